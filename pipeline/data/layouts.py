"""Which of the layouts in which people have data a folder has: `zs-seg new` makes a benchmark of what is found here.

COCO's panoptic and instance annotations (also as CVAT, Roboflow and Label Studio export them), COCO-Stuff, VOC, ADE, and
plain folders of images and label PNGs.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.data.benchmarks import (
    Annotations,
    Category,
    CocoFiles,
    CocoSplit,
    Holdout,
    LabelFiles,
    load_benchmark,
    whole,
)
from pipeline.data.coco import last_part
from pipeline.data.folder import DataFolder
from pipeline.data.images import SUFFIXES
from pipeline.data.label_maps import find_split
from storage.errors import UserError

Kind = Literal["panoptic", "instances", "labels"]
DEPTH = 4  # folders below the data folder in which annotations are searched
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
IMAGES = ("images", "image", "imgs", "img", "photos", "jpegimages", "leftimg8bit")
LABELS = ("masks", "mask", "labels", "label", "annotations", "annotation", "gt", "segmentations", "segmentation",
          "segmentationclass", "labelmaps", "maps", "gtfine")  # fmt: skip
ENDINGS = ("", "_mask", "_label", "_labels", "_gt", "_seg", "_labelIds", "-mask", "_L")
NAMES = ("names.txt", "classes.txt", "class_names.txt", "labels.txt", "names.json", "classes.json")
# What COCO publishes besides, in large files.
NO_MASKS = ("captions_", "person_keypoints_", "image_info_", "stuff_")
# Names of what is no class, in the lists that come with label maps.
UNLABELLED = ("background", "_background_", "unlabeled", "unlabelled", "unlabel", "void", "ignore", "ignored", "__ignore__",
              "unknown", "n/a")  # fmt: skip
# Built-in benchmarks, whose layouts are recognised, with the folder names that they are recognised by.
KNOWN = {
    "voc20": ("VOC", "ImageSets/Segmentation"),
    "ade150": ("ADE", "images/training"),
    "coco-stuff-zss": ("COCO-Stuff", ""),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What was found: `root`, the data folder, `title` in words, the `files`, and the `categories` in id order.

    `splits`: those that can be read. `counting`: the names of label maps came without values and are counted from 0 so
    far (`counted_from_one`). `notes` are lines on what was chosen where there was a choice.
    """

    root: Path
    kind: Kind
    title: str
    files: CocoFiles | LabelFiles
    categories: tuple[Category, ...]
    notes: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train", "val")
    counting: bool = False


def recognise(at: Path, *, kind: str = "", names: Path | None = None, holdout: Holdout) -> Layout:
    """The layout of the folder `at`, or of the annotation file `at`.

    Args:
        kind: where a folder has several kinds of annotations, the one to take.
        names: the file with the names of label maps' values.
        holdout: how images are split where the folder has no validation images.

    Raises UserError where nothing is found, with what was looked for, and for files that are broken or at odds.
    """
    if kind and kind not in get_args(Kind):
        raise UserError(f"--kind {kind!r} is unknown; use one of {', '.join(get_args(Kind))}")
    if at.suffix.lower() == ".zip":
        raise UserError(f"{at} is a .zip file; pass its folder, where COCO's own are read in place, or unpack it")
    if not at.exists():
        raise UserError(f"--from {at} not found; pass the folder of the data, or an annotation file")
    if at.is_file():
        root = at.parent.parent if at.parent.name.lower() in ("annotations", "annotation", "labels") else at.parent
        jsons = [at.relative_to(root).as_posix()]
    else:
        root, jsons = at, []
    folder = DataFolder(root)
    annotated: dict[Annotations, list[_Json]] = {}
    if kind != "labels":
        # a .zip beside what was unpacked of it counts for nothing
        annotated = _annotations(folder, jsons or _jsons(root)) or _annotations(
            folder, _with_masks(folder.names(".json"))
        )
    for one in get_args(Annotations):
        if one in annotated and kind in ("", one):
            others = [other for other in annotated if other != one] if not kind else []
            notes = tuple(f"also found: {other} annotations, taken with --kind {other}" for other in others)
            return _annotated(folder, one, annotated[one], holdout, notes)
    if kind in ("", "labels") and not at.is_file() and (found := _labelled(root, names, holdout)):
        return found
    looked = "no annotation JSON in COCO's format with segments or polygons (at most 4 folders deep), and no folder of "
    looked += f"images ({', '.join(IMAGES[:4])}, ...) beside one of label PNGs ({', '.join(LABELS[:5])}, ...)"
    raise UserError(f"{at}: {looked} was found{f' for --kind {kind}' if kind else ''}; see pipeline/data/README.md")


