"""Class-less candidate regions of the area of an image that has no label.

Under pixel-ignore that area holds everything of unseen classes, and what nobody annotated. Its outline is used; which
classes lie in it, and how they divide it, is not: the pixels of all segments that training may not see are one area.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from pipeline.teacher.config import TokensConfig


@dataclass(frozen=True, kw_only=True)
class Regions:
    """`map` (H, W) uint8, or uint16 for more than 255 regions: the number of each pixel's region from 1, or 0; `count`
    regions; `fragments`, the number of parts that were too small to be one."""

    map: np.ndarray
    count: int
    fragments: int


def find_regions(ids: np.ndarray, labelled: Sequence[int], config: TokensConfig) -> Regions:
    """The regions of an image: connected components (by sides) of the pixels that belong to no labelled segment, of
    `region_min_area` pixels or more, in the order of their first pixels.

    Args:
        ids: (H, W), the segment of each pixel. labelled: the ids of the segments that training may see.
    """
    labels: Any = ndimage.label(~np.isin(ids, labelled))
    parts, count = labels
    areas = np.bincount(parts.ravel(), minlength=count + 1)
    large = areas >= config.region_min_area
    large[0] = False  # the labelled pixels
    found = int(large.sum())
    number = np.where(large, large.cumsum(), 0).astype(np.uint8 if found < 256 else np.uint16)
    return Regions(map=number[parts], count=found, fragments=count - found)
