"""Stage "cache-clip": the frozen teacher's embeddings of every image and every masked instance, computed once."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.benchmarks import Benchmark
from pipeline.runtime import Runtime
from pipeline.teacher.cluster import Progress
from pipeline.teacher.config import TeacherConfig, TokensConfig
from pipeline.teacher.pieces import TarJob, make_group, make_groups
from storage.errors import UserError
from storage.keys import Recipe, Ref
from storage.store import Build

if TYPE_CHECKING:
    from models.teacher import Teacher

STAGE, VERSION = "cache-clip", 3
SPLITS = ("train", "val")
log = logging.getLogger(__name__)


def recipe(config: TokensConfig, *, teacher: TeacherConfig, benchmark: Benchmark, shards: Ref) -> Recipe:
    content = {
        "tokens": config,
        "teacher": teacher.identity,
        "unseen_ids": benchmark.unseen_ids,
        "protocol": benchmark.protocol,
    }
    return Recipe(kind="tokens", stage=STAGE, version=VERSION, config=content, inputs={"shards": shards})


@dataclass(frozen=True, kw_only=True)
class Job(TarJob):
    """All samples of a tar; `hide`: apply the benchmark's training protocol."""

    hide: bool
    config: TokensConfig
    teacher: TeacherConfig
    benchmark: Benchmark


def build(
    build: Build, config: TokensConfig, runtime: Runtime, *, teacher: TeacherConfig, benchmark: Benchmark
) -> None:
    """Encode every tar into one token group of the same name, one Dask task per tar; existing groups are kept.

    Raises UserError as `make_groups` does, if a tar is damaged, and, before anything is encoded, as `_require_targets`
    and, where regions are wanted, `_require_regions`.
    """
    from storage.shards import Shards
    from storage.tokens import check_tokens, token_files

    shards = build.open("shards")
    opened = Shards(shards.path)
    _require_targets(opened.tars("train"), benchmark)
    if config.regions != "none":
        _require_regions(opened.tars("train"), config, benchmark)
    jobs = [
        Job(
            tar=tar,
            sha256=shards.manifest.files[tar.name]["sha256"],
            group=build.path / f"{tar.stem}.zarr",
            images=count,
            hide=split == "train",
            config=config,
            teacher=teacher,
            benchmark=benchmark,
            artefact=build.recipe.ref,
        )
        for split in SPLITS
        for tar, count in zip(opened.tars(split), opened.counts(split), strict=True)
    ]
    make_groups(
        build,
        jobs,
        _encode,
        runtime,
        check=check_tokens,
        files=token_files,
        title="teacher tokens",
        unit="instance",
    )
    _load.cache_clear()
    for split in SPLITS:
        build.counts[split] = _counts(split, [job for job in jobs if job.hide == (split == "train")], benchmark)


def _require_targets(tars: Sequence[Path], benchmark: Benchmark) -> None:
    """Read the training tars until an image that the protocol leaves has a target: a segment of a seen class that is no
    crowd. Raises UserError if none has."""
    from pipeline.teacher.encode import kept_for_training
    from storage.shards import read_shard

    images = left = 0
    for tar in tars:
        for sample in read_shard(tar):
            images += 1
            if kept_for_training(sample, benchmark):
                left += 1
                if any(benchmark.seen[benchmark.index[s.category_id]] and not s.iscrowd for s in sample.segments):
                    return
    what = f"{left} of {images} training images"
    if not left:
        raise UserError(
            f"the image filter of benchmark {benchmark.name} leaves {what}, for each has a segment of an unseen class; "
            "add images without, or shorten its unseen_ids"
        )
    raise UserError(
        f"benchmark {benchmark.name} leaves {what}, and none of them has a segment of a seen class that is no crowd, "
        "so there is nothing to learn; add images, or correct its unseen_ids"
    )


def _require_regions(tars: Sequence[Path], config: TokensConfig, benchmark: Benchmark) -> None:
    """Read the training tars until an image that the protocol leaves has a candidate region. Raises UserError if none
    has."""
    from pipeline.teacher.encode import kept_for_training, shown_in_training
    from pipeline.teacher.regions import find_regions
    from storage.shards import decode_ids, read_shard

    config = replace(config, regions="components")  # their number is 0 where that of their parts is
    for tar in tars:
        for sample in read_shard(tar):
            labelled = [s.id for s in shown_in_training(sample, benchmark).segments]
            if kept_for_training(sample, benchmark) and find_regions(decode_ids(sample), labelled, config).count:
                return
    raise UserError(
        f"no training image that protocol {benchmark.protocol} leaves has {config.region_min_area} connected pixels "
        "without a label, so there is no region to encode; pass --tokens.regions none, --data.protocol pixel-ignore, or "
        "a smaller --tokens.region-min-area"
    )


def _counts(split: str, jobs: list[Job], benchmark: Benchmark) -> dict[str, int]:
    from storage.tokens import read_tokens

    images, kept, instances, too_small = sum(job.images for job in jobs), 0, 0, 0
    regions = {"regions": 0, "images_with_regions": 0, "region_fragments": 0}
    for job in jobs:
        group = read_tokens(job.group)
        kept, instances = kept + int(group.kept.sum()), instances + len(group.instance)
        too_small += int((~group.encoded).sum())
        if group.regions:
            found = group.regions.counts, group.regions.counts > 0, group.regions.fragments
            regions = {
                name: count + int(more.sum()) for (name, count), more in zip(regions.items(), found, strict=True)
            }
    counts = {"images": images, "encoded": kept, "instances": instances, "too_small": too_small}
    if split == "train":
        counts["left_out_by_image_filter"] = images - kept
        log.info("%s: %d of %d training images are left for training", benchmark.protocol, kept, images)
        if jobs and jobs[0].config.regions != "none":
            counts |= regions
            log.info(
                "%d regions of the area without a label in %d images were encoded; %d smaller than %d pixels were not",
                *regions.values(), jobs[0].config.region_min_area,
            )  # fmt: skip
    return counts


def _encode(job: Job, runtime: Runtime, progress: Progress) -> str:
    """Write the job's group unless it exists, and return the device's name."""
    from pipeline.teacher.encode import encode_tar

    def write(job: Job, path: Path) -> None:
        with _LOADING:
            teacher = _load(job.teacher, runtime)
        encode_tar(teacher, job.tar, path, job.config, job.benchmark, hide=job.hide, progress=progress)

    return make_group(job, write, runtime, progress)


_LOADING = threading.Lock()  # a cluster's workers may have several threads


@functools.lru_cache(maxsize=1)
def _load(teacher: TeacherConfig, runtime: Runtime) -> Teacher:
    """The teacher, loaded once per worker."""
    return teacher.load(runtime)
