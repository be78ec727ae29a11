"""Class-less candidate regions of the area of an image that has no label.

Under pixel-ignore that area holds everything of unseen classes, and what nobody annotated. Its outline is used, and the
image's colours; which classes lie in it, and how they divide it, is not: the pixels of all segments that training may
not see are one area.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from pipeline.teacher.config import TokensConfig

# A split by colours. All were chosen on generated scenes with the validation split's unseen classes, by the share of
# their segments that a region meets; a blur of half of it, or clusters of 15, cut textures.
BLUR = 1 / 32  # standard deviation of the Gaussian, as a share of the image's shorter side
SPREAD = 25.0  # root mean square distance of a region's pixels to the colour of their cluster, RGB in 0..255
CLUSTERS, ROUNDS = 6, 5  # the most in a component, and steps of k-means for each number of them
SAMPLE = 4096  # pixels of a component that the clusters are fitted to


@dataclass(frozen=True, kw_only=True)
class Regions:
    """`map` (H, W) uint8, or uint16 for more than 255 regions: the number of each pixel's region from 1, or 0; `count`
    regions; `fragments`, the number of connected parts that were too small to be one."""

    map: np.ndarray
    count: int
    fragments: int


def find_regions(
    ids: np.ndarray, labelled: Sequence[int], config: TokensConfig, image: np.ndarray | None = None
) -> Regions:
    """The regions of an image: connected components (by sides) of the pixels that belong to no labelled segment, of
    `region_min_area` pixels or more, in the order of their first pixels; with `regions` "colours" each of them split.

    Args:
        ids: (H, W), the segment of each pixel. labelled: the ids of the segments that training may see.
        image: (H, W, 3) uint8, for "colours".
    """
    free = ~np.isin(ids, labelled)
    parts, count = _components(free)
    areas = np.bincount(parts.ravel(), minlength=count + 1)
    large = areas >= config.region_min_area
    large[0] = False  # the labelled pixels
    found = int(large.sum())
    fragments = count - found
    number = np.where(large, large.cumsum(), 0)[parts]
    if config.regions == "colours" and found:
        assert image is not None
        number, found = _split(number, _blurred(image, free), config.region_min_area)
    return Regions(map=number.astype(np.uint8 if found < 256 else np.uint16), count=found, fragments=fragments)


def _components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    labels: Any = ndimage.label(mask)
    return labels


def _blurred(image: np.ndarray, free: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) float32, blurred, in which pixels of `free` (H, W) are means of such pixels alone."""
    sigma = BLUR * min(free.shape)
    weight = ndimage.gaussian_filter(free.astype(np.float32), sigma)
    layers = [ndimage.gaussian_filter(np.where(free, image[..., c], 0).astype(np.float32), sigma) for c in range(3)]
    return np.stack(layers, axis=-1) / np.maximum(weight, 1e-6)[..., None]


def _split(components: np.ndarray, colours: np.ndarray, least: int) -> tuple[np.ndarray, int]:
    """Each component of a map (H, W) cut into the connected parts of its clusters of colours (H, W, 3), and the number of
    all. Pixels of parts smaller than `least` go to the nearest part that is not; without one the component is whole."""
    result, total = np.zeros_like(components), 0
    boxes: Any = ndimage.find_objects(components)
    for number, box in enumerate(boxes, 1):
        own = components[box] == number
        cluster = np.zeros(own.shape, np.int64)
        cluster[own] = 1 + _clusters(colours[box][own])
        parts, count = np.zeros_like(cluster), 0
        for value in range(1, int(cluster.max()) + 1):
            found, several = _components(cluster == value)
            large = np.bincount(found.ravel(), minlength=several + 1) >= least
            large[0] = False
            parts = np.where(large[found], (count + large.cumsum())[found], parts)
            count += int(large.sum())
        if count:
            nearest: Any = ndimage.distance_transform_edt(parts == 0, return_distances=False, return_indices=True)
            parts = parts[tuple(nearest)]
        else:
            parts, count = np.ones_like(parts), 1
        result[box][own] = total + parts[own]
        total += count
    return result, total


def _clusters(colours: np.ndarray) -> np.ndarray:
    """(n,): the cluster, from 0, of each of n colours (n, 3). k-means with as few clusters as `SPREAD` allows, each new
    one begun at the colour farthest from the others: no draw, so the same colours have the same clusters."""
    sample = colours[:: -(-len(colours) // SAMPLE)].astype(np.float64)
    centres = sample.mean(0, keepdims=True)
    while len(centres) < CLUSTERS:
        distance = _distances(sample, centres).min(1)
        if np.sqrt(distance.mean()) < SPREAD:
            break
        centres = np.vstack((centres, sample[distance.argmax()]))
        for _ in range(ROUNDS):
            nearest = _distances(sample, centres).argmin(1)
            means = [sample[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(len(centres))]
            centres = np.stack(means)
    return _distances(colours, centres).argmin(1)


def _distances(colours: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances (n, k)."""
    return np.stack([np.square(colours - centre).sum(1) for centre in centres], axis=1)
