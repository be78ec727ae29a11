"""What a run shows in Prefect's own pages: tables, and a few of the report's pictures."""

from __future__ import annotations

import base64
import io
import re

from pipeline.report.page import SETTINGS, percent
from pipeline.report.pictures import data_url
from pipeline.report.write import headline
from pipeline.scoring.records import Report

PANEL = 200  # pixels, the longer side of one panel
GAP = 4
ROW = re.compile(r"--photo:url\(data:image/jpeg;base64,([^)]+)\)(.*?)</div>", re.DOTALL)
OVERLAY = re.compile(r'href="data:image/png;base64,([^"]+)"')


def score_rows(report: Report) -> list[dict[str, str]]:
    """The report's headline, one row a setting, numbers in percent."""
    return [
        {"percent": setting.name} | {name: percent(getattr(report.rows[key], name)) for name in headline(report)}
        for key, setting in SETTINGS.items()
    ]


def pictures(page: str, rows: int = 3) -> str:
    """The first `rows` pictures of a report's page as one image in Markdown: photo, ground truth, both predictions
    beside each other. "" where the page has none."""
    from PIL import Image, ImageOps

    strips = []
    for photo, overlays in ROW.findall(page)[:rows]:
        image = ImageOps.contain(Image.open(io.BytesIO(base64.b64decode(photo))).convert("RGB"), (PANEL, PANEL))
        panels = [image]
        for overlay in OVERLAY.findall(overlays):
            layer = Image.open(io.BytesIO(base64.b64decode(overlay))).convert("RGBA").resize(image.size)
            panels.append(Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB"))
        strips.append(panels)
    if not strips:
        return ""
    width = max((panels[0].width + GAP) * len(panels) for panels in strips)
    sheet = Image.new("RGB", (width, sum(panels[0].height + GAP for panels in strips)), "white")
    top = 0
    for panels in strips:
        for column, panel in enumerate(panels):
            sheet.paste(panel, (column * (panel.width + GAP), top))
        top += panels[0].height + GAP
    buffer = io.BytesIO()
    sheet.save(buffer, format="JPEG", quality=85)
    heads = "image, ground truth, inductive, transductive; unseen classes are outlined"
    return f"{heads}\n\n![{heads}]({data_url(buffer.getvalue(), 'jpeg')})"
