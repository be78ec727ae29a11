"""Batches for stages 2 and 3 out of the cached queries; no image is touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.schedule import Schedule
from pipeline.training import batch_rng
from storage.queries import QueryBank


@dataclass(frozen=True, kw_only=True)
class QueryBatch:
    """B images' queries: `feature` (B, Q, C) float32, `category` (B, Q) class index or -1."""

    image_ids: list[int]
    feature: Tensor
    category: Tensor


def query_batches(
    bank: QueryBank, schedule: Schedule, start: int, *, among: np.ndarray | None = None
) -> Iterator[QueryBatch]:
    """Endless batches of `schedule.batch` views drawn with replacement; batch s is a function of the seed and s alone.

    `among` (n,) bool says which views may be drawn, by default all. Raises ValueError when none may.
    """
    useful = np.arange(len(bank.image_id)) if among is None else np.flatnonzero(among)
    if not len(useful):
        raise ValueError("no cached query found a segment of a seen class; train stage 1 longer or on more images")
    step = start
    while True:
        rows = useful[batch_rng(schedule.seed, step).integers(len(useful), size=schedule.batch)]
        yield QueryBatch(
            image_ids=bank.image_id[rows].tolist(),
            feature=torch.from_numpy(bank.feature[rows]).float(),
            category=torch.from_numpy(bank.category[rows]).long(),
        )
        step += 1
