"""Stage "mask-tokens": the frozen teacher's tokens of the masks that the network of stage 1 finds, for the report's rows
with the teacher at prediction. Both checkpoints share the segmenter, so they share these tokens."""

from __future__ import annotations

import functools
import itertools
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.benchmarks import Benchmark
from pipeline.runtime import Runtime
from pipeline.teacher.cluster import Progress
from pipeline.teacher.config import TeacherConfig, TokensConfig
from pipeline.teacher.pieces import TarJob, make_group, make_groups
from storage import pieces
from storage.keys import Recipe, Ref, sha256_file
from storage.remote import Remote
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
class Job(TarJob):
    """The first `images` samples of a tar, under `hide` of those that the training protocol leaves; the checkpoint's
    folder, and the sha256 of its files (`storage.checkpoints.FILES`)."""

    hide: bool
    checkpoint: Path
    weights: tuple[str, ...]
    config: TokensConfig
    teacher: TeacherConfig
    benchmark: Benchmark

    @property
    def made_of(self) -> tuple[str, ...]:
        return (*super().made_of, *self.weights)


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

    Raises UserError as `make_groups` does, and if a tar is damaged.
    """
    from storage.checkpoints import FILES
    from storage.mask_tokens import check_mask_tokens, mask_token_files
    from storage.shards import Shards

    shards, checkpoint = build.open("shards"), build.open("checkpoint")
    opened = Shards(shards.path)
    wanted = build.recipe.config["calibration_images"]
    train = list(_left_for_training(opened.tars("train"), benchmark, most=wanted))
    val = list(zip(opened.tars("val"), opened.counts("val"), strict=True))
    shared: dict[str, Any] = {
        "artefact": build.recipe.ref,
        "checkpoint": checkpoint.path,
        "weights": tuple(checkpoint.manifest.files[name]["sha256"] for name in FILES),
        "config": config,
        "teacher": teacher,
        "benchmark": benchmark,
    }
    jobs = [
        Job(
            tar=tar,
            sha256=shards.manifest.files[tar.name]["sha256"],
            group=build.path / f"{tar.stem}.zarr",
            images=count,
            hide=hide,
            **shared,
        )
        for hide, tars in ((True, train), (False, val))
        for tar, count in tars
    ]
    make_groups(
        build,
        jobs,
        _encode,
        runtime,
        check=check_mask_tokens,
        files=mask_token_files,
        title="teacher tokens of masks",
        unit="mask",
    )
    _load.cache_clear()
    for split in ("train", "val"):
        build.counts[split] = _counts([job for job in jobs if job.hide == (split == "train")])


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

    def write(job: Job, path: Path) -> None:
        with _LOADING:
            teacher, model = _load(job.teacher, job.checkpoint, job.weights, runtime)
        _write(path, job, teacher, model, runtime, progress)

    return make_group(job, write, runtime, progress, reads=(job.checkpoint,))


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
def _load(
    teacher: TeacherConfig, checkpoint: Path, weights: tuple[str, ...], runtime: Runtime
) -> tuple[Teacher, Model]:
    """The teacher, and the checkpoint with its segmenter folded for inference, loaded once per worker and `weights`,
    the sha256 of the checkpoint's files: a worker may live through two builds of the same key, or have a store of its
    own under the same path. With a remote, files that have others, or are not here, come from there."""
    from models.folding import for_inference
    from pipeline.inference.model import load_model
    from storage.checkpoints import FILES

    with tempfile.TemporaryDirectory(prefix="zs-seg-") as name:
        here = checkpoint
        if runtime.remote and _hashes(checkpoint) != weights:
            here = Path(name)
            pieces.fetch(Remote(runtime.remote), checkpoint, here, dict(zip(FILES, weights, strict=True)))
        model = load_model(here, runtime.torch_device())
    return teacher.load(runtime), replace(model, segmenter=for_inference(model.segmenter))


def _hashes(checkpoint: Path) -> tuple[str, ...]:
    """The sha256 of a checkpoint's files, () for no folder."""
    from storage.checkpoints import FILES

    return tuple(sha256_file(checkpoint / name) for name in FILES) if checkpoint.is_dir() else ()
