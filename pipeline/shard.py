"""Stage `shard`: every image of both splits, with its annotation, checked and copied into webdataset tars.

Samples are in image-id order, `samples_per_tar` entries of the JSON a tar (training shuffles tars, and samples within
them, later). The files are copied as they are; unseen classes stay in: shards serve every protocol.
"""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.benchmarks import Benchmark
from pipeline.coco import CocoSource, Entry, coco_source, fingerprint_coco, read_split
from pipeline.runtime import Runtime
from storage.keys import Recipe, Ref
from storage.store import Build, Store

if TYPE_CHECKING:
    import numpy as np

    from storage.shards import Sample

__all__ = [
    "KIND",
    "STAGE",
    "VERSION",
    "CocoSource",
    "ShardConfig",
    "Source",
    "coco_source",
    "fingerprint_coco",
    "load_sample",
    "recipe",
    "run",
]

log = logging.getLogger(__name__)

STAGE = "shard"
KIND = "shards"
VERSION = 1
CURE = "re-download it or pass --skip-bad"

Source = CocoSource | Ref
"""A folder of real COCO files, or generated scenes (an artefact of kind "scenes" with COCO's layout)."""


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """`samples_per_tar` images of the JSON go into a tar; the last tar of a split may hold fewer.

    `skip_bad` goes on without images that are missing, damaged or at odds with their annotation, and lists them in the
    manifest; without it the first one stops the build. It is not in the key: a build that finishes without it is the
    one with it. `limit` takes the first so many images by id of each split, 0 = all.
    """

    samples_per_tar: int = 256
    skip_bad: bool = False
    limit: int = 0

    def __post_init__(self) -> None:
        if self.samples_per_tar < 1:
            raise ValueError(f"samples_per_tar must be 1 or more, not {self.samples_per_tar}")
        if self.limit < 0:
            raise ValueError(f"limit must be 0 (all images) or more, not {self.limit}")


def recipe(config: ShardConfig, *, source: Source, benchmark: Benchmark) -> Recipe:
    """What decides the shards: config, categories and source, but neither the folder's path nor the unseen split."""
    inputs = {"scenes": source} if isinstance(source, Ref) else {}
    fingerprint = None if isinstance(source, Ref) else source.fingerprint
    return Recipe(
        kind=KIND,
        stage=STAGE,
        version=VERSION,
        config={"shard": replace(config, skip_bad=False), "source": fingerprint, "categories": benchmark.categories},
        inputs=inputs,
    )


def run(config: ShardConfig, *, source: Source, benchmark: Benchmark, store: Store, runtime: Runtime) -> Ref:
    """Build the shards: `{train,val}-{i:06d}.tar` and `index.json`.

    The manifest counts images, segments, crowd regions, things and stuff of each split, images beyond `limit`, and
    lists `skipped` images with the reason.

    Raises ValueError, in one line, for data that is missing, broken or at odds with itself or with the benchmark.
    """

    def work(build: Build) -> None:
        if isinstance(source, Ref):
            root, folders = store.open(source).path, {"train": "train2017", "val": "val2017"}
        else:
            root, folders = Path(source.root), {"train": source.train, "val": source.val}
            if fingerprint_coco(root, train=source.train, val=source.val) != source.fingerprint:
                raise ValueError(f"COCO folder {root} is not, or no longer, the one that was planned with; run again")
        _shard(config, root, folders, benchmark, build, runtime)

    return store.build(recipe(config, source=source, benchmark=benchmark), work)


