"""The report's files: report.json and per_class.csv for programs, report.html for people; and its table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.report.page import LINEAGE_PLACE, PRESET_PLACE, SETTINGS, lineage_section, page, percent
from pipeline.report.pictures import TITLES, Picture, encoded, sheet
from pipeline.report.view import INDEX, is_fresh
from pipeline.scoring.records import HEADLINE, Built, Report, read_report
from storage.atomic import replacing, write_text
from storage.keys import Ref

if TYPE_CHECKING:
    from rich.table import Table

# the folder beside a published report that `zs-seg view` makes, and the link's place on the page
VIEW, VIEW_PLACE = "view", "<!--view-->"
PREVIEW, PREVIEW_ROWS, PREVIEW_SIDE = "preview.jpg", 3, 280  # pixels, the long side of one picture
CLASS_FACTS = "id", "name", "isthing", "seen"
CLASS_SCORES = "PQ", "SQ", "RQ", "IoU", "tp", "fp", "fn", "pixels"


def write_report(
    folder: Path,
    report: Report,
    *,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    pictures: Sequence[Picture],
) -> list[Path]:
    """Writes `report.json`, `report.html`, `per_class.csv` and `preview.jpg` into `folder`, which must exist.

    The preview shows the first `PREVIEW_ROWS` pictures; without pictures there is none.
    The table holds a row for each class: id, name, isthing, seen, and for each setting its PQ, SQ, RQ, IoU (percent),
    tp, fp and fn, in columns such as `inductive_PQ`; of a semantic benchmark id, name, seen, and IoU and pixels in the
    ground truth.

    Args:
        folder: where to.
        report: as `Evaluator.report` makes it; `publish` adds what is known only outside of the artefact.
        curves: training stage -> rows with `step`, `total` and the stage's other losses by name (`lr` is not drawn).
        pictures: shown in this order.

    Returns:
        The files that were written.

    Raises:
        ValueError: the report holds NaN or infinite numbers.
    """
    files = [folder / name for name in ("report.json", "per_class.csv", "report.html")]
    write_text(folder / "report.json", report.to_json())
    write_text(folder / "per_class.csv", _class_csv(report))
    rows = [picture.row() for picture in pictures]
    write_text(folder / "report.html", page(report, curves=curves, pictures=rows))
    if rows:
        preview = sheet(TITLES, [[panel.picture for panel in row] for row in rows[:PREVIEW_ROWS]], side=PREVIEW_SIDE)
        files.append(folder / PREVIEW)
        _write_bytes(files[-1], encoded(preview, "jpeg"))
    return files


def publish(source: Path, target: Path, *, preset: str, lineage: Mapping[str, Mapping[str, Any]]) -> None:
    """Copies a report into the folder `target` (made if need be) and adds which run it is of.

    Args:
        source: the folder that `write_report` wrote.
        target: where its files go, replacing older ones.
        preset: the run's name.
        lineage: stage -> the fields of `Built`.
    """
    target.mkdir(parents=True, exist_ok=True)
    built = {stage: Built(**made) for stage, made in lineage.items()}
    report = replace(read_report(source / "report.json"), preset=preset, lineage=built)
    html = (source / "report.html").read_text(encoding="utf-8")
    html = html.replace(PRESET_PLACE, f" &middot; preset {escape(preset)}{VIEW_PLACE}")
    html = html.replace(LINEAGE_PLACE, lineage_section(built))
    write_text(target / "per_class.csv", (source / "per_class.csv").read_text(encoding="utf-8"))
    write_text(target / "report.json", report.to_json())
    write_text(target / "report.html", html)
    if (source / PREVIEW).exists():
        _write_bytes(target / PREVIEW, (source / PREVIEW).read_bytes())
    else:
        (target / PREVIEW).unlink(missing_ok=True)  # an older run's
    link_view(target)


def link_view(folder: Path) -> None:
    """Link the report published in `folder`, if there is one, to the browser in its `VIEW`, if that is of this report."""
    if not (folder / "report.html").exists():
        return
    built = (read_report(folder / "report.json").lineage or {}).get("evaluate")
    if built and is_fresh(folder / VIEW, Ref.parse(built.ref)):
        html = (folder / "report.html").read_text(encoding="utf-8")
        link = f' &middot; <a href="{VIEW}/{INDEX}">all validation images</a>'
        write_text(folder / "report.html", html.replace(VIEW_PLACE, link))


def _write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def headline(report: Report) -> list[str]:
    """The scores of the report's short tables: panoptic qualities and IoUs, or IoUs alone."""
    return [name for names in HEADLINE.values() for name in names if hasattr(report.rows["inductive"], name)]


def console_table(report: Report) -> Table:
    """The headline numbers in percent, one row a setting, ceilings last."""
    from rich.table import Table

    remarks = list(report.marks)
    if report.settings.object_threshold is not None:
        chosen_on = report.settings.object_threshold_chosen_on
        remarks.insert(0, f"object_threshold {report.settings.object_threshold:g}, chosen on {chosen_on}")
    table = Table(title=report.preset or report.benchmark, caption="; ".join(remarks))
    table.add_column("percent")
    columns = headline(report)
    for name in columns:
        table.add_column(name, justify="right", style="bold" if name.startswith("h") else None)
    keys = list(SETTINGS)
    for key, following in zip(keys, [*keys[1:], keys[-1]], strict=True):
        cells = (percent(getattr(report.rows[key], name)) for name in columns)
        table.add_row(SETTINGS[key].name, *cells, end_section=SETTINGS[following].ceiling and not SETTINGS[key].ceiling)
    return table


def _class_csv(report: Report) -> str:
    first = report.rows["inductive"].per_class[0]
    facts, measures = ([name for name in names if hasattr(first, name)] for names in (CLASS_FACTS, CLASS_SCORES))
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow([*facts, *(f"{key}_{score}" for key in SETTINGS for score in measures)])
    for rows in zip(*(report.rows[key].per_class for key in SETTINGS), strict=True):
        table.writerow(
            [*(getattr(rows[0], fact) for fact in facts), *(getattr(row, score) for row in rows for score in measures)]
        )
    return buffer.getvalue()
