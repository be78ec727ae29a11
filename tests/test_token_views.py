"""Stage 1's losses when the teacher saw mirrored images too, or left small segments out."""

from __future__ import annotations

from dataclasses import replace

import torch
from loss_samples import IMAGES, V2C, batch, rng, terms_of, v2c, values


def test_segments_without_a_token_leave_the_instance_loss() -> None:
    """A zero row is as if the segment had not been matched, for the instance loss alone."""
    without = replace(batch(), instance_tokens=[tokens.clone() for tokens in batch().instance_tokens])
    without.instance_tokens[0][1] = 0
    step, small = v2c(replace(V2C, instance_negatives="batch")), v2c(replace(V2C, instance_negatives="batch"))
    whole, part = values(terms_of(step, batch(), 3)), values(terms_of(small, without, 3))
    assert whole["instance"] != part["instance"]
    assert {name: value for name, value in whole.items() if name != "instance"} == {
        name: value for name, value in part.items() if name != "instance"
    }
    without.instance_tokens[0][:], without.instance_tokens[2][:] = 0, 0
    assert values(terms_of(v2c(V2C), without, 3))["instance"] == 0


def test_negatives_are_other_images_in_the_same_view() -> None:
    step = v2c(V2C)
    step.images = IMAGES // 2  # so many images in two views
    own = torch.tensor([0, 1, IMAGES // 2, IMAGES // 2 + 1])
    step.config = replace(V2C, bank=200)
    drawn = step._negatives(own, [rng(0)] * 4)
    for row, negatives in zip(own.tolist(), drawn, strict=True):
        view = set(range(IMAGES // 2)) if row < IMAGES // 2 else set(range(IMAGES // 2, IMAGES // 2 * 2))
        assert set(negatives.tolist()) == view - {row}
