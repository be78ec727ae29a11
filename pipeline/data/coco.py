"""A folder in COCO's panoptic layout: its fingerprint, and each image's entry in the annotation JSON.

annotations/panoptic_{train,val}2017.json   annotations/panoptic_{train,val}2017/*.png   {train,val}2017/*.jpg
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data.benchmarks import Benchmark
from storage.errors import UserError

log = logging.getLogger(__name__)

MAX_IMAGE_ID = 10**12 - 1  # twelve digits name a sample in a shard


@dataclass(frozen=True, kw_only=True)
class CocoSource:
    """A COCO folder: `root`, its path on this machine, and `fingerprint`, the same everywhere (see `fingerprint_coco`).

    `train` and `val` are the image folders below `root`; the annotations are `annotations/panoptic_<train>.json`, and
    the like for `val`.
    """

    root: str
    fingerprint: str
    train: str = "train2017"
    val: str = "val2017"


def coco_source(root: str | Path) -> CocoSource:
    """The COCO 2017 folder `root` with its fingerprint; files that no annotation lists are logged. Raises UserError as
    `fingerprint_coco` does."""
    fields = CocoSource(root=str(root), fingerprint="")
    fingerprint, unlisted = _scan(Path(root), fields.train, fields.val)
    for folder, names in unlisted.items():
        shown = ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
        log.info("%s: not listed in the annotation, and not used: %s", folder, shown)
    return replace(fields, fingerprint=fingerprint)


def fingerprint_coco(root: Path, *, train: str = "train2017", val: str = "val2017") -> str:
    """A sha256 (64 hexadecimal digits) that identifies the folder's content without reading the images.

    It covers every byte of the two annotation files, and names and sizes of the images and PNGs that they list: no
    other file in the folders, and no image replaced by another of exactly the same size in bytes.

    Raises UserError when the folder, an annotation file or an image folder is missing or cannot be read.
    """
    return _scan(Path(root), train, val)[0]


def _scan(root: Path, *splits: str) -> tuple[str, dict[Path, list[str]]]:
    """The fingerprint, and of the folders that hold other files their names. Subfolders are not looked at."""
    digest, unlisted = hashlib.sha256(), {}
    try:
        if not root.is_dir():
            raise UserError(f"COCO folder {root} not found; pass --coco FOLDER or set COCO_ROOT")
        for split in splits:
            content = _read(_annotations(root, split))
            digest.update(content)
            for folder, listed in _listed(root, split, content).items():
                sizes = file_sizes(folder)
                digest.update(json.dumps(sorted(item for item in sizes.items() if item[0] in listed)).encode())
                if others := sorted(sizes.keys() - listed):
                    unlisted[folder] = others
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); mend its permissions, or pass another --coco FOLDER"
        ) from error
    return digest.hexdigest(), unlisted


def _listed(root: Path, split: str, content: bytes) -> dict[Path, set[str]]:
    """The folders of images and of PNGs, each with the file names in it that the annotation `content` lists: none, where
    that cannot be read; `read_split` explains why not."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        data = None
    found = {}
    folders = {"images": root / split, "annotations": _annotations(root, split).with_suffix("")}
    for field, folder in folders.items():
        items = data.get(field) if isinstance(data, dict) else None
        names = [item.get("file_name") for item in items if isinstance(item, dict)] if isinstance(items, list) else []
        found[folder] = {name for name in names if isinstance(name, str)}
    return found


def file_sizes(folder: Path) -> dict[str, int]:
    """Name -> bytes of each file in a folder. Raises UserError when there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"folder {folder} not found; unpack COCO there, or pass another --coco FOLDER")
    with os.scandir(folder) as files:
        return {file.name: file.stat().st_size for file in files if file.is_file()}


def _annotations(root: Path, split: str) -> Path:
    return root / "annotations" / f"panoptic_{split}.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One image's entry in the JSON: file names, size in pixels, `segments` as in `segments_info`.

    `problem`: the reason, found in the JSON, why the image cannot be used; "" if there is none.
    """

    image_id: int
    image: str
    png: str
    height: int
    width: int
    segments: tuple[dict[str, Any], ...]
    problem: str = ""


