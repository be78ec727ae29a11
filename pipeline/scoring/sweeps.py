"""Diagnostic curves: one checkpoint's panoptic quality over the object threshold and over the seen offset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pipeline.data.benchmarks import Benchmark
from pipeline.inference.maps import Classes, Output, choose, merged_map
from pipeline.scoring.metrics import Matches, PanopticQuality, harmonic_mean
from pipeline.scoring.rows import GroundTruth


class Sweeps:
    """Both curves of one checkpoint. On the threshold's curve the offset is 0, on the offset's the threshold is the stored one;
    the stored threshold and offset 0 are on their curves whether the grids name them or not."""

    def __init__(
        self,
        benchmark: Benchmark,
        facts: dict[str, Any],
        *,
        object_thresholds: Sequence[float],
        seen_offsets: Sequence[float],
    ) -> None:
        self.benchmark = benchmark
        self.overlap_threshold: float = facts["overlap_threshold"]
        ids = [category.id for category in benchmark.categories]
        stored: float = facts["object_threshold"]
        settings = {
            "object_threshold": [(t, 0.0) for t in sorted({*object_thresholds, stored})],
            "seen_offset": [(stored, o) for o in sorted({*seen_offsets, 0.0})],
        }
        self._curves = {
            curve: {setting: PanopticQuality(ids) for setting in found} for curve, found in settings.items()
        }

    def update(self, gt: GroundTruth, output: Output, logits: Tensor, classes: Classes) -> None:
        """Counts one image at every setting; `output` must be resized. Settings under which the same queries speak with the same
        classes and scores share the map and the comparison."""
        probabilities, seen = logits.sigmoid().cpu(), classes.seen.cpu()
        known: dict[bytes, Matches] = {}
        for curve in self._curves.values():
            for (threshold, offset), quality in curve.items():
                chosen = choose(probabilities, seen=seen, object_threshold=threshold, seen_offset=offset)
                # a query's class and score follow from each other, given the image
                same = chosen.queries.numpy().tobytes() + chosen.classes.numpy().tobytes()
                if same not in known:
                    found = merged_map(output, chosen, classes, overlap_threshold=self.overlap_threshold)
                    known[same] = quality.match(gt.ids, gt.sample.segments, *found, image=gt.sample.image_id)
                quality.add(known[same])

    def curves(self) -> dict[str, list[dict[str, float]]]:
        """{"object_threshold", "seen_offset"} -> a point for each setting in ascending order: `value`, and sPQ, uPQ, hPQ in percent."""
        is_seen = self.benchmark.seen
        result: dict[str, list[dict[str, float]]] = {}
        for place, (name, curve) in enumerate(self._curves.items()):
            result[name] = []
            for setting, quality in curve.items():
                counts = quality.result()
                s, u = (counts.mean([flag == group for flag in is_seen]).pq for group in (True, False))
                result[name].append({"value": setting[place], "sPQ": s, "uPQ": u, "hPQ": harmonic_mean(s, u)})
        return result
