"""Annotations in COCO's format: the fingerprint of a data folder, and each image's entry in the annotation JSON.

COCO's own layout is annotations/panoptic_{train,val}2017.json, annotations/panoptic_{train,val}2017/*.png,
{train,val}2017/*.jpg, unpacked or in COCO's .zip files; any other is described by `CocoFiles`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.benchmarks import Benchmark, CocoFiles, CocoSplit, whole
from pipeline.data.folder import DataFolder, sized
from pipeline.data.instances import has_mask
from storage.errors import UserError
from storage.id_colours import MAX_SEGMENT_ID

log = logging.getLogger(__name__)

MAX_IMAGE_ID = 10**12 - 1  # twelve digits name a sample in a shard
COCO = b"COCO 2018 Panoptic Dataset"  # what the annotations that COCO publishes call themselves
COCO_SPLITS = {"train": "train2017", "val": "val2017"}  # what COCO calls them; any other name is taken as it is


@dataclass(frozen=True, kw_only=True)
class CocoSource:
    """A folder with annotations in COCO's format: `root`, its path on this machine, and `fingerprint`, the same
    everywhere (see `fingerprint_coco`)."""

    root: str
    fingerprint: str


def coco_split(files: CocoFiles | None, split: str) -> CocoSplit:
    """Where a split's files lie; None is COCO's own layout, in which the split may also be a folder such as
    "train2017". Raises UserError for a split that there is not."""
    if files:
        return files.split(split)
    folder = COCO_SPLITS.get(split, split)
    return CocoSplit(json=f"annotations/panoptic_{folder}.json", images=folder, pngs=f"annotations/panoptic_{folder}")


def coco_source(root: str | Path, files: CocoFiles | None = None) -> CocoSource:
    """The data folder `root` with its fingerprint; files that no annotation lists, and .zip files that are read in
    place, are logged. Raises UserError as `fingerprint_coco` does."""
    folder = DataFolder(Path(root))
    fingerprint, unlisted = _scan(folder, files)
    for part, names in unlisted.items():
        shown = ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
        log.info("%s: not listed in the annotation, and not used: %s", folder.root / part, shown)
    for at in dict.fromkeys(part for split in _splits(files).values() for part in (split.images, split.pngs) if part):
        if (packed := folder.packed(at)) is not None:
            log.info("%s is read in place, from %s", folder.root / at, packed.name)
    return CocoSource(root=str(root), fingerprint=fingerprint)


def fingerprint_coco(root: Path, files: CocoFiles | None = None) -> str:
    """A sha256 (64 hexadecimal digits) that identifies the folder's content without reading the images.

    It covers every byte of the annotation files of "train" and "val", names and sizes of the images and PNGs that they
    list, and how `files` reads them: no other file in the folders, and no image replaced by another of exactly the same
    size in bytes. Files in .zip files count as unpacked.

    Raises UserError when the folder, an annotation file or an image folder is missing or cannot be read.
    """
    return _scan(DataFolder(root), files)[0]


def _splits(files: CocoFiles | None) -> dict[str, CocoSplit]:
    return {split: coco_split(files, split) for split in ("train", "val")}


def _scan(folder: DataFolder, files: CocoFiles | None) -> tuple[str, dict[str, list[str]]]:
    """The fingerprint, and of the folders that hold other files their names."""
    digest, unlisted = hashlib.sha256(), {}
    try:
        if not folder.root.is_dir():
            raise UserError(f"COCO folder {folder} not found; pass --coco FOLDER or set COCO_ROOT")
        if files and (reading := _reading(files)):
            digest.update(json.dumps(reading, sort_keys=True).encode())
        splits = _splits(files)
        for at in splits.values():
            content = _read(folder, at)
            digest.update(content)
            for part, names in _listed(at, content, bare=bool(files and files.bare)).items():
                sizes = file_sizes(folder, part, deep=any("/" in name for name in names))
                found = {name: sizes[name] if name in sizes else sized(name, sizes) for name in names}
                digest.update(json.dumps(sorted((n, size) for n, size in found.items() if size is not None)).encode())
                if others := sorted(sizes.keys() - names - {at.json.removeprefix(f"{part}/")}):
                    unlisted[part] = others
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); mend its permissions, or pass another --coco FOLDER"
        ) from error
    # where both splits lie in one folder, the one's files are no strangers to the other
    shared = splits["train"].images == splits["val"].images
    return digest.hexdigest(), {} if shared else unlisted


def _reading(files: CocoFiles) -> dict[str, Any]:
    """How the annotations are read, apart from COCO's own way."""
    holdout = {"share": files.holdout.share, "seed": files.holdout.seed} if files.holdout else None
    ways = {"kind": files.kind != "panoptic" and files.kind, "bare": files.bare, "bgr": files.bgr, "holdout": holdout}
    return {name: value for name, value in ways.items() if value}


