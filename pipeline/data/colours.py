"""Random changes of an image's colours, as SSD makes them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Largest change of brightness in 0..255, range of the factors on contrast and on saturation, largest turn of the hue
# in steps of 2 degrees, the unit of an 8-bit hue.
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18


def distort_colours(image: Tensor, rng: np.random.Generator) -> Tensor:
    """A training image (3, H, W) uint8 RGB with its brightness, contrast, saturation and hue changed, uint8.

    Each change happens with probability 0.5; contrast comes before saturation and hue or after them, with equal
    probability. Brightness: x + b. Contrast: c x. Saturation and hue: S and H of the hexagonal HSV model, S times s and
    at most 1, H turned by h. Values are cut to 0..255 after each change; they are rounded once, at the end, where the
    published code cuts off the fraction after each.

    Source: SSD (Liu et al., ECCV 2016), its data augmentation; constants and order as in Detectron2's
    ColorAugSSDTransform, which the mapper of MaskFormer and Mask2Former for semantic data sets applies, and in
    MMSegmentation's PhotoMetricDistortion. Both apply it to the resized crop; here it is the whole image before that.
    """
    x = image.float()
    if _happens(rng):
        x = (x + rng.uniform(-BRIGHTNESS, BRIGHTNESS)).clamp(0, 255)
    contrast_first = _happens(rng)
    if contrast_first:
        x = _contrast(x, rng)
    if _happens(rng):
        x = _saturate(x, rng.uniform(*SATURATION))
    if _happens(rng):
        x = _turn_hue(x, 2.0 * int(rng.integers(-HUE, HUE + 1)))
    if not contrast_first:
        x = _contrast(x, rng)
    return x.round().to(torch.uint8)


def _happens(rng: np.random.Generator) -> bool:
    return bool(rng.integers(2))


def _contrast(x: Tensor, rng: np.random.Generator) -> Tensor:
    return (x * rng.uniform(*CONTRAST)).clamp(0, 255) if _happens(rng) else x


def _saturate(x: Tensor, factor: float) -> Tensor:
    """V = max(x) and H stay and S = (V - min(x)) / V is multiplied, at most to 1."""
    value = x.amax(0)
    chroma = value - x.amin(0)
    # S times V / chroma is 1; grey pixels have no chroma and stay as they are
    most = value / chroma.clamp(min=1e-6)
    return value - (value - x) * most.clamp(max=factor)


def _turn_hue(x: Tensor, degrees: float) -> Tensor:
    """V and S stay, and the hue is turned on its circle of 360 degrees."""
    from torchvision.transforms.functional import adjust_hue

    return adjust_hue(x / 255, degrees / 360) * 255
