"""Makes small data sets in the layouts in which people bring their own: the same scenes in each.

`python tests/helpers/own_data.py FOLDER` writes one folder for each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.benchmarks import load_benchmark
from storage.shards import encode_ids

CLASSES = {1: "red circle", 2: "blue star", 3: "green ring", 4: "grey dots"}
GROUND, UNSEEN = "grey dots", "green ring"
COLOURS = {1: (200, 30, 30), 2: (30, 30, 200), 3: (30, 160, 60), 4: (120, 120, 120)}


@dataclass(frozen=True)
class Scene:
    """`boxes`: (class, top, left, bottom, right), of which later ones lie on top; the ground is class 4, its border of
    three rows unlabelled. Every second scene shows the unseen class."""

    name: str
    height: int
    width: int
    boxes: tuple[tuple[int, int, int, int, int], ...]

    @property
    def values(self) -> np.ndarray:
        """(H, W) class of each pixel, 0 = unlabelled."""
        values = np.full((self.height, self.width), 4, np.uint8)
        values[:3] = 0
        for value, top, left, bottom, right in self.boxes:
            values[top:bottom, left:right] = value
        return values

    @property
    def image(self) -> Image.Image:
        rng = np.random.default_rng(len(self.name) + self.height)
        table = np.array([(255, 255, 255), *COLOURS.values()])
        pixels = table[self.values] + rng.normal(0, 10, (self.height, self.width, 3))
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def scenes(count: int, *, seed: int = 0, prefix: str = "") -> list[Scene]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        height, width = int(rng.integers(44, 50)), int(rng.integers(60, 66))
        chosen = (1, 2, 3) if number % 2 else (1, 2)
        boxes = []
        for value in chosen:
            top, left = int(rng.integers(4, height - 18)), int(rng.integers(0, width - 22))
            boxes.append((value, top, left, top + int(rng.integers(10, 18)), left + int(rng.integers(10, 22))))
        made.append(Scene(f"{prefix}{seed}{number:03d}", height, width, tuple(boxes)))
    return made


TRAIN, VAL = scenes(14), scenes(6, seed=1)
SPLITS = {"train": TRAIN, "val": VAL}


def save(path: Path, image: Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def panoptic_json(folder: Path, made: list[Scene], first: int, *, bgr: bool = False) -> dict[str, Any]:
    """The content of a panoptic JSON; its PNGs are written into `folder`."""
    images, annotations = [], []
    for image_id, scene in enumerate(made, first):
        values, ids = scene.values, np.zeros((scene.height, scene.width), np.int64)
        segments = []
        for value in np.unique(values[values > 0]).tolist():
            ids[values == value] = number = 1000 * value + 7
            segments.append({"id": number, "category_id": value, "area": int((values == value).sum()), "iscrowd": 0})
        png = folder / f"{scene.name}.png"
        png.parent.mkdir(parents=True, exist_ok=True)
        png.write_bytes(encode_ids(ids))
        if bgr:
            Image.fromarray(np.ascontiguousarray(np.asarray(Image.open(png))[..., ::-1])).save(png)
        images.append({"id": image_id, "file_name": f"{scene.name}.jpg", "height": scene.height, "width": scene.width})
        annotations.append({"image_id": image_id, "file_name": png.name, "segments_info": segments})
    categories = [{"id": i, "name": name, "isthing": int(name != GROUND)} for i, name in CLASSES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def instances_json(
    made: list[Scene], first: int, name: Callable[[Scene], str] = lambda s: f"{s.name}.jpg"
) -> dict[str, Any]:
    """The content of an instances JSON: polygons, and of every third scene the ground as run lengths."""
    images, annotations = [], []
    for image_id, scene in enumerate(made, first):
        images.append({"id": image_id, "file_name": name(scene), "height": scene.height, "width": scene.width})
        for value, top, left, bottom, right in scene.boxes:
            outline = [left, top, right, top, right, bottom, left, bottom]
            annotations.append({"image_id": image_id, "category_id": value, "segmentation": [outline], "iscrowd": 0})
        if image_id % 3 == 0:
            inside = (scene.values == 4).T.ravel()
            changes = np.flatnonzero(np.diff(np.concatenate([[False], inside]).astype(int)))
            counts = np.diff(np.concatenate([[0], changes, [inside.size]])).tolist()
            mask = {"size": [scene.height, scene.width], "counts": counts}
            annotations.append({"image_id": image_id, "category_id": 4, "segmentation": mask, "iscrowd": 0})
    for place, item in enumerate(annotations, 1):
        item["id"] = place
    categories = [{"id": i, "name": name, "supercategory": "shape"} for i, name in CLASSES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


# ------------------------------------------------------------------------------------------------ the seven layouts


def coco_panoptic(root: Path) -> Path:
    for split, made in SPLITS.items():
        folder = root / "annotations" / f"panoptic_{split}2017"
        write(folder.with_suffix(".json"), panoptic_json(folder, made, 1 + 100 * (split == "val")))
        for scene in made:
            save(root / f"{split}2017" / f"{scene.name}.jpg", scene.image)
    return root


def coco_instances(root: Path) -> Path:
    """As Roboflow exports: a folder a split, with its JSON in it."""
    for split, made in {"train": TRAIN, "valid": VAL}.items():
        write(root / split / "_annotations.coco.json", instances_json(made, 0))
        for scene in made:
            save(root / split / f"{scene.name}.jpg", scene.image)
    return root


def one_json(root: Path) -> Path:
    """As CVAT exports: one JSON, one folder of images; to be split by a seed."""
    write(root / "annotations" / "instances_default.json", instances_json([*TRAIN, *VAL], 1))
    for scene in (*TRAIN, *VAL):
        save(root / "images" / f"{scene.name}.jpg", scene.image)
    return root


def coco_stuff(root: Path) -> Path:
    """COCO-Stuff's own values: the shapes are classes 0, 1 and 2, the ground 180."""
    values = {0: 255, 1: 0, 2: 1, 3: 2, 4: 180}
    _label_maps(root, "{split}2017", "stuffthingmaps_trainval2017/{split}2017", values)
    return root


