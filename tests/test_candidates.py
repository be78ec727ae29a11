"""What free queries of stage 1 learn from class-less regions, against slow loops over images and queries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_samples import (
    QUERIES,
    TEXT_DIM,
    V2C,
    bank,
    batch,
    batch_with_regions,
    cosine,
    given,
    info_nce,
    naive_focal,
    rng,
    terms_of,
    unit,
    v2c,
    values,
)
from torch import nn

from models import losses
from models.matcher import match
from models.segmenter import SegmenterOutput
from pipeline.training.criteria import V2CCriterion

# Without L_g, whose draws come between those of the masks.
CANDIDATES = replace(V2C, global_weight=0.0, candidate_mask_weight=0.7, candidate_token_weight=0.3)


@torch.no_grad()
def slow_candidates(step: V2CCriterion, seed: int) -> dict[str, float]:
    """The losses that regions enter, query by query; the draws come from a generator of the same seed, in the step's
    order."""
    config, draws, data = step.config, rng(seed), batch_with_regions()
    features, masks = step.segmenter(data.images)
    v = step.projector(features)
    logits = step.projector.logits(v, bank().embedding[[0, 2, 3, 6]])
    labels = [torch.tensor([{0: 0, 2: 1, 3: 2, 6: 3}[k] for k in label.tolist()]).long() for label in data.labels]
    weights: Any = {name: getattr(config, name) for name in ("class_weight", "bce_weight", "dice_weight", "points")}
    assigned = match(logits, masks, labels, data.masks, generators=[draws] * 3, **weights)
    targets, counted = torch.zeros_like(logits), torch.ones_like(logits, dtype=torch.bool)
    pairs: dict[bool, list[tuple[int, int, int, int]]] = {True: [], False: []}
    for image, layer, query in (index.tolist() for index in (assigned >= 0).transpose(0, 1).nonzero()):
        shown = int(assigned[layer, image, query])
        pairs[region := shown >= len(labels[image])].append((image, layer, query, shown))
        counted[layer, image, query] = not region
        if not region:
            targets[layer, image, query, labels[image][shown]] = 1
    found = {}
    for region in (False, True):
        predicted = torch.stack([masks[layer, image, query] for image, layer, query, _ in pairs[region]])
        truth = torch.stack([data.masks[image][shown] for image, _, _, shown in pairs[region]])
        assert len(truth) == len(logits) * (4 if region else 5)
        found[region] = losses.mask_losses(
            predicted, truth, points=config.points, normaliser=len(truth) / len(logits), draws=[(draws, len(truth))]
        )
    every = torch.cat([*data.region_tokens, *data.instance_tokens])
    token = []
    for image, layer, query, shown in pairs[True]:
        if layer == len(logits) - 1:
            own = data.region_tokens[image][shown - len(labels[image])]
            against = [cosine(v[-1, image, query], t) / config.tau for t in every if not torch.equal(t, own)]
            token.append(info_nce(cosine(v[-1, image, query], own) / config.tau, against))
    assert len(token) == 4
    bce, dice = (float(value) for value in found[True])
    return {
        "class": config.class_weight * naive_focal(logits[counted], targets[counted]) / 5,
        "bce": config.bce_weight * float(found[False][0]),
        "dice": config.dice_weight * float(found[False][1]),
        "candidate mask": config.candidate_mask_weight * (config.bce_weight * bce + config.dice_weight * dice),
        "candidate token": config.candidate_token_weight * sum(token) / 4,
    }


def test_free_queries_learn_from_the_regions_that_they_are_matched_to() -> None:
    """Masks on every output, tokens on the last, and neither a positive nor an all-zero target of the class loss."""
    step = v2c(CANDIDATES)
    expected = slow_candidates(step, 3)
    found = values(terms_of(step, batch_with_regions(), 3))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    plain = values(terms_of(v2c(replace(V2C, global_weight=0.0)), batch(), 3))
    assert all(found[name] == pytest.approx(plain[name], rel=1e-5) for name in plain if name != "class")
    assert found["class"] < plain["class"]


@pytest.mark.parametrize("name", ["candidate mask", "candidate token"])
def test_each_candidate_loss_can_be_had_alone(name: str) -> None:
    """The queries of regions are left out of the class loss all the same."""
    off = {"candidate mask": "candidate_token_weight", "candidate token": "candidate_mask_weight"}[name]
    both, one = (
        values(terms_of(v2c(config), batch_with_regions(), 3))
        for config in (CANDIDATES, replace(CANDIDATES, **{off: 0.0}))
    )
    assert one == {key: value for key, value in both.items() if key == name or not key.startswith("candidate")}


def test_candidates_teach_masks_everywhere_and_features_on_the_last_output() -> None:
    canned = given()
    terms = terms_of(v2c(CANDIDATES, segmenter=canned), batch_with_regions(), 3)
    (masks,) = torch.autograd.grad(terms["candidate mask"], [canned.masks], retain_graph=True)
    assert all(layer[:2].flatten(1).any(1).all() and not layer[2].any() for layer in masks)
    (features,) = torch.autograd.grad(terms["candidate token"], [canned.features])
    assert [bool(layer.any()) for layer in features] == [False, False, True]


def test_a_batch_without_regions_has_candidate_losses_of_0() -> None:
    none = replace(batch(), region_tokens=[torch.zeros(0, TEXT_DIM)] * 3)
    terms = terms_of(v2c(CANDIDATES), none, 3)
    found, plain = values(terms), values(terms_of(v2c(replace(V2C, global_weight=0.0)), batch(), 3))
    assert (found.pop("candidate mask"), found.pop("candidate token")) == (0, 0)
    assert found == plain
    torch.stack([terms["candidate mask"], terms["candidate token"]]).sum().backward()


@pytest.mark.parametrize("crowded", ["regions", "segments"])
@pytest.mark.parametrize("negatives", ["image", "batch"])
def test_candidate_losses_of_parts_are_those_of_the_whole(negatives: Any, crowded: str) -> None:
    """Also where an image has more segments and regions than queries; so do their gradients add up."""
    config = replace(CANDIDATES, instance_negatives=negatives, segmenter=replace(V2C.segmenter, queries=QUERIES))
    data, generator = batch_with_regions(), rng(20)
    crowd = torch.rand(4, 32, 32, generator=generator) > 0.5
    more = unit(4, TEXT_DIM, seed=21)
    if crowded == "regions":
        data = replace(
            data,
            masks=[torch.cat((data.masks[0], crowd)), *data.masks[1:]],
            region_tokens=[torch.cat((data.region_tokens[0], more)), *data.region_tokens[1:]],
        )
    else:
        data = replace(
            data,
            labels=[torch.cat((torch.tensor([0, 2, 3, 6]), data.labels[0])), *data.labels[1:]],
            masks=[torch.cat((crowd, data.masks[0])), *data.masks[1:]],
            instance_tokens=[torch.cat((more, data.instance_tokens[0])), *data.instance_tokens[1:]],
        )
        assert len(data.labels[0]) > QUERIES
    whole, gradients = {}, []
    for parts in (1, 3):
        canned = given()
        step = v2c(config, segmenter=canned)
        totals, terms = step.totals(data), {}
        instances = [torch.cat(part.instance_tokens) for part in data.split(parts)]
        regions = [torch.cat(part.region_tokens) for part in data.split(parts)]
        features, masks = canned.features, canned.masks
        for number, part in enumerate(data.split(parts)):
            own = slice(number * 3 // parts, (number + 1) * 3 // parts)
            step.segmenter = Part(canned, own)  # pyright: ignore[reportAttributeAccessIssue]
            others = [torch.cat([*x[:number], *x[number + 1 :]]) if parts > 1 else None for x in (instances, regions)]
            draws = [rng(30 + i) for i in range(3)][own]
            found = step.terms(part, draws, totals=totals, elsewhere=others[0], regions_elsewhere=others[1])
            terms = {name: terms.get(name, 0) + value for name, value in found.items()}
        gradients.append(torch.autograd.grad(torch.stack(list(terms.values())).sum(), [features, masks]))
        found = values(terms)
        whole = whole or found
        assert found == pytest.approx(whole, rel=1e-5)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class Part(nn.Module):
    """Some images of a canned segmenter."""

    def __init__(self, canned: Any, images: slice) -> None:
        super().__init__()
        self.canned, self.images = canned, images

    def forward(self, images: torch.Tensor, *, dense: bool = True) -> SegmenterOutput:
        return SegmenterOutput(self.canned.features[:, self.images], self.canned.masks[:, self.images])