def _shard(
    config: ShardConfig, root: Path, folders: dict[str, str], benchmark: Benchmark, build: Build, runtime: Runtime
) -> None:
    from PIL import Image

    from storage.shards import read_shard, write_index, write_shard

    listed = {split: read_split(root, folder, benchmark) for split, folder in folders.items()}
    entries = {split: everything[: config.limit or None] for split, everything in listed.items()}
    index: dict[str, list[dict[str, Any]]] = {split: [] for split in folders}
    skipped: list[dict[str, Any]] = []
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(runtime.workers) as pool,
        runtime.bar(sum(map(len, entries.values())), STAGE, "img") as bar,
    ):
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # PIL only warns of the smaller image bombs
        for split, folder in folders.items():
            counts = Counter[str]()
            for i, chunk in enumerate(_chunks(entries[split], config.samples_per_tar)):
                path = build.path / f"{split}-{i:06d}.tar"
                done = {sample.image_id: sample for sample in read_shard(path)} if path.exists() else {}
                samples: list[Sample] = []
                for entry, loaded in zip(chunk, pool.map(partial(_load, root, folder, done), chunk), strict=True):
                    bar.update()
                    if not isinstance(loaded, str):
                        samples.append(loaded)
                    elif config.skip_bad:
                        skipped.append({"split": split, "image_id": entry.image_id, "reason": loaded})
                    else:
                        raise ValueError(f"{root}: {split} image {entry.image_id} {loaded}; {CURE}")
                if not samples:
                    continue
                if len(samples) != len(done):  # else a killed build left this very tar
                    write_shard(path, samples)
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
                raise ValueError(f"{root}: no {split} image can be used, the first {reason}; re-download the data")
            build.counts[split] = {
                **counts,
                "stuff": counts["segments"] - counts["things"],
                "beyond_limit": len(listed[split]) - len(entries[split]),
            }
            log.info("%s: %s %s", STAGE, split, ", ".join(f"{n} {what}" for what, n in build.counts[split].items()))
    build.counts["skipped"] = skipped
    write_index(build.path, index)


def _chunks(entries: list[Entry], size: int) -> Iterator[list[Entry]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


def _load(root: Path, folder: str, done: dict[int, Sample], entry: Entry) -> Sample | str:
    return done[entry.image_id] if entry.image_id in done else load_sample(root, folder, entry)


def load_sample(root: Path, folder: str, entry: Entry) -> Sample | str:
    """The image's sample, checked; or what is wrong with it, to be read after "image 42 "."""
    from storage.shards import Sample, Segment, decode_ids

    if entry.problem:
        return entry.problem
    jpeg_name, png_name = f"{folder}/{entry.image}", f"annotations/panoptic_{folder}/{entry.png}"
    files = []
    for name in (jpeg_name, png_name):
        try:
            files.append((root / name).read_bytes())
        except FileNotFoundError:
            return f"lacks its file {name!r}"
        except OSError as error:
            return f"has a file {name!r} that cannot be read ({error.strerror})"
    jpeg, png = files
    for name, data, kind in ((jpeg_name, jpeg, "JPEG"), (png_name, png, "PNG")):
        if problem := _decoding_problem(data, kind, entry):
            return f"has a file {name!r} that {problem}"
    sample = Sample(
        image_id=entry.image_id,
        jpeg=jpeg,
        png=png,
        height=entry.height,
        width=entry.width,
        segments=tuple(
            Segment(id=s["id"], category_id=s["category_id"], area=s["area"], iscrowd=bool(s["iscrowd"]))
            for s in entry.segments
        ),
    )
    if problem := _segments_problem(decode_ids(sample), sample):
        return f"has a file {png_name!r} that {problem}"
    return sample


def _decoding_problem(data: bytes, kind: str, entry: Entry) -> str:
    from PIL import Image, UnidentifiedImageError

    from storage.shards import open_image

    try:
        image = open_image(data, kind)
        if image.size != (entry.width, entry.height):
            size = f"{image.width} x {image.height}"
            return f"is {size} pixels, but {entry.width} x {entry.height} in the JSON"
        image.load()
    except UnidentifiedImageError:  # its text holds a memory address
        return f"is no {kind}"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return f"has more than {Image.MAX_IMAGE_PIXELS} pixels"
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as error:
        return f"is damaged ({' '.join(str(error).split())})"
    return ""


def _segments_problem(ids: np.ndarray, sample: Sample) -> str:
    """Does the id map show exactly the segments of the JSON, each with its area?"""
    import numpy as np

    drawn = dict(zip(*(part.tolist() for part in np.unique(ids, return_counts=True)), strict=True))
    drawn.pop(0, None)  # void
    areas = {segment.id: segment.area for segment in sample.segments}
    if strange := sorted(drawn.keys() - areas.keys()):
        return f"has pixels of segments {_some(strange)}, which the JSON does not list"
    if lost := sorted(areas.keys() - drawn.keys()):
        return f"has no pixel of segments {_some(lost)}, which the JSON lists"
    if wrong := sorted(i for i in areas if areas[i] != drawn[i]):
        return f"shows another area than the JSON for segments {_some(wrong)}"
    return ""


def _some(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