# --------------------------------------------------------------------------------------------- annotations in JSON


@dataclass(frozen=True, kw_only=True)
class _Json:
    """An annotation file: its path below the data folder and its content, reduced to what tells where files lie."""

    path: str
    split: str
    images: tuple[str, ...]
    pngs: tuple[str, ...]
    categories: tuple[tuple[int, str, int | None], ...] = field(default=())


def _jsons(root: Path) -> list[str]:
    found = [
        Path(path, name).relative_to(root).as_posix()
        for path, _, files in _walk(root)
        for name in files
        if name.lower().endswith(".json")
    ]
    return _with_masks(found)


def _with_masks(paths: Sequence[str]) -> list[str]:
    return sorted(path for path in paths if not path.rpartition("/")[2].startswith(NO_MASKS))


def _walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for path, folders, files in os.walk(root):
        deep = len(Path(path).relative_to(root).parts)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if deep < DEPTH else []
        yield path, folders, sorted(file for file in files if not file.startswith("."))


def _annotations(folder: DataFolder, paths: Sequence[str]) -> dict[Annotations, list[_Json]]:
    """The annotation files of each kind. Files that are no annotations are left aside."""
    found: dict[Annotations, list[_Json]] = {}
    for path in paths:
        try:
            data = json.loads(folder.read(path))
        except (ValueError, RecursionError, OSError) as error:
            if len(paths) == 1:
                raise UserError(f"{folder.root / path}: no valid JSON ({error}); correct it") from error
            continue
        if isinstance(data, dict) and (kind := _kind(data)):
            found.setdefault(kind, []).append(_reduced(path, data))
    return found


def _kind(data: dict[str, Any]) -> Annotations | None:
    images, annotations = data.get("images"), data.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list) or not images:
        return None
    some = [item for item in annotations[:1000] if isinstance(item, dict)]
    if any("segments_info" in item for item in some):
        return "panoptic"
    if any("keypoints" in item or "caption" in item for item in some):
        return None
    return "instances" if any("segmentation" in item or "bbox" in item for item in some) else None


def _reduced(path: str, data: dict[str, Any]) -> _Json:
    def names(field: str) -> tuple[str, ...]:
        return tuple(str(item.get("file_name", "")) for item in data[field] if isinstance(item, dict))

    categories = []
    for place, item in enumerate(data.get("categories") or [], 1):
        number = whole(item.get("id")) if isinstance(item, dict) else None
        if number is None or number < 0 or not str(item.get("name", "")).strip():
            raise UserError(f"{path}: entry {place} of categories has no whole id and name; correct it")
        thing = whole(item["isthing"]) if "isthing" in item else None
        categories.append((number, str(item["name"]).strip(), thing))
    return _Json(
        path=path,
        split=_split_in(path),
        images=names("images"),
        pngs=names("annotations"),
        categories=tuple(categories),
    )


def _split_in(path: str) -> str:
    """The split that a path names, in its last part first: "instances_train2017.json", "valid/_annotations.coco.json";
    "" for none."""
    for part in reversed(path.split("/")):
        for word in re.findall(r"[a-z]+", part.lower()):
            if word in _SPLIT_OF:
                return _SPLIT_OF[word]
    return ""


