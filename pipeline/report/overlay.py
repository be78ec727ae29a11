"""Segments drawn over their image: what `zs-seg predict`, the report and Prefect show.

A segment keeps its own colour: it is flattened towards its mean colour, outlined, and named. The outline has the
colour of its class inside of a white line, or inside of a broad line in `UNSEEN` where the class was unseen in
training. Void is grey.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

UNSEEN = "#c2185b"
PALETTE = (
    "#2f7ed8", "#f28e2b", "#3f9b4f", "#8e6bbf", "#e5c100", "#17a2a2", "#9c6b4e", "#7fb8e6",
    "#a3c14a", "#33518f", "#d8a27a", "#5f6f81", "#6d7a1f", "#b7a8dc", "#0f6b52", "#c9502f",
)  # fmt: skip
SHADES = (1.0, 0.62, 1.45)  # the palette again, darker and lighter
SHORTEST = 640  # pixels: names need room, so the long side is not shorter unless it is asked for
# Of the long side: the letters' height, the outline's white, unseen and coloured line.
LETTERS, WHITE, BROAD, COLOURED = 1 / 27, 1 / 480, 3 / 480, 2 / 480
FEW, SMALLEST = 10, 11  # more segments than that get smaller letters, not below so many pixels
FLAT = 0.4  # the mean colour's share of a segment
INK = "#1f2933"


class AnySegment(Protocol):
    """A predicted segment or one of the ground truth."""

    @property
    def id(self) -> int: ...
    @property
    def category_id(self) -> int: ...


class Label(NamedTuple):
    """A segment's class name, its score in [0, 1] if there is one to show, and whether the class was seen in
    training."""

    name: str
    score: float | None
    seen: bool


def labels_of(segments: Iterable[AnySegment], classes: Mapping[int, tuple[str, bool]]) -> dict[int, Label]:
    """Segment id -> label; `classes`: category id -> name, seen. Predicted segments have a score, true ones none."""
    return {
        s.id: Label(name, getattr(s, "score", None), seen) for s in segments for name, seen in [classes[s.category_id]]
    }


class Box(NamedTuple):
    """A rectangle in pixels; `right` and `bottom` lie outside of it."""

    left: int
    top: int
    right: int
    bottom: int


def overlay(
    image: NDArray[np.uint8],
    ids: NDArray[np.integer],
    labels: Mapping[int, Label],
    *,
    side: int | None = None,
    colours: Mapping[str, str] | None = None,
) -> Image.Image:
    """The image with its segments outlined and named.

    Args:
        image: (H, W, 3).
        ids: (H, W), the segment of every pixel.
        labels: id -> label; pixels of any other id are void.
        side: the result's long side in pixels; None = the image's own, times a whole number where that is needed to
            reach about `SHORTEST`.
        colours: class name -> outline, such as "#2f7ed8", so that several pictures agree; None = `colours_of` the
            labels.
    """
    own = max(image.shape[:2])
    scale = max(1, round(SHORTEST / own)) if side is None else side / own
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    small = Image.fromarray(image)
    small = small.resize((width, height), Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
    rows, columns = (np.arange(n) * old // n for n, old in zip((height, width), ids.shape, strict=True))
    ids = np.asarray(ids)[np.ix_(rows, columns)]  # nearest neighbour
    colours = colours or colours_of(label.name for label in labels.values())
    shown = [value for value in labels if (ids == value).any()]  # small ones may not survive the shrinking
    segment = np.zeros(ids.shape, np.int64)  # 0 = void, else 1 + the position in `shown`
    for position, value in enumerate(shown, start=1):
        segment[ids == value] = position

    painted = _flattened(np.asarray(small, np.float32), segment, len(shown))
    _outline(painted, segment, [labels[value] for value in shown], colours)
    picture = Image.fromarray(painted.round().astype(np.uint8))
    _name(picture, segment, [labels[value] for value in shown], colours)
    return picture


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each class name, in their order; the first 48 differ."""
    found = {}
    for place, name in enumerate(dict.fromkeys(names)):
        shade = SHADES[place // len(PALETTE) % len(SHADES)]
        rgb = (min(255, round(shade * part)) for part in ImageColor.getrgb(PALETTE[place % len(PALETTE)]))
        found[name] = "#{:02x}{:02x}{:02x}".format(*rgb)
    return found


def _flattened(image: NDArray[np.float32], segment: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """The image (H, W, 3) with each segment moved towards its mean colour, and void (0) as light grey."""
    flat = segment.ravel()
    area = np.maximum(np.bincount(flat, minlength=count + 1), 1)
    sums = [np.bincount(flat, image[..., i].ravel(), minlength=count + 1) for i in range(3)]
    mean = (np.stack(sums, -1) / area[:, None]).astype(np.float32)
    painted = ((1 - FLAT) * image + FLAT * mean[segment]).astype(np.float32, copy=False)
    void = segment == 0
    painted[void] = 0.6 * image[void].mean(-1, keepdims=True) + 0.4 * 200
    return painted


def _outline(
    painted: NDArray[np.float32], segment: NDArray[np.int64], labels: Sequence[Label], colours: Mapping[str, str]
) -> None:
    """Draws inside of every segment's edge: a white or broad line, then one in the colour of its class."""
    from scipy import ndimage

    framed = np.pad(segment, 1, constant_values=-1)
    inner = framed[1:-1, 1:-1]
    edge = np.zeros(segment.shape, bool)
    for neighbour in (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:]):
        edge |= neighbour != inner
    depth = np.asarray(ndimage.distance_transform_cdt(~edge, "chessboard"))  # 0 on the edge's own pixels
    white, broad, coloured = (max(1, round(part * max(segment.shape))) for part in (WHITE, BROAD, COLOURED))
    first = np.array([0, *(white if label.seen else broad for label in labels)])[segment]
    line = np.array([(0, 0, 0), *(_rgb("#ffffff" if label.seen else UNSEEN) for label in labels)])
    own = np.array([(0, 0, 0), *(_rgb(colours[label.name]) for label in labels)])
    for where, colour in (((depth < first), line), ((depth >= first) & (depth < first + coloured), own)):
        where &= segment > 0
        painted[where] = colour[segment[where]]


def _name(
    picture: Image.Image, segment: NDArray[np.int64], labels: Sequence[Label], colours: Mapping[str, str]
) -> None:
    """Writes every segment's name where there is room for it; small segments choose first."""
    from scipy import ndimage

    draw = ImageDraw.Draw(picture)
    crowded = min(1.0, math.sqrt(FEW / max(len(labels), 1)))
    letters = max(SMALLEST, round(LETTERS * crowded * max(picture.size)))
    font, margin, height = ImageFont.load_default(letters), letters // 3, round(1.35 * letters)
    areas = np.bincount(segment.ravel(), minlength=len(labels) + 1)[1:]
    windows = ndimage.find_objects(segment)
    order = np.argsort(areas, kind="stable").tolist()
    anchors, texts = [], []
    for k in order:
        rows, columns = windows[k]
        x, y = innermost(segment[rows, columns] == 1 + k)
        anchors.append((columns.start + x, rows.start + y))
        score = "" if labels[k].score is None else f" {labels[k].score:.2f}"
        texts.append(_fitting(labels[k].name, score, font, picture.width - 2 * margin - 4))
    sizes = [(math.ceil(font.getlength(text)) + 2 * margin, height) for text in texts]
    boxes = place(anchors, sizes, picture.size)
    stroke = max(1, letters // 10)
    for k, (x, y), box in zip(order, anchors, boxes, strict=True):  # lines first, so that they cross no name
        if box and not (box.left <= x < box.right and box.top <= y < box.bottom):
            colour = colours[labels[k].name]
            end = min(max(x, box.left), box.right - 1), min(max(y, box.top), box.bottom - 1)
            draw.line((x, y, *end), fill=colour, width=stroke)
            draw.circle((x, y), 2 * stroke, fill=colour, outline="white")
    for k, text, box in zip(order, texts, boxes, strict=True):
        if box:
            fill, ink = ("white", INK) if labels[k].seen else (UNSEEN, "white")
            inside, middle = (box.left, box.top, box.right - 1, box.bottom - 1), (box.left + box.right) / 2
            draw.rounded_rectangle(inside, radius=height // 4, fill=fill, outline=colours[labels[k].name], width=stroke)
            draw.text((middle, (box.top + box.bottom) / 2), text, fill=ink, anchor="mm", font=font)


def _fitting(name: str, score: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Name and score, the name cut off where both are wider than `width` pixels."""
    text = name + score
    while font.getlength(text) > width and name:
        name = name[:-1]
        text = f"{name}...{score}"
    return text


def innermost(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """The pixel (x, y) of a mask (H, W) that is farthest from its edge, to within 1/256 of the mask's size."""
    from scipy import ndimage

    step = max(1, -(-max(mask.shape) // 256))
    if not mask[::step, ::step].any():
        step = 1
    depth = np.asarray(ndimage.distance_transform_edt(np.pad(mask[::step, ::step], 1)))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return step * int(x), step * int(y)


def place(
    anchors: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]], size: tuple[int, int]
) -> list[Box | None]:
    """Boxes of `sizes` (width, height), each centred as near to its anchor (x, y) as is possible inside of the picture
    of `size` (width, height) and apart from the boxes before it; None where there is no room left."""
    taken: list[Box] = []
    found: list[Box | None] = []
    for (x, y), (width, height) in zip(anchors, sizes, strict=True):
        last = size[0] - width, size[1] - height
        box = None
        if min(last) >= 0:
            wish = min(max(x - width // 2, 0), last[0]), min(max(y - height // 2, 0), last[1])
            step = max(1, height // 3)
            # a grid through the wished place, and the rims
            lefts, tops = (
                np.unique([*range(start % step, end + 1, step), 0, end]) for start, end in zip(wish, last, strict=True)
            )
            left, top = (part.ravel() for part in np.meshgrid(lefts, tops))
            free = np.ones(len(left), bool)
            for other in taken:
                free &= (left >= other.right) | (left + width <= other.left) | (top >= other.bottom) | (
                    top + height <= other.top
                )  # fmt: skip
            if free.any():
                distance = np.where(free, (left - wish[0]) ** 2 + (top - wish[1]) ** 2, np.inf)
                best = int(distance.argmin())
                box = Box(int(left[best]), int(top[best]), int(left[best]) + width, int(top[best]) + height)
                taken.append(box)
        found.append(box)
    return found


def _rgb(colour: str) -> tuple[int, ...]:
    return ImageColor.getrgb(colour)[:3]
