"""The report's table of where panoptic quality is lost, a waterfall from 100 down to the prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.scoring.records import LeftOut, Losses

ROWS = {
    "absent": ("absent classes", "No image shows them; the protocol counts them as 0, whatever is predicted."),
    "masks": (
        "masks",
        "Each true segment is assigned to one query by overlap alone, and that query has the true class: what is lost "
        "here is lost by the segmenter.",
    ),
    "classification": (
        "classification",
        "The query's own class, chosen only among the seen classes if its segment is seen, else only among the unseen "
        "ones.",
    ),
    "seen_bias": (
        "seen bias",
        "Its own class, chosen among all: unseen segments that get a seen class, and in the seen columns the reverse.",
    ),
    "selection": (
        "selection",
        "All queries, with their own scores and the thresholds, as in the prediction itself: segments that are "
        "dropped, covered, or spurious.",
    ),
}
BAR = 0.62  # the bars' part of a cell; the number has the rest


def loss_table(losses: Mapping[str, Losses], left_out: LeftOut, *, tables: Sequence[Mapping[str, str]]) -> str:
    """HTML of one or more tables, each of those rows of the report that it maps to the names to show, and of every
    row's largest loss in words."""
    shown = "".join(
        f"<div class=scroll>{_table(losses, names)}</div><p>{_in_words(losses, names)}</p>" for names in tables
    )
    return (
        f"<p class=note>Points of PQ, which add up; a plus is a gain. Each row uses less of the ground truth than the "
        f"one above it.</p>{shown}<p class=note>{_left_out(left_out)}</p>"
    )


def _table(losses: Mapping[str, Losses], names: Mapping[str, str]) -> str:
    columns = [(row, key) for row in names for key in ("sPQ", "uPQ")]
    groups = "".join(f"<th colspan=2 class=group>{name}" for name in names.values())
    heads = "".join(f'<th class="number{" first" if key == "sPQ" else ""}">{key}' for _, key in columns)
    rows = _row("the truth", "", [(0.0, 100.0, "100.0") for _ in columns], "level")
    for name, (title, meaning) in ROWS.items():
        points = [getattr(losses[row].losses[name], key) for row, key in columns]
        after = [getattr(losses[row].levels[name], key) for row, key in columns]
        if name == "absent" and not any(points):
            continue
        cells = [(min(left, left + lost), abs(lost), _signed(-lost)) for left, lost in zip(after, points, strict=True)]
        rows += _row(title, meaning, cells, "loss")
    last = [getattr(losses[row].levels["selection"], key) for row, key in columns]
    rows += _row("the prediction", "", [(0.0, value, f"{value:.1f}") for value in last], "level")
    return f"<table class=losses><thead><tr><td>{groups}<tr><td>{heads}</thead><tbody>{rows}</table>"


def _row(title: str, meaning: str, cells: list[tuple[float, float, str]], kind: str) -> str:
    """Cells: where the bar begins and how wide it is, in percent of the cell, and the text."""
    parts = ""
    for number, (start, width, text) in enumerate(cells):
        start, width = BAR * start, BAR * width
        place = 100 * start / (100 - width)  # CSS places a bar by the room beside it
        style = f"--at:{place:.2f}%;--v:{width:.2f}%"
        parts += f'<td class="number fall{"" if number % 2 else " first"}" style="{style}">{text}'
    return f"<tr class={kind}><th scope=row>{title}<small>{meaning}</small>{parts}"


def _signed(value: float) -> str:
    text = f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
    return "0.0" if float(text[1:]) == 0 else text


def _in_words(losses: Mapping[str, Losses], names: Mapping[str, str]) -> str:
    """Each row's largest loss of unseen PQ, and how many unseen segments are classified right."""
    found = []
    for row, name in names.items():
        part = losses[row]
        most = max(ROWS, key=lambda loss: losses[row].losses[loss].uPQ)
        unseen = part.named_right["unseen"]
        found.append(
            f"<b>{name.capitalize()}</b>: the largest loss of unseen PQ is {ROWS[most][0]} "
            f"({part.losses[most].uPQ:.1f} of {100 - part.levels['selection'].uPQ:.1f} points). Of the "
            f"{unseen.segments:,} unseen segments with a query, {unseen.within_group:.1f} % are classified correctly "
            f"among the unseen classes and {unseen.over_all:.1f} % among all."
        )
    return "<br>".join(found)


def _left_out(left_out: LeftOut) -> str:
    crowds, alone = left_out.crowd_segments, left_out.segments_without_a_query
    without = left_out.segments_without_a_token
    return (
        f"{crowds:,} crowd segments take no part; {alone:,} segments have no query over them and count as lost masks."
        + (f" {without:,} segments are too small for a token, and the teacher's names miss them." if without else "")
    )
