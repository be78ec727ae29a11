"""Where quality is lost: the segmenter's masks and the checkpoint's classification scored apart, on the same images.

True segments and queries are paired by their masks alone. A pair's query keeps its mask; its class is taken from the
ground truth, or chosen by the checkpoint among the seen or the unseen classes, or among all. Each of these levels,
from the truth down to the actual prediction, loses quality, and the losses add up to 100 - PQ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline.data.benchmarks import Benchmark
from pipeline.inference.maps import Classes, Output, Thresholds, panoptic_map
from pipeline.scoring.metrics import PanopticQuality, PanopticResult
from pipeline.scoring.records import Losses, NamedRight, SeenUnseen
from pipeline.scoring.rows import GroundTruth

LOSSES = ("absent", "masks", "classification", "seen_bias", "selection")


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The true segments of one image that are no crowd, n of them, in the ground truth's order.

    `segments` (n,): their positions in the image's segments. `classes` (n,): their class indices. `query` (n,): the
    query that each is paired with, -1 where none is left or none of its pixels are in any mask. `nearest` (n,): the
    same query, or without one the query with the most mask probability inside of the segment.
    """

    segments: NDArray[np.int64]
    classes: NDArray[np.int64]
    query: NDArray[np.int64]
    nearest: NDArray[np.int64]

    def certain(self, names: NDArray[np.int64], logits: Tensor) -> Tensor:
        """Logits (Q, K) of a prediction in which each paired query has the class index `names` (n,) with score 1, and
        all others score 0. `logits` (Q, K) gives shape, type and device."""
        result = torch.full_like(logits, -torch.inf)
        paired = self.query >= 0
        result[torch.from_numpy(self.query[paired]), torch.from_numpy(names[paired])] = torch.inf
        return result

    def choices(self, logits: Tensor, seen: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The class index that each segment's query prefers by logits (Q, K), among the classes of the segment's own
        group (n,) and among all (n,); `seen` (K,) is True for the seen group. Of no meaning without a query."""
        own = logits.float().cpu().numpy()[self.query]
        within = np.where(seen == seen[self.classes][:, None], own, -np.inf).argmax(1)
        return within, own.argmax(1)


@torch.no_grad()
def pair(gt: GroundTruth, output: Output) -> Pairs:
    """The class-blind one-to-one assignment of highest summed IoU between true segments and queries (masks >= 0.5).

    As in panoptic quality, crowds take no part and pixels of void count in no union. A pair without a common pixel is
    none.
    """
    segments = np.array([i for i, s in enumerate(gt.sample.segments) if not s.iscrowd], np.int64)
    classes = np.array([gt.benchmark.index[gt.sample.segments[i].category_id] for i in segments], np.int64)
    if not len(segments):
        return Pairs(segments=segments, classes=classes, query=segments, nearest=segments)
    masks = output.probabilities()
    probabilities = masks.flatten(1)
    ids = torch.from_numpy(gt.ids.astype(np.int64)).to(probabilities.device).flatten()
    truth = torch.stack([ids == gt.sample.segments[i].id for i in segments]).float()  # (n, H * W)
    annotated = (ids != 0).float()
    columns = torch.cat([truth, annotated[None]]).T
    # float32 counts pixels exactly up to 2^24 of them
    overlap = torch.cat([(part.flatten(1) >= 0.5).float() @ columns for part in masks.split(16)])
    overlap = overlap.T.double().cpu().numpy()
    inter, query_area = overlap[:-1], overlap[-1]
    area = truth.sum(1).double().cpu().numpy()
    iou = inter / (area[:, None] + query_area - inter)  # a segment has pixels, so the union is positive
    row, column = linear_sum_assignment(iou, maximize=True)
    query = np.full(len(segments), -1)
    query[row] = np.where(iou[row, column] > 0, column, -1)
    nearest = query.copy()
    if (lone := np.flatnonzero(query < 0)).size:
        inside = probabilities @ truth[torch.from_numpy(lone).to(truth.device)].T
        nearest[lone] = inside.argmax(0).cpu().numpy()
    return Pairs(segments=segments, classes=classes, query=query, nearest=nearest)


class Waterfall:
    """Where one checkpoint's panoptic quality is lost, in points that add up to 100 - PQ, for the seen and the unseen
    classes.

    From the truth, which scores 100, down to the actual prediction, at each level the mean PQ of the classes and, as
    the loss, its difference from the level above (which can be negative):

    - absent: classes that no image shows count 0 in sPQ and uPQ, whatever is predicted.
    - masks: the paired queries' masks (see `pair`) with the true classes and score 1, merged into a panoptic map by the
      same code as a prediction; all other queries are left out.
    - classification: the same, but each query takes its best class among the seen or among the unseen ones, whichever
      group its true class is of.
    - seen_bias: the same, but it takes its best class over all. In the unseen column that is the bias towards seen
      classes, in the seen column its opposite.
    - selection: the prediction itself, of all queries with their own scores and the thresholds. Lost are segments that
      these drop or that a wrong winner covers; spurious segments count, too.
    """

    def __init__(self, benchmark: Benchmark) -> None:
        ids = [category.id for category in benchmark.categories]
        self.benchmark = benchmark
        self.within_group, self.over_all = PanopticQuality(ids), PanopticQuality(ids)
        self._right = {group: np.zeros(3, np.int64) for group in (True, False)}  # pairs, right within group, over all

    def update(
        self,
        gt: GroundTruth,
        output: Output,
        pairs: Pairs,
        logits: Tensor,
        classes: Classes,
        thresholds: Thresholds,
    ) -> None:
        """Counts one image; `logits` (Q, K) and `thresholds` are the checkpoint's."""
        paired = pairs.query >= 0
        seen = np.array(self.benchmark.seen)
        truth_seen = seen[pairs.classes]
        within, over_all = pairs.choices(logits, seen)
        for group, counts in self._right.items():
            of_group = paired & (truth_seen == group)
            right = [names[of_group] == pairs.classes[of_group] for names in (within, over_all)]
            counts += [of_group.sum(), right[0].sum(), right[1].sum()]
        for quality, names in ((self.within_group, within), (self.over_all, over_all)):
            found = panoptic_map(output, pairs.certain(names, logits), classes, thresholds)
            quality.update(gt.ids, gt.sample.segments, *found, image=gt.sample.image_id)

    def result(self, *, true_classes: PanopticResult, actual: PanopticResult) -> Losses:
        """Levels and losses so far; `true_classes` and `actual` are the masks' and the prediction's own results."""
        seen = np.array(self.benchmark.seen)
        shown = np.where(true_classes.tp + true_classes.fn > 0, 100.0, 0.0)
        pqs = [shown, *(r.pq for r in (true_classes, self.within_group.result(), self.over_all.result(), actual))]
        levels = {"truth": SeenUnseen(sPQ=100.0, uPQ=100.0)}
        for name, pq in zip(LOSSES, pqs, strict=True):
            s, u = (float(pq[group].mean()) if group.any() else 0.0 for group in (seen, ~seen))
            levels[name] = SeenUnseen(sPQ=s, uPQ=u)
        return Losses(
            levels=levels,
            losses={
                name: SeenUnseen(sPQ=above.sPQ - levels[name].sPQ, uPQ=above.uPQ - levels[name].uPQ)
                for above, name in zip(levels.values(), LOSSES, strict=False)
            },
            named_right={
                group: NamedRight(
                    segments=int(counts[0]),
                    within_group=100 * float(counts[1] / max(counts[0], 1)),
                    over_all=100 * float(counts[2] / max(counts[0], 1)),
                )
                for group, counts in (("seen", self._right[True]), ("unseen", self._right[False]))
            },
        )
