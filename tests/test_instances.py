"""Instances as one map of segments: what lies on top, run lengths as COCO's own tools read them, and masks that are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.data.instances import draw


def test_the_smaller_instance_lies_on_top() -> None:
    def box(number: int, top: int, left: int, bottom: int, right: int, iscrowd: int = 0) -> dict[str, Any]:
        outline = [left, top, right, top, right, bottom, left, bottom]
        return {"id": number, "iscrowd": iscrowd, "segmentation": [outline]}

    small, large, crowd, same = box(1, 2, 2, 6, 6), box(2, 0, 0, 10, 10), box(3, 3, 3, 5, 5, 1), box(4, 2, 2, 6, 6)
    for order in ([small, large, crowd, same], [large, crowd, small, same], [crowd, large, small, same]):
        ids = draw(order, 12, 12)
        number = {id(one): place for place, one in enumerate(order, 1)}
        expected = np.zeros((12, 12), int)
        expected[:10, :10] = number[id(large)]
        expected[2:6, 2:6] = number[id(small)]  # of two that are equal the first; the crowd lies below, small as it is
        np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("12", "whose segmentation is '12', which must be polygons or run lengths"),
        ([["a", 1, 2, 3, 4, 5]], "with a polygon that holds no numbers"),
        ([[0, 1, 2, 3, 4, float("nan")]], "no list of finite x, y"),
        ([[0, 1, 2, 3, 4, 5, 6]], "no list of finite x, y"),
        ({}, "with a mask of size None"),
        ({"size": [4, 5], "counts": [20]}, r"a mask of size \[4, 5\] \(height, width\), but the image is 5 x 4"),
        ({"size": [5, 4], "counts": [21]}, "run lengths that do not add up to the image's 20 pixels"),
        ({"size": [5, 4], "counts": [10, -5, 15]}, "do not add up"),
        ({"size": [5, 4], "counts": "zzz"}, "do not add up"),
    ],
)
def test_masks_that_are_none(segmentation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"has annotation 7 .*{message}"):
        draw([{"id": 7, "iscrowd": 0, "segmentation": segmentation}], 5, 4)


def text(counts: str | bytes) -> str:
    return counts if isinstance(counts, str) else counts.decode()


def test_run_lengths_are_those_of_cocos_own_tools() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        height, width = rng.integers(1, 40, 2).tolist()
        inside = (rng.random((height, width)) < rng.random()).astype(np.uint8)
        runs = coco_mask.encode(np.asfortranarray(inside))
        mask = {"size": [height, width], "counts": text(runs["counts"])}
        found = draw([{"id": 1, "iscrowd": 0, "segmentation": mask}], height, width)
        np.testing.assert_array_equal(found, inside)
