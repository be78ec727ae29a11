"""The page of `zs-seg predict`: every picture with its classes and scores, one file without a network."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any
from urllib.parse import quote

from pipeline.report.overlay import UNSEEN

STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1f2933; --dim: #5b6774; --ground: #f5f7fa; --card: #fff; --line: #dde2e8;
  --unseen: {UNSEEN}; --bar: #2f7ed8; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e9ed; --dim: #9aa5b1; --ground: #14181d; --card: #1d232a;
  --line: #323b45; --unseen: #f06292; --bar: #5aa2f0; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", "Liberation Sans", sans-serif; }}
main {{ max-width: 1320px; margin: 0 auto; padding: 24px 16px 48px; }}
h1 {{ font-size: 22px; margin: 0; }}
p {{ margin: 4px 0 14px; color: var(--dim); }}
input {{ font: inherit; padding: 7px 10px; width: min(100%, 340px); border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); color: inherit; }}
.all {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 14px;
  margin-top: 14px; }}
figure {{ margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }}
figure[hidden] {{ display: none; }}
img, video {{ display: block; width: 100%; background: var(--line); }}
figcaption {{ padding: 9px 12px 12px; }}
figcaption b {{ overflow-wrap: anywhere; }}
figcaption small {{ color: var(--dim); float: right; }}
ul {{ list-style: none; margin: 6px 0 0; padding: 0; font-variant-numeric: tabular-nums; }}
li {{ display: flex; gap: 8px; padding: 1px 0; }}
li span:first-child {{ flex: 1; overflow-wrap: anywhere; }}
.unseen span:first-child {{ color: var(--unseen); font-weight: 600; }}
"""

SCRIPT = """
const field = document.querySelector("input"), figures = [...document.querySelectorAll("figure")];
field.oninput = () => {
  const word = field.value.trim().toLowerCase();
  for (const figure of figures) figure.hidden = !figure.dataset.text.includes(word);
  document.querySelector("output").textContent = figures.filter(figure => !figure.hidden).length;
};
"""


def gallery(content: Mapping[str, Any]) -> str:
    """The page of `Predicted.content`, whose entries have the path of their `picture` beside the page; the frames of a
    video share one."""
    by_picture: dict[str, list[dict[str, Any]]] = {}
    for entry in content["images"]:
        if "picture" in entry:
            by_picture.setdefault(entry["picture"], []).append(entry)
    figures = "\n".join(_figure(picture, entries) for picture, entries in by_picture.items())
    left = len(content["skipped"]) + len(content["unfinished"])
    missing = f"; {left} left out, listed in panoptic.json" if left else ""
    thresholds = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in content["thresholds"].items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>zs-seg predict</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style><main>'
        f"<h1><output>{len(by_picture)}</output> of {len(by_picture)} pictures{missing}</h1>"
        f"<p>{len(content['classes'])} classes to choose from; {thresholds}. "
        f'Classes that were unseen in training are <b style="color: var(--unseen)">marked</b>.</p>'
        f'<input type="search" placeholder="only with this class or file name" aria-label="filter">'
        f'<div class="all">\n{figures}\n</div></main><script>{SCRIPT}</script></html>\n'
    )


def _figure(picture: str, entries: list[dict[str, Any]]) -> str:
    """An image with its segments, or a video with its classes, each with its best score."""
    first, source = entries[0], quote(picture)
    ms = sum(entry["ms"] for entry in entries) / len(entries)
    if "video" in first:
        name, size = first["video"], f"{len(entries)} frames, {ms:.0f} ms each"
        shown = f'<video src="{source}" controls muted loop preload="metadata"></video>'
        best: dict[str, dict[str, Any]] = {}
        for segment in (segment for entry in entries for segment in entry["segments"]):
            if segment["score"] > best.get(segment["name"], {"score": -1.0})["score"]:
                best[segment["name"]] = segment
        segments = list(best.values())
    else:
        name, size, segments = first["file_name"], f"{ms:.0f} ms", first["segments"]
        ratio = f"{first['width']} / {first['height']}"
        shown = (
            f'<a href="{source}"><img src="{source}" loading="lazy" alt="{escape(name)}" '
            f'style="aspect-ratio: {ratio}"></a>'
        )
    rows = "".join(
        f"<li{'' if segment['seen'] else ' class=unseen'}><span>{escape(segment['name'])}</span>"
        f"<span>{segment['score']:.2f}</span></li>"
        for segment in sorted(segments, key=lambda segment: -segment["score"])
    )
    text = escape(" ".join([name, *(segment["name"] for segment in segments)]).lower())
    return (
        f'<figure data-text="{text}">{shown}<figcaption><small>{size}</small><b>{escape(name)}</b>'
        f"<ul>{rows or '<li><span>no segment</span></li>'}</ul></figcaption></figure>"
    )
