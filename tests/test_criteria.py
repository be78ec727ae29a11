"""What stage 1 minimises, against slow loops over images and queries; and who learns from it, and from what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_samples import (
    DIM,
    IMAGES,
    OWN,
    QUERIES,
    V2C,
    bank,
    batch,
    cosine,
    empty,
    given,
    info_nce,
    naive_focal,
    rng,
    terms_of,
    v2c,
    values,
    with_other_unseen,
)
from torch import nn

from models import losses
from models.matcher import match
from models.segmenter import build_segmenter
from pipeline.training.config import V2CConfig
from pipeline.training.criteria import V2CCriterion, freeze, one_hot, seen_rows

# ------------------------------------------------------------------------------------------------ shared helpers


def test_seen_rows_by_hand() -> None:
    seen, row = seen_rows(bank(), torch.device("cpu"))
    assert torch.equal(seen, bank().embedding[[0, 2, 3, 6]])
    assert row.tolist() == [0, -1, 1, 2, -1, -1, 3]


def test_one_hot_by_hand() -> None:
    rows = torch.tensor([[2, -1], [0, 1]])
    assert one_hot(rows, 3).tolist() == [[[0, 0, 1], [0, 0, 0]], [[1, 0, 0], [0, 1, 0]]]
    assert one_hot(torch.tensor([-1, -1]), 2).sum() == 0
    assert one_hot(torch.zeros(0, dtype=torch.int64), 4).shape == (0, 4)


def test_freeze() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert freeze(module) is module
    assert not any(p.requires_grad for p in module.parameters()) and not any(m.training for m in module.modules())


# ------------------------------------------------------------------------------------------------ stage 1


@torch.no_grad()
def slow_v2c(step: V2CCriterion, seed: int) -> dict[str, float]:
    """L_v2c image by image and layer by layer; the draws come from a generator of the same seed, in the step's
    order.
    """
    config, draws, data = step.config, rng(seed), batch()
    features, masks = step.segmenter(data.images)
    text = bank().embedding[[0, 2, 3, 6]]
    seen_index = {0: 0, 2: 1, 3: 2, 6: 3}
    v = step.projector(features)
    logits = step.projector.logits(v, text)
    labels = [torch.tensor([seen_index[k] for k in label.tolist()], dtype=torch.int64) for label in data.labels]
    weights: Any = {
        "class_weight": config.class_weight,
        "bce_weight": config.bce_weight,
        "dice_weight": config.dice_weight,
    }
    assigned = match(logits, masks, labels, data.masks, points=config.points, generators=[draws] * 3, **weights)
    layers = range(len(logits))
    targets = torch.zeros_like(logits)
    matched_masks, true_masks = [], []
    for image in range(3):
        for layer in layers:
            for query in range(QUERIES):
                segment = int(assigned[layer, image, query])
                if segment >= 0:
                    targets[layer, image, query, labels[image][segment]] = 1
                    matched_masks.append(masks[layer, image, query])
                    true_masks.append(data.masks[image][segment])
    assert len(true_masks) == len(layers) * 5
    bce, dice = losses.mask_losses(
        torch.stack(matched_masks), torch.stack(true_masks), points=config.points, normaliser=5, draws=[(draws, 15)]
    )
    drawn = torch.randint(IMAGES - 1, (3, config.bank), generator=draws)
    global_, instance = [], []
    for image in range(3):
        own = step.global_tokens[OWN[image]]
        strength = [
            cosine(own, v[-1, image, q]) * (config.gamma * (assigned[-1, image, q] >= 0) + 1) for q in range(QUERIES)
        ]
        share = torch.tensor(strength).exp() / torch.tensor(strength).exp().sum()
        if not config.target_attention:
            share = torch.full((QUERIES,), 1 / QUERIES)
        v_a = sum(share[q] * v[-1, image, q] for q in range(QUERIES))
        assert isinstance(v_a, torch.Tensor)
        others = [row for row in range(IMAGES) if row != OWN[image]]
        negatives = [cosine(v_a, step.global_tokens[others[i]]) / config.tau for i in drawn[image].tolist()]
        global_.append(info_nce(cosine(v_a, own) / config.tau, negatives))
        for query in range(QUERIES):
            segment = int(assigned[-1, image, query])
            if segment >= 0:
                tokens = [t for i, t in enumerate(data.instance_tokens[image]) if i != segment]
                if config.instance_negatives == "batch":
                    tokens += [t for other in range(3) if other != image for t in data.instance_tokens[other]]
                own_token = data.instance_tokens[image][segment]
                against = [cosine(v[-1, image, query], t) / config.tau for t in tokens]
                instance.append(info_nce(cosine(v[-1, image, query], own_token) / config.tau, against))
    return {
        "class": config.class_weight * naive_focal(logits, targets) / 5,
        "bce": config.bce_weight * bce.item(),
        "dice": config.dice_weight * dice.item(),
        "global": config.global_weight * sum(global_) / 3,
        "instance": config.instance_weight * sum(instance) / len(instance),
    }


@pytest.mark.parametrize(
    "config",
    [V2C, replace(V2C, target_attention=False, instance_negatives="batch"), replace(V2C, gamma=0.0, tau=0.07)],
    ids=["default", "mean and batch", "no extra attention"],
)
def test_stage_1_is_the_sum_of_its_terms(config: V2CConfig) -> None:
    step = v2c(config)
    assert values(terms_of(step, batch(), 3)) == pytest.approx(slow_v2c(step, 3), rel=1e-4)


def test_stage_1_draws_from_its_generator_alone() -> None:
    torch.manual_seed(0)
    one = values(terms_of(v2c(), batch(), 3))
    torch.manual_seed(1)
    assert values(terms_of(v2c(), batch(), 3)) == one
    other = values(terms_of(v2c(), batch(), 4))
    assert all(other[name] != one[name] for name in ("bce", "dice", "global"))


@pytest.mark.parametrize("name", ["global", "instance"])
def test_a_weight_of_0_takes_a_term_away_and_nothing_else(name: str) -> None:
    whole = values(terms_of(v2c(), batch(), 3))
    without = values(terms_of(v2c(replace(V2C, **{f"{name}_weight": 0.0})), batch(), 3))
    assert set(whole) - set(without) == {name}
    assert all(without[other] == whole[other] for other in without)


@pytest.mark.parametrize("name", ["class", "bce", "dice"])
def test_a_weight_of_0_switches_a_part_of_the_matching_loss_off(name: str) -> None:
    """The term is 0 and teaches nothing; sigma^ is found without it too, by which the other terms may move."""
    weight = {f"{name}_weight": 0.0}
    step = v2c(replace(V2C, **weight))
    terms = terms_of(step, batch(), 3)
    assert terms[name].item() == 0
    terms[name].backward()
    assert not any(p.grad is not None and p.grad.any() for p in step.segmenter.parameters())
    assert values(terms) == pytest.approx(slow_v2c(step, 3), rel=1e-4)


def test_the_baseline_is_the_matching_loss_alone() -> None:
    assert list(terms_of(v2c(replace(V2C, global_weight=0.0, instance_weight=0.0)), batch(), 3)) == [
        "class",
        "bce",
        "dice",
    ]


def test_weights_weigh() -> None:
    one, two = (values(terms_of(v2c(replace(V2C, global_weight=w, instance_weight=w)), batch(), 3)) for w in (1.0, 2.0))
    assert two["global"] == pytest.approx(2 * one["global"]) and two["instance"] == pytest.approx(2 * one["instance"])


def test_images_without_segments_push_every_logit_down() -> None:
    """Unmatched queries have all-zero targets (D2)."""
    step = v2c()
    terms = values(terms_of(step, empty(), 3))
    logits = step.projector.logits(step.projector(step.segmenter(batch().images).features), step.text)
    assert terms["class"] == pytest.approx(V2C.class_weight * naive_focal(logits, torch.zeros_like(logits)), rel=1e-4)
    assert (terms["bce"], terms["dice"], terms["instance"]) == (0, 0, 0)
    assert terms["global"] > 0


def test_stage_1_knows_nothing_of_unseen_classes() -> None:
    assert values(terms_of(v2c(texts=with_other_unseen(bank())), batch(), 3)) == values(terms_of(v2c(), batch(), 3))


def test_negatives_are_uniform_and_never_the_image_itself() -> None:
    """D3: 40,000 draws a row; each other row 10,000 times, give or take five standard deviations."""
    step = v2c(replace(V2C, bank=40_000))
    drawn = step._negatives(torch.tensor(OWN), [rng(0)] * 3)
    assert drawn.shape == (3, 40_000)
    for own, row in zip(OWN, drawn, strict=True):
        counts = row.bincount(minlength=IMAGES)
        assert counts[own] == 0 and len(counts) == IMAGES
        others = counts[torch.arange(IMAGES) != own].double()
        assert ((others - 10_000).abs() < 5 * (40_000 * 0.25 * 0.75) ** 0.5).all()


def test_the_whole_network_learns_in_stage_1() -> None:
    torch.manual_seed(0)
    segmenter = build_segmenter(
        backbone="test_resnet", backbone_weights=None, frozen_batchnorm=False, queries=QUERIES, dim=DIM, heads=2,
        encoder_layers=1, encoder_ffn=16, encoder_points=2, decoder_layers=2, decoder_ffn=16,
    )  # fmt: skip
    step = v2c(segmenter=segmenter.train())
    data = replace(batch(), images=torch.randn(3, 3, 64, 64, generator=rng(9)))
    parameters = {f"{m}.{n}": p for m in ("segmenter", "projector") for n, p in getattr(step, m).named_parameters()}
    optimiser = torch.optim.SGD(parameters.values(), lr=1e-3)
    learnt: set[str] = set()
    for number in range(
        2
    ):  # a residual branch starts at 0 (zero_init_last), so its inside learns from the second step on
        optimiser.zero_grad()
        torch.stack(list(terms_of(step, data, number).values())).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())
        learnt |= {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
        optimiser.step()
    assert learnt == parameters.keys()


def test_each_decoder_output_learns_from_the_matching_loss_and_only_the_last_from_the_teacher() -> None:
    """Deep supervision, and D4."""
    canned = given()
    terms = terms_of(v2c(segmenter=canned), batch(), 3)
    (features,) = torch.autograd.grad(terms["class"], [canned.features], retain_graph=True)
    assert all(layer.any() for layer in features)
    (masks,) = torch.autograd.grad(terms["bce"] + terms["dice"], [canned.masks], retain_graph=True)
    assert all(layer.any() for layer in masks)
    (features,) = torch.autograd.grad(terms["global"] + terms["instance"], [canned.features])
    assert [bool(layer.any()) for layer in features] == [False, False, True]
