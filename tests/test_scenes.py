"""The generated world: deterministic, every class drawable, splits disjoint, and on disk what its annotations say."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import scenes
from pipeline.line import Stage
from pipeline.runtime import Runtime
from pipeline.scenes import UNSEEN, VALIDATION_UNSEEN
from pipeline.world.config import LayoutConfig, ScenesConfig
from pipeline.world.draw import PLAIN, draw_scene
from pipeline.world.names import SHAPES, stuff_names, thing_names
from storage.store import Store

SMALL = ScenesConfig(train_images=30, val_images=10)
QUIET = Runtime(progress=False)


def test_a_scene_is_a_function_of_its_generator() -> None:
    draw = {"size": 96, "things": thing_names(SHAPES), "stuff": stuff_names()}
    one, two, other = (draw_scene(np.random.default_rng(seed), **draw) for seed in (7, 7, 8))
    assert np.array_equal(one.image, two.image) and np.array_equal(one.ids, two.ids) and one.names == two.names
    assert not np.array_equal(one.image, other.image)


def test_every_segment_is_seen_and_every_pixel_belongs_to_one() -> None:
    for seed in range(30):
        scene = draw_scene(np.random.default_rng(seed), size=96, things=thing_names(SHAPES), stuff=stuff_names())
        assert set(np.unique(scene.ids)) == set(scene.names)
        assert 2 <= sum(name.split(" ")[1] in SHAPES for name in scene.names.values()) <= 4
        assert min(np.bincount(scene.ids.ravel())[1:]) >= 60
    assert PLAIN.visible > 0.5  # else a thing could be mostly hidden and still be asked for


def test_a_layout_decides_how_crowded_a_scene_is() -> None:
    draw = {"size": 96, "things": thing_names(SHAPES), "stuff": stuff_names()}
    crowd = LayoutConfig(things=(5, 6), radius=(0.1, 0.2), visible=0.4)
    for seed in range(5):
        plain, cluttered = (
            draw_scene(np.random.default_rng(seed), **draw, layout=replace(crowd, clutter=count)) for count in (0, 8)
        )
        assert 5 <= sum(name.split(" ")[1] in SHAPES for name in plain.names.values()) <= 6
        assert np.array_equal(plain.ids, cluttered.ids) and not np.array_equal(plain.image, cluttered.image)
    mistakes: list[dict[str, Any]] = [{"things": (3, 2)}, {"radius": (0.3, 0.2)}, {"visible": 0.0}, {"clutter": -1}]
    for wrong in mistakes:
        with pytest.raises(ValueError, match="scenes: layout"):
            LayoutConfig(**wrong)


def test_plain_things_have_their_colour() -> None:
    red = draw_scene(np.random.default_rng(0), size=96, things=["red circle"], stuff=["grey fog", "grey checks"])
    pixels = red.image[red.ids == max(red.names)].astype(float).mean(0)
    assert pixels[0] > 2 * max(pixels[1:])


def test_held_out_words_are_all_seen_in_other_classes() -> None:
    for split in ("test", "validation"):
        benchmark = scenes.benchmark(replace(SMALL, split=split))
        seen_words = {
            w for c, seen in zip(benchmark.categories, benchmark.seen, strict=True) if seen for w in c.name.split()
        }
        unseen_words = {
            w for c, seen in zip(benchmark.categories, benchmark.seen, strict=True) if not seen for w in c.name.split()
        }
        assert unseen_words and unseen_words <= seen_words


def test_the_validation_split_is_another_one_of_the_same_structure() -> None:
    assert not set(UNSEEN) & set(VALIDATION_UNSEEN)
    for split, unseen in (("test", UNSEEN), ("validation", VALIDATION_UNSEEN)):
        benchmark = scenes.benchmark(replace(SMALL, split=split))
        assert (len(benchmark.categories), len(benchmark.unseen_ids)) == (40, 11)
        assert {c.name for c, seen in zip(benchmark.categories, benchmark.seen, strict=True) if not seen} == set(unseen)
    structures = [
        sorted(Counter(name.split()[0] for name in unseen).values()) for unseen in (UNSEEN, VALIDATION_UNSEEN)
    ]
    assert structures[0] == structures[1]


def test_the_folder_holds_what_its_json_says(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.open(Stage.of(scenes, SMALL).run(store, QUIET)).path
    content = json.loads((folder / "annotations" / "panoptic_train2017.json").read_text())
    assert len(content["images"]) == len(content["annotations"]) == 30
    names = {c["id"]: c["name"] for c in content["categories"]}
    for annotation in content["annotations"][:10]:
        ids = np.asarray(Image.open(folder / "annotations" / "panoptic_train2017" / annotation["file_name"]))[..., 0]
        assert {s["id"]: s["area"] for s in annotation["segments_info"]} == dict(
            zip(*np.unique(ids, return_counts=True), strict=True)
        )
        assert all(s["category_id"] in names for s in annotation["segments_info"])


def test_mostly_seen_images_in_training_and_all_classes_in_validation(tmp_path: Path) -> None:
    config = ScenesConfig(train_images=150, val_images=100, unseen_share=0.1)
    store = Store(tmp_path)
    folder = store.open(Stage.of(scenes, config).run(store, QUIET)).path
    unseen = set(scenes.benchmark(config).unseen_ids)

    def share(split: str) -> float:
        annotations = json.loads((folder / "annotations" / f"panoptic_{split}.json").read_text())["annotations"]
        return sum(any(s["category_id"] in unseen for s in a["segments_info"]) for a in annotations) / len(annotations)

    assert share("train2017") < 0.2
    assert share("val2017") > 0.5


@pytest.mark.parametrize("wrong", [{"train_images": 0}, {"unseen_share": 1.5}])
def test_wrong_settings_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ScenesConfig(**wrong)  # type: ignore[arg-type]


def test_the_backbone_is_trained_on_colours_that_no_class_has() -> None:
    from pipeline.world.names import APPEARANCES, TINTS
    from pipeline.world.train_backbone import APART, strange_colour

    named = [colour for colour in APPEARANCES.values() if colour is not None]
    for others in (named, list(TINTS.values())):
        drawn = np.stack([strange_colour(np.random.default_rng(seed), others) for seed in range(200)])
        distance = np.linalg.norm(drawn[:, None] - np.array(others), axis=-1).min(1)
        assert distance.min() > APART
        assert drawn.std(0).min() > 30  # and yet they are of all kinds
