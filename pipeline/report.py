"""The report of a run: report.json for programs, report.html for people, and the table on the terminal.

The page stands alone: pictures are data URLs, styles and the few lines of script are inline, nothing is fetched.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.pictures import UNSEEN, Picture, data_url, picture_rows
from storage.atomic import write_text

if TYPE_CHECKING:
    from rich.table import Table

# Keys of the report, in the order of the tables: key -> name, what it is. A report may lack some of them.
SETTINGS = {
    "inductive": ("inductive", "unseen names first met at prediction time"),
    "control": ("inductive + offset", "control: a constant taken off the seen scores, nothing trained"),
    "transductive": ("transductive", "unseen names, never unseen images, known in training"),
    "ceiling": ("ceiling", "ground-truth masks classified by the teacher's own instance tokens"),
}
HEADLINE = {
    "Panoptic quality": ("sPQ", "uPQ", "hPQ"),
    "Semantic IoU": ("sIoU", "uIoU", "hIoU"),
    "All classes": ("PQ", "SQ", "RQ", "PQ_th", "PQ_st"),
}
TABLE_COLUMNS = HEADLINE["Panoptic quality"] + HEADLINE["Semantic IoU"]
MEANING = {
    "sPQ": "mean panoptic quality of the seen classes",
    "uPQ": "mean panoptic quality of the unseen classes",
    "hPQ": "harmonic mean of sPQ and uPQ",
    "sIoU": "mean IoU of the seen classes",
    "uIoU": "mean IoU of the unseen classes",
    "hIoU": "harmonic mean of sIoU and uIoU",
    "PQ": "panoptic quality",
    "SQ": "segmentation quality: mean IoU of the matched segments",
    "RQ": "recognition quality: F1 of the matches",
    "PQ_th": "panoptic quality of the things",
    "PQ_st": "panoptic quality of the stuff",
}
LINES = "#2f7ed8", "#d9720b", "#3f9b4f", "#8e6bbf", "#a8801a", "#128a8a", "#9c6b4e", "#5f6f81"  # dark enough for text

PRESET_PLACE, LINEAGE_PLACE = "<!--preset-->", "<!--lineage-->"  # filled by `publish`


def write_report(
    folder: Path,
    report: Mapping[str, Any],
    *,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    pictures: Sequence[Picture],
) -> None:
    """Writes `report.json` and `report.html` into `folder`, which must exist.

    Args:
        folder: where to.
        report: `benchmark`; `marks`, warnings shown as a banner; for each key of `SETTINGS` that was evaluated the
            result of `pipeline.metrics.scores`; `teacher_accuracy` with `seen` and `unseen` (percent) and `instances`
            (how many were classified); `settings` {name: value}. What is known only outside of the artefact may be
            added by `publish`.
        curves: training stage -> rows with `step`, `total` and the stage's other losses by name (`lr` is not drawn).
        pictures: shown in this order.

    Raises:
        ValueError: the report holds NaN or infinite numbers.
    """
    write_text(folder / "report.json", json.dumps(report, indent=1, allow_nan=False))
    write_text(folder / "report.html", _page(report, curves=curves, pictures=pictures))


def publish(source: Path, target: Path, *, preset: str, lineage: Mapping[str, Mapping[str, Any]]) -> None:
    """Copies a report into the folder `target` (made if need be) and adds which run it is of.

    Args:
        source: the folder that `write_report` wrote.
        target: where report.json and report.html go, replacing older ones.
        preset: the run's name.
        lineage: stage -> {"ref": "kind/key", "seconds": how long it took to make}.
    """
    target.mkdir(parents=True, exist_ok=True)
    report = json.loads((source / "report.json").read_text()) | {"preset": preset, "lineage": lineage}
    page = (source / "report.html").read_text(encoding="utf-8")
    page = page.replace(PRESET_PLACE, f" &middot; preset {escape(preset)}")
    page = page.replace(LINEAGE_PLACE, _section("Lineage", _lineage(lineage)))
    write_text(target / "report.json", json.dumps(report, indent=1, allow_nan=False))
    write_text(target / "report.html", page)


def console_table(report: Mapping[str, Any]) -> Table:
    """The headline numbers in percent, one row a setting."""
    from rich.table import Table

    table = Table(title=report.get("preset", report["benchmark"]), caption="; ".join(report["marks"]) or None)
    table.add_column("percent")
    for name in TABLE_COLUMNS:
        table.add_column(name, justify="right", style="bold" if name.startswith("h") else None)
    for key in _present(report):
        table.add_row(SETTINGS[key][0], *(_percent(report[key][name]) for name in TABLE_COLUMNS))
    return table


def _present(report: Mapping[str, Any]) -> list[str]:
    return [key for key in SETTINGS if key in report]


def _percent(value: float) -> str:
    return f"{value:.1f}"


def _page(
    report: Mapping[str, Any], *, curves: Mapping[str, Sequence[Mapping[str, float]]], pictures: Sequence[Picture]
) -> str:
    marks = "".join(f"<li>{escape(mark)}</li>" for mark in report["marks"])
    parts = [
        f"<header><p class=brand>zs-seg{PRESET_PLACE}</p><h1>{escape(report['benchmark'])}</h1></header>",
        f"<ul class=marks>{marks}</ul>" if marks else "",
        f"<section>{_headline(report)}{_teacher_line(report['teacher_accuracy'])}</section>",
        _section("Predictions", picture_rows(pictures)) if pictures else "",
        _section("Classes", _class_table(report)),
        _section("Losses", _curves(curves)) if any(curves.values()) else "",
        f"<div class=two>{_section('Settings', _settings(report['settings']))}{LINEAGE_PLACE}</div>",
    ]
    return (
        f'<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>zs-seg {escape(report['benchmark'])}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _headline(report: Mapping[str, Any]) -> str:
    groups = "".join(f"<th colspan={len(names)} class=group>{title}" for title, names in HEADLINE.items())
    names = [(name, " first" if name == group[0] else "") for group in HEADLINE.values() for name in group]
    heads = "".join(f'<th class="number{first}" title="{MEANING[name]}">{name}' for name, first in names)
    rows = ""
    for key in _present(report):
        label, meaning = SETTINGS[key]
        cells = "".join(
            f'<td class="number{first}{" main" if name in ("hPQ", "hIoU") else ""}">{_percent(report[key][name])}'
            for name, first in names
        )
        rows += f"<tr class={key}><th scope=row>{label}<small>{meaning}</small>{cells}"
    absent = [(report[key].get("absent_seen", 0), report[key].get("absent_unseen", 0)) for key in _present(report)]
    seen, unseen = max(absent, default=(0, 0))
    note = (
        f" {seen} seen and {unseen} unseen classes neither occur nor are predicted and count 0."
        if seen + unseen
        else ""
    )
    return (
        f"<div class=scroll><table class=headline><thead><tr><td>{groups}<tr><td>{heads}</thead><tbody>{rows}</table>"
        f"</div><p class=note>Percent. s = seen classes, u = unseen classes, h = their harmonic mean.{note}</p>"
    )


def _teacher_line(accuracy: Mapping[str, float]) -> str:
    return (
        f"<p class=teacher>The frozen teacher names <b>{_percent(accuracy['seen'])} %</b> of the seen and "
        f"<b>{_percent(accuracy['unseen'])} %</b> of the unseen ground-truth instances right "
        f"({accuracy['instances']:,} instances, all class names to choose from).</p>"
    )


def _class_table(report: Mapping[str, Any]) -> str:
    keys = _present(report)
    last = "transductive" if "transductive" in keys else keys[0]
    rows_of = {key: {row["id"]: row for row in report[key]["per_class"]} for key in keys}
    columns = [(measure, key) for measure in ("PQ", "IoU") for key in keys]
    details = ("SQ", "RQ", "tp", "fp", "fn")
    groups = (
        f"<th colspan=2><th colspan={len(keys)} class=group>PQ<th colspan={len(keys)} class=group>IoU"
        f"<th colspan={len(details)} class=group>{SETTINGS[last][0]}"
    )
    heads = "<th class=sort data-text=1>class<th class=sort data-text=1>kind"
    heads += "".join(
        f'<th class="number sort{" first" if key == keys[0] else ""}">{SETTINGS[key][0].split(" + ")[-1]}'
        for _, key in columns
    )
    heads += "".join(f'<th class="number sort{" first" if name == "SQ" else ""}">{name.upper()}' for name in details)
    body = ""
    for row in sorted(report[last]["per_class"], key=lambda row: row["seen"]):  # the unseen classes first
        mark = "" if row["seen"] else " <span class=pill>unseen</span>"
        body += (
            f'<tr{"" if row["seen"] else " class=unseen"}><td data-v="{escape(row["name"])}">{escape(row["name"])}{mark}'
            f"<td class=kind>{'thing' if row['isthing'] else 'stuff'}"
        )
        for measure, key in columns:
            other = rows_of[key][row["id"]]
            empty = measure == "PQ" and not other["tp"] + other["fp"] + other["fn"]
            body += (
                f'<td class="number bar{" first" if key == keys[0] else ""}{" absent" if empty else ""}" '
                f'style="--v:{other[measure]:.1f}%" data-v={other[measure]:.4f}>{_percent(other[measure])}'
            )
        for name in details:
            value = _percent(row[name]) if name in ("SQ", "RQ") else str(row[name])
            body += f'<td class="number{" first" if name == "SQ" else ""}" data-v={row[name]}>{value}'
    return (
        f"<p class=note>Click a column to sort. TP, FP, FN count segments. Grey: the class neither occurs nor is "
        f"predicted.</p><div class=scroll><table class=classes><thead><tr>{groups}<tr>{heads}</thead>"
        f"<tbody>{body}</table></div>"
    )


def _settings(settings: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th scope=row>{escape(name)}<td>{escape(str(value))}" for name, value in settings.items())
    return f"<table class=plain>{rows}</table>"


def _lineage(lineage: Mapping[str, Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(stage)}<td><code>{escape(entry['ref'])}</code><td class=number>{_time(entry['seconds'])}"
        for stage, entry in lineage.items()
    )
    return f"<table class=plain>{rows}</table>"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    figures = "".join(
        f'<figure><figcaption>{escape(stage)}</figcaption><img alt="losses of {escape(stage)}" src="{_plot(rows)}"></figure>'
        for stage, rows in curves.items()
        if rows
    )
    return f"<div class=curves>{figures}</div>"


def _plot(rows: Sequence[Mapping[str, float]]) -> str:
    """One stage's losses over the steps, a smooth line over the faint raw one, each named at its end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = sorted(
        {name for row in rows for name in row if name not in ("step", "lr")}, key=lambda name: (name != "total", name)
    )
    figure = Figure(figsize=(4.3, 2.8), dpi=200)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.15, 0.57, 0.82))
    ends, lowest, highest = [], np.inf, -np.inf
    for number, name in enumerate(losses):
        steps, values = np.array([(row["step"], row[name]) for row in rows if name in row], float).T
        window = np.ones(max(1, len(values) // 40))
        smooth = np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
        colour = "#1f2933" if name == "total" else LINES[(number - 1) % len(LINES)]
        axes.plot(steps, values, color=colour, alpha=0.18, linewidth=0.7)
        axes.plot(steps, smooth, color=colour, linewidth=2 if name == "total" else 1.3)
        ends.append((float(smooth[-1]), name, colour))
        lowest, highest = min(lowest, float(smooth.min())), max(highest, float(smooth.max()))
    if lowest > 0 and highest > 30 * lowest:
        axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.margins(x=0.01)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.7)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9aa5b1")
    axes.tick_params(colors="#616e7c", labelsize=8.5, length=0, which="both")
    axes.set_xlabel("step", fontsize=8.5, color="#616e7c", labelpad=1)

    place = axes.transData + axes.transAxes.inverted()
    end = axes.get_xlim()[1]
    heights = _spread([float(place.transform((end, value))[1]) for value, _, _ in ends], gap=0.085)
    for (value, name, colour), height in zip(ends, heights, strict=True):
        weight = "bold" if name == "total" else "normal"
        text = f"{name.replace('_', ' ')}  {value:.3g}"
        axes.text(1.03, height, text, transform=axes.transAxes, color=colour, fontsize=8.5, va="center", weight=weight)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return data_url(buffer.getvalue(), "png")


def _spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """The heights, moved apart so that neighbours are at least `gap` from each other, and none above 1."""
    order = np.argsort(heights)
    moved = np.asarray(heights, float)[order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    moved[-1] = min(moved[-1], 1)
    for i in reversed(range(len(moved) - 1)):
        moved[i] = min(moved[i], moved[i + 1] - gap)
    result = np.empty_like(moved)
    result[order] = moved
    return result.tolist()


STYLE = f"""
:root {{ --ink: #1f2933; --dim: #616e7c; --line: #e4e7eb; --unseen: {UNSEEN}; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #f5f7fa; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "Liberation Sans", sans-serif; }}
main {{ max-width: 1180px; margin: 0 auto; padding: 36px 20px 60px; }}
header {{ margin-bottom: 20px; }}
.brand {{ margin: 0; color: var(--dim); letter-spacing: .06em; }}
h1 {{ margin: 0; font-size: 30px; line-height: 1.2; }}
h2 {{ margin: 0 0 6px; font-size: 18px; }}
section {{ background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px; margin-top: 18px; }}
.marks {{ margin: 0; padding: 12px 20px 12px 38px; background: #fff7e0; border: 1px solid #f0d48a; border-radius: 10px; color: #6b4d00; }}
.note {{ margin: 8px 0 10px; color: var(--dim); font-size: 13px; }}
.teacher {{ margin: 10px 0 0; padding-top: 12px; border-top: 1px solid var(--line); }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th {{ text-align: left; font-weight: 600; }}
td, th {{ padding: 5px 8px; }}
thead th {{ color: var(--dim); font-size: 13px; white-space: nowrap; }}
thead tr:last-child > * {{ border-bottom: 1px solid #cbd2d9; }}
tbody tr + tr > * {{ border-top: 1px solid var(--line); }}
.number {{ text-align: right; }}
.group {{ text-align: center; }}
.group, .first {{ border-left: 1px solid var(--line); }}
.headline td {{ font-size: 17px; }}
.headline small {{ display: block; font-weight: 400; font-size: 12.5px; line-height: 1.35; color: var(--dim); max-width: 23em; }}
.headline .main {{ font-weight: 700; background: #eef4fb; }}
.headline .ceiling > *, .headline .control > * {{ color: var(--dim); }}
.pill {{ background: var(--unseen); color: #fff; border-radius: 6px; padding: 1px 7px; font-size: 12px; margin-left: 4px; }}
.note .pill {{ margin-left: 0; }}
.classes {{ font-size: 13.5px; }}
.classes td {{ padding: 3px 8px; white-space: nowrap; }}
.classes .unseen > td:first-child {{ box-shadow: inset 3px 0 var(--unseen); }}
.kind {{ color: var(--dim); }}
.classes th {{ font-size: 12px; padding: 3px 5px; }}
.bar {{ width: 78px; background: linear-gradient(#dfeaf7, #dfeaf7) 0 50% / var(--v) 76% no-repeat; }}
.absent {{ color: #b6bfc9; }}
.sort {{ cursor: pointer; }}
.sort:hover {{ color: var(--ink); }}
.sort[data-order]::after {{ content: " \\25BE"; }}
.sort[data-order="1"]::after {{ content: " \\25B4"; }}
.pictures {{ display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; margin-bottom: 8px; }}
.heads {{ color: var(--dim); font-size: 13px; font-weight: 600; margin-bottom: 4px; }}
.panel {{ width: 100%; display: block; border-radius: 5px; background: var(--photo) 0 0 / 100% 100%; }}
.over {{ background-color: #888; background-blend-mode: luminosity; }} /* grey, so that the classes own the colours */
.panel text {{ font-family: "Liberation Sans", Arial, sans-serif; font-weight: 600; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 16px; }}
figure {{ margin: 0; }}
figcaption {{ font-weight: 600; font-size: 14px; }}
figure img {{ width: 100%; max-width: 480px; }}
.two {{ display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 18px; align-items: start; }}
.two td {{ overflow-wrap: anywhere; }} .two td:last-child:not(:nth-child(2)) {{ white-space: nowrap; }}
.plain {{ font-size: 13.5px; }}
.plain th {{ font-weight: 400; color: var(--dim); }}
code {{ font-family: ui-monospace, "Liberation Mono", monospace; font-size: 12.5px; }}
@media (max-width: 760px) {{ .two {{ grid-template-columns: 1fr; }} section {{ padding: 14px; }} }}
"""

SCRIPT = """
for (const head of document.querySelectorAll("th.sort")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex, text = "text" in head.dataset;
  const order = "order" in head.dataset ? -head.dataset.order : text ? 1 : -1;
  for (const other of head.parentNode.children) delete other.dataset.order;
  head.dataset.order = order;
  const value = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
  body.append(...[...body.rows].sort((a, b) =>
    order * (text ? value(a).localeCompare(value(b)) : value(a) - value(b))));
};
"""
