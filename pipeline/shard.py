"""Stage `shard`: every image of both splits, with its annotation, checked and copied into webdataset tars.

Samples are in image-id order, `samples_per_tar` listed images per tar (training shuffles tars, and samples within them,
later). JPEGs, 8-bit RGB PNGs and panoptic PNGs are copied unchanged; any other image, and one that is annotated as its
orientation shows it, becomes a PNG of its pixels (data/README.md), and a label map a map of segments, one per class in
it, so that later stages read one kind of sample. Unseen classes are kept: shards serve every protocol.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.benchmarks import Benchmark
from pipeline.data.coco import CocoSource, fingerprint_coco, read_split
from pipeline.data.config import ShardConfig
from pipeline.data.folder import DataFolder
from pipeline.data.label_maps import LabelSource, fingerprint_labels, image_ids, training_splits
from pipeline.data.samples import annotated_sample, labelled_sample
from pipeline.runtime import Runtime
from storage.errors import UserError, counted
from storage.inputs import vouch
from storage.keys import Recipe, Ref
from storage.store import Build

if TYPE_CHECKING:
    from storage.shards import Sample

log = logging.getLogger(__name__)

STAGE = "shard"
KIND = "shards"
VERSION = 2

Source = CocoSource | LabelSource | Ref
"""A folder of COCO files, a folder of images with label maps (for a semantic benchmark), or generated scenes (an
artefact of kind "scenes" in COCO's panoptic layout)."""


def recipe(config: ShardConfig, *, source: Source, benchmark: Benchmark) -> Recipe:
    """The key of the shards covers config, categories and source, but not the folder's path or the unseen classes."""
    inputs = {"scenes": source} if isinstance(source, Ref) else {}
    fingerprint = None if isinstance(source, Ref) else source.fingerprint
    ignored: dict[str, Any] = {"ignored": benchmark.files.ignored} if benchmark.files else {}
    if benchmark.others != "refuse":
        ignored["others"] = benchmark.others
    return Recipe(
        kind=KIND,
        stage=STAGE,
        version=VERSION,
        config={
            "shard": replace(config, skip_bad=False),
            "source": fingerprint,
            "categories": benchmark.categories,
            **ignored,
        },
        inputs=inputs,
    )


def build(build: Build, config: ShardConfig, runtime: Runtime, *, source: Source, benchmark: Benchmark) -> None:
    """Build the shards: `{train,val}-{i:06d}.tar` and `index.json`.

    The manifest counts images, segments, crowd regions, things and stuff of each split, images beyond `limit`, `blank`
    ones, which show no class at all (where other classes are ignored, or instances annotated), instances
    `without_pixels`, which have no mask or lie below others, and lists `skipped` images with the reason.

    Raises UserError for data that is missing, broken, inconsistent, or does not fit the benchmark.
    """
    root = build.open("scenes").path if isinstance(source, Ref) else Path(source.root)
    _shard(config, root, _listed(root, source, benchmark), benchmark, build, runtime)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One listed image: its id, `path` below the data folder, `load`, which reads and checks it (see
    `pipeline.data.samples`), and the `cure` of one that cannot be used. `blank`: nothing in it is labelled, and it is
    left out. `listed`: the number of instances that its annotation lists, where some may show no pixel."""

    image_id: int
    path: str
    load: Callable[[], Sample | str]
    cure: str
    blank: bool = False
    listed: int = 0


def _listed(root: Path, source: Source, benchmark: Benchmark) -> dict[str, list[Item]]:
    """The images of "train" and "val" in image-id order.

    Raises UserError when the files no longer have the source's fingerprint, or cannot be listed.
    """
    changed = UserError(f"data folder {root} is not, or no longer, the one that was planned with; run again")
    if isinstance(source, LabelSource):
        if fingerprint_labels(root, benchmark) != source.fingerprint:
            raise changed
        return {
            split: sorted(
                (
                    Item(
                        image_id=i,
                        path=image.name,
                        load=partial(labelled_sample, root, image, i, benchmark),
                        cure="correct or replace the file",
                    )
                    for i, image in zip(image_ids(images), images, strict=True)
                ),
                key=lambda item: item.image_id,
            )
            for split, images in training_splits(root, benchmark).items()
        }
    files = benchmark.annotations
    if isinstance(source, CocoSource) and fingerprint_coco(root, files) != source.fingerprint:
        raise changed
    folder = DataFolder(root)
    found = {
        split: [
            Item(
                image_id=entry.image_id,
                path=entry.image,
                load=partial(annotated_sample, folder, entry),
                cure=entry.cure,
                blank=entry.blank,
                listed=len(entry.segments) + entry.boxes if files and files.kind == "instances" else 0,
            )
            for entry in read_split(folder, split, benchmark)
        ]
        for split in ("train", "val")
    }
    paths = {split: {item.path for item in items} for split, items in found.items()}
    if same := sorted(paths["train"] & paths["val"]):
        raise UserError(
            f"{root}: train and val share {counted(len(same), 'image')}, the first {same[0]!r}; list each in one of them"
        )
    return found


def _shard(
    config: ShardConfig,
    root: Path,
    listed: dict[str, list[Item]],
    benchmark: Benchmark,
    build: Build,
    runtime: Runtime,
) -> None:
    from PIL import Image

    from storage.shards import INDEX, check_shard, read_shard, write_index, write_shard

    blank = {split: sum(item.blank for item in everything) for split, everything in listed.items()}
    listed = {split: _labelled(root, split, everything, benchmark) for split, everything in listed.items()}
    items = {split: everything[: config.limit or None] for split, everything in listed.items()}
    index: dict[str, list[dict[str, Any]]] = {split: [] for split in items}
    skipped: list[dict[str, Any]] = []
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(runtime.workers) as pool,
        runtime.bar(sum(map(len, items.values())), STAGE, "img") as bar,
    ):
        # PIL only warns of images up to twice its limit.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for split, chosen in items.items():
            counts = Counter[str]()
            for i, chunk in enumerate(_chunks(chosen, config.samples_per_tar)):
                path = build.path / f"{split}-{i:06d}.tar"
                left = build.holds(path, check_shard)
                done = {sample.image_id: sample for sample in read_shard(path)} if left else {}
                samples: list[Sample] = []
                for item, loaded in zip(chunk, pool.map(partial(_load, done), chunk), strict=True):
                    bar.update()
                    if not isinstance(loaded, str):
                        samples.append(loaded)
                    elif config.skip_bad:
                        skipped.append({"split": split, "image_id": item.image_id, "reason": loaded})
                    else:
                        raise UserError(
                            f"{root}: {split} image {item.image_id} {loaded}; {item.cure}, or pass --skip-bad"
                        )
                if not samples:
                    continue
                # Equal ids: a killed build has already written this tar.
                if [sample.image_id for sample in samples] != list(done):
                    vouch(build.path)
                    write_shard(path, samples)
                counts.update(_without_pixels(chunk, samples))
                held = [segment for sample in samples for segment in sample.segments]
                index[split].append({"tar": path.name, "samples": len(samples), "segments": len(held)})
                counts.update(
                    images=len(samples),
                    segments=len(held),
                    crowd=sum(segment.iscrowd for segment in held),
                    things=sum(benchmark.categories[benchmark.index[segment.category_id]].isthing for segment in held),
                )
            if not index[split]:
                reason = next(bad["reason"] for bad in skipped if bad["split"] == split)
                raise UserError(f"{root}: no {split} image can be used, the first {reason}; {chosen[0].cure}")
            if not counts["segments"]:
                raise UserError(
                    f"{root}: none of {counts['images']} {split} images has a segment, all their pixels are void; "
                    "add annotated images"
                )
            build.counts[split] = {
                **counts,
                "stuff": counts["segments"] - counts["things"],
                "beyond_limit": len(listed[split]) - len(chosen),
                **({"blank": blank[split]} if blank[split] else {}),
            }
            log.info("%s: %s %s", STAGE, split, ", ".join(f"{n} {what}" for what, n in build.counts[split].items()))
    build.counts["skipped"] = skipped
    write_index(build.path, index)
    build.add(build.path / INDEX, *(build.path / tar["tar"] for tars in index.values() for tar in tars))


def _labelled(root: Path, split: str, items: list[Item], benchmark: Benchmark) -> list[Item]:
    """The items in which anything is labelled. Raises UserError where there is none."""
    kept = [item for item in items if not item.blank]
    if not kept:
        raise UserError(
            f"{root}: none of {counted(len(items), f'{split} image')} shows a class of benchmark {benchmark.name}; "
            "choose other classes, or annotate more images"
        )
    return kept


def _without_pixels(items: list[Item], samples: list[Sample]) -> dict[str, int]:
    """The number of instances that the samples' annotations list and that show no pixel; nothing where none are
    listed."""
    if not any(item.listed for item in items):
        return {}
    used = {sample.image_id for sample in samples}
    listed = sum(item.listed for item in items if item.image_id in used)
    return {"without_pixels": listed - sum(len(sample.segments) for sample in samples)}


def _chunks(items: list[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _load(done: dict[int, Sample], item: Item) -> Sample | str:
    return done[item.image_id] if item.image_id in done else item.load()
