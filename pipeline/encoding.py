"""One tar of samples -> one group of the teacher's tokens: the work of stage "cache-clip"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from models.teacher import Teacher
from pipeline.benchmarks import Benchmark
from pipeline.cache_clip import TokensConfig
from storage.shards import Sample, decode_ids, decode_image, read_shard
from storage.tokens import write_tokens


def kept_for_training(sample: Sample, benchmark: Benchmark) -> bool:
    """The image-filter protocol: an image with any segment of an unseen class takes no part in training."""
    if benchmark.protocol != "image-filter":
        return True
    return not any(s.category_id in set(benchmark.unseen_ids) for s in sample.segments)


def encode_tar(
    teacher: Teacher,
    tar: Path,
    group: Path,
    config: TokensConfig,
    benchmark: Benchmark,
    *,
    hide: bool,
    progress: Callable[[int, int], None],
) -> None:
    """One tar to one group. Inputs of several images fill a batch, so memory is bounded whatever an image holds.

    `progress(images, instances)`: that many more are encoded.
    """
    clip, batch = teacher, config.batch
    device = next(clip.parameters()).device
    offsets, segment_id, kept = [0], [], []
    pending: list[torch.Tensor] = []
    rows: list[np.ndarray] = []
    is_global: list[bool] = []

    def encode(at_least: int) -> None:
        while sum(len(p) for p in pending) >= max(at_least, 1):
            inputs = torch.cat(pending)
            rows.append(clip.encode_images(inputs[:batch]).half().cpu().numpy())
            pending[:] = [inputs[batch:]] if len(inputs) > batch else []

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
            encode(batch)
        offsets.append(len(segment_id))
        progress(1, len(sample.segments) if kept[-1] else 0)
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
