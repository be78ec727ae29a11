"""The part of a training stage's config that all three share: how long, how fast, in what order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A training schedule.

    `steps` of `batch` images each; AdamW at `lr`, `weight_decay` on everything but norms, embeddings and scalars. `warmup` steps rise
    linearly; then `decay` "cosine" falls to 0, "step" multiplies by 0.1 at 8/9 and again at 26/27 of the steps, "constant" stays.
    `clip`: largest gradient norm of all parameters together, 0 = none. `ema`: the result is the running average of the weights that
    keeps this share a step, 0 = the last weights. `seed` decides weights, order, views and every draw.
    """

    seed: int = 0
    steps: int = 1
    batch: int = 16
    lr: float = 1e-4
    weight_decay: float = 0.05
    warmup: int = 0
    decay: Literal["cosine", "step", "constant"] = "cosine"
    clip: float = 0.01
    ema: float = 0.0

    def __post_init__(self) -> None:
        name = type(self).__name__.removesuffix("Config").lower()
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"{name}: steps and batch must be at least 1, not {self.steps} and {self.batch}")
        if self.seed < 0:
            raise ValueError(f"{name}: seed must be 0 or more, not {self.seed}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"{name}: ema must be at least 0 and below 1, not {self.ema}")
        if self.lr <= 0:
            raise ValueError(f"{name}: lr must be above 0, not {self.lr}")

    def factor(self, step: int) -> float:
        """What the learning rates are multiplied by at step `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        if self.decay == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if self.decay == "step":
            return 0.1 ** (int(step >= self.steps * 8 / 9) + int(step >= self.steps * 26 / 27))
        return 1.0


def require_sampling(stage: str, sampling: str) -> None:
    """Raises ValueError for a way to draw cached queries that there is not."""
    if sampling not in ("natural", "balanced"):
        raise ValueError(f"{stage}: sampling {sampling!r} is not one of 'natural' and 'balanced'; choose one of them")
