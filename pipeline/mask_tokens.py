"""Stage "mask-tokens": the frozen teacher's tokens of the masks that the network of stage 1 finds, for the report's rows
with the teacher at prediction. Both checkpoints share the segmenter, so they share these tokens."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.benchmarks import Benchmark
from pipeline.runtime import Runtime
from pipeline.teacher.cluster import Progress, run_tasks
from pipeline.teacher.config import TeacherConfig, TokensConfig
from pipeline.teacher.pieces import require_here, write_once
from storage.keys import Recipe, Ref
from storage.store import Build

if TYPE_CHECKING:
    from torch import Tensor

    from models.teacher import Teacher
    from pipeline.inference.model import Model
    from storage.shards import Sample

STAGE, VERSION = "mask-tokens", 1
# The options of TokensConfig that decide a mask's token; the others are of training views and of segments.
OPTIONS = ("batch", "method", "crop", "margin", "resize", "min_area", "dtype")
IMAGES_A_PASS = 8  # of the segmenter
log = logging.getLogger(__name__)


def recipe(
    config: TokensConfig,
    *,
    teacher: TeacherConfig,
    benchmark: Benchmark,
    calibration_images: int,
    shards: Ref,
    checkpoint: Ref,
) -> Recipe:
    content = {
        "tokens": {name: getattr(config, name) for name in OPTIONS},
        "teacher": teacher.identity,
        # of a semantic benchmark, whose maps have no threshold to choose, none
        "calibration_images": calibration_images if benchmark.task == "panoptic" else 0,
        "unseen_ids": benchmark.unseen_ids,
        "protocol": benchmark.protocol,
    }
    return Recipe(
        kind="mask-tokens",
        stage=STAGE,
        version=VERSION,
        config=content,
        inputs={"shards": shards, "checkpoint": checkpoint},
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One tar, of which the first `images` samples get tokens, under `hide` of those that the training protocol
    leaves; the group for them; and the checkpoint's folder."""

    tar: Path
    group: Path
    images: int
    hide: bool
    checkpoint: Path
    config: TokensConfig
    teacher: TeacherConfig
    benchmark: Benchmark

    def __str__(self) -> str:
        return str(self.tar)


def build(
    build: Build,
    config: TokensConfig,
    runtime: Runtime,
    *,
    teacher: TeacherConfig,
    benchmark: Benchmark,
    calibration_images: int,
) -> None:
    """Write one group of mask tokens per tar, one Dask task each: of all validation images, and of the first
    `calibration_images` training images that the protocol leaves, on which the object threshold is chosen (D8).
    Existing groups are kept.

    Raises UserError as `run_tasks` does, and if a tar is damaged or a worker lacks the store.
    """
    from storage.atomic import clean
    from storage.mask_tokens import check_mask_tokens, mask_token_files
    from storage.shards import Shards

    opened = Shards(build.open("shards").path)
    wanted = build.recipe.config["calibration_images"]
    train = list(_left_for_training(opened.tars("train"), benchmark, most=wanted))
    val = list(zip(opened.tars("val"), opened.counts("val"), strict=True))
    shared: dict[str, Any] = {"config": config, "teacher": teacher, "benchmark": benchmark}
    jobs = [
        Job(
            tar=tar,
            group=build.path / f"{tar.stem}.zarr",
            images=count,
            hide=hide,
            checkpoint=build.open("checkpoint").path,
            **shared,
        )
        for hide, tars in ((True, train), (False, val))
        for tar, count in tars
    ]
    missing = [job for job in jobs if not build.holds(job.group, check_mask_tokens)]
    images, left = (sum(job.images for job in some) for some in (jobs, missing))
    masks, started = 0, time.monotonic()
    with runtime.bar(images, "teacher tokens of masks", "image", initial=images - left) as bar:

        def progress(more_images: int, more_masks: int) -> None:
            nonlocal masks
            masks += more_masks
            bar.set_postfix_str(f"{masks / (time.monotonic() - started):.0f} mask/s", refresh=False)
            bar.update(more_images)

        devices, workers = run_tasks(_encode, missing, runtime, progress=progress)
    _load.cache_clear()
    clean(build.path)  # unfinished files of lost workers
    build.add(*(file for job in jobs for file in mask_token_files(job.group)))
    for split in ("train", "val"):
        build.counts[split] = _counts([job for job in jobs if job.hide == (split == "train")])
    build.provenance |= {"device": ", ".join(sorted(set(devices))), "workers": workers}


