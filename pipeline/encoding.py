"""One tar of samples -> one group of the teacher's tokens: the work of stage "cache-clip"."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.teacher import Teacher
from pipeline.benchmarks import Benchmark
from storage.shards import Sample, decode_ids, decode_image, read_shard
from storage.tokens import write_tokens


def kept_for_training(sample: Sample, benchmark: Benchmark) -> bool:
    """The image-filter protocol: an image with any segment of an unseen class takes no part in training."""
    if benchmark.protocol != "image-filter":
        return True
    return not any(s.category_id in set(benchmark.unseen_ids) for s in sample.segments)


def shown_in_training(sample: Sample, benchmark: Benchmark) -> Sample:
    """The pixel-ignore protocol: the sample without its segments of unseen classes, so that no token of them is made."""
    if benchmark.protocol != "pixel-ignore":
        return sample
    return replace(sample, segments=tuple(s for s in sample.segments if benchmark.seen[benchmark.index[s.category_id]]))


def encode_tar(
    clip: Teacher, tar: Path, group: Path, batch: int, benchmark: Benchmark, *, hide: bool, bar: Any
) -> None:
    """One tar to one group. Inputs of several images fill a batch, so memory is bounded whatever an image holds."""
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
        sample = shown_in_training(sample, benchmark) if hide else sample
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
