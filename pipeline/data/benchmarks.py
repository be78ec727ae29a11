"""Benchmarks: classes, the unseen ones among them, the protocol that hides those from training, and where their files
lie.

The published splits are JSON files in `pipeline/data/splits`; any other JSON file in that format can be used, too.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.data.config import CocoConfig
from pipeline.data.names import listed, positions
from storage.errors import UserError

Protocol = Literal["image-filter", "pixel-ignore", "none"]
Task = Literal["panoptic", "semantic"]
Others = Literal["refuse", "ignore"]
Annotations = Literal["panoptic", "instances"]
SPLITS = Path(__file__).parent / "splits"


@dataclass(frozen=True, kw_only=True)
class Category:
    """A class of the annotations. `id`: category id in their JSON, or pixel value in a semantic benchmark's label PNGs.
    `isthing`: True for countable objects; without meaning in a semantic benchmark."""

    id: int
    name: str
    isthing: bool


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """Splits the images of "train" into training and validation images, each by its name alone: an image that is added
    or removed moves no other.

    `share`: the expected share of validation images, above 0 and below 1. `seed`: another one is another split.
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"holdout: share must be above 0 and below 1, not {self.share:g}")

    def holds(self, name: str, split: str) -> bool:
        """Whether the image of this name, its path below the folder of images, belongs to "train" or "val"."""
        text = f"{self.seed}/{unicodedata.normalize('NFC', name)}"
        drawn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        return (drawn < self.share) == (split == "val")


@dataclass(frozen=True, kw_only=True)
class CocoSplit:
    """A split's annotations in COCO's format, as paths below the data folder: the `json`, the folder of `images`, and,
    of panoptic annotations, that of the `pngs`."""

    json: str
    images: str
    pngs: str = ""


@dataclass(frozen=True, kw_only=True)
class CocoFiles:
    """Where a panoptic benchmark's annotations in COCO's format lie, and how they are read.

    `kind`: "panoptic" has a PNG of segment ids an image, "instances" polygons and run lengths (`data/instances.py`).
    `bare`: of the images' `file_name` only what follows the last slash counts. `bgr`: the PNGs hold ids as
    B + 256 G + 65536 R, as OpenCV writes them. `holdout`: "val" is a part of "train".
    """

    kind: Annotations
    splits: Mapping[str, CocoSplit]
    bare: bool = False
    bgr: bool = False
    holdout: Holdout | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Annotations):
            raise UserError(
                f"annotations: kind {self.kind!r} is unknown; use one of {', '.join(get_args(Annotations))}"
            )

    def split(self, name: str) -> CocoSplit:
        """Raises UserError for a split that there is not."""
        known = [*self.splits, *(["val"] if self.holdout else [])]
        if name not in known:
            raise UserError(f"split {name!r} is unknown; --split is one of {', '.join(dict.fromkeys(known))}")
        return self.splits["train" if self.holdout and name == "val" else name]


