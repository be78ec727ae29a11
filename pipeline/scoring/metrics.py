"""Panoptic quality (panopticapi's definition) and the confusion matrix behind mIoU, as accumulators over images.

Both are plain numpy and count one image with a single `bincount`.
All qualities are in percent. A class that neither occurs nor is predicted is `absent`: it counts 0 in the seen and
unseen means of the zero-shot protocols, and how many such classes there are is reported beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.inference.maps import PredictedSegment
from pipeline.scoring.records import PanopticClass, PanopticScores, SemanticClass, SemanticScores

if TYPE_CHECKING:
    from pipeline.data.benchmarks import Category
    from storage.shards import Segment


class _AnySegment(Protocol):
    @property
    def id(self) -> int: ...
    @property
    def category_id(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class PanopticMean:
    """PQ, SQ and RQ in percent, each the mean over `classes` classes, of which `absent` never occurred."""

    pq: float
    sq: float
    rq: float
    classes: int
    absent: int


@dataclass(frozen=True, kw_only=True)
class PanopticResult:
    """Per-class counts, arrays (K,) in the order of `category_ids`."""

    category_ids: tuple[int, ...]
    iou_sum: NDArray[np.float64]
    tp: NDArray[np.int64]
    fp: NDArray[np.int64]
    fn: NDArray[np.int64]

    @property
    def absent(self) -> NDArray[np.bool_]:
        """(K,) True where the class has neither a ground-truth nor a predicted segment that counts."""
        return self.tp + self.fp + self.fn == 0

    @property
    def pq(self) -> NDArray[np.float64]:
        """(K,) percent, sum of IoU / (TP + FP/2 + FN/2); 0 where absent."""
        return 100 * self.iou_sum / np.where(self.absent, 1, self.tp + self.fp / 2 + self.fn / 2)

    @property
    def sq(self) -> NDArray[np.float64]:
        """(K,) percent, mean IoU of the matched segments; 0 without a match."""
        return 100 * self.iou_sum / np.maximum(self.tp, 1)

    @property
    def rq(self) -> NDArray[np.float64]:
        """(K,) percent, TP / (TP + FP/2 + FN/2); 0 where absent."""
        return 100 * self.tp / np.where(self.absent, 1, self.tp + self.fp / 2 + self.fn / 2)

    def mean(self, subset: ArrayLike | None = None, *, absent: Literal["zero", "skip"] = "zero") -> PanopticMean:
        """Class means over the boolean mask `subset` (K,), by default over all classes.

        Absent classes count 0 (`zero`: sPQ and uPQ) or are left out (`skip`: panopticapi's All, Things and Stuff).
        The mean over no class is 0.
        """
        chosen = np.ones(len(self.category_ids), bool) if subset is None else np.asarray(subset, bool)
        missing = int((chosen & self.absent).sum())
        if absent == "skip":
            chosen = chosen & ~self.absent
        pq, sq, rq = (float(values[chosen].mean()) if chosen.any() else 0.0 for values in (self.pq, self.sq, self.rq))
        return PanopticMean(pq=pq, sq=sq, rq=rq, classes=int(chosen.sum()), absent=missing)


@dataclass(frozen=True, kw_only=True)
class Matches:
    """What one image adds to panoptic quality, as class indices: of every match (n,) with its IoU, of the unmatched
    predictions that count, and of the missed ground truth. `pairs` (n, 2) are the matches' positions among the true and
    the predicted segments, `spurious` the positions of the predictions behind `fp`."""

    tp: NDArray[np.int64]
    iou: NDArray[np.float64]
    fp: NDArray[np.int64]
    fn: NDArray[np.int64]
    pairs: NDArray[np.int64]
    spurious: NDArray[np.int64]

    @property
    def pq(self) -> float:
        """Panoptic quality in percent over all segments of the image, whatever their class; 100 where nothing counts."""
        weight = len(self.tp) + len(self.fp) / 2 + len(self.fn) / 2
        return 100 * float(self.iou.sum()) / weight if weight else 100.0


class PanopticQuality:
    """Accumulates panoptic quality over images.

    A predicted and a ground-truth segment match when their categories agree, the latter is no crowd and
    IoU > 0.5, with union = |p| + |g| - intersection - |p on void|. An unmatched prediction is a false positive unless
    more than half of it lies on void or on a crowd of its category; of several crowds of one category in an image
    only the last one listed counts, as in panopticapi. Areas are counted from the pixels.
    """

    def __init__(self, category_ids: Sequence[int]) -> None:
        self.category_ids = tuple(category_ids)
        self._index = {category: i for i, category in enumerate(self.category_ids)}
        self._iou_sum = np.zeros(len(self.category_ids))
        self._tp, self._fp, self._fn = (np.zeros(len(self.category_ids), np.int64) for _ in range(3))

    def update(
        self,
        gt_ids: NDArray[np.integer],
        gt_segments: Sequence[Segment],
        ids: NDArray[np.integer],
        segments: Sequence[PredictedSegment],
        *,
        image: str | int,
    ) -> None:
        """Counts one image; arguments and errors as in `match`."""
        self.add(self.match(gt_ids, gt_segments, ids, segments, image=image))

    def add(self, matches: Matches) -> None:
        """Counts one image that `match` has compared."""
        np.add.at(self._iou_sum, matches.tp, matches.iou)
        np.add.at(self._tp, matches.tp, 1)
        np.add.at(self._fp, matches.fp, 1)
        np.add.at(self._fn, matches.fn, 1)

    def match(
        self,
        gt_ids: NDArray[np.integer],
        gt_segments: Sequence[Segment],
        ids: NDArray[np.integer],
        segments: Sequence[PredictedSegment],
        *,
        image: str | int,
    ) -> Matches:
        """Compares one image's prediction with its ground truth and counts nothing.

        Args:
            gt_ids: (H, W) ground-truth segment ids, 0 = void.
            gt_segments: the ground truth's segments, one for every id but 0.
            ids: (H, W) predicted segment ids, 0 = void.
            segments: the predicted segments, one for every id but 0.
            image: what to call the image in error messages.

        Raises:
            ValueError: an id without a segment, a segment without pixels, an id twice, an unknown category,
                or maps of different sizes.
        """
        if gt_ids.shape != ids.shape:
            raise ValueError(
                f"image {image}: the prediction is {ids.shape} but the ground truth {gt_ids.shape} pixels (H, W); "
                f"predict at the image's original size"
            )
        gt_class = _classes(gt_segments, self._index, what="ground truth", image=image)
        class_ = _classes(segments, self._index, what="prediction", image=image)
        crowd = np.array([segment.iscrowd for segment in gt_segments], bool)
        gt_row = _rows(gt_ids, gt_segments, what="ground truth", image=image)
        row = _rows(ids, segments, what="prediction", image=image)

        shape = len(gt_segments) + 1, len(segments) + 1  # row and column 0 are void
        overlap = np.bincount(gt_row * shape[1] + row, minlength=shape[0] * shape[1]).reshape(shape)
        gt_area, area = overlap.sum(1)[1:], overlap.sum(0)[1:]
        for what, found, areas in (("ground truth", gt_segments, gt_area), ("prediction", segments, area)):
            if not areas.all():
                empty = found[int(np.argmin(areas))].id
                raise ValueError(
                    f"image {image}: {what}: segment {empty} has no pixel in the PNG; "
                    f"correct the annotation, or leave the image out"
                )

        inter, on_void = overlap[1:, 1:], overlap[0, 1:]
        union = gt_area[:, None] + area - inter - on_void  # at least gt_area, so positive
        same = gt_class[:, None] == class_
        match = same & ~crowd[:, None] & (2 * inter > union)
        later = np.triu(crowd & (gt_class[:, None] == gt_class), 1).any(1)  # a later crowd of the same category
        on_crowd = (inter * (same & (crowd & ~later)[:, None])).sum(0)
        false_positive = ~match.any(0) & (2 * (on_void + on_crowd) <= area)
        false_negative = ~match.any(1) & ~crowd

        pairs = np.argwhere(match)
        return Matches(
            tp=gt_class[pairs[:, 0]],
            iou=inter[match] / union[match],
            fp=class_[false_positive],
            fn=gt_class[false_negative],
            pairs=pairs,
            spurious=np.flatnonzero(false_positive),
        )

    def result(self) -> PanopticResult:
        """The counts so far."""
        return PanopticResult(
            category_ids=self.category_ids,
            iou_sum=self._iou_sum.copy(),
            tp=self._tp.copy(),
            fp=self._fp.copy(),
            fn=self._fn.copy(),
        )


class ConfusionMatrix:
    """Accumulates pixels by true and predicted class; `counts` is (K, K), rows = truth, columns = prediction."""

    def __init__(self, classes: int, *, ignore: int = -1) -> None:
        if 0 <= ignore < classes:
            raise ValueError(f"ignore={ignore} is one of the {classes} classes; choose a value outside of them")
        self.ignore = ignore
        self.counts = np.zeros((classes, classes), np.int64)

    def update(self, gt: NDArray[np.integer], prediction: NDArray[np.integer], *, image: str | int) -> None:
        """Counts one image: class indices (H, W); pixels where gt is `ignore` count nowhere.

        Raises:
            ValueError: maps of different sizes, or a class index out of range.
        """
        if gt.shape != prediction.shape:
            raise ValueError(
                f"image {image}: the prediction is {prediction.shape} but the ground truth {gt.shape} pixels (H, W); "
                f"predict at the image's original size"
            )
        classes = len(self.counts)
        valid = gt != self.ignore
        truth, guess = gt[valid].astype(np.int64), prediction[valid].astype(np.int64)
        for what, values in (("ground truth", truth), ("prediction", guess)):
            if values.size and not 0 <= values.min() <= values.max() < classes:
                wrong = int(values.min() if values.min() < 0 else values.max())
                raise ValueError(
                    f"image {image}: {what}: class index {wrong} is outside 0..{classes - 1}; "
                    f"use the benchmark that the labels were made for (ignored pixels are {self.ignore})"
                )
        self.counts += np.bincount(truth * classes + guess, minlength=classes**2).reshape(classes, classes)

    @property
    def absent(self) -> NDArray[np.bool_]:
        """(K,) True where the class is neither in the ground truth nor predicted."""
        return self.counts.sum(0) + self.counts.sum(1) == 0

    @property
    def iou(self) -> NDArray[np.float64]:
        """(K,) percent; 0 where absent."""
        hit = self.counts.diagonal()
        return 100 * hit / np.maximum(self.counts.sum(0) + self.counts.sum(1) - hit, 1)

    def mean(self, subset: ArrayLike | None = None, *, absent: Literal["zero", "skip"] = "zero") -> float:
        """Mean IoU in percent over the boolean mask `subset` (K,), by default all classes.

        Absent classes count 0 (`zero`: sIoU and uIoU) or are left out (`skip`: the usual mIoU).
        """
        chosen = np.ones(len(self.counts), bool) if subset is None else np.asarray(subset, bool)
        if absent == "skip":
            chosen = chosen & ~self.absent
        return float(self.iou[chosen].mean()) if chosen.any() else 0.0


def harmonic_mean(seen: float, unseen: float) -> float:
    """2 s u / (s + u), and 0 when both are 0."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0


def class_map(
    ids: NDArray[np.integer], segments: Sequence[_AnySegment], class_index: Mapping[int, int], *, image: str | int
) -> NDArray[np.int32]:
    """The class index of every pixel (H, W) of a panoptic map: `class_index` maps category ids; void becomes -1.

    Raises:
        ValueError: an id without a segment, an id twice, or an unknown category.
    """
    table = np.append(-1, _classes(segments, class_index, what="segments", image=image)).astype(np.int32)
    return table[_rows(ids, segments, what="segments", image=image)].reshape(ids.shape)


def scores(
    quality: PanopticResult, confusion: ConfusionMatrix, *, categories: Sequence[Category], seen: Sequence[bool]
) -> PanopticScores:
    """One row of a panoptic benchmark's report, from its counted segments and pixels."""
    is_seen, isthing = np.array(seen, bool), np.array([category.isthing for category in categories], bool)
    seen_mean, unseen_mean = quality.mean(is_seen), quality.mean(~is_seen)
    every, things, stuff = (quality.mean(subset, absent="skip") for subset in (None, isthing, ~isthing))
    seen_iou, unseen_iou = confusion.mean(is_seen), confusion.mean(~is_seen)
    pq, sq, rq, iou = (part.tolist() for part in (quality.pq, quality.sq, quality.rq, confusion.iou))
    tp, fp, fn = (part.tolist() for part in (quality.tp, quality.fp, quality.fn))
    return PanopticScores(
        sPQ=seen_mean.pq,
        uPQ=unseen_mean.pq,
        hPQ=harmonic_mean(seen_mean.pq, unseen_mean.pq),
        sIoU=seen_iou,
        uIoU=unseen_iou,
        hIoU=harmonic_mean(seen_iou, unseen_iou),
        PQ=every.pq,
        SQ=every.sq,
        RQ=every.rq,
        PQ_th=things.pq,
        PQ_st=stuff.pq,
        absent_seen=seen_mean.absent,
        absent_unseen=unseen_mean.absent,
        per_class=[
            PanopticClass(
                id=category.id,
                name=category.name,
                isthing=category.isthing,
                seen=bool(known),
                PQ=pq[k],
                SQ=sq[k],
                RQ=rq[k],
                IoU=iou[k],
                tp=tp[k],
                fp=fp[k],
                fn=fn[k],
            )
            for k, (category, known) in enumerate(zip(categories, seen, strict=True))
        ],
    )


def semantic_scores(
    confusion: ConfusionMatrix, *, categories: Sequence[Category], seen: Sequence[bool]
) -> SemanticScores:
    """One row of a semantic benchmark's report, from its counted pixels."""
    is_seen = np.array(seen, bool)
    seen_iou, unseen_iou = confusion.mean(is_seen), confusion.mean(~is_seen)
    iou, pixels = confusion.iou.tolist(), confusion.counts.sum(1)
    return SemanticScores(
        mIoU=confusion.mean(absent="skip"),
        sIoU=seen_iou,
        uIoU=unseen_iou,
        hIoU=harmonic_mean(seen_iou, unseen_iou),
        accuracy=100 * float(confusion.counts.trace() / max(pixels.sum(), 1)),
        absent_seen=int((confusion.absent & is_seen).sum()),
        absent_unseen=int((confusion.absent & ~is_seen).sum()),
        per_class=[
            SemanticClass(id=category.id, name=category.name, seen=bool(known), IoU=iou[k], pixels=int(pixels[k]))
            for k, (category, known) in enumerate(zip(categories, seen, strict=True))
        ],
    )


def _classes(
    segments: Sequence[_AnySegment], class_index: Mapping[int, int], *, what: str, image: str | int
) -> NDArray[np.int64]:
    """(len(segments),) the class index of every segment."""
    for segment in segments:
        if segment.category_id not in class_index:
            raise ValueError(
                f"image {image}: {what}: segment {segment.id} is of category {segment.category_id}, "
                f"which the benchmark does not have; use the annotations that belong to the benchmark"
            )
    return np.array([class_index[segment.category_id] for segment in segments], np.int64)


def _rows(
    ids: NDArray[np.integer], segments: Sequence[_AnySegment], *, what: str, image: str | int
) -> NDArray[np.int64]:
    """(H*W,) for every pixel 0 for void, else 1 + the position of its segment in `segments`."""
    known = np.array([0, *(segment.id for segment in segments)], np.int64)
    order = np.argsort(known, kind="stable")
    ordered = known[order]
    if wrong := [*ordered[ordered < 0], *ordered[1:][ordered[1:] == ordered[:-1]]]:
        raise ValueError(
            f"image {image}: {what}: segment id {wrong[0]} is listed twice, is 0, which is void, or is negative; "
            f"give every segment a positive id of its own"
        )
    pixels = ids.reshape(-1)
    starts = np.flatnonzero(np.append(True, pixels[1:] != pixels[:-1])[: pixels.size])  # of runs of one id
    runs = pixels[starts].astype(np.int64)  # few: searching for them costs next to nothing
    place = np.minimum(np.searchsorted(ordered, runs), len(ordered) - 1)
    if (stray := runs[ordered[place] != runs]).size:
        raise ValueError(
            f"image {image}: {what}: the PNG has pixels of id {stray[0]} but no such segment is listed; "
            f"correct the annotation, or leave the image out"
        )
    return np.repeat(order[place], np.diff(starts, append=pixels.size))
