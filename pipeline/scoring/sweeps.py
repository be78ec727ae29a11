"""Diagnostic curves: one checkpoint's panoptic quality over the object threshold and over the seen offset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.benchmarks import Benchmark
from pipeline.inference.maps import Classes, Output, Thresholds, choose, merge
from pipeline.scoring.metrics import Matches, PanopticQuality, harmonic_mean
from pipeline.scoring.records import SweepCurves, SweepPoint
from pipeline.scoring.rows import GroundTruth
from storage.shards import Segment


class Trials:
    """One image's prediction by class logits (Q, K) under several thresholds, compared with the truth `ids` (H, W) and
    `segments`. Thresholds that keep the same queries with the same classes share the map and the comparison."""

    def __init__(
        self,
        ids: NDArray[np.integer],
        segments: Sequence[Segment],
        output: Output,
        logits: Tensor,
        classes: Classes,
        *,
        image: int,
    ) -> None:
        self.ids, self.segments, self.output, self.classes, self.image = ids, segments, output.kept(), classes, image
        self.scores, self.seen = logits.sigmoid().cpu(), classes.seen.cpu()
        self._known: dict[bytes, Matches] = {}

    def add(self, quality: PanopticQuality, thresholds: Thresholds) -> None:
        """Count the prediction under `thresholds`."""
        chosen = choose(self.scores, self.seen, thresholds)
        # a query's class and score follow from each other, given the image
        same = chosen.queries.numpy().tobytes() + chosen.classes.numpy().tobytes()
        if same not in self._known:
            found = merge(self.output, chosen, self.classes, overlap_threshold=thresholds.overlap_threshold)
            self._known[same] = quality.match(self.ids, self.segments, *found, image=self.image)
        quality.add(self._known[same])


class Sweeps:
    """Both curves of one checkpoint with the stored thresholds `stored`.

    On the object threshold's curve the offset is 0, on the offset's the object threshold is the stored one. The stored
    threshold and offset 0 are on their curves whether the grids name them or not.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        stored: Thresholds,
        *,
        object_thresholds: Sequence[float],
        seen_offsets: Sequence[float],
    ) -> None:
        self.benchmark = benchmark
        ids = [category.id for category in benchmark.categories]
        stored = replace(stored, seen_offset=0.0)
        settings = {
            "object_threshold": [
                replace(stored, object_threshold=value)
                for value in sorted({*object_thresholds, stored.object_threshold})
            ],
            "seen_offset": [replace(stored, seen_offset=value) for value in sorted({*seen_offsets, 0.0})],
        }
        self._curves = {
            curve: {setting: PanopticQuality(ids) for setting in found} for curve, found in settings.items()
        }

    def update(self, gt: GroundTruth, output: Output, logits: Tensor, classes: Classes) -> None:
        """Counts one image at every setting."""
        trials = Trials(gt.ids, gt.sample.segments, output, logits, classes, image=gt.sample.image_id)
        for curve in self._curves.values():
            for setting, quality in curve.items():
                trials.add(quality, setting)

    def curves(self) -> SweepCurves:
        """Both curves so far."""
        found = {
            name: [sweep_point(getattr(setting, name), quality, self.benchmark) for setting, quality in curve.items()]
            for name, curve in self._curves.items()
        }
        return SweepCurves(**found)


def sweep_point(value: float, quality: PanopticQuality, benchmark: Benchmark) -> SweepPoint:
    """The point of a curve at `value`, from what was counted there."""
    counts, seen = quality.result(), np.array(benchmark.seen)
    s, u = counts.mean(seen).pq, counts.mean(~seen).pq
    return SweepPoint(value=value, sPQ=s, uPQ=u, hPQ=harmonic_mean(s, u))
