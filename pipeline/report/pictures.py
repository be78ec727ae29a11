"""The report's pictures: an image, its ground truth and both predictions side by side, on the page or as one sheet."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.report.overlay import INK, Label, colours_of, overlay
from pipeline.scoring.records import CHECKPOINTS

TITLES = "image", "ground truth", *CHECKPOINTS
PANEL = 480  # pixels, the long side of a rendered picture
GAP, HEAD = 8, 24  # pixels of a sheet

Labelled = tuple[NDArray[np.integer], Mapping[int, Label]]


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


def picture_rows(rows: Sequence[Sequence[Image.Image]]) -> str:
    """HTML: each of `rows` as one row of pictures under `TITLES`."""
    heads = "".join(f"<span>{title}</span>" for title in TITLES)
    shown = "".join(
        "<div class=pictures>"
        + "".join(
            f'<img class=panel alt="{title}" src="{data_url(encoded(panel, "webp"), "webp")}">'
            for title, panel in zip(TITLES, row, strict=True)
        )
        + "</div>"
        for row in rows
    )
    return (
        "<p class=note>Objects keep their own colours. An outline has one colour a class within a row; a broad outline "
        "and a <span class=pill>name</span> of this colour mark classes that were unseen in training; plain grey is "
        f"void.</p><div class='pictures heads'>{heads}</div>{shown}"
    )


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