def _annotated(
    folder: DataFolder, kind: Annotations, found: list[_Json], holdout: Holdout, notes: tuple[str, ...]
) -> Layout:
    of_split: dict[str, _Json] = {}
    for one in found:
        split = one.split or "train"
        if split in of_split:
            raise UserError(
                f"{folder}: {of_split[split].path} and {one.path} both look like {kind} annotations of {split!r}; pass "
                "one as --from FILE.json, or put the splits' names (train, val) into theirs"
            )
        of_split[split] = one
    if "train" not in of_split:
        # a set of one split, whatever it is called
        of_split = {"train": next(iter(of_split.values())), **dict(list(of_split.items())[1:])}
    categories = _categories(list(of_split.values()))
    placed = {split: _placed(folder, one, kind) for split, one in of_split.items()}
    bare = {bare for _, bare in placed.values()}
    if len(bare) > 1:
        raise UserError(f"{folder}: file_name leads to the images in one split and not in another; correct it")
    split_by_seed = "val" not in of_split
    files = CocoFiles(
        kind=kind,
        splits={split: at for split, (at, _) in placed.items()},
        bare=bare.pop(),
        holdout=holdout if split_by_seed else None,
    )
    what = "COCO panoptic" if kind == "panoptic" else "COCO instances"
    jsons = ", ".join(one.path for one in of_split.values())
    splits = tuple(dict.fromkeys(["train", "val", *of_split]))
    return Layout(
        root=folder.root, kind=kind, title=f"{what} ({jsons})", files=files, categories=categories, notes=notes,
        splits=splits,
    )  # fmt: skip


def _categories(found: list[_Json]) -> tuple[Category, ...]:
    """The categories of all files in id order; things, where a file does not tell."""
    known: dict[int, tuple[str, int | None, str]] = {}
    for one in found:
        for number, name, thing in one.categories:
            if (other := known.setdefault(number, (name, thing, one.path)))[0] != name:
                raise UserError(
                    f"category {number} is {other[0]!r} in {other[2]} and {name!r} in {one.path}; give one class one id"
                )
    if not known:
        raise UserError(f"{found[0].path}: lists no categories; add them with id and name")
    return tuple(
        Category(id=number, name=name, isthing=thing is None or bool(thing))
        for number, (name, thing, _) in sorted(known.items())
    )


def _placed(folder: DataFolder, one: _Json, kind: Annotations) -> tuple[CocoSplit, bool]:
    """Where the images and PNGs of an annotation file lie, and whether only the last part of `file_name` counts."""
    parent, stem = (one.path.rpartition("/")[i] for i in (0, 2))
    stem = stem.rpartition(".")[0]
    short = re.sub(r"^(panoptic|instances|annotations?|person)[_-]", "", stem)
    words = SPLITS.get(one.split, ("",))
    places = [short, *words, *(f"images/{word}" for word in (short, *words)), "images", parent, f"{parent}/images", "."]
    if parent:
        above = parent.rpartition("/")[0] or "."
        places += [above, f"{above}/images"]
    images, bare = _first(folder, places, one.images, f"images of {one.path}")
    pngs = ""
    if kind == "panoptic":
        beside = f"{parent}/{stem}" if parent else stem
        places = [beside, short, f"panoptic_{short}", *(f"panoptic/{word}" for word in words), "panoptic", parent, "."]
        pngs, strange = _first(folder, places, one.pngs, f"panoptic PNGs of {one.path}", without=images)
        if strange:
            raise UserError(f"{folder.root / one.path}: the PNGs' file_name lead nowhere; write them below {pngs}")
    return CocoSplit(json=one.path, images=images, pngs=pngs), bare


def _first(
    folder: DataFolder, places: Sequence[str], names: Sequence[str], what: str, without: str | None = None
) -> tuple[str, bool]:
    """The first place that holds some of the first `names`, and whether by their last part alone."""
    some = [name for name in names[:50] if name]
    tried = list(dict.fromkeys(place.strip("/") or "." for place in places))
    for bare in (False, True):
        best = max(tried, key=lambda place: _held(folder, place, some, bare), default="")
        if best and _held(folder, best, some, bare):
            return best, bare
    raise UserError(
        f"{folder}: the {what} were not found, the first {some[0] if some else ''!r} was looked for in "
        f"{', '.join(tried)}; put them in one of these, or correct file_name"
    )


def _held(folder: DataFolder, place: str, names: Sequence[str], bare: bool) -> int:
    def path(name: str) -> str:
        name = last_part(name) if bare else name
        return name if place == "." else f"{place}/{name}"

    return sum(
        folder.holds(path(name)) for name in names if (not name.startswith("/") and ".." not in name.split("/")) or bare
    )


# ------------------------------------------------------------------------------------------------------ label maps


