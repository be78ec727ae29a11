"""Transforms of an image and its segment ids: large-scale jitter, flip, crop and pad to train, a resize to test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.config import STRIDE, AugmentConfig, ResizeConfig

# ImageNet's statistics in 0..255, as in the published networks.
PIXEL_MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
PIXEL_STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)


def channels_first(image: np.ndarray) -> Tensor:
    """A decoded image (H, W, 3) uint8 as a tensor (3, H, W) that shares its memory."""
    return torch.from_numpy(image).permute(2, 0, 1)


def normalise(image: Tensor) -> Tensor:
    """An image (3, H, W) in 0..255, minus ImageNet's mean, over ImageNet's standard deviation; float32."""
    return (image.float() - PIXEL_MEAN) / PIXEL_STD


def augment(image: Tensor, ids: Tensor, config: AugmentConfig, rng: np.random.Generator) -> tuple[Tensor, Tensor, bool]:
    """One training view of an image (3, H, W) uint8 and its segment ids (H, W).

    Returns the normalised image (3, S, S), ids (S, S) int32, and whether the view is mirrored. Padding is 0 in both:
    the mean colour, and no segment.
    """
    height, width = ids.shape
    factor = rng.uniform(*config.jitter) * config.size / max(height, width)
    size = (max(round(height * factor), 1), max(round(width * factor), 1))
    scaled, scaled_ids = _resize(normalise(image), size), _resize_ids(ids, size)
    mirrored = config.flip and bool(rng.random() < 0.5)
    if mirrored:
        scaled, scaled_ids = scaled.flip(-1), scaled_ids.flip(-1)
    top, left = (int(rng.integers(max(s - config.size, 0) + 1)) for s in size)
    crop = (slice(top, top + config.size), slice(left, left + config.size))
    return _pad(scaled[:, *crop], config.size, config.size), _pad(scaled_ids[crop], config.size, config.size), mirrored


def resize_for_test(image: Tensor, config: ResizeConfig) -> tuple[Tensor, tuple[int, int]]:
    """The test view of an image (3, H, W) uint8: normalised, resized, padded right and below to a multiple of 32.

    Returns the input (3, H', W') and the (height, width) of the image inside it.
    """
    height, width = image.shape[-2:]
    factor = min(config.short / min(height, width), config.longest / max(height, width))
    size = (max(round(height * factor), 1), max(round(width * factor), 1))
    padded = [-(-s // STRIDE) * STRIDE for s in size]
    return _pad(_resize(normalise(image), size), *padded), size


def place_ids(ids: Tensor, size: tuple[int, int], padded: Sequence[int]) -> Tensor:
    """Segment ids (H, W) in the geometry of `resize_for_test`: resized to `size`, then padded with 0."""
    return _pad(_resize_ids(ids, size), *padded)


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def _resize_ids(ids: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest neighbour by indexing: exact for large ids, which a float image would round."""
    if ids.shape == size:
        return ids
    rows, columns = (((torch.arange(new) + 0.5) * old / new).long() for new, old in zip(size, ids.shape, strict=True))
    return ids[rows[:, None], columns]


def _pad(image: Tensor, height: int, width: int) -> Tensor:
    return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))
