"""The files of a semantic benchmark: finding them in their usual layouts, reading and writing label PNGs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.benchmarks import Benchmark, LabelFiles
from pipeline.data.images import annotation_png
from storage.errors import UserError, counted

if TYPE_CHECKING:
    import numpy as np

_SUFFIXES = {"jpeg": "jpg", "tiff": "tif"}  # what stands for the same format
IGNORED = -1
_UNKNOWN = -2


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """An image file and its label PNG; `name` is the part that both paths share, with subfolders."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True, kw_only=True)
class LabelledSplit:
    """The images of a split, in order, and the `layout` that was found: root, images, labels, and list ("": none)."""

    images: tuple[LabelledImage, ...]
    layout: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class LabelSource:
    """A folder of images with label maps: `root`, its path on this machine, and `fingerprint`, the same everywhere
    (see `fingerprint_labels`)."""

    root: str
    fingerprint: str


def label_source(root: str | Path, benchmark: Benchmark) -> LabelSource:
    """The folder `root` with its fingerprint. Raises UserError as `fingerprint_labels` does."""
    return LabelSource(root=str(root), fingerprint=fingerprint_labels(Path(root), benchmark))


def fingerprint_labels(root: Path, benchmark: Benchmark) -> str:
    """A sha256 (64 hexadecimal digits) that identifies the training and validation files without reading them.

    It covers names and sizes of images and label PNGs: a file replaced by another of exactly the same size in bytes is
    not detected.

    Raises UserError as `training_splits` does.
    """
    digest = hashlib.sha256()
    for split, images in training_splits(root, benchmark).items():
        sizes = [(item.name, _size(item.image), _size(item.label)) for item in images]
        digest.update(json.dumps([split, sizes]).encode())
    return digest.hexdigest()


def training_splits(root: Path, benchmark: Benchmark) -> dict[str, tuple[LabelledImage, ...]]:
    """The images of "train" and "val", including those of which one file is missing.

    Raises UserError when the benchmark has no location for training images, and as `find_split` does.
    """
    assert benchmark.files
    if "train" not in benchmark.files.splits:
        raise UserError(
            f"benchmark {benchmark.name} names no files to train on and is for `zs-seg evaluate`; `zs-seg new NAME "
            "--from FOLDER` writes one to train on, or add 'train' to its splits, or a holdout"
        )
    found = {split: find_split(benchmark.files, root, split, complete=False).images for split in ("train", "val")}
    images = {split: {item.image for item in items} for split, items in found.items()}
    if same := sorted(images["train"] & images["val"]):
        what = "are the same" if images["train"] == images["val"] else "share"
        raise UserError(
            f"benchmark {benchmark.name}: train and val {what} {counted(len(same), 'image')}, the first {same[0]}; put "
            '{split} into the paths of its images or lists, or give it "holdout": {"share": 0.2}'
        )
    return found


