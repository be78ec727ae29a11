"""What Prefect's pages show of a report: the pictures are taken from the report's own page."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from flows.artifacts import GAP, PANEL, pictures
from pipeline.report.pictures import Picture, picture_rows


def picture(height: int, width: int, *, seen: bool) -> Picture:
    """A black image whose left half is one segment in the transductive prediction; the rest predicts nothing."""
    ids = np.zeros((height, width), np.int64)
    nothing = (ids.copy(), {})
    ids[:, : width // 2] = 7
    image = np.zeros((height, width, 3), np.uint8)
    return Picture(image=image, ground_truth=nothing, inductive=nothing, transductive=(ids, {7: ("cat", seen)}))


def test_pictures_are_photo_truth_and_predictions_side_by_side() -> None:
    page = f"<h1>report</h1>{picture_rows([picture(300, 600, seen=True), picture(90, 90, seen=False), picture(9, 9, seen=True)])}"
    message = pictures(page, rows=2)
    data = message.split("](data:image/jpeg;base64,")[1].removesuffix(")")
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
    assert sheet.shape == (PANEL // 2 + GAP + PANEL + GAP, 4 * (PANEL + GAP), 3)
    rows = sheet[: PANEL // 2, :-GAP], sheet[PANEL // 2 + GAP : -GAP, :-GAP]
    for row in rows:
        panels = [row[:, column : column + PANEL] for column in range(0, 4 * (PANEL + GAP) - GAP, PANEL + GAP)]
        assert all(panel.max() < 30 for panel in panels[:3])  # black but for JPEG's own noise
        left, right = np.split(panels[3][10:-10, 10:-10], 2, axis=1)
        assert left[:, :-12].mean() > 60 and right[:, 12:].max() < 30
    assert pictures("<h1>a page without pictures</h1>") == ""
