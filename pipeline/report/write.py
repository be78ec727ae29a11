"""The report of a run: report.json and per_class.csv for programs, report.html for people, and the table on the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.report.page import LINEAGE_PLACE, PRESET_PLACE, SETTINGS, lineage_section, page, percent, present
from pipeline.report.pictures import Picture
from storage.atomic import write_text

if TYPE_CHECKING:
    from rich.table import Table

TABLE_COLUMNS = "sPQ", "uPQ", "hPQ", "sIoU", "uIoU", "hIoU"
CLASS_FACTS = "id", "name", "isthing", "seen"
CLASS_SCORES = "PQ", "SQ", "RQ", "IoU", "tp", "fp", "fn", "pixels"


def write_report(
    folder: Path,
    report: Mapping[str, Any],
    *,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    pictures: Sequence[Picture],
) -> None:
    """Writes `report.json`, `report.html` and `per_class.csv` into `folder`, which must exist.

    The table holds a row for each class: id, name, isthing, seen, and for each setting its PQ, SQ, RQ, IoU (percent), tp, fp
    and fn, in columns such as `inductive_PQ`; of a semantic benchmark id, name, seen, and IoU and pixels in the ground truth.

    Args:
        folder: where to.
        report: `benchmark`; `marks`, warnings shown as a banner; what `Evaluator.results` gives, though rows of `SETTINGS` may be
            missing; `published`, see `beside_the_paper`; `settings` {name: value}. What is known only outside of the artefact
            may be added by `publish`.
        curves: training stage -> rows with `step`, `total` and the stage's other losses by name (`lr` is not drawn).
        pictures: shown in this order.

    Raises:
        ValueError: the report holds NaN or infinite numbers.
    """
    write_text(folder / "report.json", json.dumps(report, indent=1, allow_nan=False))
    write_text(folder / "per_class.csv", _class_csv(report))
    write_text(folder / "report.html", page(report, curves=curves, pictures=pictures))


def publish(source: Path, target: Path, *, preset: str, lineage: Mapping[str, Mapping[str, Any]]) -> None:
    """Copies a report into the folder `target` (made if need be) and adds which run it is of.

    Args:
        source: the folder that `write_report` wrote.
        target: where report.json, report.html and per_class.csv go, replacing older ones.
        preset: the run's name.
        lineage: stage -> {"ref": "kind/key", "seconds": how long it took to make}.
    """
    target.mkdir(parents=True, exist_ok=True)
    report = json.loads((source / "report.json").read_text()) | {"preset": preset, "lineage": lineage}
    html = (source / "report.html").read_text(encoding="utf-8")
    html = html.replace(PRESET_PLACE, f" &middot; preset {escape(preset)}")
    html = html.replace(LINEAGE_PLACE, lineage_section(lineage))
    write_text(target / "per_class.csv", (source / "per_class.csv").read_text(encoding="utf-8"))
    write_text(target / "report.json", json.dumps(report, indent=1, allow_nan=False))
    write_text(target / "report.html", html)


def console_table(report: Mapping[str, Any]) -> Table:
    """The headline numbers in percent, one row a setting, ceilings last."""
    from rich.table import Table

    settings = report["settings"]
    remarks = list(report["marks"])
    if "object_threshold" in settings:
        chosen_on = settings["object_threshold_chosen_on"]
        remarks.insert(0, f"object_threshold {settings['object_threshold']:g}, chosen on {chosen_on}")
    table = Table(title=report.get("preset", report["benchmark"]), caption="; ".join(remarks))
    table.add_column("percent")
    columns = [name for name in TABLE_COLUMNS if name in report[present(report)[0]]]
    for name in columns:
        table.add_column(name, justify="right", style="bold" if name.startswith("h") else None)
    keys = present(report)
    for key, following in zip(keys, [*keys[1:], keys[-1]], strict=True):
        cells = (percent(report[key][name]) for name in columns)
        table.add_row(SETTINGS[key].name, *cells, end_section=SETTINGS[following].ceiling and not SETTINGS[key].ceiling)
    return table


def _class_csv(report: Mapping[str, Any]) -> str:
    keys = present(report)
    first = report[keys[0]]["per_class"][0]
    facts, measures = ([name for name in names if name in first] for names in (CLASS_FACTS, CLASS_SCORES))
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow([*facts, *(f"{key}_{score}" for key in keys for score in measures)])
    for rows in zip(*(report[key]["per_class"] for key in keys), strict=True):
        table.writerow([*(rows[0][fact] for fact in facts), *(row[score] for row in rows for score in measures)])
    return buffer.getvalue()
