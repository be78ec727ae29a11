"""The location of an instance: the box to crop around it, and its own patches in the teacher's input."""

from __future__ import annotations

import math

import numpy as np


def instance_box(mask: np.ndarray, margin: float) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of a square around a mask (H, W), `margin` of its longer side wider at each side.

    The square is shifted into the image, and cut to the image's height and width.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    ends = (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)
    side = math.ceil(max(end - start for start, end in ends) * (1 + 2 * margin))
    starts, stops = [], []
    for (start, end), limit in zip(ends, mask.shape, strict=True):
        size = min(side, limit)
        starts.append(min(max((start + end - size) // 2, 0), limit - size))
        stops.append(starts[-1] + size)
    return starts[0], starts[1], stops[0], stops[1]


def own_patches(
    ids: np.ndarray, wanted: np.ndarray, *, grid: tuple[int, int], patch: int, place: tuple[int, int, int, int]
) -> np.ndarray:
    """Each segment's own patches, (k, P) bool, row-major: those whose centre it covers, else the one it covers most.

    Args:
        ids: (H, W), the segment of each pixel. wanted: (k,), ids of segments that have pixels.
        grid: rows and columns of patches. patch: side of a patch, in pixels of the teacher's input.
        place: the image's box in that input: top, left, height, width.
    """
    (height, width), (top, left, placed_height, placed_width) = ids.shape, place
    y = ((np.arange(grid[0]) + 0.5) * patch - top) * height / placed_height
    x = ((np.arange(grid[1]) + 0.5) * patch - left) * width / placed_width
    centres = ids[y.clip(0, height - 1).astype(int)[:, None], x.clip(0, width - 1).astype(int)]
    inside = ((y >= 0) & (y < height))[:, None] & (x >= 0) & (x < width)
    own = ((centres == wanted[:, None, None]) & inside).reshape(len(wanted), inside.size)
    for lost in np.flatnonzero(~own.any(1)):
        pixels = np.nonzero(ids == wanted[lost])
        row = ((top + (pixels[0] + 0.5) * placed_height / height) / patch).astype(int).clip(max=grid[0] - 1)
        column = ((left + (pixels[1] + 0.5) * placed_width / width) / patch).astype(int).clip(max=grid[1] - 1)
        own[lost, np.bincount(row * grid[1] + column).argmax()] = True
    return own
