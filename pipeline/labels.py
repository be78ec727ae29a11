"""The files of a semantic benchmark: finding them in the layouts in which people have them, reading and writing label PNGs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.benchmarks import Benchmark, LabelFiles

if TYPE_CHECKING:
    import numpy as np

IGNORED = -1
_UNKNOWN = -2


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """An image file and its label PNG; `name` is what both have in common, with subfolders."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True, kw_only=True)
class LabelledSplit:
    """The images of a split, in order, and the `layout` they were found in: root, images, labels, and list ("": none)."""

    images: tuple[LabelledImage, ...]
    layout: dict[str, str]


def find_split(files: LabelFiles, data: Path, split: str) -> LabelledSplit:
    """The split's images and label PNGs below the folder `data`; see `LabelFiles` for where they are looked for.

    Raises ValueError that names every path looked for where images, label PNGs or the list are missing, and the first
    file and how many where some images lack their label PNG, or the reverse without a list.
    """
    if split not in files.splits:
        raise ValueError(f"split {split!r} is unknown; --split is one of {', '.join(files.splits)}")
    if not data.is_dir():
        raise ValueError(f"--data {data} not found; pass the data set's folder")
    images, labels, lists = (
        [pattern.replace("{split}", files.splits[split]) for pattern in patterns]
        for patterns in (files.images, files.labels, files.lists)
    )
    root = next((data / root for root in files.roots if any(_matching(data / root, p) for p in images)), None)
    if root is None:
        looked = [data / root / pattern for root in files.roots for pattern in images]
        raise ValueError(f"no images found as {_either(looked)}; unpack the data set there, or correct --data")
    list_at, names = _listed(root, lists) if lists else ("", None)
    images_at, image_of = _take(root, images, names, "image")
    labels_at, label_of = _take(root, labels, names or sorted(image_of), "label map")
    if names is None and (bare := sorted(label_of.keys() - image_of.keys())):
        raise ValueError(
            f"{len(bare)} of {len(label_of)} label maps have no image, the first is {label_of[bare[0]]} "
            f"(looked for {_either([_file(root, images_at, bare[0])])}); complete the images or remove it"
        )
    found = (LabelledImage(name=name, image=image_of[name], label=label_of[name]) for name in names or sorted(image_of))
    layout = {"root": str(root), "images": images_at, "labels": labels_at, "list": list_at}
    return LabelledSplit(images=tuple(found), layout=layout)


def _listed(root: Path, lists: Sequence[str]) -> tuple[str, list[str]]:
    """The first list file that is there, and the names in it."""
    path = next((path for path in lists if (root / path).is_file()), None)
    if path is None:
        raise ValueError(f"no list of the split's images found as {_either([root / p for p in lists])}; add it")
    names = [line.strip() for line in (root / path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{root / path} names no image; re-download it")
    if len(set(names)) < len(names):
        raise ValueError(f"{root / path} names {max(names, key=names.count)!r} twice; re-download it")
    return path, names


def _take(root: Path, patterns: Sequence[str], names: Sequence[str] | None, what: str) -> tuple[str, dict[str, Path]]:
    """The first pattern that has a file for each of `names` (None: for anything), and its files by name."""
    most: dict[str, Path] = {}
    for pattern in patterns:
        found = _matching(root, pattern)
        if found and (names is None or found.keys() >= set(names)):
            return pattern, found
        most = max(most, found, key=len)
    if not most:
        raise ValueError(f"no {what}s found as {_either([root / p for p in patterns])}; unpack the data set there")
    missing = [name for name in names or () if name not in most]
    raise ValueError(
        f"{len(missing)} of {len(names or ())} images lack their {what}, the first {missing[0]!r} "
        f"(looked for {_either([_file(root, p, missing[0]) for p in patterns])}); complete the {what}s"
    )


def _matching(root: Path, pattern: str) -> dict[str, Path]:
    """Files below `root` that match, by what `*` stands for; hidden ones, such as macOS leaves them, left out."""
    head, tail = pattern.split("*")
    folder, _, prefix = head.rpartition("/")
    found = {}
    for path in sorted((root / folder).rglob("*")):
        name = path.relative_to(root / folder).as_posix()
        if name.startswith(prefix) and name.endswith(tail) and not path.name.startswith(".") and path.is_file():
            found[name[len(prefix) : len(name) - len(tail)]] = path
    return found


def _file(root: Path, pattern: str, name: str) -> Path:
    return root / pattern.replace("*", name)


def _either(paths: Sequence[Path]) -> str:
    return " or ".join(str(path) for path in dict.fromkeys(paths))


def read_labels(path: Path, benchmark: Benchmark) -> np.ndarray:
    """A label PNG as class indices (H, W) int32, -1 where ignored. Of a paletted PNG the palette's index is the value.

    Raises ValueError that names the file when it is missing, damaged, in colours, or holds a value that is neither a
    category id nor ignored.
    """
    import numpy as np

    assert benchmark.files
    values = _read_values(path)
    table = _table(benchmark.index, benchmark.files.ignored, int(values.max()) + 1)
    classes = table[values]
    if (classes == _UNKNOWN).any():
        strange = np.unique(values[classes == _UNKNOWN])
        raise ValueError(
            f"{path} has pixels of value {strange[0]} ({int((values == strange[0]).sum())} of them), which is neither a class of "
            f"benchmark {benchmark.name} nor ignored; use the label maps that belong to it"
        )
    return classes


def _table(index: Mapping[int, int], ignored: Sequence[int], size: int) -> np.ndarray:
    """(n,) int32, n >= size: value -> class index."""
    import numpy as np

    table = np.full(max(size, *index, *ignored) + 1, _UNKNOWN, np.int32)
    table[list(index)] = list(index.values())
    table[list(ignored)] = IGNORED
    return table


def _read_values(path: Path) -> np.ndarray:
    """(H, W) integers as stored."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            mode, bits = image.mode, path.read_bytes()[24]  # the header's bit depth
            values = np.array(image)
    except FileNotFoundError as error:
        raise ValueError(f"{path} not found; complete the label maps") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a PNG ({reason}); re-download it") from error
    if mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(f"{path} is a PNG in colours (mode {mode}); a label map must be grey or paletted, convert it")
    if mode == "L" and bits < 8:  # PIL would stretch its values to 0..255
        raise ValueError(f"{path} is a grey PNG of {bits} bits; save it with 8")
    return values.astype(np.int64)


def write_labels(path: Path, classes: np.ndarray, benchmark: Benchmark) -> None:
    """Class indices (H, W) as a grey PNG of the benchmark's own values, 16 bits deep where 8 do not do."""
    import numpy as np
    from PIL import Image

    ids = np.array([category.id for category in benchmark.categories])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids[classes].astype(np.uint8 if ids.max() < 256 else np.uint16)).save(path)
