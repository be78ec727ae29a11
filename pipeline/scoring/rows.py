"""One row of scores under way: panoptic quality and IoU, or IoU alone, of one way to name what the segmenter found, image by
image."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from pipeline.data.benchmarks import Benchmark
from pipeline.inference.maps import Classes, Output, PredictedSegment, Thresholds, panoptic_map, semantic_map
from pipeline.scoring.metrics import ConfusionMatrix, PanopticQuality, class_map, scores, semantic_scores
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
        thresholds: Thresholds,
    ) -> tuple[np.ndarray, list[PredictedSegment]]:
        """Score one image by its class logits; returns the panoptic map."""
        ids, segments = panoptic_map(output, logits, classes, thresholds)
        self.quality.update(gt.ids, gt.sample.segments, ids, segments, image=gt.sample.image_id)
        found = semantic_map(output, logits, classes, seen_offset=thresholds.seen_offset)
        self.confusion.update(gt.classes, found, image=gt.sample.image_id)
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


class SemanticRow:
    """One row of a semantic benchmark's report under way, with the methods of `Row`; it knows pixels and no segments."""

    def __init__(self, benchmark: Benchmark) -> None:
        self.benchmark = benchmark
        self.confusion = ConfusionMatrix(len(benchmark.categories))

    def predict(
        self,
        gt: GroundTruth,
        output: Output,
        logits: Tensor,
        classes: Classes,
        thresholds: Thresholds,
    ) -> tuple[np.ndarray, list[PredictedSegment]]:
        """Score one image by its class logits; returns the semantic map, each class in it as one segment. Of the thresholds
        only `seen_offset` has an effect here."""
        found = semantic_map(output, logits, classes, seen_offset=thresholds.seen_offset)
        self.confusion.update(gt.classes, found, image=gt.sample.image_id)
        shown = [
            PredictedSegment(id=k + 1, category_id=self.benchmark.categories[k].id, score=1.0)
            for k in np.unique(found).tolist()
        ]
        return found + 1, shown

    def rename(self, gt: GroundTruth, guess: list[int]) -> None:
        """Score one image whose masks are the true ones and whose segments are named by class index `guess`."""
        name_of = {segment.id: k for segment, k in zip(gt.sample.segments, guess, strict=True)}
        ids, place = np.unique(gt.ids, return_inverse=True)
        found = np.array([name_of.get(i, -1) for i in ids.tolist()])[
            place.reshape(gt.ids.shape)
        ]  # void is counted nowhere
        self.confusion.update(gt.classes, found, image=gt.sample.image_id)

    def scores(self) -> dict[str, Any]:
        """See `metrics.semantic_scores`."""
        return semantic_scores(self.confusion, categories=self.benchmark.categories, seen=self.benchmark.seen)
