"""Batches for stages 2 and 3 from the cached queries, without reading an image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.training.config import Schedule
from pipeline.training.loop import batch_rng
from storage.errors import UserError
from storage.queries import QueryBank


@dataclass(frozen=True, kw_only=True)
class QueryBatch:
    """The queries of B views: `feature` (B, Q, C) float32, `category` (B, Q) int64 class index, or -1 if unmatched."""

    image_ids: list[int]
    feature: Tensor
    category: Tensor


def query_batches(bank: QueryBank, schedule: Schedule, start: int, *, matched: bool = False) -> Iterator[QueryBatch]:
    """Endless batches of `schedule.batch` views drawn with replacement; batch s depends on the seed and s alone.

    Views are sampled uniformly, with `matched` only views with a matched query. Raises UserError when there is nothing
    to draw from.
    """
    found = bank.category >= 0
    weight = found.any(1).astype(float) if matched else np.ones(len(found))
    if not weight.any():
        raise UserError("no cached query found a segment of a seen class; train stage 1 longer or on more images")
    upto = np.cumsum(weight)
    step = start
    while True:
        draws = batch_rng(schedule.seed, step).random(schedule.batch)
        rows = np.searchsorted(upto, draws * upto[-1], side="right")
        yield QueryBatch(
            image_ids=bank.image_id[rows].tolist(),
            feature=torch.from_numpy(bank.feature[rows]).float(),
            category=torch.from_numpy(bank.category[rows]).long(),
        )
        step += 1
