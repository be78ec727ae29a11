"""The report's page. It stands alone: pictures are data URLs, styles and script are inline, nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from pipeline.report.loss_table import loss_table
from pipeline.report.pictures import Panel, picture_rows
from pipeline.report.plots import loss_plot, sweep_plot
from pipeline.report.style import SCRIPT, STYLE
from pipeline.runtime import duration
from pipeline.scoring.records import (
    CHECKPOINTS,
    HEADLINE,
    TEACHER_ROWS,
    WITH_TEACHER,
    Built,
    PanopticClass,
    PanopticScores,
    Published,
    Report,
    Settings,
    SweepReport,
    TeacherAccuracy,
)


class Setting(NamedTuple):
    """A row of the headline: its name and its meaning; a `ceiling` uses something of the ground truth."""

    name: str
    meaning: str
    ceiling: bool = False


# The report's rows in the order of the tables.
SETTINGS = {
    "inductive": Setting("inductive", "stage 1: unseen class names are used only at prediction"),
    "control": Setting("inductive + offset", "control: a constant taken off the seen scores, nothing trained"),
    "transductive": Setting("transductive", "stages 2 and 3 train with the unseen class names, without images of them"),
    "inductive_teacher": Setting(
        "inductive + teacher",
        "the inductive scores multiplied with the teacher's, for the masks that the network finds",
    ),
    "transductive_teacher": Setting("transductive + teacher", "the same with the transductive scores"),
    "teacher": Setting("teacher alone", "those masks with the teacher's scores alone"),
    "ceiling": Setting(
        "true masks, teacher's names", "each true segment classified by the teacher's token of it", True
    ),
    "true_masks_inductive": Setting(
        "true masks, inductive names", "each true segment classified by the query that lies over it", True
    ),
    "true_masks_transductive": Setting(
        "true masks, transductive names", "the same with the transductive checkpoint", True
    ),
    "true_classes": Setting(
        "our masks, true names", "the queries that lie over true segments, with the true classes", True
    ),
}
CLASS_TABLE = {
    "inductive": "inductive",
    "control": "offset",
    "transductive": "transductive",
    "inductive_teacher": "ind. + teacher",
    "transductive_teacher": "trans. + teacher",
    "ceiling": "ceiling",
}
COLUMNS = {
    "Panoptic quality": HEADLINE["panoptic"],
    "Semantic IoU": HEADLINE["semantic"],
    "All classes": ("PQ", "SQ", "RQ", "PQ_th", "PQ_st", "mIoU", "accuracy"),
}  # of which a benchmark has those of its task
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
    "mIoU": "mean IoU of the classes that occur or are predicted",
    "accuracy": "pixels that are right",
}
PRESET_PLACE, LINEAGE_PLACE = "<!--preset-->", "<!--lineage-->"  # filled by `report.publish`


def percent(value: float) -> str:
    """One digit after the point."""
    return f"{value:.1f}"


def page(
    report: Report,
    *,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    pictures: Sequence[Sequence[Panel]],
) -> str:
    """The whole page; arguments as in `write.write_report`, pictures rendered (see `Picture.row`)."""
    marks = "".join(f"<li>{escape(mark)}</li>" for mark in report.marks)
    parts = [
        f"<header><p class=brand>zs-seg{PRESET_PLACE}</p><h1>{escape(report.benchmark)}</h1></header>",
        f"<ul class=marks>{marks}</ul>" if marks else "",
        f"<section>{_headline(report)}{_teacher_line(report.teacher_accuracy)}</section>",
        _section("Beside the paper", _published(report.published)) if report.published else "",
        _section("Where is quality lost?", _losses(report)) if report.losses else "",
        _section("Predictions", picture_rows(pictures)) if pictures else "",
        _section("Classes", _class_table(report)),
        _section("Training losses", _curves(curves)) if any(curves.values()) else "",
        _section("Diagnostic curves, no results", _sweeps(report.sweeps, report.settings), kind="aside")
        if report.sweeps
        else "",
        f"<div class=two>{_section('Settings', _settings(report.settings))}{LINEAGE_PLACE}</div>",
    ]
    return (
        f'<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>zs-seg {escape(report.benchmark)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def lineage_section(lineage: Mapping[str, Built]) -> str:
    """Stage -> what was built, as a section of the page."""
    rows = "".join(
        f"<tr><th scope=row>{escape(stage)}<td><code>{escape(made.ref)}</code><td class=number>{duration(made.seconds)}"
        for stage, made in lineage.items()
    )
    return _section("Lineage", f"<table class=plain>{rows}</table>")


def _section(title: str, content: str, *, kind: str = "") -> str:
    return f"<section{f' class={kind}' if kind else ''}><h2>{title}</h2>{content}</section>"


def _losses(report: Report) -> str:
    assert report.losses
    tables = [{key: SETTINGS[key].name for key in part} for part in (CHECKPOINTS, TEACHER_ROWS)]
    return loss_table(report.losses, report.left_out, tables=tables)


def _headline(report: Report) -> str:
    any_row = report.rows["inductive"]
    shown = {
        title: found
        for title, names in COLUMNS.items()
        if (found := [name for name in names if hasattr(any_row, name)])
    }
    groups = "".join(f"<th colspan={len(names)} class=group>{title}" for title, names in shown.items())
    names = [(name, " first" if name == group[0] else "") for group in shown.values() for name in group]
    heads = "".join(f'<th class="number{first}" title="{MEANING[name]}">{name}' for name, first in names)
    rows = ""
    for key, (label, meaning, is_ceiling) in SETTINGS.items():
        row = report.rows[key]
        cells = "".join(
            f'<td class="number{first}{" main" if name in ("hPQ", "hIoU") else ""}">{percent(getattr(row, name))}'
            for name, first in names
        )
        rows += (
            f'<tr class="{key}{" ceiling" if is_ceiling else ""}"><th scope=row>{label}<small>{meaning}</small>{cells}'
        )
    seen, unseen = max((row.absent_seen, row.absent_unseen) for row in report.rows.values())
    note = (
        f" {seen} seen and {unseen} unseen classes neither occur nor are predicted and count 0."
        if seen + unseen
        else ""
    )
    return (
        f"<div class=scroll><table class=headline><thead><tr><td>{groups}<tr><td>{heads}</thead><tbody>{rows}</table>"
        f"</div><p class=note>Percent. s = seen classes, u = unseen classes, h = their harmonic mean.{note}</p>"
    )


def _teacher_line(accuracy: TeacherAccuracy) -> str:
    return (
        f"<p class=teacher>The frozen teacher classifies <b>{percent(accuracy.seen)} %</b> of the seen and "
        f"<b>{percent(accuracy.unseen)} %</b> of the unseen ground-truth instances correctly "
        f"({accuracy.instances:,} instances, among all class names).</p>"
    )


def _class_table(report: Report) -> str:
    keys, last = list(CLASS_TABLE), "transductive"
    rows_of = {key: {row.id: row for row in report.rows[key].per_class} for key in keys}
    panoptic = isinstance(report.rows[last], PanopticScores)
    measures, details = (("PQ", "IoU"), ("SQ", "RQ", "tp", "fp", "fn")) if panoptic else (("IoU",), ("pixels",))
    columns = [(measure, key) for measure in measures for key in keys]
    groups = f"<th colspan={1 + panoptic}>" + "".join(f"<th colspan={len(keys)} class=group>{m}" for m in measures)
    groups += f"<th colspan={len(details)} class=group>{SETTINGS[last].name if panoptic else 'truth'}"
    heads = "<th class=sort data-text=1>class" + "<th class=sort data-text=1>kind" * panoptic
    heads += "".join(
        f'<th class="number sort{" first" if key == keys[0] else ""}">{CLASS_TABLE[key]}' for _, key in columns
    )
    heads += "".join(
        f'<th class="number sort{" first" if name == details[0] else ""}">{name.upper() if panoptic else name}'
        for name in details
    )
    body = ""
    for row in sorted(report.rows[last].per_class, key=lambda row: row.seen):  # the unseen classes first
        mark = "" if row.seen else " <span class=pill>unseen</span>"
        body += f'<tr{"" if row.seen else " class=unseen"}><td data-v="{escape(row.name)}">{escape(row.name)}{mark}'
        if isinstance(row, PanopticClass):
            body += f"<td class=kind>{'thing' if row.isthing else 'stuff'}"
        for measure, key in columns:
            other = rows_of[key][row.id]
            value = getattr(other, measure)
            empty = measure == measures[0] and not any(
                getattr(other, name) for name in details if name not in ("SQ", "RQ")
            )
            body += (
                f'<td class="number bar{" first" if key == keys[0] else ""}{" absent" if empty else ""}" '
                f'style="--v:{value:.1f}%" data-v={value:.4f}>{percent(value)}'
            )
        for name in details:
            value = getattr(row, name)
            shown = percent(value) if name in ("SQ", "RQ") else str(value)
            body += f'<td class="number{" first" if name == details[0] else ""}" data-v={value}>{shown}'
    note = (
        "TP, FP, FN count segments. Grey: the class neither occurs nor is predicted."
        if panoptic
        else "Grey: the class does not occur."
    )
    return (
        f"<p class=note>Click a column to sort. {note} Ceiling: true masks, teacher's names. All settings are in "
        f"per_class.csv.</p><div class=scroll><table class=classes><thead><tr>{groups}<tr>{heads}</thead>"
        f"<tbody>{body}</table></div>"
    )


def _settings(settings: Settings) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}<td>{escape(str(value))}" for name, value in settings.content().items()
    )
    return f"<table class=plain>{rows}</table>"


def _curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(stage)}</figcaption>"
        f'<img alt="losses of {escape(stage)}" src="{loss_plot(rows)}"></figure>'
        for stage, rows in curves.items()
        if rows
    )
    return f"<div class=curves>{figures}</div>"


def _sweeps(sweeps: SweepReport, settings: Settings) -> str:
    names = {"object_threshold": "object threshold", "seen_offset": "seen offset"}
    exponents = {"alpha": "alpha, of seen classes", "beta": "beta, of unseen classes"}
    curves = {(key, name): getattr(getattr(sweeps, key), name) for name in names for key in CHECKPOINTS}
    curves |= {(key, name): getattr(getattr(sweeps, key), name) for name in exponents for key in WITH_TEACHER}
    names |= exponents
    top = max(5.0, 1.1 * max(max(point.sPQ, point.uPQ, point.hPQ) for points in curves.values() for point in points))
    figures = "".join(
        f"<figure><figcaption>{SETTINGS[key].name}: {names[name]}</figcaption>"
        f'<img alt="{SETTINGS[key].name} by {names[name]}" '
        f'src="{sweep_plot(points, name=names[name], headline=getattr(settings, name), top=top)}"></figure>'
        for (key, name), points in curves.items()
    )
    counted = f"all {sweeps.of:,}" if sweeps.images == sweeps.of else f"{sweeps.images:,} of {sweeps.of:,}"
    return (
        f"<p class=note>PQ over single settings, on {counted} validation images. Nothing was chosen from these "
        f"curves: the headline above uses the object threshold {settings.object_threshold:g}, chosen on "
        f"{escape(settings.object_threshold_chosen_on or '')} and stored in the checkpoint, the seen offset "
        f"{settings.seen_offset:g}, and, with the teacher, alpha {settings.alpha:g} and beta {settings.beta:g}.</p><div class='curves pairs'>{figures}</div>"
    )


def _published(published: Published) -> str:
    heads = "".join(f"<th class=number>{escape(column)}" for column in published.columns)
    rows = ""
    for kind, part in (("published", published.published), ("ours", published.ours)):
        for name, values in part.items():
            cells = "".join(f"<td class=number>{'' if value is None else percent(value)}" for value in values)
            rows += f"<tr class={kind}><th scope=row>{escape(name)}{cells}"
    note = escape(published.note)
    return (
        f"<p class=note>Percent; published numbers as in the paper's {escape(published.table)}. {note}</p>"
        f"<div class=scroll><table><thead><tr><td>{heads}</thead><tbody>{rows}</table></div>"
    )
