"""The numbers of images and instances of a run, counted from the annotations without opening an image."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.benchmarks import Benchmark, benchmark_of_coco
from pipeline.data.coco import coco_split, file_sizes, read_split
from pipeline.data.config import CocoConfig
from pipeline.data.folder import DataFolder, sized
from pipeline.line import Config, Stage
from pipeline.scenes import benchmark as benchmark_of_scenes
from storage.errors import counted
from storage.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The input of a run; None = unknown until a stage has run.

    `train`, `val`: images. `left`: training images that the protocol leaves. `train_instances`: their segments.
    `val_instances`: segments of all validation images. `bytes`: of the image and annotation files that go into the
    tars.
    """

    train: int
    val: int
    left: int | None = None
    train_instances: int | None = None
    val_instances: int | None = None
    bytes: int | None = None

    @property
    def inputs(self) -> int | None:
        """The number of teacher inputs: images and masked instances."""
        if self.left is None or self.train_instances is None or self.val_instances is None:
            return None
        return self.left + self.val + self.train_instances + self.val_instances

    def __str__(self) -> str:
        def number(instances: int | None) -> str:
            return "an unknown number of instances" if instances is None else counted(instances, "instance")

        left = "an unknown number" if self.left is None else f"{self.left:,}"
        return (
            f"{counted(self.train, 'training image')}, "
            f"of which the protocol leaves {left} with {number(self.train_instances)}; "
            f"{counted(self.val, 'validation image')} with {number(self.val_instances)}"
        )


def count(config: Config, stages: list[Stage], store: Store) -> Counts:
    """Count the input of the line. Takes seconds for the JSON of all of COCO.

    Raises UserError as `read_split` and `find_split` do.
    """
    if isinstance(config.data, CocoConfig):
        benchmark = benchmark_of_coco(config.data)
        if benchmark.files:
            return _count_label_maps(benchmark, Path(config.data.root), config.shard.limit)
        return _count_annotated(benchmark, Path(config.data.root), config.shard.limit)
    drawn = stages[0].recipe.ref
    if store.state(drawn) == "fresh":
        return _count_annotated(benchmark_of_scenes(config.data), store.path(drawn), config.shard.limit)
    least = config.shard.limit or max(config.data.train_images, config.data.val_images)
    return Counts(train=min(config.data.train_images, least), val=min(config.data.val_images, least))


def _count_annotated(benchmark: Benchmark, root: Path, limit: int) -> Counts:
    """Images that the annotation shows to be unusable, and those without any label, are not counted, but logged."""
    unseen = set(benchmark.unseen_ids) if benchmark.protocol == "image-filter" else set()
    folder = DataFolder(root)
    images, left, instances, size = {}, {}, {}, 0
    for split in ("train", "val"):
        listed = [entry for entry in read_split(folder, split, benchmark) if not entry.blank]
        entries = [entry for entry in listed[: limit or None] if not entry.problem]
        if bad := [entry for entry in listed[: limit or None] if entry.problem]:
            log.warning(
                "%s of %s cannot be used, the first %d %s; %s",
                f"{len(bad):,}", counted(len(entries) + len(bad), f"{split} image"), bad[0].image_id, bad[0].problem,
                bad[0].cure,
            )  # fmt: skip
        kept = [
            entry
            for entry in entries
            if split == "val" or not any(segment["category_id"] in unseen for segment in entry.segments)
        ]
        images[split], left[split] = len(entries), len(kept)
        instances[split] = sum(len(entry.segments) for entry in kept)
        at = coco_split(benchmark.annotations, split)
        parts = [(at.images, [entry.name for entry in entries])]
        parts += [(at.pngs, [entry.png.removeprefix(f"{at.pngs}/") for entry in entries])] if at.pngs else []
        for part, names in parts:
            sizes = file_sizes(folder, part, deep=any("/" in name for name in names))
            size += sum(sized(name, sizes) or 0 for name in names)
    return Counts(
        train=images["train"],
        val=images["val"],
        left=left["train"],
        train_instances=instances["train"],
        val_instances=instances["val"],
        bytes=size,
    )


def _count_label_maps(benchmark: Benchmark, root: Path, limit: int) -> Counts:
    """Counts without segments: those of a label map are unknown until it is decoded."""
    from pipeline.data.label_maps import find_split

    assert benchmark.files
    images, size = {}, 0
    for split in ("train", "val"):
        found = find_split(benchmark.files, root, split).images[: limit or None]
        images[split] = len(found)
        size += sum(file.stat().st_size for one in found for file in (one.image, one.label))
    return Counts(train=images["train"], val=images["val"], left=images["train"], bytes=size)
