"""One image with its annotation, checked and ready for a shard: from a panoptic PNG and its JSON, from instances, or
from a label map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.benchmarks import Benchmark
from pipeline.data.coco import Entry
from pipeline.data.folder import DataFolder
from pipeline.data.images import annotation_png, for_shard
from pipeline.data.label_maps import LabelledImage, decode_labels
from storage.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from storage.shards import Sample, Shards


def annotated_sample(folder: DataFolder, entry: Entry) -> Sample | str:
    """The image's sample, checked, of a panoptic PNG or of instances; or the problem, as text that continues "image
    42 "."""
    return entry.problem or (panoptic_sample if entry.png else instance_sample)(folder, entry)


def panoptic_sample(folder: DataFolder, entry: Entry) -> Sample | str:
    """As `annotated_sample`, of an entry with a panoptic PNG. The PNG stays as it is, unless its colours are in the
    order BGR, or it has segments of other categories, whose pixels become void."""
    import numpy as np

    from storage.shards import Sample, Segment, decode_ids, encode_ids

    if entry.problem:
        return entry.problem
    files = _read(folder, entry.image, entry.png)
    if isinstance(files, str):
        return files
    size = entry.width, entry.height
    try:
        image = for_shard(files[0], size, "in the JSON")
    except UserError as error:
        return f"has a file {entry.image!r} that {error}"
    try:
        drawn = annotation_png(files[1])
    except UserError as error:
        return f"has a file {entry.png!r} that {error}"
    if drawn.size != size:
        sizes = f"{drawn.width} x {drawn.height} pixels, but {size[0]} x {size[1]}"
        return f"has a file {entry.png!r} that is {sizes} in the JSON"
    sample = Sample(
        image_id=entry.image_id,
        image=image,
        png=files[1],
        height=entry.height,
        width=entry.width,
        segments=tuple(
            Segment(id=s["id"], category_id=s["category_id"], area=s["area"], iscrowd=bool(s["iscrowd"]))
            for s in entry.segments
        ),
    )
    areas = {segment["id"]: segment["area"] for segment in (*entry.segments, *entry.others)}
    ids = decode_ids(sample)
    if problem := _segments_problem(_swapped(ids) if entry.bgr else ids, areas):
        if drawn.mode in ("1", "L", "LA", "I;16"):
            problem = f"is grey (mode {drawn.mode}), but a panoptic PNG is RGB, with id = R + 256 G + 65536 B"
        elif not _segments_problem(ids if entry.bgr else _swapped(ids), areas):
            wrong, right = ("BGR", "false") if entry.bgr else ("RGB", "true")
            problem = f"is not in the order {wrong} (set bgr of the benchmark's annotations to {right})"
        return f"has a file {entry.png!r} that {problem}"
    if entry.bgr or entry.others:
        ids = _swapped(ids) if entry.bgr else ids
        ids[np.isin(ids, [segment["id"] for segment in entry.others])] = 0
        sample = replace(sample, png=encode_ids(ids))
    return sample


def _swapped(ids: np.ndarray) -> np.ndarray:
    """Segment ids whose lowest and highest byte are exchanged."""
    return (ids & 0xFF00) | (ids >> 16) | ((ids & 0xFF) << 16)


def instance_sample(folder: DataFolder, entry: Entry) -> Sample | str:
    """As `annotated_sample`, of an entry of instances: segment ids are 1, 2, ... in the annotation's order, of those
    that show a pixel (see `pipeline.data.instances`)."""
    import numpy as np

    from pipeline.data.instances import draw
    from storage.shards import Sample, Segment, encode_ids

    if entry.problem:
        return entry.problem
    files = _read(folder, entry.image)
    if isinstance(files, str):
        return files
    try:
        image = for_shard(files[0], (entry.width, entry.height), "in the JSON")
    except UserError as error:
        return f"has a file {entry.image!r} that {error}"
    # an instance of another category still covers what lies below it
    everything = sorted((*entry.segments, *entry.others), key=lambda one: one["id"])
    try:
        ids = draw(everything, entry.height, entry.width)
    except UserError as error:
        return str(error)
    wanted = {one["id"] for one in entry.segments}
    ids[np.isin(ids, [number for number, one in enumerate(everything, 1) if one["id"] not in wanted])] = 0
    areas = dict(zip(*(part.tolist() for part in np.unique(ids, return_counts=True)), strict=True))
    return Sample(
        image_id=entry.image_id,
        image=image,
        png=encode_ids(ids),
        height=entry.height,
        width=entry.width,
        segments=tuple(
            Segment(id=number, category_id=one["category_id"], area=areas[number], iscrowd=bool(one["iscrowd"]))
            for number, one in enumerate(everything, 1)
            if number in areas
        ),
    )


