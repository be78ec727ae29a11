"""Diagnostic curves: one checkpoint's panoptic quality over the object threshold and over the seen offset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from pipeline.data.benchmarks import Benchmark
from pipeline.inference.maps import Classes, Output, Thresholds, choose, merge
from pipeline.scoring.metrics import Matches, PanopticQuality, harmonic_mean
from pipeline.scoring.records import SweepCurves, SweepPoint
from pipeline.scoring.rows import GroundTruth


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
        """Counts one image at every setting. Settings that keep the same queries with the same classes share the map
        and the comparison."""
        output = output.kept()
        scores, seen = logits.sigmoid().cpu(), classes.seen.cpu()
        known: dict[bytes, Matches] = {}
        for curve in self._curves.values():
            for setting, quality in curve.items():
                chosen = choose(scores, seen, setting)
                # a query's class and score follow from each other, given the image
                same = chosen.queries.numpy().tobytes() + chosen.classes.numpy().tobytes()
                if same not in known:
                    found = merge(output, chosen, classes, overlap_threshold=setting.overlap_threshold)
                    known[same] = quality.match(gt.ids, gt.sample.segments, *found, image=gt.sample.image_id)
                quality.add(known[same])

    def curves(self) -> SweepCurves:
        """Both curves so far."""
        seen = np.array(self.benchmark.seen)

        def points(name: str) -> list[SweepPoint]:
            found = []
            for setting, quality in self._curves[name].items():
                counts = quality.result()
                s, u = counts.mean(seen).pq, counts.mean(~seen).pq
                found.append(SweepPoint(value=getattr(setting, name), sPQ=s, uPQ=u, hPQ=harmonic_mean(s, u)))
            return found

        return SweepCurves(object_threshold=points("object_threshold"), seen_offset=points("seen_offset"))
