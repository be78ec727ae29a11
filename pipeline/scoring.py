"""One row of scores under way: panoptic quality and IoU of one way to name what the segmenter found, image by image."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from pipeline.benchmarks import Benchmark
from pipeline.inference import Classes, Output, panoptic_map, semantic_map
from pipeline.metrics import ConfusionMatrix, PanopticQuality, PredictedSegment, class_map, scores
from storage.shards import Sample, decode_ids


class GroundTruth:
    """A sample's ids (H, W) and class indices (H, W), -1 where nothing is annotated."""

    def __init__(self, sample: Sample, benchmark: Benchmark) -> None:
        self.sample, self.benchmark = sample, benchmark
        self.ids = decode_ids(sample)
        self.classes = class_map(self.ids, sample.segments, benchmark.index, image=sample.image_id)


class Row:
    """One row of the report under way."""

    def __init__(self, benchmark: Benchmark) -> None:
        self.benchmark = benchmark
        self.quality = PanopticQuality([c.id for c in benchmark.categories])
        self.confusion = ConfusionMatrix(len(benchmark.categories))

    def predict(
        self,
        gt: GroundTruth,
        output: Output,
        logits: Tensor,
        classes: Classes,
        facts: dict[str, Any],
        *,
        seen_offset: float = 0.0,
    ) -> tuple[np.ndarray, list[PredictedSegment]]:
        """Score one image by its class logits; returns the panoptic map."""
        thresholds = {name: facts[name] for name in ("object_threshold", "overlap_threshold")}
        ids, segments = panoptic_map(output, logits, classes, seen_offset=seen_offset, **thresholds)
        self.quality.update(gt.ids, gt.sample.segments, ids, segments, image=gt.sample.image_id)
        self.confusion.update(
            gt.classes, semantic_map(output, logits, classes, seen_offset=seen_offset), image=gt.sample.image_id
        )
        return ids, segments

    def rename(self, gt: GroundTruth, guess: list[int]) -> None:
        """Score one image whose masks are the true ones and whose segments, crowds apart, are named by class index `guess`."""
        named = [
            PredictedSegment(id=s.id, category_id=self.benchmark.categories[k].id, score=1.0)
            for s, k in zip(gt.sample.segments, guess, strict=True)
            if not s.iscrowd
        ]
        ids = np.where(np.isin(gt.ids, [s.id for s in named]), gt.ids, 0)
        self.quality.update(gt.ids, gt.sample.segments, ids, named, image=gt.sample.image_id)
        classes = class_map(ids, named, self.benchmark.index, image=gt.sample.image_id)
        self.confusion.update(
            np.where(ids > 0, gt.classes, -1), np.where(ids > 0, classes, 0), image=gt.sample.image_id
        )

    def scores(self) -> dict[str, Any]:
        """See `metrics.scores`."""
        return scores(
            self.quality.result(), self.confusion, categories=self.benchmark.categories, seen=self.benchmark.seen
        )