def _listed(at: CocoSplit, content: bytes, *, bare: bool) -> dict[str, set[str]]:
    """The folders of images and of PNGs, each with the file names in it that the annotation `content` lists: none, where
    that cannot be read; `read_split` explains why not."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        data = None
    found = {}
    for field, folder in {"images": at.images, "annotations": at.pngs}.items():
        if folder:
            items = data.get(field) if isinstance(data, dict) else None
            dicts = [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
            names = {name for item in dicts if isinstance(name := item.get("file_name"), str)}
            found[folder] = {last_part(name) for name in names} if bare and field == "images" else names
    return found


def last_part(name: str) -> str:
    """What follows the last slash or backslash of a file name."""
    return name.replace("\\", "/").rpartition("/")[2]


def file_sizes(folder: DataFolder, part: str, *, deep: bool = False) -> dict[str, int]:
    """Name -> bytes of each file in a part of the folder. Raises UserError when there is no such part."""
    sizes = folder.sizes(part, deep=deep)
    if sizes is None:
        raise UserError(
            f"folder {folder.root / part} not found; unpack COCO there, put COCO's .zip file beside it, "
            "or pass another --coco FOLDER"
        )
    return sizes


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One image's entry in the JSON: its `name` there, the paths of `image` and `png` below the data folder, size in
    pixels, `segments` as in `segments_info`, or of instances the annotations (see `pipeline.data.instances`).

    `others`: those of categories that the benchmark does not list, where it ignores them. `boxes`: the number of
    annotations of instances without a mask, which are not among the segments. `bgr`: the order of the PNG's
    colours. `blank`: nothing in the image is labelled, and it is not used. `problem`: the reason, found in the JSON, why
    the image cannot be used; "" if there is none. `cure`: what mends an image that cannot be used.
    """

    image_id: int
    name: str
    image: str
    png: str
    height: int
    width: int
    segments: tuple[dict[str, Any], ...]
    cure: str
    others: tuple[dict[str, Any], ...] = ()
    boxes: int = 0
    bgr: bool = False
    blank: bool = False
    problem: str = ""


