"""Stage "scenes": the generated world on disk in COCO's panoptic layout, so that it is processed exactly like COCO."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from pipeline.data.benchmarks import Benchmark, Category
from pipeline.runtime import Runtime
from pipeline.world.config import ScenesConfig
from pipeline.world.names import stuff_names, thing_names
from storage.keys import Recipe
from storage.store import Build

STAGE, VERSION = "scenes", 1

# Unseen combinations; each of their words occurs in seen classes, too. Two share an appearance, which alone therefore
# does not determine the unseen class.
UNSEEN = (
    "red circle", "red ring", "green star", "blue circle", "yellow ring", "striped star", "spotted ring",
    "grey dots", "brown stripes", "pink fog", "olive checks",
)  # fmt: skip
# A disjoint choice of the same structure, on which settings are chosen, so that none is tuned on a reported class.
VALIDATION_UNSEEN = (
    "cyan circle", "cyan ring", "purple star", "green circle", "blue ring", "spotted star", "striped ring",
    "grey checks", "brown dots", "pink stripes", "olive fog",
)  # fmt: skip


def benchmark(config: ScenesConfig) -> Benchmark:
    """The world's classes: things, then stuff; ids from 1."""
    things, stuff = thing_names(config.shapes), stuff_names()
    unseen = VALIDATION_UNSEEN if config.split == "validation" else UNSEEN
    categories = tuple(Category(id=i + 1, name=name, isthing=i < len(things)) for i, name in enumerate(things + stuff))
    return Benchmark(
        name=f"scenes-{config.split}",
        categories=categories,
        unseen_ids=tuple(c.id for c in categories if c.name in unseen),
        protocol=config.protocol,
    )


def recipe(config: ScenesConfig) -> Recipe:
    """Scenes of one seed and one `unseen_share` are the same under both protocols, and so is their key."""
    config = replace(config, protocol="image-filter")
    return Recipe(
        kind="scenes",
        stage=STAGE,
        version=VERSION,
        config={"scenes": config, "benchmark": benchmark(config).content},
        inputs={},
    )


def build(build: Build, config: ScenesConfig, runtime: Runtime) -> None:
    """Draw both splits into COCO's layout; an image depends only on the config, its split and its number."""
    classes = benchmark(config)
    with runtime.bar(config.train_images + config.val_images, "drawing scenes", "image") as bar:
        for split, count in (("train2017", config.train_images), ("val2017", config.val_images)):
            build.counts[split] = _draw_split(build, split, count, config, classes, bar)


def _draw_split(
    build: Build, split: str, count: int, config: ScenesConfig, classes: Benchmark, bar: Any
) -> dict[str, int]:
    import numpy as np
    from PIL import Image

    from pipeline.world.draw import draw_scene

    folder = build.path
    (folder / split).mkdir(exist_ok=True)
    (folder / "annotations" / f"panoptic_{split}").mkdir(parents=True, exist_ok=True)
    by_name = {c.name: c for c in classes.categories}
    pools = {
        everything: {
            "things": [
                c.name
                for c, seen in zip(classes.categories, classes.seen, strict=True)
                if c.isthing and (seen or everything)
            ],
            "stuff": [
                c.name
                for c, seen in zip(classes.categories, classes.seen, strict=True)
                if not c.isthing and (seen or everything)
            ],
        }
        for everything in (True, False)
    }
    images, annotations = [], []
    for number in range(1, count + 1):
        rng = np.random.default_rng([config.seed, split == "val2017", number])
        everything = split == "val2017" or bool(rng.random() < config.unseen_share)
        scene = draw_scene(rng, size=config.size, layout=config.layout, **pools[everything])
        stem = f"{number:012d}"
        jpeg, png = folder / split / f"{stem}.jpg", folder / "annotations" / f"panoptic_{split}" / f"{stem}.png"
        Image.fromarray(scene.image).save(jpeg, quality=92)
        rgb = np.stack([scene.ids, np.zeros_like(scene.ids), np.zeros_like(scene.ids)], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(png)
        build.add(jpeg, png)
        images.append({"id": number, "file_name": f"{stem}.jpg", "height": config.size, "width": config.size})
        segments = [
            {"id": i, "category_id": by_name[name].id, "area": int((scene.ids == i).sum()), "iscrowd": 0}
            for i, name in scene.names.items()
        ]
        annotations.append({"image_id": number, "file_name": f"{stem}.png", "segments_info": segments})
        bar.update()
    categories = [{"id": c.id, "name": c.name, "isthing": int(c.isthing)} for c in classes.categories]
    content = {"images": images, "annotations": annotations, "categories": categories}
    listing = folder / "annotations" / f"panoptic_{split}.json"
    listing.write_text(json.dumps(content))
    build.add(listing)
    return {"images": count, "segments": sum(len(a["segments_info"]) for a in annotations)}
