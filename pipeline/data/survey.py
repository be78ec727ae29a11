"""What a benchmark's files show, looked at once before anything is built: `zs-seg new` prints it.

Annotations and label maps are read whole, of images the header alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pipeline.data.benchmarks import Benchmark, Protocol
from pipeline.data.coco import Entry, read_split
from pipeline.data.folder import DataFolder
from pipeline.data.images import check_size
from pipeline.data.label_maps import LabelledImage, find_split, pixel_values
from pipeline.data.samples import annotated_sample
from pipeline.runtime import Runtime
from storage.errors import UserError, counted

TRIED = 5  # panoptic PNGs that are decoded to find the order of their colours


@dataclass(frozen=True, kw_only=True)
class Look:
    """An image as its files show it: `name`, `path` below the data folder and `bytes` (None: not there), category id ->
    number of segments (of a label map: of pixels), and what is wrong, in a word or two and in full."""

    name: str
    path: str
    bytes: int | None
    shows: Mapping[int, int]
    wrong: str = ""
    why: str = ""

    @property
    def fits(self) -> bool:
        return not self.wrong


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The images of each split, in its order. `boxes`: annotations without a mask; `repeated`: ids of annotations that
    stand more than once in their file. `blank`: split -> images without any annotation."""

    looks: Mapping[str, Sequence[Look]]
    boxes: int = 0
    annotations: int = 0
    repeated: int = 0
    blank: Mapping[str, int] = field(default_factory=dict)

    def values(self) -> Counter[int]:
        """Category id, or value of a label pixel -> number of images that show it."""
        return Counter(value for looks in self.looks.values() for look in looks for value in look.shows)


def survey(root: Path, benchmark: Benchmark, splits: Sequence[str], runtime: Runtime) -> Survey:
    """Look at the splits' files; categories that the benchmark lacks are counted with the rest.

    Raises UserError as `read_split` and `find_split` do.
    """

    def looked(look: Callable[[Any], Look], items: Mapping[str, Sequence[Any]]) -> dict[str, list[Look]]:
        with (
            ThreadPoolExecutor(runtime.workers) as pool,
            runtime.bar(sum(map(len, items.values())), "looking at", "img") as bar,
        ):
            return {split: [_ticked(found, bar) for found in pool.map(look, some)] for split, some in items.items()}

    if benchmark.files:
        files = benchmark.files
        images = {split: find_split(files, root, split, complete=False).images for split in splits}
        return Survey(looks=looked(partial(_labelled, root), images))
    folder = DataFolder(root)
    lenient = replace(benchmark, others="ignore")
    entries = {split: read_split(folder, split, lenient) for split in splits}
    looks = looked(partial(_annotated, folder), entries)
    instances = bool(benchmark.annotations and benchmark.annotations.kind == "instances")
    everything = [one for some in entries.values() for entry in some for one in (*entry.segments, *entry.others)]
    given = [
        Counter(repr(one["given"]) for entry in some for one in (*entry.segments, *entry.others) if one["given"] is not None)
        for some in entries.values()
    ] if instances else []  # fmt: skip
    boxes = sum(entry.boxes for some in entries.values() for entry in some)
    return Survey(
        looks=looks,
        annotations=len(everything) + boxes,
        boxes=boxes,
        repeated=sum(count > 1 for counts in given for count in counts.values()),
        blank={
            split: sum(not (entry.segments or entry.others or entry.boxes or entry.problem) for entry in some)
            for split, some in entries.items()
        } if instances else {},
    )  # fmt: skip


def _ticked(look: Look, bar: Any) -> Look:
    bar.update()
    return look


def _annotated(folder: DataFolder, entry: Entry) -> Look:
    shows = Counter(one["category_id"] for one in (*entry.segments, *entry.others))
    look = Look(name=entry.name, path=entry.image, bytes=None, shows=shows)
    if entry.problem:
        return replace(look, wrong="are at odds in the JSON", why=entry.problem)
    if entry.png and not folder.holds(entry.png):
        return replace(look, wrong="lack their panoptic PNG", why=f"lacks its file {entry.png!r}")
    return _sized(look, folder, (entry.width, entry.height), "in the JSON")


