"""The report's pictures: an image, its ground truth and both predictions side by side, on the page or as one sheet."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.report.overlay import INK, Label, colours_of, overlay
from pipeline.scoring.records import CHECKPOINTS
from storage import id_colours

TITLES = "image", "ground truth", *CHECKPOINTS
PANEL = 480  # pixels, the long side of a rendered picture
GAP, HEAD = 8, 24  # pixels of a sheet

Labelled = tuple[NDArray[np.integer], Mapping[int, Label]]


class Panel(NamedTuple):
    """A rendered picture, and for the pointer over it `places`, a PNG as `places_png` makes it, and the `names` of its
    segments by place; both empty of a plain image."""

    picture: Image.Image
    places: bytes = b""
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image (H, W, 3) uint8 with its ground truth and predictions: each ids (H, W), 0 = void, and id -> label."""

    image: NDArray[np.uint8]
    ground_truth: Labelled
    inductive: Labelled
    transductive: Labelled

    def panels(self) -> list[Image.Image]:
        """Rendered in the order of `TITLES`, the long sides `PANEL` pixels; a class has one colour in all of them."""
        shown = self.ground_truth, self.inductive, self.transductive
        colours = colours_of(label.name for _, labels in shown for label in labels.values())
        overlays = [overlay(self.image, ids, labels, side=PANEL, colours=colours) for ids, labels in shown]
        return [Image.fromarray(self.image).resize(overlays[0].size), *overlays]

    def row(self) -> list[Panel]:
        """`panels` with what the pointer over them finds."""
        image, *overlays = self.panels()
        row = [Panel(image)]
        for picture, (ids, labels) in zip(
            overlays, (self.ground_truth, self.inductive, self.transductive), strict=True
        ):
            places = np.zeros(ids.shape, np.int64)
            for place, value in enumerate(labels, start=1):
                places[ids == value] = place
            names = tuple(label.name + ("" if label.seen else ", unseen") for label in labels.values())
            row.append(Panel(picture, places_png(places, PANEL), names))
        return row


def picture_rows(rows: Sequence[Sequence[Panel]]) -> str:
    """HTML: each of `rows` as one row of pictures under `TITLES`."""
    heads = "".join(f"<span>{title}</span>" for title in TITLES)
    shown = "".join(
        f"<div class=pictures>{''.join(_panel(*one) for one in zip(TITLES, row, strict=True))}</div>" for row in rows
    )
    return (
        "<p class=note>Objects keep their own colours. An outline has one colour a class within a row; a broad outline "
        "and a <span class=pill>name</span> of this colour mark classes that were unseen in training; plain grey is "
        f"void. Click to enlarge; the pointer names a segment.</p><div class='pictures heads'>{heads}</div>{shown}"
    )


def _panel(title: str, panel: Panel) -> str:
    hover = ""
    if panel.places:
        names = escape(json.dumps(panel.names))
        hover = f' data-places="{data_url(panel.places, "png")}" data-names="{names}"'
    return f'<img class=panel alt="{title}"{hover} src="{data_url(encoded(panel.picture, "webp"), "webp")}">'


def places_png(places: NDArray[np.integer], side: int) -> bytes:
    """A map (H, W), 0 for void, else 1 + a segment's position, as a PNG whose long side is at most `side` pixels:
    place = R + 256 G + 65536 B of every pixel."""
    height, width = places.shape
    if (longest := max(height, width)) > side:
        rows, columns = (np.arange(max(1, n * side // longest)) * longest // side for n in (height, width))
        places = places[np.ix_(rows, columns)]
    buffer = io.BytesIO()
    Image.fromarray(id_colours.colours_of(places)).save(buffer, format="png")
    return buffer.getvalue()


def sheet(titles: Sequence[str], rows: Sequence[Sequence[Image.Image]], *, side: int) -> Image.Image:
    """Rows of pictures under the columns' titles, each scaled to a long side of `side` pixels."""
    scaled = [
        [panel.resize([max(1, round(length * side / max(panel.size))) for length in panel.size]) for panel in row]
        for row in rows
    ]
    heights = [max(panel.height for panel in row) for row in scaled]
    result = Image.new("RGB", (GAP + len(titles) * (side + GAP), HEAD + sum(heights) + GAP * len(heights)), "white")
    draw, font = ImageDraw.Draw(result), ImageFont.load_default(14)
    lefts = [GAP + column * (side + GAP) for column in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left, HEAD / 2), title, fill=INK, anchor="lm", font=font)
    top = HEAD
    for row, height in zip(scaled, heights, strict=True):
        for left, panel in zip(lefts, row, strict=True):
            result.paste(panel, (left, top))
        top += height + GAP
    return result


def encoded(picture: Image.Image, kind: Literal["jpeg", "webp"]) -> bytes:
    """The picture as a file; WebP keeps lines and letters sharper in half of the bytes, and only pages show it."""
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=75)
    return buffer.getvalue()


def data_url(data: bytes, kind: str) -> str:
    """An image of a kind such as "png", to stand inside of a page."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