def image_ids(images: Sequence[LabelledImage]) -> list[int]:
    """One id per image of a split: its name as a number if all names are distinct numbers of at most 12 digits, as in
    COCO; else its position, counted from 1."""
    names = [item.name for item in images]
    if all(name.isascii() and name.isdecimal() and len(name) <= 12 for name in names):
        numbers = [int(name) for name in names]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(names) + 1))


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def find_split(files: LabelFiles, data: Path, split: str, *, complete: bool = True) -> LabelledSplit:
    """The split's images and label PNGs below the folder `data`; `LabelFiles` describes where they are searched.

    With `complete`, every image needs its label PNG and, without a list, every label PNG its image. Otherwise a missing
    file is returned as the path where it is expected.

    Raises UserError, naming every path searched, if images, label PNGs or the list are missing; and, with `complete`,
    naming the first missing file and their number.
    """
    held = files.holdout if split in ("train", "val") else None
    known = [*files.splits, *(["val"] if held and "val" not in files.splits else [])]
    if split not in known:
        raise UserError(f"split {split!r} is unknown; --split is one of {', '.join(known)}")
    if not data.is_dir():
        raise UserError(f"folder {data} not found; pass the data set's folder with --coco (of evaluate: --data)")
    images, labels, lists = (
        [pattern.replace("{split}", files.splits["train" if held else split]) for pattern in patterns]
        for patterns in (files.images, files.labels, files.lists)
    )
    root = next(
        (data / root for root in files.roots if any(next(_matching(data / root, p), None) for p in images)), None
    )
    if root is None:
        looked = [data / root / pattern for root in files.roots for pattern in images]
        raise UserError(
            f"no images found as {_either(looked)}; unpack the data set there, or correct --coco (of evaluate: --data)"
        )
    list_at, names = _listed(root, lists) if lists else ("", None)
    images_at, image_of = _take(root, images, names, "image", complete=complete)
    labels_at, label_of = _take(root, labels, names or sorted(image_of), "label map", complete=complete)
    bare = sorted(label_of.keys() - image_of.keys()) if names is None else []
    if bare and complete:
        raise UserError(
            f"{len(bare)} of {len(label_of)} label maps have no image, the first is {label_of[bare[0]]} "
            f"(looked for {_either([_file(root, images_at, bare[0])])}); complete the images or remove it"
        )
    found = (
        LabelledImage(
            name=name,
            image=Path(image_of[name]) if name in image_of else _file(root, images_at, name),
            label=Path(label_of[name]) if name in label_of else _file(root, labels_at, name),
        )
        for name in names or sorted([*image_of, *bare])
        if not held or held.holds(name, split)
    )
    layout = {"root": str(root), "images": images_at, "labels": labels_at, "list": list_at}
    images = tuple(found)
    if not images:
        raise UserError(
            f"{root}: no image falls to {split!r} by the benchmark's holdout; give it another seed or share"
        )
    return LabelledSplit(images=images, layout=layout)


