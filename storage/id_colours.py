"""Segment ids as colours, COCO's panoptic PNGs: id = R + 256 G + 65536 B.

Imports no torch, so that every command may import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MAX_SEGMENT_ID = 256**3 - 1  # 0 is void


def ids_of(colours: np.ndarray) -> np.ndarray:
    """(..., 3) integers in 0..255 -> (...) int32."""
    red, green, blue = (colours[..., i].astype("int32") for i in range(3))
    return red + 256 * green + 65536 * blue


def colours_of(ids: np.ndarray) -> np.ndarray:
    """(...) integers in 0..MAX_SEGMENT_ID -> (..., 3) uint8."""
    import numpy as np

    assert ids.size == 0 or (ids.min() >= 0 and ids.max() <= MAX_SEGMENT_ID), (ids.min(), ids.max())
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