def read_split(root: Path, split: str, benchmark: Benchmark) -> list[Entry]:
    """Every image that the split's JSON lists, in image-id order; `split` is a folder name such as "train2017".

    Raises UserError, naming the file and the place in it, when the JSON is missing, broken, without images, lacks a
    field, lists an image twice, has a file name with a path in it, or names a category differently from the benchmark.
    """
    path = _annotations(root, split)
    try:
        data = json.loads(_read(path))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: no valid JSON ({error}); re-download it") from error
    if not isinstance(data, dict):
        raise _malformed(path, "the file", "an object with images and annotations")
    _check_categories(path, data, benchmark)
    images = _by_id(path, data, "images", "id")
    annotations = _by_id(path, data, "annotations", "image_id")
    if not images:
        raise UserError(f"{path}: holds no images; pass a folder that has some with --coco (of evaluate: --data)")
    return [
        _entry(path, image_id, images.get(image_id), annotations.get(image_id), benchmark)
        for image_id in sorted(images.keys() | annotations.keys())
    ]


def _entry(
    path: Path, image_id: int, image: dict[str, Any] | None, annotation: dict[str, Any] | None, benchmark: Benchmark
) -> Entry:
    where = f"image {image_id}"
    problems: list[str] = []
    name, height, width, png, segments = "", 0, 0, "", []
    if image is None:
        problems.append("has an annotation but no entry in images")
    else:
        name = _file_name(path, where, image)
        height, width = (_integer(path, where, image, field, 1) for field in ("height", "width"))
    if annotation is None:
        problems.append("has no annotation")
    else:
        png = _file_name(path, where, annotation)
        segments = _list(path, f"the annotation of {where}", annotation, "segments_info")
        for segment in segments:
            for field in ("id", "category_id", "area", "iscrowd"):
                _integer(path, f"a segment of {where}", segment, field, 0)
        ids = [segment["id"] for segment in segments]
        if len(set(ids)) < len(ids):
            problems.append(f"has segment {next(i for i in ids if ids.count(i) > 1)} twice")
        for segment in segments:
            if segment["category_id"] not in benchmark.index:
                problems.append(
                    f"has category {segment['category_id']}, which benchmark {benchmark.name} does not know"
                )
    return Entry(
        image_id=image_id,
        image=name,
        png=png,
        height=height,
        width=width,
        segments=tuple(segments),
        problem=problems[0] if problems else "",
    )


def _check_categories(path: Path, data: dict[str, Any], benchmark: Benchmark) -> None:
    """The same id must mean the same class here and in the benchmark; the file need not list categories at all."""
    for category in _list(path, "the file", data, "categories") if "categories" in data else []:
        position = benchmark.index.get(_integer(path, "a category", category, "id", 0))
        if position is None:
            continue
        known = benchmark.categories[position]
        name = known.name.partition(",")[0].strip()  # synonyms may follow
        found = (category.get("name", name), bool(category.get("isthing", known.isthing)))
        if found != (name, known.isthing):
            raise UserError(
                f"{path}: category {known.id} is {found[0]!r} (isthing {found[1]:d}), but {name!r} "
                f"(isthing {known.isthing:d}) in benchmark {benchmark.name}; choose the benchmark that fits the data"
            )


def _by_id(path: Path, data: dict[str, Any], field: str, id_field: str) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for item in _list(path, "the file", data, field):
        image_id = _integer(path, f"an entry of {field}", item, id_field, 0)
        if image_id > MAX_IMAGE_ID:
            raise UserError(f"{path}: image id {image_id} has more than 12 digits; renumber the images")
        if image_id in found:
            raise UserError(f"{path}: image {image_id} is listed twice in {field}; remove one or re-download the file")
        found[image_id] = item
    return found


def _file_name(path: Path, where: str, item: dict[str, Any]) -> str:
    name = item.get("file_name")
    if not isinstance(name, str):
        raise _malformed(path, where, "file_name")
    if name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise UserError(
            f"{path}: {where} has file_name {name!r}; it must be a bare file name, correct or re-download it"
        )
    return name


def _integer(path: Path, where: str, item: Any, field: str, least: int) -> int:
    value = item.get(field) if isinstance(item, dict) else None
    if not isinstance(value, int) or value < least:
        raise _malformed(path, where, field)
    return value


def _list(path: Path, where: str, item: Any, field: str) -> list[Any]:
    value = item.get(field) if isinstance(item, dict) else None
    if not isinstance(value, list):
        raise _malformed(path, where, field)
    return value


def _malformed(path: Path, where: str, field: str) -> UserError:
    return UserError(f"{path}: {where} lacks a valid {field}; re-download the panoptic annotations")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"{path} not found; unpack COCO's panoptic annotations there, "
            "or pass another folder with --coco (of evaluate: --data)"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend its permissions") from error
