"""Makes tiny semantic data sets in the layouts in which people have them: an image and a label PNG for every name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# benchmark -> the layouts as (folder of images, folder of label PNGs, list file or "") below the data folder
LAYOUTS: dict[str, list[tuple[str, str, str]]] = {
    "coco-stuff-zss": [
        ("val2017", "stuffthingmaps_trainval2017/val2017", ""),
        ("images/val2017", "stuffthingmaps/val2017", ""),
    ],
    "voc20": [
        ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation/val.txt"),
        ("VOC2012/JPEGImages", "VOC2012/SegmentationClass", "VOC2012/ImageSets/Segmentation/val.txt"),
        (
            "VOCdevkit/VOC2012/JPEGImages",
            "VOCdevkit/VOC2012/SegmentationClass",
            "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt",
        ),
    ],
    "pc59": [
        ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext/val.txt"),
        (
            "VOCdevkit/VOC2010/JPEGImages",
            "VOCdevkit/VOC2010/SegmentationClassContext",
            "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt",
        ),
    ],
    "ade150": [
        ("images/validation", "annotations/validation", ""),
        ("ADEChallengeData2016/images/validation", "ADEChallengeData2016/annotations/validation", ""),
    ],
}
EVERY = [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]
# a value that counts nowhere, one of the first class, one of the last, one that is neither
VALUES = {
    "coco-stuff-zss": (255, 0, 181, 11),
    "voc20": (255, 1, 20, 21),
    "pc59": (0, 1, 59, 60),
    "ade150": (0, 1, 150, 255),
}
HEIGHT, WIDTH = 32, 48


def make_layout(
    root: Path, layout: tuple[str, str, str], values: Sequence[int], names: Sequence[str] = ("b_2", "a_1")
) -> Path:
    """An image of noise for every name; its label PNG shows `values` in upright stripes of equal width."""
    images, labels, listed = layout
    rng = np.random.default_rng(0)
    for name in names:
        picture = rng.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        image = root / images / f"{name}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(image)
        save_labels(root / labels / f"{name}.png", stripes(values))
    if listed:
        (root / listed).parent.mkdir(parents=True, exist_ok=True)
        (root / listed).write_text("".join(f"{name}\n" for name in names))
    return root


def stripes(values: Sequence[int]) -> np.ndarray:
    """(H, W) uint8."""
    return np.repeat(np.array(values, np.uint8), WIDTH // len(values))[None].repeat(HEIGHT, 0)


def save_labels(path: Path, values: np.ndarray) -> None:
    """A grey PNG of the values (H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
