"""Small banks, batches and networks for the tests of the criteria, and losses computed slowly."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from models.projector import Projector
from models.segmenter import Segmenter, SegmenterOutput
from pipeline.teacher.text_bank import TextBank
from pipeline.training.config import V2CConfig
from pipeline.training.criteria import V2CCriterion
from pipeline.training.loader import Batch

SEEN = [True, False, True, True, False, False, True]  # 4 seen, 3 unseen
DIM, TEXT_DIM, QUERIES, IMAGES = 16, 8, 6, 5  # IMAGES have a cached global token, 3 of them are in the batch
OWN = [4, 0, 2]
V2C = V2CConfig(points=24, bank=7, gamma=1.5, tau=0.2, class_weight=3.0, bce_weight=4.0, dice_weight=5.0, global_weight=0.5, instance_weight=2.0)  # fmt: skip


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(*shape: int, seed: int) -> Tensor:
    return nn.functional.normalize(torch.randn(*shape, generator=rng(seed)), dim=-1)


def bank() -> TextBank:
    names = [f"class {i}" for i in range(len(SEEN))]
    return TextBank(
        key="0" * 16, embedding=unit(len(SEEN), TEXT_DIM, seed=1), ids=list(range(10, 17)), names=names,
        isthing=[True] * len(SEEN), seen=SEEN, teacher={}, templates=["{}"],
    )  # fmt: skip


def with_other_unseen(bank: TextBank) -> TextBank:
    seen = torch.tensor(bank.seen)[:, None]
    return replace(bank, embedding=torch.where(seen, bank.embedding, unit(len(SEEN), TEXT_DIM, seed=99)))


def projector() -> Projector:
    torch.manual_seed(2)
    return Projector(dim=DIM, text_dim=TEXT_DIM, hidden=10, layers=2)


class Canned(nn.Module):
    """A segmenter whose features and masks are given: the losses need no network."""

    def __init__(self, features: Tensor, masks: Tensor) -> None:
        super().__init__()
        self.features, self.masks = nn.Parameter(features), nn.Parameter(masks)

    def forward(self, images: Tensor, *, dense: bool = True) -> SegmenterOutput:
        return SegmenterOutput(self.features, self.masks)


@cache
def batch() -> Batch:
    """Three images of 32 x 32 with 3, 0 and 2 segments of seen classes; their masks overlap nowhere."""
    masks = torch.zeros(5, 32, 32, dtype=torch.bool)
    masks[0, :12], masks[1, 12:20, :20], masks[2, 22:], masks[3, :, :10], masks[4, 4:30, 15:] = (True,) * 5
    tokens = unit(5, TEXT_DIM, seed=4)
    return Batch(
        image_ids=[1, 2, 3],
        images=torch.randn(3, 3, 32, 32, generator=rng(5)),
        global_rows=torch.tensor(OWN),
        labels=[torch.tensor([0, 3, 6]), torch.zeros(0, dtype=torch.int64), torch.tensor([2, 0])],
        masks=[masks[:3], masks[:0], masks[3:]],
        instance_tokens=[tokens[:3], tokens[:0], tokens[3:]],
    )


@cache
def batch_with_regions() -> Batch:
    """`batch` with 2, 2 and 0 candidate regions, which overlap nothing in their image."""
    data, masks = batch(), torch.zeros(4, 32, 32, dtype=torch.bool)
    masks[0, 12:20, 22:], masks[1, 20:22], masks[2, :9], masks[3, 9:20, 4:] = (True,) * 4
    tokens = unit(4, TEXT_DIM, seed=44)
    both = [torch.cat(pair) for pair in zip(data.masks, (masks[:2], masks[2:], masks[:0]), strict=True)]
    return replace(data, masks=both, region_tokens=[tokens[:2], tokens[2:], tokens[:0]])


def empty() -> Batch:
    nothing = batch()
    return replace(
        nothing,
        labels=[nothing.labels[1]] * 3,
        masks=[nothing.masks[1]] * 3,
        instance_tokens=[nothing.instance_tokens[1]] * 3,
    )


def given() -> Canned:
    masks = torch.randn(3, 3, QUERIES, 8, 8, generator=rng(7))
    return Canned(torch.randn(3, 3, QUERIES, DIM, generator=rng(6)), masks)


def v2c(config: V2CConfig = V2C, texts: TextBank | None = None, segmenter: nn.Module | None = None) -> V2CCriterion:
    used: Segmenter = segmenter or given()  # pyright: ignore[reportAssignmentType]
    return V2CCriterion(used, projector(), texts or bank(), unit(IMAGES, TEXT_DIM, seed=8), config)


def terms_of(step: V2CCriterion, data: Batch, seed: int) -> dict[str, Tensor]:
    """All images draw from one generator, one after the other."""
    return step.terms(data, [rng(seed)] * len(data.image_ids), totals=step.totals(data))


def values(terms: dict[str, Tensor]) -> dict[str, float]:
    return {name: term.item() for name, term in terms.items()}


def naive_focal(logits: Tensor, targets: Tensor) -> float:
    """Lin et al. 2017, one decision at a time, alpha 0.25, gamma 2."""
    total = 0.0
    for logit, target in zip(logits.detach().double().flatten(), targets.flatten(), strict=True):
        p = 1 / (1 + torch.exp(-logit))
        total += float(-0.25 * (1 - p) ** 2 * p.log() if target else -0.75 * p**2 * (1 - p).log())
    return total


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def info_nce(positive: float, negatives: list[float]) -> float:
    scores = torch.tensor([positive, *negatives], dtype=torch.float64)
    return float(scores.exp().sum().log() - positive)
