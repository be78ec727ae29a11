"""The generated world: shapes with a colour or a pattern on textured ground, drawn with numpy and Pillow from a seed.

Things are "<appearance> <shape>" ("striped star"), stuff is "<tint> <texture>" ("grey dots"). Every combination is a
class, so a class can be held out of training while each of its two words occurs in seen classes: this makes zero-shot
transfer possible and measurable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pipeline.world.config import LayoutConfig
from pipeline.world.names import APPEARANCES, SHAPES, TINTS

INK, PAPER = (35, 35, 40), (235, 235, 230)  # the two tones of a striped or spotted thing
MIN_AREA = 60  # pixels
PLAIN = LayoutConfig()


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One drawn image: `image` (S, S, 3) uint8, `ids` (S, S) int32 from 1, `names`: class name by segment id."""

    image: np.ndarray
    ids: np.ndarray
    names: dict[int, str]


def draw_scene(
    rng: np.random.Generator, *, size: int, things: list[str], stuff: list[str], layout: LayoutConfig = PLAIN
) -> Scene:
    """Draw a scene of `layout.things` things over 1 or 2 stuff regions, of classes named in `things` and `stuff`.

    Placements are redrawn until each segment has `MIN_AREA` visible pixels, and each thing the share `layout.visible`
    of its own.
    """
    while True:
        ids, names, visible = _placement(rng, size, things, stuff, layout)
        if visible:
            return Scene(image=_paint(rng, ids, names, layout.clutter), ids=ids, names=names)


def _placement(
    rng: np.random.Generator, size: int, things: list[str], stuff: list[str], layout: LayoutConfig
) -> tuple[np.ndarray, dict[int, str], bool]:
    """Segment ids (size, size), class names by id, and whether every segment is visible enough.

    One or two stuff regions come first, then things from back to front.
    """
    ids, names = _ground(rng, size, stuff)
    whole = {}
    for _ in range(int(rng.integers(layout.things[0], layout.things[1] + 1))):
        name = things[rng.integers(len(things))]
        mask = shape_mask(rng, name.split(" ")[1], size, radius=layout.radius)
        segment = len(names) + 1
        ids[mask] = segment
        names[segment] = name
        whole[segment] = int(mask.sum())
    area = np.bincount(ids.ravel(), minlength=len(names) + 1)
    return ids, names, all(area[s] >= max(MIN_AREA, layout.visible * whole.get(s, 0)) for s in names)


def _paint(rng: np.random.Generator, ids: np.ndarray, names: dict[int, str], clutter: int) -> np.ndarray:
    """An image (S, S, 3) uint8: every segment coloured, then clutter, a brightness factor and noise over all of it."""
    size = len(ids)
    image = np.empty((size, size, 3), dtype=np.float32)
    for segment, name in names.items():
        first, second = name.split(" ")
        surface = _surface(rng, first, size) if second in SHAPES else textured(rng, TINTS[first], second, size)
        np.copyto(image, surface, where=(ids == segment)[..., None], casting="same_kind")
    return photograph(rng, _strokes(rng, image, clutter) if clutter else image)


def _strokes(rng: np.random.Generator, image: np.ndarray, count: int) -> np.ndarray:
    """`image` (S, S, 3) with short straight strokes, 1 or 2 pixels wide, in any colour."""
    size = len(image)
    canvas = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(count):
        y, x = rng.uniform(0, size, 2)
        angle, length = rng.uniform(0, np.pi), rng.uniform(0.08, 0.25) * size
        end = (x + length * np.cos(angle), y + length * np.sin(angle))
        draw.line([(x, y), end], fill=tuple(int(v) for v in rng.integers(0, 256, 3)), width=int(rng.integers(1, 3)))
    return np.asarray(canvas)


def photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """A painted image (S, S, 3) times a random brightness in 0.85..1.12, with Gaussian noise of deviation 6; uint8."""
    lit = image.astype(np.float32) * rng.uniform(0.85, 1.12)
    return np.clip(lit + 6.0 * rng.standard_normal(image.shape, dtype=np.float32), 0, 255).astype(np.uint8)


