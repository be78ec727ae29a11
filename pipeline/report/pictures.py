"""The report's overlay pictures: segments drawn over a photo with their class names, the unseen ones outlined."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.report.overlay import PALETTE, UNSEEN

PANEL = 480  # long side of a rendered mask in pixels, and the unit of the label sizes

Overlay = tuple[NDArray[np.integer], Mapping[int, tuple[str, bool]]]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image with its ground truth and predictions: each ids (H, W), 0 = void, and {id: (class name, seen)}."""

    image: NDArray[np.uint8]  # (H, W, 3)
    ground_truth: Overlay
    inductive: Overlay
    transductive: Overlay


def picture_rows(pictures: Sequence[Picture]) -> str:
    """HTML: one row a picture, image | ground truth | inductive | transductive, one colour a class within a row."""
    heads = "".join(f"<span>{title}</span>" for title in ("image", "ground truth", "inductive", "transductive"))
    rows = ""
    for picture in pictures:
        overlays = picture.ground_truth, picture.inductive, picture.transductive
        names = list(dict.fromkeys(name for ids, classes in overlays for name, _ in classes.values()))
        colour_of = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
        height, width = picture.image.shape[:2]
        scale = PANEL / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        panels = "".join(_panel(overlay, colour_of, size) for overlay in overlays)
        empty = f'<svg class=panel viewBox="0 0 {size[1]} {size[0]}"></svg>'
        rows += f'<div class=pictures style="--photo:url({_photo(picture.image)})">{empty}{panels}</div>'
    return (
        f"<p class=note>One colour a class within a row. <span class=pill>name</span> and the outline of the same colour "
        f"mark classes that were unseen in training; plain grey is void.</p><div class='pictures heads'>{heads}</div>{rows}"
    )


def _photo(image: NDArray[np.uint8]) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((PANEL, PANEL))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=92, subsampling=0)
    return data_url(buffer.getvalue(), "jpeg")


def _panel(overlay: Overlay, colour_of: Mapping[str, str], size: tuple[int, int]) -> str:
    """Translucent segments with edges and names, to lie over the photo."""
    from scipy import ndimage

    ids, classes = overlay
    rows, columns = (np.arange(n) * old // n for n, old in zip(size, ids.shape, strict=True))
    ids = np.asarray(ids)[np.ix_(rows, columns)]  # nearest neighbour
    pixels = np.zeros((*size, 4), np.uint8)
    thin, thick = (
        ndimage.maximum_filter(ids, width, mode=mode, cval=-1) != ndimage.minimum_filter(ids, width, mode=mode, cval=-1)
        for width, mode in ((3, "nearest"), (11, "constant"))  # only the thick outline follows the image's border
    )
    areas = []
    for value, (name, seen) in classes.items():
        mask = ids == value
        if not mask.any():
            continue  # too small to survive the shrinking
        pixels[mask] = *_rgb(colour_of[name]), 150
        if not seen:
            pixels[mask & thick] = *_rgb(UNSEEN), 255
        areas.append((int(mask.sum()), mask, name, seen))
    pixels[thin & (ids > 0)] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    areas.sort(key=lambda area: area[0])  # small segments choose the place of their label first
    labels = _labels([(mask, name, seen) for _, mask, name, seen in areas], colour_of, size)
    return (
        f'<svg class="panel over" viewBox="0 0 {size[1]} {size[0]}"><image width={size[1]} height={size[0]} '
        f'href="{data_url(buffer.getvalue(), "png")}"/>{labels}</svg>'
    )


def _labels(
    segments: Sequence[tuple[NDArray[np.bool_], str, bool]], colour_of: Mapping[str, str], size: tuple[int, int]
) -> str:
    """The names, each as near to its segment's innermost point as the labels before it allow."""
    from scipy import ndimage

    height, font = 27, 20
    taken: list[tuple[float, float, float]] = []  # left, right, top
    found = ""
    for mask, name, seen in segments:
        width = 0.5 * font * len(name) + 14
        depth = np.asarray(ndimage.distance_transform_edt(np.pad(mask, 1)))[1:-1, 1:-1]
        y, x = np.unravel_index(int(depth.argmax()), depth.shape)
        left = float(np.clip(x - width / 2, 2, max(2, size[1] - width - 2)))
        tops = [y - height / 2 + shift * height / 2 for step in range(12) for shift in (step, -step)]
        tops = [top for top in tops if 2 <= top <= size[0] - height - 2] or [2.0]
        free = (
            t
            for t in tops
            if all(left > end or left + width < start or abs(t - other) > height for start, end, other in taken)
        )
        top = next(free, tops[0])
        taken.append((left, left + width, top))
        fill, stroke, ink = ("#fff", colour_of[name], "#1f2933") if seen else (UNSEEN, "#fff", "#fff")
        found += (
            f'<rect x={left:.1f} y={top:.1f} width={width:.1f} height={height} rx=6 fill="{fill}" fill-opacity=.9 '
            f'stroke="{stroke}" stroke-width=2 /><text x={left + width / 2:.1f} y={top + 20:.1f} fill="{ink}" '
            f"font-size={font} text-anchor=middle textLength={width - 14:.1f} lengthAdjust=spacingAndGlyphs>{escape(name)}</text>"
        )
    return found


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def data_url(data: bytes, kind: str) -> str:
    """An image of a kind such as "png", to stand inside of a page."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
