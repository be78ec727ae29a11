"""Views of an image and its segment ids: large-scale jitter, flip, crop and pad to train, a resize to test.

Where an image lies in its view is decided from its size and random numbers alone; the pixels are computed apart from
that, on whichever device the image lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.config import STRIDE, AugmentConfig, ResizeConfig, SemanticAugmentConfig

# ImageNet's statistics in 0..255, as in the published networks.
PIXEL_MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
PIXEL_STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
# The longest side of a semantic training view before it is cropped, in units of its size: 2560 pixels for 640.
LONGEST = 4


def channels_first(image: np.ndarray) -> Tensor:
    """A decoded image (H, W, 3) uint8 as a tensor (3, H, W) that shares its memory."""
    return torch.from_numpy(image).permute(2, 0, 1)


def normalise(image: Tensor) -> Tensor:
    """An image (3, H, W) in 0..255, minus ImageNet's mean, over ImageNet's standard deviation; float32."""
    mean, std = _statistics(image.device)
    return (image.float() - mean) / std


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    return PIXEL_MEAN.to(device), PIXEL_STD.to(device)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an image lies in a view, sizes as (height, width) in pixels.

    The image is resized to `size` and mirrored or not; of that the view shows the window of size `view` whose first
    pixel is (`top`, `left`), padded at the right and the bottom where the image ends.
    """

    size: tuple[int, int]
    view: tuple[int, int]
    top: int = 0
    left: int = 0
    mirrored: bool = False

    def image(self, image: Tensor) -> Tensor:
        """The view (3, *view) float32, normalised, of an image (3, H, W) uint8. Padding is 0, the mean colour."""
        scaled = _resize(normalise(image), self.size)
        scaled = scaled.flip(-1) if self.mirrored else scaled
        return _pad(scaled[:, *self._window], self.view)

    def sources(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The rows and the columns of an image of that size which the view's rows and columns show, nearest neighbours:
        int64, each as long as the part of the view that is no padding."""
        rows, columns = (_nearest(old, new) for old, new in zip((height, width), self.size, strict=True))
        columns = columns.flip(0) if self.mirrored else columns
        return rows[self._window[0]], columns[self._window[1]]

    def ids(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The view (*view) of integers (H, W), given their `sources`: exact for large ids, which a float image would
        round. Padding is 0, no segment."""
        return _pad(ids.index_select(1, columns).index_select(0, rows), self.view)

    @property
    def _window(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.view[0]), slice(self.left, self.left + self.view[1])


def place_for_training(height: int, width: int, config: AugmentConfig, rng: np.random.Generator) -> Placement:
    """A random square view of an image of that size."""
    size = _training_size(height, width, config, rng)
    mirrored = config.flip and bool(rng.random() < 0.5)
    top, left = (int(rng.integers(max(s - config.size, 0) + 1)) for s in size)
    return Placement(size=size, view=(config.size, config.size), top=top, left=left, mirrored=mirrored)


def place_for_test(height: int, width: int, config: ResizeConfig) -> Placement:
    """The test view of an image of that size: resized, padded right and below to a multiple of 32."""
    factor = min(config.short / min(height, width), config.longest / max(height, width))
    size = (max(round(height * factor), 1), max(round(width * factor), 1))
    return Placement(size=size, view=(-(-size[0] // STRIDE) * STRIDE, -(-size[1] // STRIDE) * STRIDE))


def _training_size(height: int, width: int, config: AugmentConfig, rng: np.random.Generator) -> tuple[int, int]:
    """The random (height, width) to which an image of that size is scaled before it is cropped."""
    if isinstance(config, SemanticAugmentConfig):
        smallest, largest = (round(10 * factor) for factor in config.jitter)
        short = config.size * int(rng.integers(smallest, largest + 1)) / 10
        factor = min(short / min(height, width), LONGEST * config.size / max(height, width))
    else:
        factor = rng.uniform(*config.jitter) * config.size / max(height, width)
    return max(round(height * factor), 1), max(round(width * factor), 1)


def resize_for_test(image: Tensor, config: ResizeConfig) -> tuple[Tensor, tuple[int, int]]:
    """The test view of an image (3, H, W) uint8: normalised, resized, padded right and below to a multiple of 32.

    Returns the input (3, H', W') and the (height, width) of the image inside it.
    """
    placement = place_for_test(image.shape[-2], image.shape[-1], config)
    return placement.image(image), placement.size


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def _nearest(old: int, new: int) -> Tensor:
    """(new,) int64: of `old` pixels the nearest to each of `new`."""
    if old == new:
        return torch.arange(new)
    return ((torch.arange(new) + 0.5) * old / new).long()


def _pad(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.pad(image, (0, size[1] - image.shape[-1], 0, size[0] - image.shape[-2]))