def _ground(rng: np.random.Generator, size: int, stuff: list[str]) -> tuple[np.ndarray, dict[int, str]]:
    """One stuff region over the whole image, or two different ones on the two sides of a wavy line."""
    chosen = rng.choice(len(stuff), size=int(rng.integers(1, 3)), replace=False)
    ids = np.ones((size, size), dtype=np.int32)
    if len(chosen) == 2:
        y, x = _grid(size)
        angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        wave = 0.06 * size * np.sin(along * 2 * np.pi / size + phase)
        ids[across + wave > rng.uniform(-0.2, 0.2) * size] = 2
    return ids, {i + 1: stuff[c] for i, c in enumerate(chosen)}


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates y, x, each (size, size), with the origin at the image's centre."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    return y - size / 2, x - size / 2


def _turned(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates in a randomly rotated and shifted frame, each (size, size)."""
    y, x = _grid(size)
    angle, shift = rng.uniform(0, np.pi), rng.uniform(-20, 20, size=2)
    return y * np.cos(angle) + x * np.sin(angle) + shift[0], x * np.cos(angle) - y * np.sin(angle) + shift[1]


def textured(rng: np.random.Generator, tint: Sequence[float], texture: str, size: int) -> np.ndarray:
    """A stuff surface (size, size, 3), float: the tint (RGB in 0..255), darkened where the texture's pattern is on."""
    u, v = _turned(rng, size)
    period = rng.uniform(9, 14)
    if texture == "stripes":
        on = (np.mod(u, period) < 0.5 * period).astype(float)
    elif texture == "dots":
        on = (np.hypot(np.mod(u, period) - period / 2, np.mod(v, period) - period / 2) < 0.3 * period).astype(float)
    elif texture == "checks":
        on = (np.mod(u, period) < 0.5 * period) ^ (np.mod(v, period) < 0.5 * period)
    else:  # fog: smooth low-frequency noise
        coarse = Image.fromarray(rng.uniform(0, 1, (6, 6)).astype(np.float32))
        on = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    base = np.array(tint) * rng.uniform(0.92, 1.08)
    return base * (1.0 - 0.4 * np.asarray(on, dtype=float)[..., None])


def _surface(rng: np.random.Generator, appearance: str, size: int) -> np.ndarray:
    """A thing's surface (size, size, 3), float: a plain colour, or ink stripes or spots on paper."""
    colour = APPEARANCES[appearance]
    if colour is not None:
        return np.broadcast_to(np.array(colour) + rng.normal(0, 8, 3), (size, size, 3))
    u, v = _turned(rng, size)
    period = rng.uniform(6, 8)
    if appearance == "striped":
        on = np.mod(u, period) < 0.5 * period
    else:
        on = np.hypot(np.mod(u, period) - period / 2, np.mod(v, period) - period / 2) < 0.32 * period
    return np.where(on[..., None], np.array(INK), np.array(PAPER)).astype(float)


def shape_mask(
    rng: np.random.Generator, shape: str, size: int, *, radius: tuple[float, float] = PLAIN.radius
) -> np.ndarray:
    """The mask (size, size) bool of a shape, rotated and placed at random, its radius drawn from `radius`, two shares
    of the image's side."""
    reach = rng.uniform(*radius) * size
    cy, cx = rng.uniform(0.8 * reach, size - 0.8 * reach, size=2)
    turn = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    distance = np.hypot(y - cy, x - cx)
    if shape == "circle":
        return distance < 0.9 * reach
    if shape == "ring":
        return (distance < reach) & (distance > 0.55 * reach)
    angles, radii = _outline(shape)
    points = [
        (cx + reach * r * np.cos(a + turn), cy + reach * r * np.sin(a + turn))
        for a, r in zip(angles, radii, strict=True)
    ]
    canvas = Image.new("1", (size, size))
    ImageDraw.Draw(canvas).polygon(points, fill=1)
    return np.asarray(canvas)


def _outline(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """A polygon as angles (radians) and radii relative to the shape's radius."""
    if shape == "star":
        return np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2, 0.45, 1.1)
    if shape == "square":
        return np.arange(4) * np.pi / 2, np.full(4, 1.1)
    if shape == "triangle":
        return np.arange(3) * 2 * np.pi / 3, np.full(3, 1.2)
    arm = np.arctan2(0.33, 1.1)  # a cross: two bars whose half-width is 0.33 and half-length 1.1
    angles = np.concatenate([[q - arm, q + arm, q + np.pi / 4] for q in np.arange(4) * np.pi / 2])
    return angles, np.tile([np.hypot(0.33, 1.1), np.hypot(0.33, 1.1), 0.33 * np.sqrt(2)], 4)