def _labelled(root: Path, names: Path | None, holdout: Holdout) -> Layout | None:
    """One of the built-in layouts, or a plain one."""
    for benchmark in KNOWN:
        if (found := _known(root, benchmark, names, holdout)) is not None:
            return found
    files = _plain(root)
    if files is None:
        return None
    has_val = "val" in files.splits
    files = files if has_val else replace(files, splits=_only_train(files.splits), holdout=holdout)
    listed = _names_of(root, names)
    categories, ignored = _values_of(listed) if listed else ((), ())
    splits = tuple(dict.fromkeys(["train", "val", *files.splits]))
    return Layout(
        root=root, kind="labels", title=f"label maps ({files.images[0]}, {files.labels[0]})",
        files=replace(files, ignored=ignored), categories=categories, splits=splits,
        counting=bool(listed) and listed[0][0] is None,
    )  # fmt: skip


def _only_train(splits: Mapping[str, str]) -> dict[str, str]:
    """A set of one split is split by a seed, whatever it is called."""
    first = next(iter(splits), "")
    return {"train": splits.get("train", splits.get(first, "")), **{s: at for s, at in splits.items() if s == "test"}}


def _known(root: Path, name: str, names: Path | None, holdout: Holdout) -> Layout | None:
    benchmark = load_benchmark(name)
    assert benchmark.files
    title, mark = KNOWN[name]
    if mark and not any((root / at / mark).is_dir() for at in benchmark.files.roots):
        return None
    found = []
    for split in benchmark.files.splits:
        try:
            find_split(benchmark.files, root, split, complete=False)
            found.append(split)
        except UserError:
            continue
    if not found:
        return None
    files, notes = benchmark.files, ()
    if missing := [split for split in ("train", "val") if split not in found]:
        at = benchmark.files.splits[found[0]]
        files = replace(files, splits={"train": at}, holdout=holdout)
        notes = (f"no {missing[0]} images of {title} found: those of {found[0]} are split by a seed",)
    categories, ignored = benchmark.categories, files.ignored
    places = [root / at for at in files.roots if (root / at).is_dir()]
    if listed := next((some for place in places if (some := _names_of(place, names, quiet=True))), None):
        categories, ignored = _values_of(listed)
        ignored = tuple(dict.fromkeys([*ignored, *(v for v in files.ignored if v not in {c.id for c in categories})]))
    return Layout(
        root=root, kind="labels", title=f"{title} label maps", files=replace(files, ignored=ignored),
        categories=categories, notes=notes,
    )  # fmt: skip


def _plain(root: Path) -> LabelFiles | None:
    """Folders of images beside folders of label PNGs, with or without folders of splits; also both in one folder."""
    inside = {path.name.lower(): path.name for path in sorted(root.iterdir()) if path.is_dir()}
    images = [inside[name] for name in IMAGES if name in inside]
    labels = [inside[name] for name in LABELS if name in inside]
    for image in images:
        for label in labels:
            splits = _splits_in(root / image)
            parted = splits if splits == _splits_in(root / label) else {}
            if parted and (found := _pair(root, f"{image}/{{split}}", f"{label}/{{split}}", parted)):
                return found
            if found := _pair(root, image, label, {}):
                return _by_lists(root, found)
    if splits := _splits_in(root):
        first = root / next(iter(splits.values()))
        below = {path.name.lower(): path.name for path in sorted(first.iterdir()) if path.is_dir()}
        for image in [below[name] for name in IMAGES if name in below] or [""]:
            for label in [below[name] for name in LABELS if name in below] or [""]:
                pictures, maps = ("/".join(filter(None, ("{split}", part))) for part in (image, label))
                if found := _pair(root, pictures, maps, splits):
                    return found
    return _pair(root, ".", ".", {})


def _splits_in(folder: Path) -> dict[str, str]:
    """Split -> name of its folder."""
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (split := _SPLIT_OF.get(path.name.lower())):
            found.setdefault(split, path.name)
    return {split: found[split] for split in SPLITS if split in found}


