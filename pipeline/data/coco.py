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

from pipeline.data.benchmarks import Benchmark, whole
from storage.errors import UserError
from storage.id_colours import MAX_SEGMENT_ID

log = logging.getLogger(__name__)

MAX_IMAGE_ID = 10**12 - 1  # twelve digits name a sample in a shard
COCO = b"COCO 2018 Panoptic Dataset"  # what the annotations that COCO publishes call themselves


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

    `problem`: the reason, found in the JSON, why the image cannot be used; "" if there is none. `cure`: what mends an
    image that cannot be used.
    """

    image_id: int
    image: str
    png: str
    height: int
    width: int
    segments: tuple[dict[str, Any], ...]
    cure: str
    problem: str = ""


def read_split(root: Path, split: str, benchmark: Benchmark) -> list[Entry]:
    """Every image that the split's JSON lists, in image-id order; `split` is a folder name such as "train2017".

    Where a whole number is due, 12.0 and "12" are read as 12.

    Raises UserError, naming the file and the place in it, when the JSON is missing, broken, without images, lacks a
    field, lists an image twice, has a file name with a path in it, or names a category differently from the benchmark.
    """
    path = _annotations(root, split)
    content = _read(path)
    file = _File(path=path, cure="download it again" if COCO in content else "correct it")
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise file.error(f"no valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise file.invalid("the file", data, "images and annotations", "lists")
    _check_categories(file, data, benchmark)
    images = _by_id(file, data, "images", "id")
    annotations = _by_id(file, data, "annotations", "image_id")
    if not images:
        raise UserError(f"{path}: holds no images; pass a folder that has some with --coco (of evaluate: --data)")
    return [
        _entry(file, image_id, images.get(image_id), annotations.get(image_id), benchmark)
        for image_id in sorted(images.keys() | annotations.keys())
    ]


@dataclass(frozen=True, kw_only=True)
class _File:
    """An annotation file, and what mends a mistake in it: COCO's own can be had again, any other must be corrected."""

    path: Path
    cure: str

    def error(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}; {self.cure}")

    def invalid(self, where: str, item: Any, field: str, valid: str) -> UserError:
        """The error for the `field` of `item`, the JSON object at `where`, whose value is missing or not `valid`."""
        if not isinstance(item, dict):
            return self.error(f"{where} is {_shown(item)}, which must be an object with {field}")
        if field not in item:
            return self.error(f"{where} lacks {field}, which must be {valid}")
        return self.error(f"{where} has {field} {_shown(item[field])}, which must be {valid}")

    def integer(self, where: str, item: Any, field: str, least: int, most: int | None = None) -> int:
        number = whole(item.get(field)) if isinstance(item, dict) else None
        if number is None or number < least or (most is not None and number > most):
            valid = f"a whole number of {least} or more" if most is None else f"a whole number from {least} to {most}"
            raise self.invalid(where, item, field, "0 or 1" if (least, most) == (0, 1) else valid)
        return number

    def list(self, where: str, item: Any, field: str) -> list[Any]:
        value = item.get(field) if isinstance(item, dict) else None
        if not isinstance(value, list):
            raise self.invalid(where, item, field, "a list")
        return value

    def name(self, where: str, item: dict[str, Any]) -> str:
        name = item.get("file_name")
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
            folder = self.path.stem.removeprefix("panoptic_")
            raise self.invalid(where, item, "file_name", f"a bare file name, without the folder ({folder})")
        return name


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _entry(
    file: _File, image_id: int, image: dict[str, Any] | None, annotation: dict[str, Any] | None, benchmark: Benchmark
) -> Entry:
    where = f"image {image_id}"
    problems: list[str] = []
    name, height, width, png, segments = "", 0, 0, "", []
    if image is None:
        problems.append("has an annotation but no entry in images")
    else:
        name = file.name(where, image)
        height, width = (file.integer(where, image, field, 1) for field in ("height", "width"))
    if annotation is None:
        problems.append("has no annotation")
    else:
        of_image = f"the annotation of {where}"
        png = file.name(of_image, annotation)
        segments = [
            segment if _is_plain(segment) else _segment(file, f"{where}, entry {place} of segments_info", segment)
            for place, segment in enumerate(file.list(of_image, annotation, "segments_info"), 1)
        ]
        problems += _segment_problems(segments, benchmark)
    return Entry(
        image_id=image_id,
        image=name,
        png=png,
        height=height,
        width=width,
        segments=tuple(segments),
        cure=file.cure,
        problem=problems[0] if problems else "",
    )


def _is_plain(segment: Any) -> bool:
    """Whether all its numbers are valid integers, as in COCO's own files, whose 1.3 million segments need no more."""
    try:
        number, category, area, iscrowd = segment["id"], segment["category_id"], segment["area"], segment["iscrowd"]
    except (KeyError, TypeError):
        return False
    plain = type(number) is type(category) is type(area) is type(iscrowd) is int
    return plain and number >= 0 <= category and area >= 0 <= iscrowd <= 1


def _segment(file: _File, where: str, segment: Any) -> dict[str, Any]:
    """The JSON's entry, its numbers made integers in place."""
    number = file.integer(where, segment, "id", 0)
    where = f"{where} (segment {number})"
    segment["id"] = number
    for field, most in (("category_id", None), ("area", None), ("iscrowd", 1)):
        segment[field] = file.integer(where, segment, field, 0, most)
    return segment


def _segment_problems(segments: list[dict[str, Any]], benchmark: Benchmark) -> list[str]:
    """What is wrong with an image's segments, as texts that continue "image 42 "."""
    problems, ids = [], [segment["id"] for segment in segments]
    if len(set(ids)) < len(ids):
        problems.append(f"has segment {next(i for i in ids if ids.count(i) > 1)} twice")
    if 0 in ids:
        problems.append("has a segment of id 0, which marks the pixels of no segment; ids are 1 or more")
    if ids and max(ids) > MAX_SEGMENT_ID:
        problems.append(
            f"has segment {max(ids)}, but the colours of a panoptic PNG hold ids up to {MAX_SEGMENT_ID} (2^24 - 1)"
        )
    problems += [
        f"has category {segment['category_id']} (segment {segment['id']}), "
        f"which benchmark {benchmark.name} does not know"
        for segment in segments
        if segment["category_id"] not in benchmark.index
    ]
    return problems


def _check_categories(file: _File, data: dict[str, Any], benchmark: Benchmark) -> None:
    """The same id must mean the same class here and in the benchmark; the file need not list categories at all."""
    for place, category in enumerate(file.list("the file", data, "categories") if "categories" in data else [], 1):
        position = benchmark.index.get(file.integer(f"entry {place} of categories", category, "id", 0))
        if position is None:
            continue
        known = benchmark.categories[position]
        where = f"category {known.id}"
        name = known.name.partition(",")[0].strip()  # synonyms may follow
        isthing = bool(file.integer(where, category, "isthing", 0, 1)) if "isthing" in category else known.isthing
        found = (category.get("name", name), isthing)
        if found != (name, known.isthing):
            raise UserError(
                f"{file.path}: {where} is {found[0]!r} (isthing {found[1]:d}), but {name!r} "
                f"(isthing {known.isthing:d}) in benchmark {benchmark.name}; make them agree, or choose the benchmark of these data"
            )


def _by_id(file: _File, data: dict[str, Any], field: str, id_field: str) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for place, item in enumerate(file.list("the file", data, field), 1):
        image_id = file.integer(f"entry {place} of {field}", item, id_field, 0, MAX_IMAGE_ID)
        if image_id in found:
            raise file.error(f"image {image_id} is listed twice in {field}")
        found[image_id] = item
    return found


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
