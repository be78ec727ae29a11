"""The object threshold of a panoptic map (D8), chosen for seen classes on training images."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pipeline.inference.maps import Classes, Output, Thresholds
from pipeline.scoring.config import OBJECT_THRESHOLDS
from pipeline.scoring.metrics import PanopticQuality
from pipeline.scoring.sweeps import Trials
from storage.shards import Sample, decode_ids


class Calibration:
    """Counts training images at every threshold of `OBJECT_THRESHOLDS`.

    The choice is the lowest threshold whose seen PQ is within `slack` points of the best: the curve is flat over a wide
    range, and unseen classes have lower scores than seen ones, so among thresholds of about equal seen PQ the lowest
    loses the fewest unseen segments. Only seen classes are predicted; segments of unseen classes, if the protocol
    leaves any, count as void.

    Args:
        classes: the seen ones alone.
        overlap_threshold: see `Thresholds`.
        slack: see above, in points of PQ.
    """

    def __init__(self, classes: Classes, *, overlap_threshold: float, slack: float) -> None:
        self.classes, self.overlap_threshold, self.slack = classes, overlap_threshold, slack
        self._ids = set(classes.ids.tolist())
        self._qualities = {threshold: PanopticQuality(sorted(self._ids)) for threshold in OBJECT_THRESHOLDS}

    def update(self, sample: Sample, output: Output, logits: Tensor) -> None:
        """Count one image by the logits (Q, K) of the seen classes."""
        segments = [s for s in sample.segments if s.category_id in self._ids]
        ids = decode_ids(sample)
        ids = np.where(np.isin(ids, [s.id for s in segments]), ids, 0)
        trials = Trials(ids, segments, output, logits, self.classes, image=sample.image_id)
        for threshold, quality in self._qualities.items():
            trials.add(quality, Thresholds(object_threshold=threshold, overlap_threshold=self.overlap_threshold))

    def result(self) -> tuple[float, dict[float, float]]:
        """The threshold of choice, and the mean PQ of the seen classes in percent by threshold."""
        by_threshold = {threshold: quality.result().mean().pq for threshold, quality in self._qualities.items()}
        enough = max(by_threshold.values()) - self.slack
        return min(threshold for threshold, pq in by_threshold.items() if pq >= enough), by_threshold
