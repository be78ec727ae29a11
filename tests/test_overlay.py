"""Pictures of segments: objects keep their colours, unseen classes are outlined, names lie apart and inside."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageColor, ImageDraw

from pipeline.report.overlay import UNSEEN, Label, colours_of, innermost, overlay, place

GREEN, BROWN = (40, 160, 60), (120, 80, 40)
MAGENTA = ImageColor.getrgb(UNSEEN)


def scene(*, seen: bool = True) -> tuple[np.ndarray, np.ndarray, dict[int, Label]]:
    """A green square (id 7, class as given) and a void right edge on brown ground (id 900), 120 x 160 pixels."""
    image, ids = np.full((120, 160, 3), BROWN, np.uint8), np.full((120, 160), 900, np.int64)
    image[20:100, 20:100], ids[20:100, 20:100] = GREEN, 7
    ids[:, 140:] = 0
    return image, ids, {7: Label("green square", 0.87, seen), 900: Label("mud", None, True)}


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[float, float, float, float]]]:
    """The names that are written from now on, each with its text's bounding box."""
    found: list[tuple[str, tuple[float, float, float, float]]] = []
    write = ImageDraw.ImageDraw.text

    def noted(self: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, **options: Any) -> None:
        box: Any = self.textbbox(xy, text, font=options["font"], anchor=options["anchor"])
        found.append((text, box))
        write(self, xy, text, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    return found


@pytest.mark.parametrize("seen", [True, False])
def test_an_object_keeps_its_colour_and_only_an_unseen_one_has_the_broad_outline(seen: bool) -> None:
    image, ids, labels = scene(seen=seen)
    picture = np.asarray(overlay(image, ids, labels, side=480, colours={"green square": "#e5c100", "mud": "#17a2a2"}))
    assert picture.shape == (360, 480, 3)
    row = [tuple(pixel) for pixel in picture[270].tolist()]  # below the names
    assert row[180] == GREEN and row[30] == BROWN
    left = row.index(GREEN)  # from there to the left: the class's colour, the outer line, the ground's own lines
    outer, width = (((255, 255, 255), 1), (MAGENTA, 3))[not seen]
    own, ground = ImageColor.getrgb("#e5c100"), ImageColor.getrgb("#17a2a2")
    expected = [own] * 2 + [outer] * width + [(255, 255, 255)] + [ground] * 2 + [BROWN]
    assert row[left - len(expected) : left] == expected[::-1]
    assert (picture == MAGENTA).all(-1).any() == (not seen)


def test_a_segment_is_flattened_towards_its_mean_and_void_is_grey() -> None:
    rng = np.random.default_rng(0)
    image, ids, labels = scene()
    image = (image + rng.integers(0, 40, image.shape)).astype(np.uint8)
    picture = np.asarray(overlay(image, ids, labels, side=160)).astype(float)
    part = (slice(106, 115), slice(10, 100))  # of the ground, without lines or names
    assert picture[part].mean((0, 1)) == pytest.approx(image[part].mean((0, 1)), abs=1)
    assert picture[part].std() < image[part].astype(float).std()
    void = picture[:, 150:158]
    assert (void.max(-1) - void.min(-1)).max() <= 1 and void.mean() > 120


def test_what_has_no_label_is_void() -> None:
    image, ids, labels = scene()
    without = np.where(ids == 7, 0, ids)
    expected = np.asarray(overlay(image, without, {900: labels[900]}))
    np.testing.assert_array_equal(np.asarray(overlay(image, ids, {900: labels[900]})), expected)


def test_small_images_grow_by_a_whole_number_and_large_ones_stay() -> None:
    for (height, width), expected in (((96, 96), (672, 672)), ((30, 500), (30, 500)), ((500, 900), (500, 900))):
        picture = overlay(np.zeros((height, width, 3), np.uint8), np.zeros((height, width), int), {})
        assert (picture.height, picture.width) == expected


def test_names_are_written_with_scores_inside_of_the_picture_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    names = drawn(monkeypatch)
    image, ids, labels = scene()
    overlay(image, ids, labels)
    assert sorted(text for text, _ in names) == ["green square 0.87", "mud"]
    names.clear()
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 25, (12, 16)).repeat(20, 0).repeat(20, 1)  # 24 classes, all over the picture
    many = {i: Label(f"class number {i}" * (1 + (i == 3)), 0.5, i % 3 > 0) for i in range(1, 25)}
    many[4] = Label("a name far too long " * 9, 0.25, True)
    picture = overlay(np.zeros((240, 320, 3), np.uint8), ids, many)
    assert len(names) == 24
    assert any(text.startswith("a name far too long") and text.endswith("... 0.25") for text, _ in names)
    for _, (left, top, right, bottom) in names:
        assert left >= 0 and top >= 0 and right <= picture.width and bottom <= picture.height
    for (_, one), (_, other) in combinations(names, 2):
        assert one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(20, 200), st.integers(20, 200)),
    wishes=st.lists(
        st.tuples(st.integers(0, 199), st.integers(0, 199), st.integers(1, 90), st.integers(5, 40)), max_size=15
    ),
)
def test_boxes_never_overlap_nor_leave_the_picture(
    size: tuple[int, int], wishes: list[tuple[int, int, int, int]]
) -> None:
    anchors = [(min(x, size[0] - 1), min(y, size[1] - 1)) for x, y, _, _ in wishes]
    sizes = [(width, height) for _, _, width, height in wishes]
    boxes = place(anchors, sizes, size)
    assert len(boxes) == len(wishes)
    there = [box for box in boxes if box]
    for box in there:
        assert 0 <= box.left < box.right <= size[0] and 0 <= box.top < box.bottom <= size[1]
    for one, other in combinations(there, 2):
        assert one.left >= other.right or other.left >= one.right or one.top >= other.bottom or other.top >= one.bottom
    for box, (width, height) in zip(boxes, sizes, strict=True):
        assert box is None or (box.right - box.left, box.bottom - box.top) == (width, height)
    if wishes and sizes[0][0] <= size[0] and sizes[0][1] <= size[1]:  # the first has all the room
        box, (x, y) = boxes[0], anchors[0]
        assert box and box.left <= x < box.right and box.top <= y < box.bottom


