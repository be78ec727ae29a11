"""MaskLogits against the dense tensor it stands for: values, gradients, the matcher, and what training asks of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.losses import sample_logits
from models.mask_logits import MaskLogits
from models.matcher import match

LAYERS, IMAGES, QUERIES, WIDTH = 3, 2, 5, 4


def masks(images: int = IMAGES) -> MaskLogits:
    generator = torch.Generator().manual_seed(0)

    def rand(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()

    return MaskLogits(rand(LAYERS, images, QUERIES, WIDTH), rand(images, WIDTH, 6, 8))


def slow(given: MaskLogits) -> Tensor:
    return (given.embeddings[..., None, None] * given.pixels[:, None]).sum(3)


def test_it_is_indexed_like_the_dense_tensor() -> None:
    given = masks()
    dense = slow(given)
    assert len(given) == LAYERS
    torch.testing.assert_close(given.dense(), dense)
    torch.testing.assert_close(given[-1], dense[-1])
    torch.testing.assert_close(given[1:].dense(), dense[1:])


@pytest.mark.parametrize("images", [1, 3, 5])
def test_rows_and_their_gradients(images: int) -> None:
    """Images in order, a map of each image twice, images without a map, and no map at all."""
    given = masks(images)
    layer, query = torch.tensor([2, 1, 1, 0, 2]), torch.tensor([0, 4, 4, 4, 4])
    image = torch.tensor([0, 0, 0, 1, 2]).clamp(max=images - 1)
    expected, found = slow(given)[layer, image, query], given[layer, image, query]
    torch.testing.assert_close(found, expected)
    pull = torch.randn_like(expected)
    leaves = [given.embeddings, given.pixels]
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, pull), torch.autograd.grad(expected, leaves, pull), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    nothing = layer[:0]
    assert given[nothing, nothing, nothing].shape == (0, 6, 8)


def test_values_at_points_are_bilinear_values_of_the_dense_maps() -> None:
    """Also within half a cell of the border, where a part of the value is the zero outside."""
    given = masks()
    points = torch.rand(IMAGES, 50, 2, dtype=torch.float64)
    points[:, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.01, 0.99], [0.5, 0.0]])
    for found, maps in zip(given.sample(points), slow(given), strict=True):
        torch.testing.assert_close(found, sample_logits(maps, points))


def test_half_precision_is_sampled_in_float32() -> None:
    given = MaskLogits(masks().embeddings.bfloat16(), masks().pixels.bfloat16())
    assert [values.dtype for values in given.sample(torch.rand(IMAGES, 3, 2))] == [torch.float32] * LAYERS


@pytest.mark.parametrize("mask_loss", ["points", "full"])
def test_the_matcher_assigns_alike(mask_loss: str) -> None:
    given = MaskLogits(masks().embeddings.float(), masks().pixels.float())
    labels, truth = (
        [torch.tensor([1, 0, 2]), torch.tensor([2])],
        [torch.rand(3, 24, 32) > 0.5, torch.rand(1, 24, 32) > 0.5],
    )
    found = [
        match(
            torch.zeros(LAYERS, IMAGES, QUERIES, 3), either, labels, truth, class_weight=2.0, bce_weight=5.0, dice_weight=5.0,
            points=60, generators=[torch.Generator().manual_seed(1)] * 2, mask_loss=mask_loss,  # pyright: ignore[reportArgumentType]
        )
        for either in (given, given.dense())
    ]  # fmt: skip
    assert torch.equal(*found)
    assert (found[0] >= 0).sum() == LAYERS * 4
