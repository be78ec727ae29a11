"""Captions of the small CLIP's training: what they say of a segment is what its pixels show."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.world.draw import Scene, draw_scene
from pipeline.world.names import APPEARANCES, SHAPES, stuff_names, thing_names
from pipeline.world.train_teacher import described

SIDE = 90
RED = np.array(APPEARANCES["red"])


def square(name: str, *, top: int, left: int, side: int, brightness: float = 1.0) -> Scene:
    """A square of `side` pixels, red at `brightness`, on grey."""
    ids = np.ones((SIDE, SIDE), np.int32)
    ids[top : top + side, left : left + side] = 2
    image = np.full((SIDE, SIDE, 3), 120, np.uint8)
    image[ids == 2] = np.round(RED * brightness)
    return Scene(image=image, ids=ids, names={1: "grey dots", 2: name})


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (square("red square", top=0, left=0, side=20), "small red square at the top left"),
        (square("red square", top=30, left=30, side=30), "medium red square at the centre"),
        (square("red square", top=35, left=56, side=34), "medium red square at the right"),
        (square("red square", top=50, left=25, side=40), "large red square at the bottom"),
        (square("red square", top=5, left=65, side=20, brightness=0.85), "small dark red square at the top right"),
        (square("red square", top=65, left=5, side=20, brightness=1.1), "small light red square at the bottom left"),
        # a pattern has no brightness of its own
        (square("striped square", top=65, left=5, side=20, brightness=0.5), "small striped square at the bottom left"),
    ],
)
def test_size_place_and_shade_are_the_pixels(scene: Scene, caption: str) -> None:
    assert described(scene, 2, mirrored=False) == caption


def test_a_mirrored_image_swaps_left_and_right_alone() -> None:
    rng = np.random.default_rng(0)
    swap = {"left": "right", "right": "left"}
    places = set()
    for _ in range(30):
        scene = draw_scene(rng, size=96, things=thing_names(SHAPES), stuff=stuff_names())
        flipped = Scene(image=scene.image[:, ::-1], ids=scene.ids[:, ::-1], names=scene.names)
        for segment in scene.names:
            words = described(scene, segment, mirrored=False).split(" ")
            places.add(words[-1])
            expected = " ".join(swap.get(word, word) for word in words)
            assert described(scene, segment, mirrored=True) == expected
            # as the flipped pixels have it
            assert described(flipped, segment, mirrored=False) == expected
    assert {"left", "right", "top", "bottom", "centre"} <= places