def _pair(root: Path, images: str, labels: str, splits: Mapping[str, str]) -> LabelFiles | None:
    """The patterns of images and label PNGs in two folders, by the ending and suffix that most pairs have."""
    at = next(iter(splits.values()), "")
    pictures = _files(root / images.replace("{split}", at), SUFFIXES)
    maps = {name.rpartition(".")[0] for name in _files(root / labels.replace("{split}", at), (".png",))}
    stems: dict[str, set[str]] = {}
    for name in pictures:
        stem, _, suffix = name.rpartition(".")
        # in one folder, PNGs are taken for the labels
        if images != labels or suffix.lower() != "png":
            stems.setdefault(suffix.lower(), set()).add(stem)
    pairs = Counter(
        {(suffix, end): len({stem + end for stem in some} & maps) for suffix, some in stems.items() for end in ENDINGS}
    )
    if not pairs or not (best := pairs.most_common(1)[0])[1]:
        return None
    (suffix, end), _ = best
    return LabelFiles(
        images=(f"*.{suffix}" if images == "." else f"{images}/*.{suffix}",),
        labels=(f"*{end}.png" if labels == "." else f"{labels}/*{end}.png",),
        splits=dict(splits),
    )


def _files(folder: Path, suffixes: Sequence[str]) -> list[str]:
    if not folder.is_dir():
        return []
    return [
        Path(path, name).relative_to(folder).as_posix()
        for path, _, files in _walk(folder)
        for name in files
        if name.lower().endswith(tuple(suffixes))
    ]


def _by_lists(root: Path, files: LabelFiles) -> LabelFiles:
    """With the lists of names that lie beside one folder of images, where there are some: train.txt and val.txt."""
    for place in ("", "splits/", "lists/", "ImageSets/"):
        for train, val in (("train", "val"), ("train", "valid"), ("train", "test")):
            if all((root / f"{place}{split}.txt").is_file() for split in (train, val)):
                return replace(files, lists=(f"{place}{{split}}.txt",), splits={"train": train, "val": val})
    return files


def _names_of(root: Path, names: Path | None, *, quiet: bool = False) -> list[tuple[int | None, str]] | None:
    """The names of pixel values, with their values where the file has them; None without a file.

    A file has a name a line, behind its value or not ("7 car", "7: car", "car"), or is a JSON list of names, or an object
    of values and names.
    """
    if names and not names.is_file():
        raise UserError(f"--names {names} not found; write one class a line, its pixel value and its name: 7 car")
    path = names or next((root / name for name in NAMES if (root / name).is_file()), None)
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a list of names ({error}); write one name a line, in UTF-8"
        ) from error
    if isinstance(content, dict):
        pairs = [(whole(a), str(b)) if whole(a) is not None else (whole(b), str(a)) for a, b in content.items()]
    elif isinstance(content, list):
        pairs = [(whole(c["id"]), str(c["name"])) if isinstance(c, dict) else (None, str(c)) for c in content]
    else:
        pairs = [_line(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    numbered = {number is not None for number, _ in pairs}
    if not pairs or len(numbered) > 1:
        raise UserError(f"{path}: some names have a pixel value and some none; write each line as: 7 car")
    return [(number, name.strip()) for number, name in pairs]


def _line(line: str) -> tuple[int | None, str]:
    if found := re.fullmatch(r"\s*(\d+)\s*[:,;\t ]\s*(.*\S)\s*", line):
        return int(found[1]), found[2]
    return None, line.strip()


def _values_of(listed: list[tuple[int | None, str]]) -> tuple[tuple[Category, ...], tuple[int, ...]]:
    """The classes, and the values of what is no class by its name. Names without values count from 0."""
    values = [(place if number is None else number, name) for place, (number, name) in enumerate(listed)]
    ignored = tuple(sorted({value for value, name in values if name.lower() in UNLABELLED}))
    return tuple(
        Category(id=value, name=name, isthing=False) for value, name in values if value not in ignored
    ), ignored


def counted_from_one(layout: Layout, values: Counter[int]) -> Layout:
    """The layout with its names counted from 1 where they have no values of their own, do not begin with what is no
    class, and the largest value in the label maps, but 255, is just their number: then 0 is unlabelled."""
    assert isinstance(layout.files, LabelFiles)
    most = max((value for value in values if value != 255), default=0)
    if not layout.counting or layout.files.ignored or most != len(layout.categories):
        return layout
    return replace(
        layout,
        categories=tuple(replace(category, id=category.id + 1) for category in layout.categories),
        files=replace(layout.files, ignored=(0,)),
        notes=(*layout.notes, f"the names count from 1, as the label maps go up to {most}; 0 is unlabelled"),
    )
