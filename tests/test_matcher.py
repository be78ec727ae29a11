"""The matcher against brute force over all assignments, transformers' Mask2Former matcher, and its own symmetries."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mask2former.modeling_mask2former import Mask2FormerHungarianMatcher, sample_point

from models.losses import focal_loss
from models.matcher import match

WEIGHTS: dict[str, Any] = {"class_weight": 2.0, "bce_weight": 5.0, "dice_weight": 5.0}
COUNTS = (2, 0, 3, 1)
L, B, Q, K = 3, len(COUNTS), 5, 7


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def world(counts: tuple[int, ...] = COUNTS, seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    g = rng(seed)
    class_logits = torch.randn(L, len(counts), Q, K, generator=g) * 3
    mask_logits = torch.randn(L, len(counts), Q, 6, 6, generator=g) * 3
    labels = [torch.randint(0, K, (count,), generator=g) for count in counts]
    masks = [torch.rand(count, 24, 24, generator=g) > 0.6 for count in counts]
    return class_logits, mask_logits, labels, masks


def slow_costs(class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor, points: Tensor) -> Tensor:
    """(Q, O) of one image and layer in float64, by the definition of the losses."""
    cost = torch.zeros(len(class_logits), len(labels), dtype=torch.float64)
    for q, (classes, map_) in enumerate(zip(class_logits.double(), mask_logits.double(), strict=True)):
        x = sample_point(map_[None, None], points.double(), align_corners=False)[0, 0]
        for o, (label, mask) in enumerate(zip(labels, masks, strict=True)):
            t = sample_point(mask[None, None].double(), points.double(), align_corners=False)[0, 0]
            one, s = classes[label], x.sigmoid()
            focal = focal_loss(one, torch.tensor(1), normaliser=1) - focal_loss(one, torch.tensor(0), normaliser=1)
            dice = 1 - (2 * (s * t).sum() + 1) / (s.sum() + t.sum() + 1)
            cost[q, o] = 2 * focal + 5 * F.binary_cross_entropy_with_logits(x, t) + 5 * dice
    return cost


@pytest.mark.parametrize("seed", range(4))
def test_no_assignment_is_cheaper(seed: int) -> None:
    class_logits, mask_logits, labels, masks = world(seed=seed)
    found = match(class_logits, mask_logits, labels, masks, **WEIGHTS, points=40, generators=[rng(9)] * len(masks))
    points = torch.rand(B, 40, 2, generator=rng(9))
    assert found.shape == (L, B, Q)
    for layer in range(L):
        for b, count in enumerate(COUNTS):
            cost = slow_costs(class_logits[layer, b], mask_logits[layer, b], labels[b], masks[b], points[b : b + 1])
            chosen = sum(float(cost[q, o]) for q, o in enumerate(found[layer, b].tolist()) if o >= 0)
            assert sorted(found[layer, b].tolist()) == [-1] * (Q - count) + list(range(count))
            least = min(sum(float(cost[q, o]) for o, q in enumerate(qs)) for qs in permutations(range(Q), count))
            assert chosen == pytest.approx(least, abs=1e-4)


def test_masks_are_matched_as_in_transformers() -> None:
    class_logits, mask_logits, labels, masks = world((4, 2, 5), seed=3)
    found = match(
        class_logits[:1],
        mask_logits[:1],
        labels,
        masks,
        class_weight=0,
        bce_weight=5,
        dice_weight=3,
        points=64,
        generators=[rng(1)] * len(masks),
    )
    torch.manual_seed(1)
    theirs: Any = Mask2FormerHungarianMatcher(cost_class=0, cost_mask=5, cost_dice=3, num_points=64)
    indices = theirs(mask_logits[0], class_logits[0], [mask.float() for mask in masks], labels)
    for b, (query, segment) in enumerate(indices):
        expected = torch.full((Q,), -1)
        expected[query] = segment
        assert torch.equal(found[0, b], expected)


def test_the_query_that_shows_a_segment_gets_it() -> None:
    _, _, labels, masks = world()
    class_logits, mask_logits = torch.full((1, B, Q, K), -5.0), torch.full((1, B, Q, 24, 24), -5.0)
    planted = torch.full((1, B, Q), -1)
    for b, count in enumerate(COUNTS):
        for o, q in enumerate(torch.randperm(Q, generator=rng(b))[:count].tolist()):
            planted[0, b, q] = o
            class_logits[0, b, q, labels[b][o]] = 5.0
            mask_logits[0, b, q][masks[b][o]] = 5.0
    assert torch.equal(
        match(class_logits, mask_logits, labels, masks, **WEIGHTS, points=100, generators=[rng()] * len(masks)), planted
    )


def test_the_class_decides_between_equal_masks() -> None:
    class_logits, mask_logits = torch.full((1, 1, 2, 3), -4.0), torch.zeros(1, 1, 2, 6, 6)
    class_logits[0, 0, 1, 2] = 4.0
    masks = [torch.ones(1, 12, 12, dtype=torch.bool)]
    found = match(
        class_logits, mask_logits, [torch.tensor([2])], masks, **WEIGHTS, points=20, generators=[rng()] * len(masks)
    )
    assert found.tolist() == [[[-1, 0]]]


def test_segments_may_come_in_any_order() -> None:
    class_logits, mask_logits, labels, masks = world()
    found = match(class_logits, mask_logits, labels, masks, **WEIGHTS, points=40, generators=[rng()] * len(masks))
    flipped = match(
        class_logits,
        mask_logits,
        [x.flip(0) for x in labels],
        [x.flip(0) for x in masks],
        **WEIGHTS,
        points=40,
        generators=[rng()] * len(masks),
    )
    counts = torch.tensor(COUNTS)[None, :, None]
    assert torch.equal(torch.where(flipped < 0, -1, counts - 1 - flipped), found)


def test_layers_do_not_see_each_other_and_share_points() -> None:
    class_logits, mask_logits, labels, masks = world()
    found = match(class_logits, mask_logits, labels, masks, **WEIGHTS, points=10, generators=[rng()] * len(masks))
    for layer in range(L):
        alone = match(
            class_logits[layer, None],
            mask_logits[layer, None],
            labels,
            masks,
            **WEIGHTS,
            points=10,
            generators=[rng()] * len(masks),
        )
        assert torch.equal(alone[0], found[layer])


def test_more_segments_than_queries_leave_some_out() -> None:
    class_logits, mask_logits, labels, masks = world((9, 1))
    found = match(class_logits, mask_logits, labels, masks, **WEIGHTS, points=40, generators=[rng()] * len(masks))
    assert (found[:, 0] >= 0).all()
    assert all(len(set(row)) == Q for row in found[:, 0].tolist())


def test_images_without_segments_match_nothing() -> None:
    found = match(*world((0, 0)), **WEIGHTS, points=10, generators=[rng()] * 2)
    assert torch.equal(found, torch.full((L, 2, Q), -1))


def test_half_precision_matches_alike() -> None:
    class_logits, mask_logits, labels, masks = world()
    class_logits, mask_logits = class_logits.bfloat16(), mask_logits.bfloat16()
    full = match(
        class_logits.float(), mask_logits.float(), labels, masks, **WEIGHTS, points=40, generators=[rng()] * len(masks)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            match(class_logits, mask_logits, labels, masks, **WEIGHTS, points=40, generators=[rng()] * len(masks)), full
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_refused(bad: float) -> None:
    class_logits, mask_logits, labels, masks = world()
    with pytest.raises(ValueError, match="diverged; lower the learning rate"):
        match(class_logits, mask_logits * bad, labels, masks, **WEIGHTS, points=10, generators=[rng()] * len(masks))


# ------------------------------------------------------------------------------------------------ regions without a class


def with_regions(masks: list[Tensor], counts: tuple[int, ...], seed: int) -> list[Tensor]:
    """The masks of the segments, then of so many regions."""
    g = rng(seed + 100)
    return [
        torch.cat((own, torch.rand(more, 24, 24, generator=g) > 0.6)) for own, more in zip(masks, counts, strict=True)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_regions_get_the_queries_that_are_left_at_least_cost_of_their_masks(seed: int) -> None:
    """Segments have the queries that they have without regions; of the others no assignment is cheaper."""
    class_logits, mask_logits, labels, masks = world(seed=seed)
    more = (2, 4, 3, 0)
    both = with_regions(masks, more, seed)
    options: dict[str, Any] = {**WEIGHTS, "points": 40}
    alone = match(class_logits, mask_logits, labels, masks, **options, generators=[rng(9)] * B)
    found = match(class_logits, mask_logits, labels, both, **options, generators=[rng(9)] * B)
    points = torch.rand(B, 40, 2, generator=rng(9))
    for layer in range(L):
        for b, (count, regions) in enumerate(zip(COUNTS, more, strict=True)):
            own = torch.where(found[layer, b] < count, found[layer, b], -1)
            assert torch.equal(own, alone[layer, b])
            free = (own < 0).nonzero()[:, 0].tolist()
            chosen = {q: int(found[layer, b, q]) - count for q in free if found[layer, b, q] >= 0}
            assert len(chosen) == len(set(chosen.values())) == min(regions, len(free))
            if not chosen:
                continue
            none = torch.zeros(Q, 1)
            cost = slow_costs(
                none, mask_logits[layer, b], torch.zeros(regions).long(), both[b][count:], points[b : b + 1]
            )
            cost = cost - slow_class_cost()
            queries, few = (free, regions) if len(free) >= regions else (range(regions), len(free))
            pairs = cost[free] if len(free) >= regions else cost[free].T
            least = min(
                sum(float(pairs[q, o]) for o, q in enumerate(qs)) for qs in permutations(range(len(queries)), few)
            )
            assert sum(float(cost[q, r]) for q, r in chosen.items()) == pytest.approx(least, abs=1e-4)


def slow_class_cost() -> float:
    """What `slow_costs` adds for a class logit of 0."""
    zero = torch.zeros(())
    return 2 * float(focal_loss(zero, torch.tensor(1), normaliser=1) - focal_loss(zero, torch.tensor(0), normaliser=1))


@pytest.mark.parametrize("mask_loss", ["points", "full"])
def test_the_class_is_nothing_to_a_region(mask_loss: Any) -> None:
    class_logits, mask_logits, labels, masks = world()
    both = with_regions(masks, (1, 2, 0, 2), 0)
    options: dict[str, Any] = {**WEIGHTS, "points": 40, "mask_loss": mask_loss}
    found = match(class_logits, mask_logits, labels, both, **options, generators=[rng(1)] * B)
    others = torch.ones_like(class_logits, dtype=torch.bool)  # the logits that decide nothing for a segment
    for b, label in enumerate(labels):
        others[:, b, :, label] = False
    moved = torch.where(others, class_logits * -3 + 1, class_logits)
    assert torch.equal(match(moved, mask_logits, labels, both, **options, generators=[rng(1)] * B), found)


def test_without_a_query_left_a_region_has_none() -> None:
    class_logits, mask_logits, labels, masks = world((9, 1))
    both = with_regions(masks, (3, 7), 0)
    found = match(class_logits, mask_logits, labels, both, **WEIGHTS, points=40, generators=[rng()] * 2)
    assert found[:, 0].max() < 9
    assert all(sorted(row)[0] == 0 and len(set(row)) == Q and min(row) >= 0 for row in found[:, 1].tolist())


def test_images_with_regions_alone() -> None:
    class_logits, mask_logits, labels, masks = world((0, 0))
    found = match(
        class_logits, mask_logits, labels, with_regions(masks, (1, 2), 0), **WEIGHTS, points=10, generators=[rng()] * 2
    )
    assert [sorted(row) for row in found[0].tolist()] == [[-1] * (Q - 1) + [0], [-1] * (Q - 2) + [0, 1]]
