"""Stage "cache-clip": what the frozen teacher sees in every image and every masked instance, computed once."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.benchmarks import Benchmark
from pipeline.runtime import Runtime
from pipeline.teaching import TeacherConfig
from storage.keys import Recipe, Ref
from storage.store import Build, Store

if TYPE_CHECKING:
    from models.teacher import Teacher
    from storage.shards import Sample

STAGE, VERSION = "cache-clip", 1
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """`batch`: teacher inputs at a time, packed across images. It is in the key, for a batch's size may move the last bits."""

    batch: int = 128

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"tokens: batch must be at least 1, not {self.batch}")


def recipe(config: TokensConfig, *, teacher: TeacherConfig, benchmark: Benchmark, shards: Ref) -> Recipe:
    content = {
        "tokens": config, "teacher": teacher.identity, "unseen_ids": benchmark.unseen_ids, "protocol": benchmark.protocol,
    }  # fmt: skip
    return Recipe(kind="tokens", stage=STAGE, version=VERSION, config=content, inputs={"shards": shards})


def run(
    config: TokensConfig, *, teacher: TeacherConfig, benchmark: Benchmark, shards: Ref, store: Store, runtime: Runtime
) -> Ref:
    """Encode every tar into one token group of the same name; a group that is there is not made again."""

    def work(build: Build) -> None:
        from storage.shards import Shards
        from storage.tokens import read_tokens

        opened = Shards(store.open(shards).path)
        clip = None
        for split in ("train", "val"):
            tars = opened.tars(split)
            with runtime.bar(sum(opened.counts(split)), f"teacher tokens, {split}", "image") as bar:
                for tar, count in zip(tars, opened.counts(split), strict=True):
                    group = build.path / f"{tar.stem}.zarr"
                    if not group.exists():
                        clip = clip or teacher.load(runtime)
                        _encode_tar(clip, tar, group, config, benchmark, hide=split == "train", bar=bar)
                    else:
                        bar.update(count)
            images, kept, instances = sum(opened.counts(split)), 0, 0
            for tar in tars:
                group = read_tokens(build.path / f"{tar.stem}.zarr")
                kept, instances = kept + int(group.kept.sum()), instances + len(group.instance)
            build.counts[split] = {"images": images, "encoded": kept, "instances": instances}
            if split == "train":
                build.counts[split]["left_out_by_image_filter"] = images - kept
                log.info("%s: %d of %d training images are left for training", benchmark.protocol, kept, images)
                if not kept:
                    raise ValueError(
                        f"the image filter of benchmark {benchmark.name} leaves no training image; add images"
                    )

        build.provenance["device"] = str(runtime.torch_device())

    return store.build(recipe(config, teacher=teacher, benchmark=benchmark, shards=shards), work)


def kept_for_training(sample: Sample, benchmark: Benchmark) -> bool:
    """The image-filter protocol: an image with any segment of an unseen class takes no part in training."""
    if benchmark.protocol != "image-filter":
        return True
    return not any(s.category_id in set(benchmark.unseen_ids) for s in sample.segments)


def _encode_tar(
    clip: Teacher, tar: Path, group: Path, config: TokensConfig, benchmark: Benchmark, *, hide: bool, bar: Any
) -> None:
    """One tar to one group. Inputs of several images fill a batch, so memory is bounded whatever an image holds."""
    import numpy as np
    import torch

    from storage.shards import decode_ids, decode_image, read_shard
    from storage.tokens import write_tokens

    device = next(clip.parameters()).device
    offsets, segment_id, kept = [0], [], []
    pending: list[torch.Tensor] = []
    rows: list[np.ndarray] = []
    is_global: list[bool] = []

    def encode(at_least: int) -> None:
        while sum(len(p) for p in pending) >= max(at_least, 1):
            inputs = torch.cat(pending)
            rows.append(clip.encode_images(inputs[: config.batch]).half().cpu().numpy())
            pending[:] = [inputs[config.batch :]] if len(inputs) > config.batch else []

    for sample in read_shard(tar):
        kept.append(not hide or kept_for_training(sample, benchmark))
        if kept[-1]:
            image = torch.from_numpy(decode_image(sample)).permute(2, 0, 1).to(device)
            ids = torch.from_numpy(decode_ids(sample)).to(device)
            prepared = clip.prepare(image)
            segments = torch.tensor([s.id for s in sample.segments], device=device)
            pending.append(prepared[None])
            is_global.append(True)
            if len(segments):
                pending.append(clip.mask(prepared, ids == segments[:, None, None]))
                is_global += [False] * len(segments)
                segment_id += segments.tolist()
            encode(config.batch)
        offsets.append(len(segment_id))
        bar.update()
    encode(1)
    flags = np.array(is_global, dtype=bool)
    encoded = np.concatenate(rows) if rows else np.zeros((0, clip.dim), np.float16)
    global_ = np.zeros((len(kept), encoded.shape[1]), np.float16)
    global_[np.array(kept, dtype=bool)] = encoded[flags]
    write_tokens(
        group,
        global_=global_,
        instance=encoded[~flags],
        offsets=np.array(offsets, np.int64),
        segment_id=np.array(segment_id, np.int64),
        kept=np.array(kept, dtype=bool),
    )
