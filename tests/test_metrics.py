"""Panoptic quality against a slow reference and against hotcoco; the confusion matrix against loops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pytest
from hotcoco.panoptic import PanopticEval
from hypothesis import given, settings
from hypothesis import strategies as st
from panoptic_factory import CATEGORIES, IDS, Case, cases, slow_quality, write_panoptic

from pipeline.data.benchmarks import Category
from pipeline.inference.maps import PredictedSegment
from pipeline.scoring.metrics import ConfusionMatrix, PanopticQuality, class_map, harmonic_mean, scores, semantic_scores
from storage.shards import Segment


def accumulate(many: Sequence[Case]) -> PanopticQuality:
    quality = PanopticQuality(IDS)
    for number, case in enumerate(many):
        quality.update(case.gt_ids, case.gt_segments, case.ids, case.segments, image=number)
    return quality


@settings(max_examples=150, deadline=None)
@given(st.lists(cases, min_size=1, max_size=3))
def test_equals_the_slow_reference(many: list[Case]) -> None:
    result = accumulate(many).result()
    expected = slow_quality(many)
    for k, i in enumerate(IDS):
        iou_sum, tp, fp, fn = expected[i]
        assert (result.tp[k], result.fp[k], result.fn[k]) == (tp, fp, fn)
        assert result.iou_sum[k] == pytest.approx(iou_sum, abs=1e-9)
        assert bool(result.absent[k]) == (tp + fp + fn == 0)
        assert result.pq[k] == pytest.approx(100 * iou_sum / max(tp + fp / 2 + fn / 2, 1e-9), abs=1e-9)
        assert result.pq[k] == pytest.approx(result.sq[k] * result.rq[k] / 100, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(cases, min_size=1, max_size=3))
def test_equals_hotcoco(tmp_path_factory: pytest.TempPathFactory, many: list[Case]) -> None:
    folder = tmp_path_factory.mktemp("hotcoco")
    gt = write_panoptic(folder, "gt", [c.gt_ids for c in many], [c.gt_segments for c in many])
    predicted = write_panoptic(folder, "predicted", [c.ids for c in many], [c.segments for c in many])
    evaluation = PanopticEval(str(gt), str(predicted))
    evaluation.evaluate()
    expected = evaluation.results()

    result = accumulate(many).result()
    for k, i in enumerate(IDS):
        theirs = expected["per_class"].get(i, {"pq": 0, "sq": 0, "rq": 0, "tp": 0, "fp": 0, "fn": 0})
        assert (result.tp[k], result.fp[k], result.fn[k]) == (theirs["tp"], theirs["fp"], theirs["fn"])
        for ours, name in ((result.pq, "pq"), (result.sq, "sq"), (result.rq, "rq")):
            assert ours[k] / 100 == pytest.approx(max(theirs[name], 0), abs=1e-9)  # hotcoco: -1 where absent
    isthing = np.array([c.isthing for c in CATEGORIES])
    for name, subset in (("All", None), ("Things", isthing), ("Stuff", ~isthing)):
        mean = result.mean(subset, absent="skip")
        assert (mean.pq / 100, mean.sq / 100, mean.rq / 100) == pytest.approx(
            tuple(max(expected[name][key], 0) for key in ("pq", "sq", "rq")), abs=1e-9
        )


def segment(id: int, category_id: int, *, iscrowd: bool = False) -> Segment:
    return Segment(id=id, category_id=category_id, area=0, iscrowd=iscrowd)


def predicted(id: int, category_id: int) -> PredictedSegment:
    return PredictedSegment(id=id, category_id=category_id, score=1.0)


def test_perfect_prediction_is_100() -> None:
    ids = np.array([[7, 7, 0], [9, 9, 70000]], np.int32)
    quality = PanopticQuality(IDS)
    quality.update(
        ids, [segment(7, 1), segment(9, 4), segment(70000, 200)],
        ids, [predicted(70000, 200), predicted(9, 4), predicted(7, 1)], image=1,
    )  # fmt: skip
    mean = quality.result().mean()
    assert (mean.pq, mean.sq, mean.rq, mean.classes, mean.absent) == (100, 100, 100, 3, 0)


def test_renamed_class_by_hand() -> None:
    """Two cats and a sky, all masks right, one cat called dog: cat 1 TP 1 FN = 66.7, dog 1 FP = 0, sky 100."""
    ids = np.array([[1, 1, 2, 2], [3, 3, 3, 3]], np.int32)
    quality = PanopticQuality(IDS)
    quality.update(
        ids, [segment(1, 1), segment(2, 1), segment(3, 200)],
        ids, [predicted(1, 1), predicted(2, 4), predicted(3, 200)], image=1,
    )  # fmt: skip
    result = quality.result()
    assert result.pq == pytest.approx([200 / 3, 0, 100])
    assert result.sq == pytest.approx([100, 0, 100])
    assert result.mean([True, True, False]).pq == pytest.approx(100 / 3)
    assert not result.absent.any()


def test_absent_class_counts_zero_unless_skipped() -> None:
    ids = np.ones((2, 2), np.int32)
    quality = PanopticQuality(IDS)
    quality.update(ids, [segment(1, 1)], ids, [predicted(1, 1)], image=1)
    things = [True, True, False]
    assert (quality.result().mean(things).pq, quality.result().mean(things).absent) == (50, 1)
    assert quality.result().mean(things, absent="skip").pq == 100
    assert quality.result().mean([False] * 3).pq == 0


@pytest.mark.parametrize(
    ("gt_segments", "segments", "message"),
    [
        ([segment(1, 1)], [predicted(5, 1)], r"image 39.*ground truth.*id 2 but no such segment"),
        ([segment(1, 1), segment(2, 4)], [], r"image 39.*prediction.*id 5 but no such segment"),
        ([segment(1, 1), segment(2, 4), segment(3, 1)], [predicted(5, 1)], r"image 39.*ground truth: segment 3 has no"),
        ([segment(1, 1), segment(2, 4)], [predicted(5, 1), predicted(6, 1)], r"image 39.*prediction: segment 6 has no"),
        ([segment(1, 1), segment(2, 77)], [predicted(5, 1)], r"image 39.*segment 2 is of category 77"),
        ([segment(1, 1), segment(2, 4)], [predicted(5, 78)], r"image 39.*segment 5 is of category 78"),
        ([segment(1, 1), segment(2, 4), segment(2, 1)], [predicted(5, 1)], r"image 39.*segment id 2 is listed twice"),
        ([segment(0, 1), segment(1, 1), segment(2, 4)], [predicted(5, 1)], r"image 39.*segment id 0 is listed twice"),
    ],
)
def test_inconsistent_images_are_named(
    gt_segments: list[Segment], segments: list[PredictedSegment], message: str
) -> None:
    gt_ids, ids = np.array([[1, 2], [0, 2]], np.int32), np.array([[5, 5], [0, 0]], np.int32)
    quality = PanopticQuality(IDS)
    with pytest.raises(ValueError, match=message):
        quality.update(gt_ids, gt_segments, ids, segments, image=39)
    assert quality.result().absent.all()


def test_sizes_must_agree() -> None:
    ids = np.zeros((2, 2), np.int32)
    with pytest.raises(ValueError, match="image 39.*original size"):
        PanopticQuality(IDS).update(ids, [], ids[:1], [], image=39)
    with pytest.raises(ValueError, match="image 39.*original size"):
        ConfusionMatrix(3).update(ids, ids[:1], image=39)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(0, 60))
def test_confusion_matrix_equals_loops(seed: int, classes: int, pixels: int) -> None:
    rng = np.random.default_rng(seed)
    gt, guess = rng.integers(0, classes, pixels), rng.integers(0, classes, pixels)
    gt[rng.random(pixels) < 0.2] = -1
    matrix = ConfusionMatrix(classes)
    matrix.update(gt[: pixels // 2], guess[: pixels // 2], image=1)
    matrix.update(gt[pixels // 2 :], guess[pixels // 2 :], image=2)
    for k in range(classes):
        both = sum(g == k and p == k for g, p in zip(gt, guess, strict=True))
        either = sum(k in (g, p) and g != -1 for g, p in zip(gt, guess, strict=True))
        assert matrix.iou[k] == pytest.approx(100 * both / either if either else 0, abs=1e-9)
        assert bool(matrix.absent[k]) == (either == 0)
    assert matrix.mean() == pytest.approx(sum(matrix.iou) / classes)


def test_confusion_matrix_refuses_unknown_indices() -> None:
    zero = np.zeros((1, 2), np.int64)
    with pytest.raises(ValueError, match="image 7: ground truth: class index 3"):
        ConfusionMatrix(3).update(np.array([[0, 3]]), zero, image=7)
    with pytest.raises(ValueError, match="image 7: prediction: class index -1"):
        ConfusionMatrix(3).update(zero, np.array([[0, -1]]), image=7)
    with pytest.raises(ValueError, match="ignore=255"):
        ConfusionMatrix(300, ignore=255)


def test_harmonic_mean() -> None:
    assert harmonic_mean(60, 30) == pytest.approx(40)
    assert harmonic_mean(0, 0) == 0 == harmonic_mean(50, 0)


def test_class_map() -> None:
    ids = np.array([[5, 0], [900, 900]], np.int32)
    classes = class_map(ids, [segment(900, 200), segment(5, 4)], {1: 0, 4: 1, 200: 2}, image=1)
    assert classes.tolist() == [[1, -1], [2, 2]]
    with pytest.raises(ValueError, match="image 3.*segment 5 is of category 4"):
        class_map(ids, [segment(900, 200), segment(5, 4)], {1: 0, 200: 2}, image=3)


def test_more_classes_than_a_byte_holds() -> None:
    ids, many = np.array([[0, 1], [2, 3]], np.int32), {i: i for i in range(300)}
    classes = class_map(ids, [segment(1, 0), segment(2, 255), segment(3, 299)], many, image=1)
    assert classes.tolist() == [[-1, 0], [255, 299]]
    confusion = ConfusionMatrix(300)
    confusion.update(classes, np.maximum(classes, 0), image=1)
    assert confusion.counts.sum() == 3
    assert [confusion.counts[i, i] for i in (0, 255, 299)] == [1, 1, 1]


def test_scores_splits_seen_and_unseen() -> None:
    """The renamed class again: cat and sky seen, dog unseen."""
    gt_ids = np.array([[1, 1, 2, 2], [3, 3, 3, 3]], np.int32)
    gt, found = [segment(1, 1), segment(2, 1), segment(3, 200)], [predicted(1, 1), predicted(2, 4), predicted(3, 200)]
    quality, confusion = PanopticQuality(IDS), ConfusionMatrix(3)
    quality.update(gt_ids, gt, gt_ids, found, image=1)
    index = {category: k for k, category in enumerate(IDS)}
    confusion.update(class_map(gt_ids, gt, index, image=1), class_map(gt_ids, found, index, image=1), image=1)
    report = scores(quality.result(), confusion, categories=CATEGORIES, seen=[True, False, True])
    assert report.sPQ == pytest.approx((200 / 3 + 100) / 2)
    assert (report.uPQ, report.hPQ, report.uIoU, report.hIoU) == (0, 0, 0, 0)
    assert report.sIoU == pytest.approx((50 + 100) / 2)
    assert (report.PQ_st, report.absent_seen, report.absent_unseen) == (100, 0, 0)
    assert asdict(report.per_class[1]) == {
        "id": 4, "name": "dog", "isthing": True, "seen": False,
        "PQ": 0, "SQ": 0, "RQ": 0, "IoU": 0, "tp": 0, "fp": 1, "fn": 0,
    }  # fmt: skip
    json.dumps(asdict(report), allow_nan=False)  # plain numbers, none of numpy


def test_semantic_scores_of_a_small_case_by_hand() -> None:
    """Pixels: 6 cat, of which 2 called dog; 3 dog, right; 1 cow, called cat. IoU cat 4/7, dog 3/5, cow 0; emu
    absent."""
    categories = [Category(id=i, name=name, isthing=False) for i, name in enumerate(("cat", "dog", "cow", "emu"))]
    confusion = ConfusionMatrix(4)
    truth = np.array([[0, 0, 0, 0, 0, 0, 1, 1, 1, 2, -1, -1]])
    confusion.update(truth, np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 3, 0]]), image="a")
    scores = semantic_scores(confusion, categories=categories, seen=[True, False, True, False])
    cat, dog = 400 / 7, 60.0
    seen, unseen = cat / 2, dog / 2  # emu, absent, counts 0 among the unseen
    assert scores.mIoU == pytest.approx((cat + dog + 0) / 3)  # and is left out of the mean of all
    assert (scores.sIoU, scores.uIoU) == pytest.approx((seen, unseen))
    assert scores.hIoU == pytest.approx(2 * seen * unseen / (seen + unseen))
    assert scores.accuracy == pytest.approx(70)
    assert (scores.absent_seen, scores.absent_unseen) == (0, 1)
    assert [(row.name, row.pixels) for row in scores.per_class] == [
        ("cat", 6),
        ("dog", 3),
        ("cow", 1),
        ("emu", 0),
    ]
    assert [row.IoU for row in scores.per_class] == pytest.approx([cat, dog, 0, 0])
