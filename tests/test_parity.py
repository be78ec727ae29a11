"""Our segmenters, matcher and mask losses against transformers', with the same random weights, inputs and points.

The float64 runs tell an error from rounding: there the two agree to the last digits. In float32 a query of Mask2Former
may look at another cell where a mask logit is 0 but for rounding, and differs by 1e-3 from there on; the float32 runs
therefore take images on which no logit is that near to 0, which `margin` asserts.

Padding: a smaller image of a batch stands in the top left corner, with zeros (after normalisation) around it. The
published code attends to them as to anything else (Detectron2's ImageList drops the sizes, MaskFormer passes mask=None,
Mask2Former's pixel decoder masks of zeros), and so do transformers' networks: they take a pixel_mask and never read it.
Ours has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mask2former import modeling_mask2former as hf2
from transformers.models.maskformer import modeling_maskformer as hf1

from models import deformable, losses, pixel_decoder
from models.matcher import match
from models.segmenter import Segmenter
from pipeline.bench import reference

NETWORKS = ("mask2former", "maskformer", "maskformer without encoder")
SIZES = {"square": (128, 128), "wide": (64, 160), "padded": (96, 128)}
Outputs = tuple[Tensor, Tensor]  # features and masks, dense
SEEDS = {"square": 21, "wide": 42, "padded": 60}


@dataclass(frozen=True)
class Pair:
    theirs: Any
    ours: Segmenter
    outputs: Callable[[Any, Tensor], Any]  # of theirs
    names: Any


@cache
def pair(network: str, *, small: bool) -> Pair:
    if network == "mask2former":
        theirs = reference.build_mask2former(small=small)
        ours = reference.ours_of_mask2former(theirs)
        return Pair(theirs, ours, reference.mask2former_outputs, reference.MASK2FORMER)
    layers = 0 if "without" in network else 2 if small else 6
    theirs = reference.build_maskformer(encoder_layers=layers, small=small)
    return Pair(theirs, reference.ours_of_maskformer(theirs), reference.maskformer_outputs, reference.MASKFORMER)


@contextmanager
def float64(both: Pair) -> Iterator[Pair]:
    """The pair in float64, and all that networks compute by themselves, positions above all."""

    def forget() -> None:
        for module in (deformable, pixel_decoder):
            for function in vars(module).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()

    forget()
    torch.set_default_dtype(torch.float64)
    both.theirs.double()
    both.ours.double()
    try:
        yield both
    finally:
        both.theirs.float()
        both.ours.float()
        torch.set_default_dtype(torch.float32)
        forget()


def images(picture: str, *, batch: int = 1, seed: int | None = None) -> Tensor:
    """Float64 noise; a padded one is zero below row 80 and from column 100 on."""
    generator = torch.Generator().manual_seed(SEEDS[picture] if seed is None else seed)
    found = torch.randn(batch, 3, *SIZES[picture], generator=generator, dtype=torch.float64)
    if picture == "padded":
        found[:, :, 80:], found[:, :, :, 100:] = 0.0, 0.0
    return found


def difference(ours: Outputs, theirs: Outputs) -> float:
    """The largest one of any decoder output, over that output's largest value."""
    worst = 0.0
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape
        worst = max(worst, *(float((a - b).abs().max() / b.abs().max()) for a, b in zip(our, their, strict=True)))
    return worst