def test_a_box_without_room_is_none() -> None:
    anchors, size = [(20, 5)] * 4, (50, 40)
    assert [box is None for box in place(anchors, [(40, 18)] * 4, size)] == [False, False, True, True]
    assert place(anchors[:1], [(60, 10)], size) == [None]


def test_colours_differ_and_none_is_that_of_the_unseen() -> None:
    names = [f"class {i}" for i in range(48)]
    colours = [np.array(ImageColor.getrgb(c)) for c in colours_of([*names, *names]).values()]
    assert len(colours) == 48
    assert min(np.abs(one - other).max() for one, other in combinations(colours, 2)) >= 8
    assert min(np.abs(colour - np.array(MAGENTA)).max() for colour in colours) >= 40


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_the_innermost_pixel_is_the_farthest_from_the_edge(seed: int, size: tuple[int, int]) -> None:
    """By looking at every pair of pixels; outside of the picture counts as outside of the mask."""
    mask = np.random.default_rng(seed).random(size) < 0.8
    mask[0, 0] = True
    outside = [(y, x) for y in range(-1, size[0] + 1) for x in range(-1, size[1] + 1)
               if not (0 <= y < size[0] and 0 <= x < size[1] and mask[y, x])]  # fmt: skip

    def depth(y: int, x: int) -> int:
        return min((y - a) ** 2 + (x - b) ** 2 for a, b in outside)

    x, y = innermost(mask)
    assert depth(y, x) == max(depth(a, b) for a, b in np.argwhere(mask).tolist()) > 0


def test_innermost_of_a_large_mask() -> None:
    mask = np.zeros((900, 1300), bool)
    mask[100:500, 200:1200] = True
    x, y = innermost(mask)
    assert abs(y - 300) <= 6 and 400 <= x <= 1000
    mask = np.zeros((900, 1300), bool)
    mask[7, 11] = True  # between the pixels that are looked at
    assert innermost(mask) == (11, 7)
