"""The ablations' tables and figures as one page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path


def picture(path: Path) -> str:
    """A PNG file as HTML that holds it."""
    from pipeline.report.pictures import data_url

    return f'<img style="width:100%" alt="" src="{data_url(path.read_bytes(), "png")}">'


def page(title: str, sections: Mapping[str, str]) -> str:
    """A page of sections, heading -> HTML, in the report's style."""
    from pipeline.report.style import STYLE

    content = "".join(f"<section><h2>{escape(head)}</h2>{body}</section>" for head, body in sections.items())
    return (
        f'<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>zs-seg ablations, {escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><p class=brand>zs-seg</p><h1>Ablations, {escape(title)}</h1></header>{content}</main></body></html>\n"
    )