def plain_maps(root: Path) -> Path:
    """Grey maps beside images, a folder a split, the names in a file."""
    _label_maps(root, "images/{split}", "masks/{split}", {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}, ending="_mask")
    write(root / "classes.txt", "background\n" + "".join(f"{name}\n" for name in CLASSES.values()))
    return root


NUMBERS, PLAIN_NAMES = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}, ["background", *CLASSES.values()]


def split_folders(root: Path) -> Path:
    _label_maps(root, "{split}/imgs", "{split}/labels", NUMBERS)
    write(root / "names.json", PLAIN_NAMES)
    return root


def split_folders_of_both(root: Path) -> Path:
    _label_maps(root, "{split}", "{split}", NUMBERS, names={"train": "Training", "val": "valid"})
    write(root / "names.txt", "".join(f"{value}: {name}\n" for value, name in enumerate(PLAIN_NAMES)))
    return root


def lists_of_names(root: Path) -> Path:
    _label_maps(root, "images", "gt", NUMBERS, ending="_gt")
    for split, made in SPLITS.items():
        write(root / f"{split}.txt", "".join(f"{scene.name}\n" for scene in made))
    write(root / "classes.json", {name: value for value, name in enumerate(PLAIN_NAMES)})
    return root


def both_in_one_folder(root: Path) -> Path:
    _label_maps(root, ".", ".", NUMBERS, ending="_mask")
    write(root / "labels.txt", "\n".join(PLAIN_NAMES))
    return root


def plain_folder(root: Path) -> Path:
    """One folder of images, one of paletted maps, neither with splits."""
    _label_maps(root, "photos", "labels", {0: 255, 1: 10, 2: 20, 3: 30, 4: 40}, palette=True)
    write(root / "names.txt", "".join(f"{10 * value} {name}\n" for value, name in CLASSES.items()))
    return root


def voc(root: Path) -> Path:
    at = root / "VOCdevkit" / "VOC2012"
    _label_maps(at, "JPEGImages", "SegmentationClass", {0: 0, 1: 7, 2: 12, 3: 15, 4: 255}, palette=True)
    for split, made in SPLITS.items():
        write(at / "ImageSets" / "Segmentation" / f"{split}.txt", "".join(f"{scene.name}\n" for scene in made))
    return root


def ade(root: Path) -> Path:
    at = root / "ADEChallengeData2016"
    names = {"train": "training", "val": "validation"}
    _label_maps(at, "images/{split}", "annotations/{split}", {0: 0, 1: 13, 2: 21, 3: 5, 4: 3}, names=names)
    return root


def _label_maps(
    root: Path, images: str, labels: str, values: dict[int, int], *, ending: str = "", palette: bool = False,
    names: dict[str, str] | None = None,
) -> None:  # fmt: skip
    table = np.array([values[value] for value in range(5)], np.uint8)
    for split, made in SPLITS.items():
        word = (names or {}).get(split, split)
        for scene in made:
            save(root / images.format(split=word) / f"{scene.name}.jpg", scene.image)
            drawn = Image.fromarray(table[scene.values])
            if palette:
                drawn = Image.fromarray(table[scene.values], mode="P")
                drawn.putpalette([(37 * i) % 256 for i in range(768)])
            save(root / labels.format(split=word) / f"{scene.name}{ending}.png", drawn)


# layout -> what makes it, and the names of its unseen class and of the others
LAYOUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "COCO panoptic": (coco_panoptic, UNSEEN),
    "COCO instances": (coco_instances, UNSEEN),
    "one JSON, split by a seed": (one_json, UNSEEN),
    "COCO-Stuff": (coco_stuff, load_benchmark("coco-stuff-zss").names[2]),
    "label maps with splits": (plain_maps, UNSEEN),
    "label maps split by a seed": (plain_folder, UNSEEN),
    "VOC": (voc, "person"),
    "ADE": (ade, "tree"),
}

if __name__ == "__main__":
    for make, _ in LAYOUTS.values():
        print(make(Path(sys.argv[1]) / make.__name__))