def margin(masks: Tensor) -> float:
    """The mask logit nearest to 0 of those that decide where Mask2Former's queries look, over the largest one."""
    height, width = masks.shape[-2:]
    found = []
    for output, stride in zip(masks[:-1], (8, 4, 2) * 3, strict=True):
        logits = F.interpolate(output, size=(height // stride, width // stride), mode="bilinear", align_corners=False)
        found.append(float(logits.abs().min() / logits.abs().max()))
    return min(found)


@pytest.mark.slow
@pytest.mark.parametrize("picture", SIZES)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_published_r50_network_says_the_same_at_every_output(
    network: str, picture: str, record_property: Callable[[str, object], None]
) -> None:
    both = pair(network, small=False)
    inputs = images(picture)
    with torch.no_grad():
        rounded = difference(both.ours(inputs.float()), both.outputs(both.theirs, inputs.float()))
        with float64(both):
            theirs = both.outputs(both.theirs, inputs)
            exact = difference(both.ours(inputs), theirs)
    record_property("float32", rounded)
    record_property("float64", exact)
    print(f"{network}, {picture}: float32 {rounded:.1e}, float64 {exact:.1e}")
    if network == "mask2former":
        assert margin(theirs.masks) > 1e-5, "choose another image, this one cannot be compared in float32"
    assert rounded < 1e-4
    assert exact < 1e-9


@pytest.mark.parametrize("picture", SIZES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_small_network_says_the_same_at_every_output(network: str, picture: str) -> None:
    inputs = images(picture, batch=2)
    with float64(pair(network, small=True)) as both, torch.no_grad():
        assert difference(both.ours(inputs), both.outputs(both.theirs, inputs)) < 1e-9


@pytest.mark.parametrize("network", NETWORKS)
def test_the_gradients_are_the_same_and_every_weight_matters(network: str) -> None:
    with float64(pair(network, small=True)) as both:
        inputs = images("wide", batch=2)
        pulls = [torch.randn_like(output) for output in both.ours(inputs)]
        for output, found in (
            (both.ours(inputs), both.ours),
            (both.outputs(both.theirs, inputs), both.theirs),
        ):
            found.zero_grad()
            sum((a * b).sum() for a, b in zip(output, pulls, strict=True)).backward()  # pyright: ignore[reportAttributeAccessIssue]
        theirs = {key: p.grad for key, p in both.theirs.named_parameters() if not key.startswith("class_predictor")}
        ours = {key: p.grad for key, p in both.ours.named_parameters()}
        expected = reference.our_names(theirs, both.names)
        assert ours.keys() == expected.keys()
        for key, gradient in expected.items():
            found = ours[key]
            assert found is not None and (found - gradient).abs().max() <= 1e-9 * (1 + gradient.abs().max()), key
            # MaskFormer's queries start at zero: whatever the first layer's queries and keys are, all values are alike
            blind = network != "mask2former" and key == "query_decoder.layers.0.self_attention.in_proj.weight"
            assert blind or gradient.abs().max() > 1e-6, f"{key} does not matter, so that nothing above would see it"


@pytest.mark.parametrize("network", NETWORKS)
def test_the_outputs_of_the_reference_are_its_own(network: str) -> None:
    """The last output is what transformers returns; and its pixel_mask is never read.

    Two calls of one network need not agree to the last bit: the kernels of some CPUs sum in an order that depends on
    where the tensors lie in memory. A mask that is read moves the logits by far more than the tolerance.
    """
    both = pair(network, small=True)
    inputs = images("padded").float()
    mask = torch.zeros(inputs[:, 0].shape)
    with torch.no_grad():
        features, masks = both.outputs(both.theirs, inputs)
        theirs = both.theirs(inputs, pixel_mask=mask)
    torch.testing.assert_close(theirs.masks_queries_logits, masks[-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.theirs.class_predictor(features[-1]), theirs.class_queries_logits)


# -------------------------------------------------------------------------------------------- matcher and mask losses


def scene(seed: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Mask logits (L, B, Q, h, w), labels and boxes as masks, some of them hinted at by a query."""
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for count in (4, 1, 7):
        corner, side = (
            torch.randint(0, 40, (count, 2, 1, 1), generator=generator),
            torch.randint(8, 24, (count, 2, 1, 1), generator=generator),
        )
        row, column = torch.arange(64)[:, None], torch.arange(64)[None]
        inside = (row >= corner[:, 0]) & (row < corner[:, 0] + side[:, 0])
        masks.append(inside & (column >= corner[:, 1]) & (column < corner[:, 1] + side[:, 1]))
    logits = torch.randn(3, 3, 10, 16, 16, generator=generator, dtype=dtype)
    for image, mask in enumerate(masks):
        shown = F.interpolate(mask[None].to(dtype), size=(16, 16), mode="area")[0]
        logits[:, image, : len(mask)] += shown
    logits += 3 * torch.randn(
        3, 3, 10, 1, 1, generator=generator, dtype=dtype
    )  # some say mask everywhere, some nowhere
    labels = [torch.randint(0, 5, (len(mask),), generator=generator) for mask in masks]
    return logits, labels, masks


def assigned(indices: list[tuple[Tensor, Tensor]], queries: int) -> Tensor:
    found = torch.full((len(indices), queries), -1)
    for image, (query, segment) in enumerate(indices):
        found[image, query] = segment
    return found


@pytest.mark.parametrize("mask_loss", ["points", "full"])
@pytest.mark.parametrize("seed", range(5))
def test_the_assignments_are_identical(seed: int, mask_loss: Any) -> None:
    """In every layer. The class costs differ by design (focal over sigmoids against softmax); with equal logits both
    are one number for all, and test_matcher.py has the focal cost against a loop."""
    logits, labels, masks = scene(seed, torch.float32)
    classes = torch.zeros(3, 3, 10, 5)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, float] = {"class_weight": 2.0, "bce_weight": 5.0, "dice_weight": 5.0}
    found = match(
        classes, logits, labels, masks, **weights, points=112, generators=[generator] * 3, mask_loss=mask_loss
    )
    theirs: nn.Module = (
        hf2.Mask2FormerHungarianMatcher(cost_class=2.0, cost_mask=5.0, cost_dice=5.0, num_points=112)
        if mask_loss == "points"
        else hf1.MaskFormerHungarianMatcher(cost_class=2.0, cost_mask=5.0, cost_dice=5.0)
    )
    for layer in range(3):
        torch.manual_seed(seed)  # our layers share an image's points
        indices = theirs(logits[layer], classes[layer], [mask.float() for mask in masks], labels)
        assert torch.equal(found[layer], assigned(indices, 10))


def test_point_sampled_losses_are_the_same_at_the_same_points_in_float32() -> None:
    """The published 12,544 points, and transformers' own choice of them, fed to both."""
    logits, _, masks = scene(1, torch.float32)
    logits, truth = logits[0, 2, :7], masks[2]
    options: dict[str, Any] = {"points": 12544, "oversample": 3.0, "importance": 0.75}
    bce, dice = losses.mask_losses(
        logits, truth, **options, normaliser=7, draws=[(torch.Generator().manual_seed(3), 7)]
    )
    points = losses.sample_points(logits, **options, draws=[(torch.Generator().manual_seed(3), 7)])
    x = hf2.sample_point(logits[:, None], points, align_corners=False)[:, 0]
    t = hf2.sample_point(truth[:, None].float(), points, align_corners=False)[:, 0]
    assert float(bce) == pytest.approx(float(hf2.sigmoid_cross_entropy_loss(x, t, 7)), rel=1e-5)
    assert float(dice) == pytest.approx(float(hf2.dice_loss(x, t, 7)), rel=1e-5)


def test_full_mask_losses_are_the_same() -> None:
    logits, _, masks = scene(2, torch.float64)
    logits, rows = logits[:2, 2, :7].flatten(0, 1).requires_grad_(), torch.arange(14) % 7
    found = losses.full_mask_losses(logits, masks[2], rows=rows, normaliser=7)
    x = F.interpolate(logits[:, None], size=(64, 64), mode="bilinear", align_corners=False)[:, 0].flatten(1)
    t = masks[2][rows].flatten(1).double()
    expected = hf1.sigmoid_focal_loss(x, t, 7), hf1.dice_loss(x, t, 7)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
        gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-14)
    nothing = losses.full_mask_losses(logits[:0], masks[2], rows=rows[:0], normaliser=1)
    assert [loss.item() for loss in nothing] == [0.0, 0.0] and nothing[0].requires_grad
