"""The report's rows with the teacher at prediction, their calibration, and their curves over alpha and beta."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.data.benchmarks import Benchmark
from pipeline.inference.maps import Classes, Output, Thresholds, panoptic_map
from pipeline.inference.model import Model
from pipeline.inference.teacher import MaskTokens, with_teacher
from pipeline.scoring.calibration import Calibration
from pipeline.scoring.config import EvaluateConfig
from pipeline.scoring.metrics import PanopticQuality
from pipeline.scoring.records import WITH_TEACHER, SweepPoint, TeacherCurves
from pipeline.scoring.rows import GroundTruth
from pipeline.scoring.sweeps import sweep_point
from storage.shards import Sample


@dataclass(frozen=True, kw_only=True)
class TeacherRow:
    """A row: whose p is multiplied with t, and with which exponents."""

    checkpoint: str
    alpha: float
    beta: float

    def logits(self, own: Mapping[str, Tensor], found: MaskTokens, log_t: Tensor, seen: Tensor) -> Tensor:
        """The logits of q, from the checkpoints' own."""
        return with_teacher(own[self.checkpoint], found.queries, log_t, seen, alpha=self.alpha, beta=self.beta)


def teacher_rows(config: EvaluateConfig) -> dict[str, TeacherRow]:
    """The rows of `records.TEACHER_ROWS`. A mask without a token takes no part of the teacher; in the teacher's own row
    it keeps the inductive scores."""
    rows = {
        name: TeacherRow(checkpoint=name.removesuffix("_teacher"), alpha=config.alpha, beta=config.beta)
        for name in WITH_TEACHER
    }
    return rows | {"teacher": TeacherRow(checkpoint="inductive", alpha=1.0, beta=1.0)}


class TeacherCalibration:
    """Chooses each row's object threshold for q as `Calibration` does for p: among the seen classes alone, of which t
    is then the softmax."""

    def __init__(
        self, rows: Mapping[str, TeacherRow], models: Mapping[str, Model], classes: Classes, *, slack: float
    ) -> None:
        self.rows, self.models, self.classes = rows, models, classes.only(classes.seen)
        self._calibrations = {
            name: Calibration(
                self.classes, overlap_threshold=models[row.checkpoint].meta.overlap_threshold, slack=slack
            )
            for name, row in rows.items()
        }
        self._text = {
            name: model.text if model.meta.linear else model.text[classes.seen] for name, model in models.items()
        }
        self._seen = classes.seen

    @torch.no_grad()
    def update(self, sample: Sample, output: Output, found: MaskTokens) -> None:
        """Count one training image."""
        output, log_t = output.kept(), found.log_scores(self.classes.text)
        own = {name: self._logits(name, output) for name in self.models}
        for name, row in self.rows.items():
            logits = row.logits(own, found, log_t, self.classes.seen)
            self._calibrations[name].update(sample, output, logits)

    def _logits(self, name: str, output: Output) -> Tensor:
        model = self.models[name]
        logits = model.logits(output.features, self._text[name])
        return logits[:, self._seen] if model.meta.linear else logits

    def thresholds(self) -> dict[str, Thresholds]:
        """By row."""
        return {
            name: replace(
                self.models[self.rows[name].checkpoint].meta.thresholds, object_threshold=calibration.result()[0]
            )
            for name, calibration in self._calibrations.items()
        }


class TeacherPoints:
    """Panoptic quality of some rows, whose checkpoints and exponents differ, under the same thresholds."""

    def __init__(self, benchmark: Benchmark, rows: Iterable[TeacherRow], thresholds: Thresholds) -> None:
        self.benchmark, self.thresholds = benchmark, thresholds
        ids = [category.id for category in benchmark.categories]
        self._qualities = {row: PanopticQuality(ids) for row in rows}

    @torch.no_grad()
    def update(
        self, gt: GroundTruth, output: Output, own: Mapping[str, Tensor], found: MaskTokens, classes: Classes
    ) -> None:
        """Count one image; `own` are the checkpoints' logits (Q, K)."""
        output, log_t = output.kept(), found.log_scores(classes.text)
        for row, quality in self._qualities.items():
            logits = row.logits(own, found, log_t, classes.seen)
            ids, segments = panoptic_map(output, logits, classes, self.thresholds)
            quality.update(gt.ids, gt.sample.segments, ids, segments, image=gt.sample.image_id)

    def points(self) -> dict[TeacherRow, SweepPoint]:
        """By row, so far; a point's `value` is the row's beta."""
        return {row: sweep_point(row.beta, quality, self.benchmark) for row, quality in self._qualities.items()}


class TeacherSweep:
    """One row's curves over alpha, with its beta, and over beta, with its alpha; under its thresholds."""

    def __init__(
        self, benchmark: Benchmark, row: TeacherRow, thresholds: Thresholds, *, exponents: Sequence[float]
    ) -> None:
        self._rows = {
            name: {value: replace(row, **{name: value}) for value in sorted({*exponents, getattr(row, name)})}
            for name in ("alpha", "beta")
        }
        # the row itself is on both curves
        self._points = TeacherPoints(
            benchmark, (at for curve in self._rows.values() for at in curve.values()), thresholds
        )

    def update(
        self, gt: GroundTruth, output: Output, own: Mapping[str, Tensor], found: MaskTokens, classes: Classes
    ) -> None:
        """Count one image, as `TeacherPoints.update`."""
        self._points.update(gt, output, own, found, classes)

    def curves(self) -> TeacherCurves:
        """Both curves so far."""
        points = self._points.points()
        curves = {
            name: [replace(points[row], value=value) for value, row in curve.items()]
            for name, curve in self._rows.items()
        }
        return TeacherCurves(**curves)
