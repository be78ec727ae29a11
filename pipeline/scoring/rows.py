"""One row of the report while it is counted: panoptic quality and IoU of one classifier, image by image."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from pipeline.data.benchmarks import Benchmark
from pipeline.inference.maps import Classes, Output, PredictedSegment, Thresholds, panoptic_map, semantic_map
from pipeline.scoring.metrics import ConfusionMatrix, PanopticQuality, class_map, scores, semantic_scores
from pipeline.scoring.records import Scores
from storage.shards import Sample, decode_ids

Map = tuple[np.ndarray, list[PredictedSegment]]  # ids (H, W), 0 = void, and a segment for every other id


class GroundTruth:
    """A sample's ids (H, W) and class indices (H, W), -1 where nothing is annotated."""

    def __init__(self, sample: Sample, benchmark: Benchmark) -> None:
        self.sample, self.benchmark = sample, benchmark
        self.ids = decode_ids(sample)
        self.classes = class_map(self.ids, sample.segments, benchmark.index, image=sample.image_id)


class Row:
    """Counts of one row.

    `confusion` counts pixels; `quality` counts segments, and is None of a semantic benchmark, which has only pixels.
    """

    def __init__(self, benchmark: Benchmark) -> None:
        self.benchmark = benchmark
        self.confusion = ConfusionMatrix(len(benchmark.categories))
        panoptic = benchmark.task == "panoptic"
        self.quality = PanopticQuality([c.id for c in benchmark.categories]) if panoptic else None

    def predict(self, gt: GroundTruth, output: Output, logits: Tensor, classes: Classes, thresholds: Thresholds) -> Map:
        """Count the prediction of one image by class logits (Q, K).

        Returns its panoptic map; of a semantic benchmark its semantic map, each class as one segment. There, of the
        thresholds, only `seen_offset` has an effect.
        """
        image = gt.sample.image_id
        found = semantic_map(output, logits, classes, seen_offset=thresholds.seen_offset)
        self.confusion.update(gt.classes, found, image=image)
        if self.quality is None:
            return found + 1, [
                PredictedSegment(id=k + 1, category_id=self.benchmark.categories[k].id, score=1.0)
                for k in np.unique(found).tolist()
            ]
        ids, segments = panoptic_map(output, logits, classes, thresholds)
        self.quality.update(gt.ids, gt.sample.segments, ids, segments, image=image)
        return ids, segments

    def rename(self, gt: GroundTruth, guess: list[int]) -> None:
        """Count one image's true masks, with the class index `guess` of every segment in place of its true class.
        Crowds, and segments with the guess -1, are no prediction, and their pixels are left out."""
        image = gt.sample.image_id
        named = [
            PredictedSegment(id=s.id, category_id=self.benchmark.categories[k].id, score=1.0)
            for s, k in zip(gt.sample.segments, guess, strict=True)
            if not s.iscrowd and k >= 0
        ]
        ids = np.where(np.isin(gt.ids, [s.id for s in named]), gt.ids, 0)
        classes = class_map(ids, named, self.benchmark.index, image=image)
        self.confusion.update(np.where(ids > 0, gt.classes, -1), np.where(ids > 0, classes, 0), image=image)
        if self.quality is not None:
            self.quality.update(gt.ids, gt.sample.segments, ids, named, image=image)

    def scores(self) -> Scores:
        """The row so far."""
        classes: dict[str, Any] = {"categories": self.benchmark.categories, "seen": self.benchmark.seen}
        if self.quality is None:
            return semantic_scores(self.confusion, **classes)
        return scores(self.quality.result(), self.confusion, **classes)
