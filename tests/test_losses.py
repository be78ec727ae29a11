"""Every loss against an independent reference: slow float64 loops, torchvision, transformers, numerical gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss
from transformers.models.mask2former import modeling_mask2former as hf

from models import losses

D = torch.float64
Options = dict[str, Any]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=D)


def cos(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


# ------------------------------------------------------------------------------------------------------------- focal


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 0.0), (0.25, 1.5)])
def test_focal_loss_is_torchvisions(alpha: float, gamma: float) -> None:
    logits, targets = normal(3, 4, 5) * 6, normal(3, 4, 5, seed=1) > 0.8
    expected = sigmoid_focal_loss(logits, targets.to(D), alpha=alpha, gamma=gamma, reduction="sum") / 7
    for same in (targets, targets.long(), targets.to(D)):
        torch.testing.assert_close(losses.focal_loss(logits, same, normaliser=7, alpha=alpha, gamma=gamma), expected)
    by_tensor = losses.focal_loss(logits, targets, normaliser=torch.tensor(7), alpha=alpha, gamma=gamma)
    torch.testing.assert_close(by_tensor, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_finite_for_logits_of_any_size(gamma: float) -> None:
    logits = torch.tensor([-1e4, -160.0, 160.0, 1e4]).repeat(2).requires_grad_()
    targets = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    loss = losses.focal_loss(logits, targets, normaliser=1, gamma=gamma)
    loss.backward()
    torch.testing.assert_close(loss.item(), 1.0 * (160 + 1e4), rtol=1e-5, atol=0)  # 0.75 + 0.25 of each wrong side
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- masks


def test_maps_of_both_kinds_are_sampled_as_mask2former_does() -> None:
    masks = normal(3, 9, 14) > 0
    rows = torch.tensor([2, 0, 0, 1])
    points = torch.rand(4, 50, 2, generator=rng())
    points[:, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.999, 0.0], [0.01, 0.99]])  # corners and edges
    expected = hf.sample_point(masks[rows][:, None].float(), points, align_corners=False)[:, 0]
    torch.testing.assert_close(losses.sample_masks(masks, rows, points), expected, atol=1e-5, rtol=0)
    maps = normal(4, 2, 9, 14)
    expected = hf.sample_point(maps, points.to(D), align_corners=False)
    torch.testing.assert_close(losses.sample_logits(maps, points), expected)


def test_a_prediction_and_its_mask_are_asked_at_the_same_place() -> None:
    coarse = normal(1, 6, 6) > 0
    fine = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    centres = (torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0)) + 0.5)[None] / 6
    zero = torch.zeros(1, dtype=torch.int64)
    torch.testing.assert_close(
        losses.sample_masks(fine, zero, centres), losses.sample_logits(coarse[:, None].float(), centres)[:, 0]
    )


def test_uncertain_points_are_those_nearest_to_zero() -> None:
    maps = normal(3, 8, 8).float()
    options: Options = {"points": 20, "oversample": 3.0, "importance": 0.75}
    points = losses.sample_points(maps, **options, draws=[(rng(5), 3)])
    uniform = torch.rand(3, 60 + 5, 2, generator=rng(5))
    for row in range(3):
        value = hf.sample_point(maps[row][None, None], uniform[row, :60][None], align_corners=False)[0, 0].abs()
        expected = uniform[row, :60][value.argsort()[:15]]
        assert sorted(points[row, :15].tolist()) == sorted(expected.tolist())
        assert torch.equal(points[row, 15:], uniform[row, 60:])
    assert torch.equal(points, losses.sample_points(maps, **options, draws=[(rng(5), 3)]))
    assert not torch.equal(points, losses.sample_points(maps, **options, draws=[(rng(6), 3)]))


@pytest.mark.parametrize("importance", [0.0, 0.75, 1.0])
def test_mask_losses_are_mask2formers_at_the_same_points(importance: float) -> None:
    logits, masks = normal(6, 8, 8), normal(6, 32, 32, seed=1) > 0
    options: Options = {"points": 40, "oversample": 2.0, "importance": importance}
    bce, dice = losses.mask_losses(logits, masks, **options, normaliser=4, draws=[(rng(3), 6)])
    points = losses.sample_points(logits, **options, draws=[(rng(3), 6)]).to(D)
    x = hf.sample_point(logits[:, None], points, align_corners=False)[:, 0]
    t = hf.sample_point(masks[:, None].to(D), points, align_corners=False)[:, 0]
    torch.testing.assert_close(bce, hf.sigmoid_cross_entropy_loss(x, t, 4), rtol=1e-5, atol=0)
    torch.testing.assert_close(dice, hf.dice_loss(x, t, 4), rtol=1e-5, atol=0)


def test_mask_losses_take_each_segment_once() -> None:
    logits, masks, rows = normal(7, 8, 8), normal(3, 20, 24, seed=1) > 0, torch.tensor([0, 0, 2, 1, 2, 2, 0])
    options: Options = {"points": 30, "normaliser": 7}
    shared = losses.mask_losses(logits, masks, rows=rows, **options, draws=[(rng(), 7)])
    copied = losses.mask_losses(logits, masks[rows], **options, draws=[(rng(), 7)])
    assert shared == copied


def test_mask_losses_fall_to_nothing_for_the_right_mask_only() -> None:
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, :16], masks[1, :, 20:] = True, True
    right = (masks.float() * 2 - 1) * 30
    options: Options = {"points": 200, "importance": 0.0, "normaliser": 2}
    bce, dice = losses.mask_losses(right, masks, **options, draws=[(rng(), 2)])
    assert bce < 1.0
    assert dice < 0.05
    swapped_bce, swapped_dice = losses.mask_losses(right.flip(0), masks, **options, draws=[(rng(), 2)])
    assert swapped_bce > 5 * bce
    assert swapped_dice > 0.3


@pytest.mark.parametrize("rows", [1, 3, 7, 8])
def test_full_mask_losses_in_groups_are_those_of_all_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows at once, and in groups of one, three, and as many as there are; in a group of all, to the bit."""
    torch.manual_seed(0)
    logits, masks = torch.randn(7, 6, 8, requires_grad=True), torch.rand(3, 24, 32) > 0.5
    of = torch.tensor([0, 2, 1, 1, 0, 2, 2])

    def computed() -> tuple[Tensor, ...]:
        found = losses.full_mask_losses(logits, masks, rows=of, normaliser=3)
        return (*found, torch.autograd.grad(found[0] + 2 * found[1], logits)[0])

    whole = computed()
    monkeypatch.setattr(losses, "PIXELS", rows * 24 * 32 + 5)
    for one, other in zip(computed(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
        assert rows < 7 or torch.equal(one, other)


def test_full_mask_losses_keep_no_map_of_a_masks_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the backward pass finds stored is the predictions, the masks, and numbers a row."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    logits, masks = torch.randn(7, 6, 8, requires_grad=True), torch.rand(3, 240, 320) > 0.5
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses.full_mask_losses(logits, masks, rows=torch.arange(7) % 3, normaliser=3)
    assert all(tensor is masks or tensor.numel() <= logits.numel() for tensor in kept)


def test_mask_losses_of_nothing_keep_the_graph() -> None:
    logits = torch.zeros(0, 8, 8, requires_grad=True)
    for masks in (torch.zeros(0, 16, 16, dtype=torch.bool), torch.zeros(3, 16, 16, dtype=torch.bool)):
        rows = torch.zeros(0, dtype=torch.int64)
        bce, dice = losses.mask_losses(logits, masks, rows=rows, points=10, normaliser=1, draws=[(rng(), 0)])
        (bce + dice).backward()
        assert bce == dice == 0
        assert logits.grad is not None


# ---------------------------------------------------------------------------------------------------------- contrast


def test_target_attention_is_equation_2() -> None:
    token, v, matched, gamma = normal(2, 4), normal(2, 5, 4, seed=1), normal(2, 5, seed=2) > 0, 1.7
    found = losses.target_attention(token, v, matched, gamma=gamma)
    for b in range(2):
        weight = [math.exp(cos(token[b], v[b, q]) * (gamma * float(matched[b, q]) + 1)) for q in range(5)]
        expected = sum(w * v[b, q] for q, w in enumerate(weight)) / sum(weight)
        torch.testing.assert_close(found[b], expected)
    torch.testing.assert_close(losses.target_attention(token, v, matched, gamma=gamma, enabled=False), v.sum(1) / 5)
    torch.testing.assert_close(losses.target_attention(3 * token, v, matched, gamma=gamma), found)


@pytest.mark.parametrize("shared", [True, False])
def test_global_loss_is_cross_entropy_over_the_bank(shared: bool) -> None:
    v, token = normal(3, 4), normal(3, 4, seed=1)
    bank = normal(*([6, 4] if shared else [3, 6, 4]), seed=2)
    expected = 0.0
    for b in range(3):
        others = bank if shared else bank[b]
        logits = torch.tensor([cos(v[b], token[b]), *[cos(v[b], c) for c in others]], dtype=D) / 0.3
        expected += F.cross_entropy(logits, torch.tensor(0)) / 3
    torch.testing.assert_close(losses.global_loss(v, token, bank, tau=0.3), expected)


def slow_instance_loss(v: Tensor, tokens: Tensor, image: Tensor, tau: float, negatives: str) -> Tensor:
    rows = []
    for i in range(len(v)):
        others = [j for j in range(len(v)) if j != i and (negatives == "batch" or image[j] == image[i])]
        if others:
            logits = torch.tensor([cos(v[i], tokens[j]) / tau for j in [i, *others]], dtype=D)
            rows.append(F.cross_entropy(logits, torch.tensor(0)))
    return torch.stack(rows).mean()


IMAGE = torch.tensor([0, 0, 0, 1, 2, 2, 4, 5, 5])  # 1 and 4 hold one instance each


@pytest.mark.parametrize("negatives", ["image", "batch"])
def test_instance_loss_is_equation_4(negatives: Literal["image", "batch"]) -> None:
    v, tokens = normal(9, 4), normal(9, 4, seed=1)
    found = losses.instance_loss(v, tokens, IMAGE, tau=0.3, negatives=negatives)
    torch.testing.assert_close(found, slow_instance_loss(v, tokens, IMAGE, 0.3, negatives))
    order = torch.randperm(9, generator=rng())
    permuted = losses.instance_loss(v[order], tokens[order], IMAGE[order] * 10, tau=0.3, negatives=negatives)
    torch.testing.assert_close(permuted, found)


def test_an_instance_alone_in_its_image_counts_nothing() -> None:
    v, tokens = normal(3, 4).requires_grad_(), normal(3, 4, seed=1)
    loss = losses.instance_loss(v, tokens, torch.arange(3), tau=0.1)
    loss.backward()
    assert loss == 0
    assert v.grad is not None
    assert (v.grad == 0).all()
    assert losses.instance_loss(v, tokens, torch.arange(3), tau=0.1, negatives="batch") > 0


# --------------------------------------------------------------------------------------------------------- generator


def slow_kernel(a: Tensor, b: Tensor) -> float:
    square = float((a - b).square().sum())
    return sum(math.exp(-square / (2 * sigma**2)) for sigma in (2, 5, 10, 20, 40, 80)) / 6


def test_mmd_loss_is_the_biased_estimate() -> None:
    fake, real = normal(4, 3) * 3, normal(6, 3, seed=1) * 3 + 40  # far from the origin
    expected = 0.0
    for x, y, sign in ((fake, fake, 1), (real, real, 1), (fake, real, -2)):
        expected += sign * sum(slow_kernel(a, b) for a in x for b in y) / len(x) / len(y)
    assert losses.mmd_loss(fake, real).item() == pytest.approx(expected, rel=1e-9)
    assert losses.mmd_loss(fake.float(), real.float()).item() == pytest.approx(expected, rel=1e-4)
    assert losses.mmd_loss(real.flip(0), fake.flip(0)).item() == pytest.approx(expected, rel=1e-9)
    assert losses.mmd_loss(real, real.flip(0)).item() == pytest.approx(0, abs=1e-12)


def slow_diversity_loss(
    fake: Tensor, real: Tensor, image: Tensor, rest: Tensor, rest_image: Tensor, tau: float
) -> Tensor:
    rows = []
    for i in range(len(fake)):
        negatives = [fake[j] for j in range(len(fake)) if j != i and image[j] == image[i]]
        negatives += [rest[k] for k in range(len(rest)) if rest_image[k] == image[i]]
        if negatives:
            logits = torch.tensor([cos(fake[i], other) / tau for other in [real[i], *negatives]], dtype=D)
            rows.append(F.cross_entropy(logits, torch.tensor(0)))
    return torch.stack(rows).mean()


def test_diversity_loss_is_equation_7() -> None:
    fake, real, rest = normal(9, 4), normal(9, 4, seed=1), normal(8, 4, seed=2)
    rest_image = torch.tensor([0, 1, 1, 2, 2, 2, 7, 7])  # none for 4 and 5; 7 has no generated feature
    found = losses.diversity_loss(fake, real, IMAGE, rest, rest_image, tau=0.3)
    torch.testing.assert_close(found, slow_diversity_loss(fake, real, IMAGE, rest, rest_image, 0.3))
    one, two = torch.randperm(9, generator=rng()), torch.randperm(8, generator=rng())
    permuted = losses.diversity_loss(fake[one], real[one], IMAGE[one], rest[two], rest_image[two], tau=0.3)
    torch.testing.assert_close(permuted, found)
    without_images_of_others = losses.diversity_loss(fake, real, IMAGE, rest[:6], rest_image[:6], tau=0.3)
    torch.testing.assert_close(without_images_of_others, found)


def test_kl_loss_is_the_divergence_from_a_standard_normal() -> None:
    mu, log_var = normal(5, 3), normal(5, 3, seed=1)
    latent = torch.distributions.Normal(mu, (0.5 * log_var).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mu), 1.0)
    expected = torch.distributions.kl_divergence(latent, standard).sum(1).mean()
    torch.testing.assert_close(losses.kl_loss(mu, log_var), expected)
    assert losses.kl_loss(torch.zeros(4, 3), torch.zeros(4, 3)) == 0


# --------------------------------------------------------------------------------------------------------------- all

Case = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def cases(dtype: torch.dtype = D) -> dict[str, Case]:
    """Every loss as a function of its differentiable inputs alone."""
    matched = torch.tensor([[True, False, True], [False, False, False]])
    masks, image = normal(5, 12, 12, seed=9) > 0, torch.tensor([0, 0, 1, 2, 2])
    rest, rest_image, bank = normal(4, 3, seed=8).to(dtype), torch.tensor([0, 1, 1, 3]), normal(6, 3, seed=7).to(dtype)
    a, b = normal(5, 3, seed=1).to(dtype), normal(5, 3, seed=2).to(dtype)
    queries, maps = normal(2, 3, 3).to(dtype), normal(5, 6, 6).to(dtype)

    def mask(maps: Tensor) -> Tensor:
        # importance 0: points chosen by the logits would move with them
        return sum(
            losses.mask_losses(maps, masks, points=9, importance=0.0, normaliser=3, draws=[(rng(), 5)]), torch.zeros(())
        )

    return {
        "focal": (lambda x: losses.focal_loss(x, matched, normaliser=2), (queries[0, :2],)),
        "mask": (mask, (maps,)),
        "attention": (lambda t, v: losses.target_attention(t, v, matched, gamma=2.0), (a[:2], queries)),
        "global": (lambda x, t: losses.global_loss(x, t, bank, tau=0.5), (a, b)),
        "instance": (lambda x, t: losses.instance_loss(x, t, image, tau=0.5), (a, b)),
        "batch": (lambda x, t: losses.instance_loss(x, t, image, tau=0.5, negatives="batch"), (a, b)),
        "mmd": (losses.mmd_loss, (a, b)),
        "diversity": (lambda x, r: losses.diversity_loss(x, r, image, rest, rest_image, tau=0.5), (a, b)),
        "kl": (losses.kl_loss, (a, b)),
    }


@pytest.mark.parametrize("name", cases())
def test_gradients_are_the_numerical_ones(name: str) -> None:
    function, inputs = cases()[name]
    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in inputs])


@pytest.mark.parametrize("name", cases())
def test_autocast_changes_nothing(name: str) -> None:
    function, inputs = cases(torch.float32)[name]
    plain = function(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(*inputs), plain)
        half = function(*[x.bfloat16() for x in inputs])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0.05, atol=0.02)


def test_no_rows_give_a_zero_that_keeps_the_graph() -> None:
    none, image = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    rest, rest_image = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    for loss in (
        losses.focal_loss(none, none, normaliser=1),
        losses.instance_loss(none, none, image, tau=0.1),
        losses.global_loss(none, none, rest, tau=0.1),
        losses.diversity_loss(none, none, image, rest, rest_image, tau=0.1),
        losses.diversity_loss(none, none, image, rest[:0], rest_image[:0], tau=0.1),
        losses.kl_loss(none, none),
    ):
        assert loss == 0
        loss.backward()