def _labelled(root: Path, item: LabelledImage) -> Look:
    import numpy as np

    look = Look(name=item.name, path=item.image.relative_to(root).as_posix(), bytes=None, shows={})
    try:
        values = pixel_values(item.label.read_bytes())
    except FileNotFoundError:
        return replace(look, wrong="lack their label map", why=f"lacks its file {item.label}")
    except (OSError, UserError) as error:
        return replace(look, wrong="have a label map that cannot be used", why=f"has a file {item.label} that {error}")
    shows = dict(zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True))
    return _sized(replace(look, shows=shows), DataFolder(root), values.shape[::-1], "in its label map")


def _sized(look: Look, folder: DataFolder, size: tuple[int, int], where: str) -> Look:
    try:
        with folder.open(look.path) as file:
            check_size(file, size, where)
            return replace(look, bytes=file.seek(0, 2))
    except FileNotFoundError:
        return replace(look, wrong="lack their file", why=f"lacks its file {look.path!r}")
    except (OSError, UserError) as error:
        wrong = "have another size than their annotation" if " pixels" in str(error) else "cannot be read"
        return replace(look, wrong=wrong, why=f"has a file {look.path!r} that {error}")


def bgr(root: Path, benchmark: Benchmark) -> bool:
    """Whether the first panoptic PNGs fit their JSON with blue as the lowest byte, and not with red."""
    folder = DataFolder(root)
    entries = [entry for entry in read_split(folder, "train", replace(benchmark, others="ignore")) if entry.png]
    usable = [entry for entry in entries if not entry.problem and folder.holds(entry.png) and folder.holds(entry.image)]
    return any(
        isinstance(annotated_sample(folder, entry), str)
        and not isinstance(annotated_sample(folder, replace(entry, bgr=True)), str)
        for entry in usable[:TRIED]
    )


# ------------------------------------------------------------------------------------------------------ what follows


def left(looks: Sequence[Look], benchmark: Benchmark) -> dict[str, int]:
    """Protocol -> the training images that it leaves with a pixel of a seen class."""
    unseen = set(benchmark.unseen_ids)
    seen = benchmark.index.keys() - unseen
    usable = [look for look in looks if look.fits and look.shows.keys() & seen]
    filtered = sum(not look.shows.keys() & unseen for look in usable)
    return {protocol: filtered if protocol == "image-filter" else len(usable) for protocol in get_args(Protocol)}


def others(found: Survey, benchmark: Benchmark) -> Counter[int]:
    """Categories, or values of label pixels, outside of the benchmark's, and the number of images that show them."""
    ignored = set(benchmark.files.ignored) if benchmark.files else set()
    return Counter(
        {value: n for value, n in found.values().items() if value not in benchmark.index and value not in ignored}
    )


def warnings(found: Survey, benchmark: Benchmark, root: Path) -> list[str]:
    """One line for each thing that a training would suffer from and still run with, with what mends it."""
    lines = []
    for split, looks in found.looks.items():
        for wrong in dict.fromkeys(look.wrong for look in looks if look.wrong):
            bad = [look for look in looks if look.wrong == wrong]
            lines.append(
                f"{len(bad):,} of {counted(len(looks), f'{split} image')} {wrong} ({_three([look.name for look in bad])}; "
                f"the first {bad[0].why}); mend them, or leave them out with --skip-bad"
            )
    lines += [
        f"{counted(number, f'{split} image')} have no annotation, and are not used; annotate them if they show anything"
        for split, number in found.blank.items()
        if number
    ]
    if found.boxes:
        lines.append(
            f"{found.boxes:,} of {counted(found.annotations, 'annotation')} have no mask (a box alone), and their pixels "
            "are unlabelled; draw polygons for them"
        )
    if found.repeated:
        lines.append(f"{counted(found.repeated, 'annotation id')} stand more than once; nothing depends on them here")
    if same := _same_content(found, root):
        lines.append(
            f"{counted(len(same), 'val image')} have the bytes of a train image ({_three(same)}); the scores of what was "
            "trained on are too high: remove them from one split"
        )
    lines += _not_shown(found, benchmark)
    if 0 in benchmark.index and not benchmark.files and not found.values()[0]:
        name = benchmark.names[benchmark.index[0]]
        lines.append(
            f"category 0, {name!r}, looks like an exporter's name of the whole set; leave it out with --classes"
        )
    if benchmark.files and (high := [c.id for c in benchmark.categories if c.id > 255]):
        lines.append(f"{len(high)} values are above 255, the first {high[0]}: only label PNGs of 16 bits hold them")
    return lines


