"""Reports for tests: numbers that are asked for, and zeros elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pipeline.scoring.records import (
    CHECKPOINTS,
    ROWS,
    TEACHER_ROWS,
    LeftOut,
    Losses,
    NamedRight,
    PanopticScores,
    Report,
    Scores,
    SeenUnseen,
    Settings,
    SweepCurves,
    SweepPoint,
    SweepReport,
    TeacherAccuracy,
    TeacherCurves,
)
from pipeline.scoring.waterfall import LOSSES


def panoptic_scores(**given: Any) -> PanopticScores:
    """A row of zeros without classes but for `given`."""
    zeros: dict[str, Any] = {field.name: 0 for field in fields(PanopticScores)} | {"per_class": []}
    return PanopticScores(**zeros | given)


def losses(**points: tuple[float, float]) -> Losses:
    """A waterfall with those losses, (seen, unseen), and none elsewhere."""
    levels, found, left = {"truth": SeenUnseen(sPQ=100.0, uPQ=100.0)}, {}, (100.0, 100.0)
    for name in LOSSES:
        lost = points.get(name, (0.0, 0.0))
        left = left[0] - lost[0], left[1] - lost[1]
        levels[name], found[name] = SeenUnseen(sPQ=left[0], uPQ=left[1]), SeenUnseen(sPQ=lost[0], uPQ=lost[1])
    right = NamedRight(segments=2345, within_group=81.25, over_all=36.5)
    return Losses(levels=levels, losses=found, named_right={"seen": right, "unseen": right})


def report(rows: Mapping[str, Scores] | None = None, **given: Any) -> Report:
    """A panoptic report; rows that are not given are zeros."""

    def curve(*values: float) -> list[SweepPoint]:
        return [SweepPoint(value=v, sPQ=60 - v, uPQ=30 + v, hPQ=40.0) for v in values]

    curves = SweepCurves(object_threshold=curve(0.1, 0.5), seen_offset=curve(0.0, 0.1))
    exponents = TeacherCurves(alpha=curve(0.0, 0.4), beta=curve(0.8, 1.0))
    content: dict[str, Any] = {
        "benchmark": "tiny <world>",
        "marks": [],
        "losses": {name: losses() for name in (*CHECKPOINTS, *TEACHER_ROWS)},
        "sweeps": SweepReport(
            images=300,
            of=5000,
            inductive=curves,
            transductive=curves,
            inductive_teacher=exponents,
            transductive_teacher=exponents,
        ),
        "left_out": LeftOut(crowd_segments=1017, segments_without_a_query=3),
        "published": None,
        "teacher_accuracy": TeacherAccuracy(seen=97.25, unseen=66.6, instances=1234),
        "settings": Settings(
            object_threshold=0.1,
            object_threshold_chosen_on="seen classes of training images",
            object_threshold_inductive_teacher=0.2,
            object_threshold_transductive_teacher=0.3,
            object_threshold_teacher=0.4,
            overlap_threshold=0.8,
            seen_offset=0.0,
            control_offset=0.1,
            alpha=0.4,
            beta=0.8,
            images=5000,
            teacher="small / shipped",
        ),
    }
    return Report(rows={name: (rows or {}).get(name, panoptic_scores()) for name in ROWS}, **content | given)
