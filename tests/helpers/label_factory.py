"""Makes tiny semantic data sets in the layouts in which people have them: an image and a label PNG for every name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


# A tiny zero-shot benchmark with COCO-Stuff's layout: its file, and images of about 64 x 48 pixels with maps of its
# classes.
NAMES = {0: "red circle", 3: "blue star", 7: "green ring", 20: "grey dots", 25: "pink fog", 180: "yellow cross"}
UNSEEN = (7, 25)
UNLABELLED = 255


def write_stuff_benchmark(path: Path, **change: Any) -> Path:
    """A semantic benchmark with protocol pixel-ignore; `change` replaces fields of the file."""
    facts = {
        "task": "semantic",
        "categories": [{"id": value, "name": name} for value, name in NAMES.items()],
        "unseen_ids": list(UNSEEN),
        "protocol": "pixel-ignore",
        "ignored": [UNLABELLED],
        "splits": {"train": "train2017", "val": "val2017"},
        "images": ["{split}/*.jpg", "images/{split}/*.jpg"],
        "labels": ["stuffthingmaps_trainval2017/{split}/*.png", "stuffthingmaps/{split}/*.png"],
    }
    path.write_text(json.dumps(facts | change))
    return path


def make_stuff(root: Path, *, train: int = 6, val: int = 3, labels: str = "stuffthingmaps", seed: int = 0) -> Path:
    """Images 10, 11, ... in train2017 and 10010, ... in val2017 with maps below `labels`: a ground of one class,
    rectangles of others, and an unlabelled stripe. Each class has a colour of its own."""
    rng = np.random.default_rng(seed)
    colours = np.random.default_rng(1).integers(0, 256, (256, 3))
    for split, count, first in (("train2017", train, 10), ("val2017", val, 10010)):
        for image_id in range(first, first + count):
            height, width = int(rng.integers(44, 50)), int(rng.integers(60, 66))
            values = np.full((height, width), rng.choice(list(NAMES)), np.uint8)
            for value in rng.choice(list(NAMES), 3, replace=False):
                top, left = int(rng.integers(height - 20)), int(rng.integers(width - 24))
                values[top : top + 20, left : left + 24] = value
            values[:3] = UNLABELLED
            picture = np.clip(colours[values] + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
            (root / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(root / split / f"{image_id:012d}.jpg", quality=95)
            save_labels(root / labels / split / f"{image_id:012d}.png", values)
    return root