def _listed(root: Path, lists: Sequence[str]) -> tuple[str, list[str]]:
    """The first list file that exists, and the names in it."""
    path = next((path for path in lists if (root / path).is_file()), None)
    if path is None:
        raise UserError(f"no list of the split's images found as {_either([root / p for p in lists])}; add it")
    try:
        lines = (root / path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{root / path} cannot be read as a list ({error}); write one name a line, in UTF-8") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UserError(f"{root / path} names no image; write one name a line")
    if outside := [
        name for name in names if name.startswith("/") or ".." in name.split("/") or set(name) & set("\\\0")
    ]:
        raise UserError(
            f"{root / path} names {outside[0]!r}, which is no name of an image below the folder; correct it"
        )
    if len(set(names)) < len(names):
        raise UserError(f"{root / path} names {max(names, key=names.count)!r} twice; remove one")
    return path, names


def _take(
    root: Path, patterns: Sequence[str], names: Sequence[str] | None, what: str, *, complete: bool
) -> tuple[str, dict[str, str]]:
    """The first pattern with a file for each of `names` (None: with any file), and its files by name. If there is none
    and the files need not be `complete`: the pattern with most files."""
    at, most = "", dict[str, str]()
    for pattern in patterns:
        found = _by_name(root, pattern, what)
        if found and (names is None or found.keys() >= set(names)):
            return pattern, found
        if len(found) > len(most):
            at, most = pattern, found
    if not most:
        raise UserError(f"no {what}s found as {_either([root / p for p in patterns])}; unpack the data set there")
    if not complete:
        return at, most
    missing = [name for name in names or () if name not in most]
    raise UserError(
        f"{len(missing)} of {len(names or ())} images lack their {what}, the first {missing[0]!r} "
        f"(looked for {_either([_file(root, p, missing[0]) for p in patterns])}); complete the {what}s"
    )


def _by_name(root: Path, pattern: str, what: str) -> dict[str, str]:
    """The files that match, by name. Raises UserError for two of one name, such as a.jpg and a.JPEG."""
    found: dict[str, str] = {}
    for name, path in _matching(root, pattern):
        if name in found:
            raise UserError(f"{found[name]} and {path} are two {what}s of one name; remove or rename one")
        found[name] = path
    return found


def _matching(root: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """(what `*` stands for, path) of each file below `root` that matches, without hidden files and folders such as
    those of macOS.
    A pattern's suffix stands for all spellings of it: ".jpg" also for ".JPG" and ".jpeg".
    Paths are strings, not Path objects, for speed: COCO has 120,000 of them."""
    head, tail = pattern.split("*")
    tail, suffix = _suffix(tail)
    folder, _, prefix = head.rpartition("/")
    top = str(root / folder)
    for path, folders, files in os.walk(top):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        below = "" if path == top else Path(path).relative_to(top).as_posix() + "/"
        for file in files:
            name, kind = _suffix(below + file)
            if kind == suffix and name.startswith(prefix) and name.endswith(tail) and not file.startswith("."):
                yield name[len(prefix) : len(name) - len(tail)], os.path.join(path, file)


def _suffix(name: str) -> tuple[str, str]:
    """("a.b", "jpg") of "a.b.JPEG": what is before the last dot, and what is behind it, spelled in one way."""
    stem, _, suffix = name.rpartition(".")
    suffix = suffix.lower()
    return stem, _SUFFIXES.get(suffix, suffix)


def _file(root: Path, pattern: str, name: str) -> Path:
    return root / pattern.replace("*", name)


def _either(paths: Sequence[Path]) -> str:
    return " or ".join(str(path) for path in dict.fromkeys(paths))


def read_labels(path: Path, benchmark: Benchmark) -> np.ndarray:
    """The label PNG at `path`, decoded by `decode_labels`. Raises UserError, naming the file."""
    try:
        return decode_labels(path.read_bytes(), benchmark)
    except OSError as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path} {reason}; complete the label maps") from error
    except UserError as error:
        raise UserError(f"{path} {error}; use the label maps that belong to the benchmark") from error


def decode_labels(png: bytes, benchmark: Benchmark) -> np.ndarray:
    """A label PNG as class indices (H, W) int32, -1 where ignored. The value of a paletted pixel is its palette index.

    Raises UserError, with a message that continues the file's name, if the PNG is damaged, in colours, grey with fewer
    than 8 bits, or holds a value that is neither a category id nor ignored, unless the benchmark ignores others.
    """
    import numpy as np

    assert benchmark.files
    values = pixel_values(png)
    table = _table(benchmark.index, benchmark.files.ignored, int(values.max()) + 1)
    classes = table[values]
    if benchmark.others == "ignore":
        classes[classes == _UNKNOWN] = IGNORED
    if (classes == _UNKNOWN).any():
        strange = np.unique(values[classes == _UNKNOWN])
        raise UserError(
            f"has pixels of value {strange[0]} ({int((values == strange[0]).sum())} of them), "
            f"which is neither a class of benchmark {benchmark.name} nor ignored (--data.others ignore ignores it)"
        )
    return classes


def _table(index: Mapping[int, int], ignored: Sequence[int], size: int) -> np.ndarray:
    """(n,) int32, n >= size: value -> class index."""
    import numpy as np

    table = np.full(max(size, *index, *ignored) + 1, _UNKNOWN, np.int32)
    table[list(index)] = list(index.values())
    table[list(ignored)] = IGNORED
    return table


def pixel_values(png: bytes) -> np.ndarray:
    """The values (H, W) int64 of a label PNG as stored. Raises UserError as `decode_labels`, for a file that is none."""
    import numpy as np

    image = annotation_png(png)
    mode, bits = image.mode, png[24]  # the header's bit depth
    if mode not in ("1", "L", "P", "I", "I;16"):
        raise UserError(f"is a PNG in colours (mode {mode}), and a label map is grey or paletted")
    if mode == "L" and bits < 8:  # PIL would stretch its values to 0..255
        raise UserError(f"is a grey PNG of {bits} bits, and a label map has 8 or more")
    return np.array(image).astype(np.int64)


def write_labels(path: Path, classes: np.ndarray, benchmark: Benchmark) -> None:
    """Write class indices (H, W) as a grey PNG of category ids: 8 bits deep, or 16 if an id exceeds 255."""
    import numpy as np
    from PIL import Image

    ids = np.array([category.id for category in benchmark.categories])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids[classes].astype(np.uint8 if ids.max() < 256 else np.uint16)).save(path)