def _left_for_training(tars: Sequence[Path], benchmark: Benchmark, *, most: int) -> Iterator[tuple[Path, int]]:
    """The training tars with the number of their images that the protocol leaves, `most` in all, in order."""
    from pipeline.teacher.encode import kept_for_training
    from storage.shards import read_shard

    for tar in tars if most else ():
        count = min(sum(kept_for_training(sample, benchmark) for sample in read_shard(tar)), most)
        if count:
            yield tar, count
        if not (most := most - count):
            return


def _counts(jobs: list[Job]) -> dict[str, int]:
    from storage.mask_tokens import read_mask_tokens

    groups = [read_mask_tokens(job.group) for job in jobs]
    return {
        "images": sum(len(group.image_id) for group in groups),
        "masks": sum(len(group.query) for group in groups),
    }


def _encode(job: Job, runtime: Runtime, progress: Progress) -> str:
    """Write the job's group unless it exists, and return the device's name."""
    require_here(job.tar, job.checkpoint, job.group.parent)
    device = str(runtime.torch_device())
    if job.group.exists():
        progress(job.images, 0)
        return device
    with _LOADING:
        teacher, model = _load(job.teacher, job.checkpoint, runtime)
    write_once(job.group, lambda own: _write(own, job, teacher, model, runtime, progress))
    return device


def _write(own: Path, job: Job, teacher: Teacher, model: Model, runtime: Runtime, progress: Progress) -> None:
    import numpy as np

    from pipeline.data.ahead import mapped
    from pipeline.data.transforms import channels_first
    from pipeline.inference.forward import outputs
    from pipeline.inference.teacher import logit_scale, mask_tokens
    from pipeline.teacher.encode import kept_for_training
    from storage.mask_tokens import write_mask_tokens
    from storage.shards import decode_image, read_shard

    def decoded(sample: Sample) -> tuple[tuple[int, Tensor], Tensor]:
        image = channels_first(decode_image(sample))
        return (sample.image_id, image), image

    kept = (sample for sample in read_shard(job.tar) if not job.hide or kept_for_training(sample, job.benchmark))
    images = mapped(decoded, itertools.islice(kept, job.images), workers=runtime.decoders, count=4 * runtime.decoders)
    image_ids: list[int] = []
    queries, tokens = [np.zeros(0, np.int32)], [np.zeros((0, teacher.dim), np.float16)]
    for (image_id, image), output in outputs(model.segmenter, images, model.meta.resize, batch=IMAGES_A_PASS):
        found, rows = mask_tokens(teacher, image, output, job.config)
        image_ids.append(image_id)
        queries.append(found.cpu().numpy())
        tokens.append(rows.half().cpu().numpy())
        progress(1, len(found))
    write_mask_tokens(
        own,
        image_id=np.array(image_ids),
        offsets=np.cumsum([len(some) for some in queries]),
        query=np.concatenate(queries),
        token=np.concatenate(tokens),
        scale=logit_scale(teacher),
    )


_LOADING = threading.Lock()  # a cluster's workers may have several threads


@functools.lru_cache(maxsize=1)
def _load(teacher: TeacherConfig, checkpoint: Path, runtime: Runtime) -> tuple[Teacher, Model]:
    """The teacher, and the checkpoint with its segmenter folded for inference, loaded once per worker."""
    from dataclasses import replace

    from models.folding import for_inference
    from pipeline.inference.model import load_model

    model = load_model(checkpoint, runtime.torch_device())
    return teacher.load(runtime), replace(model, segmenter=for_inference(model.segmenter))