def _not_shown(found: Survey, benchmark: Benchmark) -> list[str]:
    """Classes that cannot be learned, or not be scored."""
    shown = {split: {v for look in looks if look.fits for v in look.shows} for split, looks in found.looks.items()}
    anywhere = set[int]().union(*shown.values())
    pairs = list(zip(benchmark.categories, benchmark.seen, strict=True))
    kinds = {
        "shown by no image; leave them out with --classes": [c for c, _ in pairs if c.id not in anywhere],
        "seen, but shown by no train image; make them unseen, or leave them out with --classes": [
            c for c, seen in pairs if seen and c.id in anywhere - shown["train"]
        ],
        "unseen, but shown by no val image, and cannot be scored; choose others with --unseen": [
            c for c, seen in pairs if not seen and c.id not in shown["val"]
        ],
    }
    return [
        f"{len(classes)} class{'es are' if len(classes) > 1 else ' is'} {what}: {_three([c.name for c in classes])}"
        for what, classes in kinds.items()
        if classes
    ]


def _three(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _same_content(found: Survey, root: Path) -> list[str]:
    """The names of val images whose file is byte for byte a train image's: those of equal sizes are compared."""
    folder = DataFolder(root)
    sizes = {look.bytes for look in found.looks["train"]} - {None}
    alike = [look for look in found.looks["val"] if look.bytes in sizes]
    wanted = {look.bytes for look in alike}

    def digest(look: Look) -> str:
        return hashlib.sha256(folder.read(look.path)).hexdigest()

    trained = {digest(look) for look in found.looks["train"] if look.bytes in wanted} if alike else set()
    return [look.name for look in alike if digest(look) in trained]


def require(found: Survey, benchmark: Benchmark, root: Path) -> None:
    """Raises UserError where a run would stop before it trained, with what mends it."""
    paths = {split: {look.path for look in looks} for split, looks in found.looks.items()}
    if same := sorted(paths["train"] & paths["val"]):
        raise UserError(
            f"{root}: {counted(len(same), 'image')} of val are train images, too ({_three(same)}); list each in one split"
        )
    if found.annotations and found.boxes == found.annotations:
        raise UserError(
            f"{root}: none of {counted(found.annotations, 'annotation')} has a mask, all are boxes; export polygons or "
            "run lengths"
        )
    for split in ("train", "val"):
        looks = found.looks[split]
        if not any(look.fits for look in looks):
            first = f", the first {looks[0].why}" if looks else ""
            raise UserError(
                f"{root}: none of {counted(len(looks), f'{split} image')} can be used{first}; mend the files"
            )
        if not any(look.fits and look.shows.keys() & benchmark.index.keys() for look in looks):
            raise UserError(
                f"{root}: no {split} image shows any of the classes ({_three(benchmark.names)}); choose other --classes"
            )
    if benchmark.others == "refuse" and (strange := others(found, benchmark)):
        listed = _three([str(value) for value in strange])
        what = "values" if benchmark.files else "categories"
        raise UserError(
            f"{root}: {counted(sum(1 for looks in found.looks.values() for look in looks if look.shows.keys() & strange.keys()), 'image')} "
            f"show {what} that are no class ({listed}); pass --others ignore, which makes their pixels unlabelled, or name "
            "them as classes"
        )
    counts = left(found.looks["train"], benchmark)
    if any(benchmark.seen) and not all(benchmark.seen) and not counts[benchmark.protocol]:
        able = [protocol for protocol, number in counts.items() if number]
        cure = f"pass --protocol {able[0]}, which leaves {counts[able[0]]}, or " if able else ""
        raise UserError(
            f"{root}: every train image shows an unseen class or no seen one, so {benchmark.protocol} leaves none of "
            f"{len(found.looks['train'])}; {cure}choose other --unseen classes"
        )
