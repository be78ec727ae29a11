"""Makes tiny, valid folders in COCO's panoptic layout, for tests to use and to break."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from storage.shards import encode_ids

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 3, "name": "car", "isthing": 1},
    {"id": 25, "name": "giraffe", "isthing": 1},  # unseen in coco-panoptic-zps
    {"id": 95, "name": "bridge", "isthing": 0},
    {"id": 193, "name": "grass-merged", "isthing": 0},  # unseen in coco-panoptic-zps
]


def make_coco(root: Path, *, train: int = 5, val: int = 2, seed: int = 0) -> Path:
    """Write `train` + `val` images of about 40 x 30 pixels with 3 segments each; the first image of each split is grey
    and has a crowd region and void pixels. Image ids are 10, 11, ... in train and 10010, ... in val."""
    rng = np.random.default_rng(seed)
    for split, count, first in (("train2017", train, 10), ("val2017", val, 10010)):
        pngs = root / "annotations" / f"panoptic_{split}"
        (root / split).mkdir(parents=True)
        pngs.mkdir(parents=True)
        images, annotations = [], []
        for image_id in range(first, first + count):
            height, width = int(rng.integers(28, 34)), int(rng.integers(36, 44))
            pixels = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
            image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
            if image_id == first:
                image = image.convert("L")
            image.save(root / split / f"{image_id:012d}.jpg", quality=95)

            ids = np.zeros((height, width), np.int64)
            values = [int(value) for value in rng.choice(256**3 - 1, 3, replace=False) + 1]
            ids[:, : width // 2], ids[:, width // 2 :] = values[0], values[1]
            ids[5:15, 5:30] = values[2]
            if image_id == first:
                ids[0, :] = 0
            (pngs / f"{image_id:012d}.png").write_bytes(encode_ids(ids))
            chosen = rng.choice(len(CATEGORIES), 3, replace=False)
            segments = [
                {
                    "id": value,
                    "category_id": CATEGORIES[int(category)]["id"],
                    "area": int((ids == value).sum()),
                    "iscrowd": int(image_id == first and value == values[2]),
                    "bbox": [0, 0, 1, 1],
                }
                for value, category in zip(values, chosen, strict=True)
            ]
            images.append({"id": image_id, "file_name": f"{image_id:012d}.jpg", "height": height, "width": width})
            annotations.append({"image_id": image_id, "file_name": f"{image_id:012d}.png", "segments_info": segments})
        data = {"images": images[::-1], "annotations": annotations, "categories": CATEGORIES}
        (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(data))
    return root


def edit_json(root: Path, change: Callable[[dict[str, Any]], object], split: str = "train2017") -> None:
    """Read a split's panoptic JSON, let `change` alter it, write it back."""
    path = root / "annotations" / f"panoptic_{split}.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