@dataclass(frozen=True, kw_only=True)
class LabelFiles:
    """Where a semantic benchmark's images and label PNGs lie below its data folder; of several paths, the first found.

    `roots` are folders below the data folder; all other paths are relative to one of them. In `images` and `labels`,
    `*` stands for an image's name, subfolders included. `lists` are text files with one name per line; without `lists`
    every image that matches belongs to the split. `{split}` stands for the split's value in `splits`. `ignored` are the
    values of label pixels that are left out of training and evaluation. `holdout`: "val" is a part of "train".
    """

    images: tuple[str, ...]
    labels: tuple[str, ...]
    ignored: tuple[int, ...] = ()
    lists: tuple[str, ...] = ()
    roots: tuple[str, ...] = (".",)
    splits: Mapping[str, str]
    holdout: Holdout | None = None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Classes in a fixed order, the unseen ones among them, and the protocol that hides those from training.

    `image-filter` drops every training image that holds a segment of an unseen class. `pixel-ignore` keeps every image
    and makes the pixels of unseen classes unlabelled: they form no segment and have no token, whatever their class.
    `none` keeps every image; segments of unseen classes have teacher tokens, but are never targets. `files` is set for
    a semantic benchmark, whose ground truth is label PNGs; without it the benchmark is panoptic: `annotations` has the
    place of its files, None is COCO 2017's own layout. `others`: what becomes of categories, or values of label pixels,
    that are not listed: "refuse" the image, or "ignore", which makes their pixels unlabelled.

    pixel-ignore in the losses: unlabelled pixels belong to no segment, so in the mask losses of a matched query they
    are background, like every pixel of another segment. The published mask classifiers do the same (MaskFormer's and
    Mask2Former's semantic data, and the zero-shot methods built on them); sampled points are not left out. An unmatched
    query has no mask loss, so its mask may cover an unseen object; its target is zero for every seen class. The image's
    pixels stay: the segmenter's input and the teacher's token of the whole image include them, as in the paper.

    Raises UserError where categories are empty or double, `unseen_ids` or `protocol` unknown, or `files` malformed.
    """

    name: str
    categories: tuple[Category, ...]
    unseen_ids: tuple[int, ...]
    protocol: Protocol
    files: LabelFiles | None = None
    annotations: CocoFiles | None = None
    others: Others = "refuse"

    def __post_init__(self) -> None:
        ids = [category.id for category in self.categories]
        names = [category.name for category in self.categories]
        if not ids:
            raise UserError(f"benchmark {self.name}: categories is empty; list at least one")
        for what, values in (("category id", ids), ("category name", names), ("unseen id", self.unseen_ids)):
            if len(set(values)) < len(values):
                value, _ = Counter(values).most_common(1)[0]
                raise UserError(f"benchmark {self.name}: {what} {value!r} is listed twice; keep one")
        if strange := sorted(set(self.unseen_ids) - set(ids)):
            raise UserError(f"benchmark {self.name}: unseen_ids {strange} are no category ids; correct them")
        if self.files:
            self._check_files(self.files, ids)
        if self.protocol not in get_args(Protocol):
            known = ", ".join(get_args(Protocol))
            raise UserError(f"benchmark {self.name}: protocol {self.protocol!r} is unknown; use one of {known}")
        if self.others not in get_args(Others):
            known = " or ".join(get_args(Others))
            raise UserError(f"benchmark {self.name}: others is {self.others!r:.60}, which must be {known}; correct it")

    def _check_files(self, files: LabelFiles, ids: list[int]) -> None:
        for field, patterns in (("images", files.images), ("labels", files.labels)):
            if not patterns or any(pattern.count("*") != 1 for pattern in patterns):
                raise UserError(
                    f"benchmark {self.name}: {field} {list(patterns)} must be paths with one * each, "
                    "for an image's name"
                )
        if (least := min([*ids, *files.ignored])) < 0:
            raise UserError(f"benchmark {self.name}: value {least} is negative; use the values in the label PNGs")
        if (most := max([*ids, *files.ignored])) > 65535:
            raise UserError(
                f"benchmark {self.name}: value {most} is above 65535, the most a label PNG holds; correct it"
            )
        if both := sorted(set(files.ignored) & set(ids)):
            raise UserError(f"benchmark {self.name}: values {both} are categories and ignored; choose one of both")

    @property
    def task(self) -> Task:
        return "semantic" if self.files else "panoptic"

    @property
    def content(self) -> dict[str, Any]:
        """The fields that enter the keys of artefacts; the location of the files does not."""
        return {
            "name": self.name,
            "categories": self.categories,
            "unseen_ids": self.unseen_ids,
            "protocol": self.protocol,
        }

    @cached_property
    def index(self) -> dict[int, int]:
        """Category id -> position in `categories`, which is the class index everywhere else."""
        return {category.id: position for position, category in enumerate(self.categories)}

    @cached_property
    def seen(self) -> list[bool]:
        """(K,) in category order: True for classes that training uses, False for unseen ones."""
        unseen = set(self.unseen_ids)
        return [category.id not in unseen for category in self.categories]

    @cached_property
    def names(self) -> list[str]:
        """Class names in category order."""
        return [category.name for category in self.categories]


def benchmark_of_coco(config: CocoConfig) -> Benchmark:
    """The benchmark of real images with what the config chooses of it, see `choose`, under its own protocol or the one
    in its place. Raises UserError as `load_benchmark` and `choose`."""
    loaded = load_benchmark(config.benchmark)
    benchmark = choose(loaded, classes=config.classes, unseen=config.unseen, others=config.others)
    return benchmark if config.protocol == "own" else replace(benchmark, protocol=config.protocol)


def choose(
    benchmark: Benchmark, *, classes: Sequence[str] = (), unseen: Sequence[str] = (), others: Others | None = None
) -> Benchmark:
    """The benchmark with `classes` alone, with `unseen` as its unseen classes, and with another rule for `others`; what
    is empty or None stays. Its name has what was chosen.

    Classes are named as in `pipeline.data.names.positions`, one a word or separated by commas. Raises UserError for a
    name that no class has.
    """
    chosen: list[str] = []
    if classes:
        kept = positions(listed(classes), benchmark.names, "--data.classes")
        categories = tuple(benchmark.categories[i] for i in kept)
        ids = {category.id for category in categories}
        still = tuple(i for i in benchmark.unseen_ids if i in ids)
        benchmark = replace(benchmark, categories=categories, unseen_ids=still)
        chosen.append(f"classes {', '.join(benchmark.names)}")
    if unseen:
        found = positions(listed(unseen), benchmark.names, "--data.unseen")
        benchmark = replace(benchmark, unseen_ids=tuple(benchmark.categories[i].id for i in found))
        chosen.append(f"unseen {', '.join(benchmark.names[i] for i in found)}")
    name = f"{benchmark.name} ({'; '.join(chosen)})" if chosen else benchmark.name
    return replace(benchmark, name=name, others=others or benchmark.others)


def load_benchmark(name: str) -> Benchmark:
    """Load a benchmark of `pipeline/data/splits` by name ("coco-panoptic-zps"), or a JSON file in that format.

    A file holds `categories` (each with `id`, `name`, `isthing`), `unseen_ids` and `protocol`; text after a colon in
    `protocol` explains it. If it also lists `unseen_names`, they must be the names of the unseen ids, in order. With
    `task` "semantic" it also holds the fields of `LabelFiles`, of which only `images` and `labels` are required, and
    its categories need no `isthing`. A panoptic one may hold `annotations`, the fields of `CocoFiles`; without it the
    files lie as COCO's own. `holdout` (`share`, `seed`) and `others` are optional; `zs-seg new` writes such files.

    Raises UserError for an unknown name and for a file that is missing, broken, incomplete or inconsistent.
    """
    path = Path(name) if name.endswith(".json") else SPLITS / f"{name.replace('-', '_')}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem.replace("_", "-") for file in SPLITS.glob("*.json")))
        raise UserError(f"benchmark {name!r} not found; use one of {known}, or the path of a JSON file")
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        benchmark = _benchmark(path.stem if name.endswith(".json") else name, facts)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: no valid JSON ({error}); correct it") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: field {error} is missing or malformed; see {SPLITS.name}/coco_panoptic_zps.json and voc20.json"
        ) from error
    names = [benchmark.names[benchmark.index[i]] for i in benchmark.unseen_ids]
    if facts.get("unseen_names", names) != names:
        raise UserError(f"{path}: unseen_names are not the names of unseen_ids, which are {names}; correct one of them")
    return benchmark


def _benchmark(name: str, facts: dict[str, Any]) -> Benchmark:
    task = facts.get("task", "panoptic")
    if task not in get_args(Task):
        raise UserError(f"benchmark {name}: task {task!r} is unknown; use one of {', '.join(get_args(Task))}")
    defaults = {"isthing": False} if task == "semantic" else {}
    categories = [{**defaults, **category} for category in facts["categories"]]
    return Benchmark(
        name=name,
        categories=tuple(
            Category(
                id=_integer(name, f"id of entry {place} of categories", c["id"]),
                name=str(c["name"]),
                isthing=bool(_integer(name, f"isthing of entry {place} of categories", c["isthing"])),
            )
            for place, c in enumerate(categories, 1)
        ),
        unseen_ids=tuple(_integer(name, "an entry of unseen_ids", i) for i in facts["unseen_ids"]),
        protocol=facts["protocol"].partition(":")[0],
        files=_label_files(name, facts) if task == "semantic" else None,
        annotations=_coco_files(name, facts) if task == "panoptic" and "annotations" in facts else None,
        others=facts.get("others", "refuse"),
    )


def whole(value: Any) -> int | None:
    """12, 12.0, "12" and "12.0" as 12, True as 1; None for what is no whole number."""
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}(\.0*)?", value, re.ASCII):
        return int(value.partition(".")[0])
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return None


def _integer(name: str, where: str, value: Any) -> int:
    if (number := whole(value)) is None:
        raise UserError(f"benchmark {name}: {where} is {value!r:.60}, which must be a whole number; correct it")
    return number


def _label_files(name: str, facts: dict[str, Any]) -> LabelFiles:
    def paths(field: str) -> tuple[str, ...]:
        value = facts[field]
        return (value,) if isinstance(value, str) else tuple(str(path) for path in value)

    return LabelFiles(
        images=paths("images"),
        labels=paths("labels"),
        ignored=tuple(_integer(name, "an entry of ignored", value) for value in facts.get("ignored", ())),
        lists=paths("lists") if "lists" in facts else (),
        roots=paths("roots") if "roots" in facts else (".",),
        splits={
            str(split): str(folder)
            for split, folder in facts.get("splits", {"train" if "holdout" in facts else "val": "val"}).items()
        },
        holdout=_holdout(name, facts),
    )


def _coco_files(name: str, facts: dict[str, Any]) -> CocoFiles:
    found = facts["annotations"]
    return CocoFiles(
        kind=found["kind"],
        splits={
            str(split): CocoSplit(json=str(at["json"]), images=str(at["images"]), pngs=str(at.get("pngs", "")))
            for split, at in found["splits"].items()
        },
        bare=bool(_integer(name, "bare of annotations", found.get("bare", False))),
        bgr=bool(_integer(name, "bgr of annotations", found.get("bgr", False))),
        holdout=_holdout(name, facts),
    )


def _holdout(name: str, facts: dict[str, Any]) -> Holdout | None:
    found = facts.get("holdout")
    if found is None:
        return None
    return Holdout(share=float(found["share"]), seed=_integer(name, "seed of holdout", found.get("seed", 0)))