def labelled_sample(root: Path, item: LabelledImage, image_id: int, benchmark: Benchmark) -> Sample | str:
    """The image with its label map as a sample, checked; or the problem, as text that continues "image 42 ".

    Every class in the map is one segment, thing or stuff: its id is the map's value + 1, in the order of values; id 0
    marks ignored pixels. There are no crowds.
    """
    import numpy as np

    from storage.shards import Sample, Segment, encode_ids

    image_name, png_name = (path.relative_to(root).as_posix() for path in (item.image, item.label))
    files = _read(DataFolder(root), image_name, png_name)
    if isinstance(files, str):
        return files
    try:
        classes = decode_labels(files[1], benchmark)
    except UserError as error:
        return f"has a file {png_name!r} that {error}"
    height, width = classes.shape
    try:
        image = for_shard(files[0], (width, height), "in its label map")
    except UserError as error:
        return f"has a file {image_name!r} that {error}"
    values = np.array([category.id for category in benchmark.categories] + [-1])[classes]  # class -1 is the last
    found = zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True)
    return Sample(
        image_id=image_id,
        image=image,
        png=encode_ids(values + 1),
        height=height,
        width=width,
        segments=tuple(
            Segment(id=value + 1, category_id=value, area=area, iscrowd=False) for value, area in found if value >= 0
        ),
    )


def _read(folder: DataFolder, *names: str) -> list[bytes] | str:
    """The files' contents; or the first that cannot be read, and why."""
    files = []
    for name in names:
        try:
            files.append(folder.read(name))
        except FileNotFoundError:
            return f"lacks its file {name!r}"
        except OSError as error:
            return f"has a file {name!r} that cannot be read ({error.strerror})"
    return files


def _segments_problem(ids: np.ndarray, areas: dict[int, int]) -> str:
    """How the id map (H, W) differs from the JSON's segments or their areas, "" for not at all."""
    import numpy as np

    drawn = dict(zip(*(part.tolist() for part in np.unique(ids, return_counts=True)), strict=True))
    drawn.pop(0, None)  # void
    if strange := sorted(drawn.keys() - areas.keys()):
        return f"has pixels of segments {_some(strange)}, which the JSON does not list"
    if lost := sorted(areas.keys() - drawn.keys()):
        return f"has no pixel of segments {_some(lost)}, which the JSON lists"
    if wrong := sorted(i for i in areas if areas[i] != drawn[i]):
        first, others = wrong[0], f", and so for {len(wrong) - 1} more" * (len(wrong) > 1)
        return f"shows {drawn[first]} pixels of segment {first}, but its area is {areas[first]} in the JSON{others}"
    return ""


def _some(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def samples_with_tokens(
    shards: Shards, tokens: Path, *, workers: int
) -> Iterator[tuple[tuple[Sample, Tensor], Tensor]]:
    """((validation sample, its instance tokens (O, D) float32), image (3, H, W) uint8) for every validation sample,
    decoded ahead by `workers` threads.

    Reads each tar together with its token group in the folder `tokens`.
    """
    import torch

    from pipeline.data.ahead import mapped
    from pipeline.data.transforms import channels_first
    from storage.shards import decode_image, read_shard
    from storage.tokens import read_tokens

    def undecoded() -> Iterator[tuple[Sample, Tensor]]:
        for tar in shards.tars("val"):
            group = read_tokens(tokens / f"{tar.stem}.zarr")
            for row, sample in enumerate(read_shard(tar)):
                yield sample, torch.from_numpy(group.instance[group.rows(row)]).float()

    def decoded(pair: tuple[Sample, Tensor]) -> tuple[tuple[Sample, Tensor], Tensor]:
        return pair, channels_first(decode_image(pair[0]))

    return mapped(decoded, undecoded(), workers=workers, count=4 * workers)