def read_split(root: Path | DataFolder, split: str, benchmark: Benchmark) -> list[Entry]:
    """Every image that the split's JSON lists, in image-id order; `split` is "train", "val", another one of the
    benchmark's, or of COCO's own layout a folder name such as "train2017".

    Where a whole number is due, 12.0 and "12" are read as 12.

    Raises UserError, naming the file and the place in it, when the JSON is missing, broken, without images, lacks a
    field, lists an image twice, has a file name that leads out of its folder, or names a category differently from the
    benchmark.
    """
    folder, files = root if isinstance(root, DataFolder) else DataFolder(root), benchmark.annotations
    at = coco_split(files, split)
    path, content = folder.root / at.json, _read(folder, at)
    file = _File(path=path, cure="download it again" if COCO in content else "correct it", at=at, files=files)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise file.error(f"no valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise file.invalid("the file", data, "images and annotations", "lists")
    _check_categories(file, data, benchmark)
    images = _by_id(file, data, "images", "id")
    if not images:
        raise UserError(f"{path}: holds no images; pass a folder that has some with --coco (of evaluate: --data)")
    if files and files.kind == "instances":
        instances = _instances(file, data)
        entries = [
            _instance_entry(file, image_id, images.get(image_id), instances.get(image_id, []), benchmark)
            for image_id in sorted(images.keys() | instances.keys())
        ]
    else:
        annotations = _by_id(file, data, "annotations", "image_id")
        entries = [
            _entry(file, image_id, images.get(image_id), annotations.get(image_id), benchmark)
            for image_id in sorted(images.keys() | annotations.keys())
        ]
    if files and files.bare:
        _require_names_apart(file, entries)
    if files and files.holdout and split in ("train", "val"):
        entries = [entry for entry in entries if files.holdout.holds(entry.name, split)]
        if not entries:
            raise UserError(
                f"{path}: none of {len(images)} images falls to {split!r} by the benchmark's holdout; give it another "
                "seed or share"
            )
    return entries


def _require_names_apart(file: _File, entries: list[Entry]) -> None:
    names: dict[str, int] = {}
    for entry in entries:
        if entry.name and (other := names.setdefault(entry.name, entry.image_id)) != entry.image_id:
            raise file.error(
                f"images {other} and {entry.image_id} are both called {entry.name!r} without their folders"
            )


@dataclass(frozen=True, kw_only=True)
class _File:
    """An annotation file, and what mends a mistake in it: COCO's own can be had again, any other must be corrected."""

    path: Path
    cure: str
    at: CocoSplit
    files: CocoFiles | None

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

    def name(self, where: str, item: dict[str, Any], folder: str) -> str:
        """The `file_name` of a file in `folder`: in COCO's own layout without a path."""
        name = item.get("file_name")
        if isinstance(name, str) and self.files and self.files.bare and folder == self.at.images:
            name = last_part(name)
        parts = set(name.split("/")) if isinstance(name, str) else {""}
        deep = len(parts) > 1 and not self.files
        if not isinstance(name, str) or deep or parts & {"", ".", ".."} or set(name) & set("\\\0"):
            what = "a path below" if self.files else "a bare file name, without"
            raise self.invalid(where, item, "file_name", f"{what} the folder ({folder.rpartition('/')[2]})")
        return name


def _within(folder: str, name: str) -> str:
    return name if folder in ("", ".") else f"{folder}/{name}"


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _entry(
    file: _File, image_id: int, image: dict[str, Any] | None, annotation: dict[str, Any] | None, benchmark: Benchmark
) -> Entry:
    where = f"image {image_id}"
    name, height, width, problems = _image(file, where, image)
    png, segments = "", []
    if annotation is None:
        problems.append("has no annotation")
    else:
        of_image = f"the annotation of {where}"
        png = file.name(of_image, annotation, file.at.pngs)
        segments = [
            segment if _is_plain(segment) else _segment(file, f"{where}, entry {place} of segments_info", segment)
            for place, segment in enumerate(file.list(of_image, annotation, "segments_info"), 1)
        ]
        problems += _id_problems(segments)
    known, others = _apart(segments, benchmark)
    strange = [] if benchmark.others == "ignore" else others
    problems += [f"has category {_category(segment, 'segment')}, {_unknown_to(benchmark)}" for segment in strange]
    return Entry(
        image_id=image_id,
        name=name,
        image=_within(file.at.images, name),
        png=_within(file.at.pngs, png),
        height=height,
        width=width,
        segments=tuple(known),
        others=tuple(others),
        bgr=bool(file.files and file.files.bgr),
        blank=bool(others) and not known,
        cure=OTHERS_CURE if strange and len(problems) == len(strange) else file.cure,
        problem=problems[0] if problems else "",
    )


OTHERS_CURE = "add it to the benchmark, or make it unlabelled with --data.others ignore"


def _unknown_to(benchmark: Benchmark) -> str:
    return f"which benchmark {benchmark.name} does not know"


def _category(segment: dict[str, Any], what: str) -> str:
    return f"{segment['category_id']} ({what} {segment['id']})"


def _image(file: _File, where: str, image: dict[str, Any] | None) -> tuple[str, int, int, list[str]]:
    """File name, height, width, and what is wrong."""
    if image is None:
        return "", 0, 0, ["has an annotation but no entry in images"]
    name = file.name(where, image, file.at.images)
    height, width = (file.integer(where, image, field, 1) for field in ("height", "width"))
    return name, height, width, []


def _apart(segments: list[dict[str, Any]], benchmark: Benchmark) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The segments of the benchmark's categories, and the others."""
    known = [segment for segment in segments if segment["category_id"] in benchmark.index]
    others = [segment for segment in segments if segment["category_id"] not in benchmark.index]
    return known, others


def _instances(file: _File, data: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """Image id -> its annotations in the file's order: `id`, the place in the file counted from 1, `category_id`,
    `iscrowd`, `segmentation`, which `pipeline.data.instances` checks, and `given`, its id in the file, which nothing
    depends on: exporters repeat it."""
    found: dict[int, list[dict[str, Any]]] = {}
    for place, item in enumerate(file.list("the file", data, "annotations"), 1):
        where = f"entry {place} of annotations"
        image_id = file.integer(where, item, "image_id", 0, MAX_IMAGE_ID)
        found.setdefault(image_id, []).append(
            {
                "id": place,
                "category_id": file.integer(where, item, "category_id", 0),
                "iscrowd": file.integer(where, item, "iscrowd", 0, 1) if item.get("iscrowd") is not None else 0,
                "segmentation": item.get("segmentation"),
                "given": item.get("id"),
            }
        )
    return found


def _instance_entry(
    file: _File, image_id: int, image: dict[str, Any] | None, annotations: list[dict[str, Any]], benchmark: Benchmark
) -> Entry:
    name, height, width, problems = _image(file, f"image {image_id}", image)
    everything, others = _apart(annotations, benchmark)
    known = [one for one in everything if has_mask(one)]
    strange = [] if benchmark.others == "ignore" else others
    problems += [f"has category {_category(one, 'annotation')}, {_unknown_to(benchmark)}" for one in strange]
    return Entry(
        image_id=image_id,
        name=name,
        image=_within(file.at.images, name),
        png="",
        height=height,
        width=width,
        segments=tuple(known),
        others=tuple(others),
        boxes=len(everything) - len(known),
        blank=not known and not problems,
        cure=OTHERS_CURE if strange else file.cure,
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


def _id_problems(segments: list[dict[str, Any]]) -> list[str]:
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
    return problems


def _check_categories(file: _File, data: dict[str, Any], benchmark: Benchmark) -> None:
    """The same id must mean the same class here and in the benchmark; the file need not list categories at all. A
    benchmark that names its files was made of them, and may call its classes otherwise."""
    if benchmark.annotations:
        return
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


def _read(folder: DataFolder, at: CocoSplit) -> bytes:
    path = folder.root / at.json
    try:
        return folder.read(at.json)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} not found; unpack COCO's panoptic annotations there, "
            "or pass another folder with --coco (of evaluate: --data)"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend its permissions") from error
