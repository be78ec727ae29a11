"""Panoptic and semantic inference against a slow reference, pixel by pixel, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.inference.maps import Classes, Output, PredictedSegment, Thresholds, panoptic_map, semantic_map
from pipeline.scoring.metrics import PanopticQuality
from storage.shards import Segment

CATEGORY_IDS = torch.tensor([1, 4, 90, 200])
ISTHING = torch.tensor([True, True, False, False])
SEEN = torch.tensor([True, False, True, False])
CLASSES = Classes(text=torch.eye(4), ids=CATEGORY_IDS, isthing=ISTHING, seen=SEEN)


def draw(seed: int, queries: int) -> tuple[Output, Tensor]:
    """A random output and class logits (Q, 4)."""
    rng = torch.Generator().manual_seed(seed)

    def size(low: int, high: int) -> tuple[int, int]:
        height, width = torch.randint(low, high, (2,), generator=rng).tolist()
        return height, width

    padded = size(4, 17)
    coarse = 2 * torch.randn(queries, 3, 3, generator=rng) - 0.5
    output = Output(
        features=torch.zeros(queries, 2),
        masks=F.interpolate(coarse[None], size(2, 7), mode="bicubic")[0],
        padded_size=padded,
        image_size=(max(1, padded[0] - 2), max(1, padded[1] - 3)),
        original_size=size(1, 20),
    )
    return output, torch.rand(queries, 4, generator=rng).logit()


def resized(output: Output) -> np.ndarray:
    """(Q, H, W) sigmoid masks, one query at a time."""
    height, width = output.image_size
    masks = []
    for logits in output.masks:
        big = F.interpolate(logits[None, None], output.padded_size, mode="bilinear", align_corners=False)
        original = F.interpolate(big[:, :, :height, :width], output.original_size, mode="bilinear", align_corners=False)
        masks.append(original[0, 0].sigmoid().numpy())
    return np.stack(masks)


def slow_panoptic(
    output: Output, logits: Tensor, thresholds: Thresholds
) -> dict[frozenset[tuple[int, int]], tuple[int, float]]:
    """{pixels of the segment: (category, score)}."""
    masks = resized(output)
    candidates = []
    for query, probabilities in enumerate(logits.sigmoid().numpy()):
        lowered = [p - np.float32(thresholds.seen_offset * bool(s)) for p, s in zip(probabilities, SEEN, strict=True)]
        best = int(np.argmax(lowered))
        if probabilities[best] > thresholds.object_threshold:
            candidates.append((query, best, probabilities[best]))
    pixels: dict[int, set[tuple[int, int]]] = {query: set() for query, _, _ in candidates}
    height, width = output.original_size
    for y in range(height):
        for x in range(width):
            if candidates:
                query = max(candidates, key=lambda c: c[2] * masks[c[0], y, x])[0]
                if masks[query, y, x] >= 0.5:
                    pixels[query].add((y, x))
    things, stuff = [], {}
    for query, class_, score in candidates:
        own = int((masks[query] >= 0.5).sum())
        if not pixels[query] or len(pixels[query]) / own < thresholds.overlap_threshold:
            continue
        if ISTHING[class_]:
            things.append((frozenset(pixels[query]), (int(CATEGORY_IDS[class_]), float(score))))
        else:
            merged, highest = stuff.get(class_, (frozenset(), 0.0))
            stuff[class_] = merged | pixels[query], max(highest, float(score))
    return dict(things) | {area: (int(CATEGORY_IDS[c]), score) for c, (area, score) in stuff.items()}


def as_sets(ids: np.ndarray, segments: list[PredictedSegment]) -> dict[frozenset[tuple[int, int]], tuple[int, float]]:
    found = {}
    for segment in segments:
        area = frozenset((int(y), int(x)) for y, x in np.argwhere(ids == segment.id))
        found[area] = segment.category_id, segment.score
    assert len(found) == len(segments) == len(set(np.unique(ids)) - {0})
    return found


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    queries=st.integers(1, 8),
    object_threshold=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    overlap_threshold=st.sampled_from([0.0, 0.5, 0.8]),
    seen_offset=st.sampled_from([0.0, 0.2]),
    chunk=st.sampled_from([1, 500, 2**24]),
)
def test_panoptic_equals_the_slow_reference(
    seed: int, queries: int, object_threshold: float, overlap_threshold: float, seen_offset: float, chunk: int
) -> None:
    output, logits = draw(seed, queries)
    thresholds = Thresholds(
        object_threshold=object_threshold, overlap_threshold=overlap_threshold, seen_offset=seen_offset
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.inference.maps.CHUNK_ELEMENTS", chunk)
        ids, segments = panoptic_map(output, logits, CLASSES, thresholds)
        again = panoptic_map(output.kept(), logits, CLASSES, thresholds)
    assert ids.shape == output.original_size and ids.dtype == np.int32
    assert as_sets(ids, segments) == slow_panoptic(output, logits, thresholds)
    assert again[1] == segments and again[0].dtype == np.int32 and (again[0] == ids).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    queries=st.integers(1, 8),
    seen_offset=st.sampled_from([0.0, 0.3]),
    chunk=st.sampled_from([1, 500, 2**24]),
)
def test_semantic_equals_the_slow_reference(seed: int, queries: int, seen_offset: float, chunk: int) -> None:
    output, logits = draw(seed, queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.inference.maps.CHUNK_ELEMENTS", chunk)
        classes = semantic_map(output, logits, CLASSES, seen_offset=seen_offset)
        again = semantic_map(output.kept(), logits, CLASSES, seen_offset=seen_offset)
    assert (again == classes).all() and again.dtype == classes.dtype == np.int32
    assert classes.shape == output.original_size
    masks, probabilities = resized(output).astype(np.float64), logits.sigmoid().double().numpy()
    for (y, x), chosen in np.ndenumerate(classes):
        sums = [
            sum(probabilities[q, k] * masks[q, y, x] for q in range(queries)) - seen_offset * bool(SEEN[k])
            for k in range(4)
        ]
        assert sums[chosen] >= max(sums) - 1e-5


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), queries=st.integers(1, 8), chunk=st.sampled_from([1, 500, 2**24]))
def test_masks_and_areas_equal_the_slow_reference(seed: int, queries: int, chunk: int) -> None:
    """Whether they are kept or not, all of them or some, whatever the chunks; these move the last bit of a sigmoid."""
    output, _ = draw(seed, queries)
    some = torch.arange(queries)[seed % queries :]
    expected = resized(output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.inference.maps.CHUNK_ELEMENTS", chunk)
        for one in (output, output.kept()):
            np.testing.assert_allclose(one.probabilities().numpy(), expected, rtol=1e-6)
            parts = list(one.chunks(some))
            found = torch.cat([part for part, _ in parts]).numpy()
            np.testing.assert_allclose(found, expected[some.numpy()], rtol=1e-6)
            areas = [int(area) for _, own in parts for area in own]
            assert areas == (expected[some.numpy()] >= 0.5).sum((1, 2)).tolist()


def test_kept_masks_are_resized_once_and_others_only_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    resize = Output._resize
    monkeypatch.setattr(Output, "_resize", lambda self, logits: (counts.append(len(logits)), resize(self, logits))[1])
    output, logits = draw(0, 6)
    kept = output.kept()
    assert kept.kept() is kept and not counts  # lazily
    for one, expected in ((output, [4, 6, 4, 6]), (kept, [6])):
        counts.clear()
        for _ in range(2):
            panoptic_map(one, logits, CLASSES, _keeping(4, logits))
            semantic_map(one, logits, CLASSES)
        assert counts == expected


def _keeping(count: int, logits: Tensor) -> Thresholds:
    """The thresholds that keep the `count` best queries."""
    scores = logits.sigmoid().amax(1).sort(descending=True).values
    return Thresholds(object_threshold=float(scores[count]), overlap_threshold=0.0)


def predict(
    probabilities: Tensor,
    masks: Tensor,
    object_threshold: float = 0.5,
    overlap_threshold: float = 0.8,
    seen_offset: float = 0.0,
    **sizes: tuple[int, int],
) -> tuple[np.ndarray, list[PredictedSegment]]:
    """The map of class probabilities (Q, 4) and mask logits (Q, h, w)."""
    thresholds = Thresholds(
        object_threshold=object_threshold, overlap_threshold=overlap_threshold, seen_offset=seen_offset
    )
    return panoptic_map(sized(masks, **sizes), probabilities.logit(), CLASSES, thresholds)


def sized(masks: Tensor, **sizes: tuple[int, int]) -> Output:
    """An output whose sizes are those of `masks` but for `sizes`."""
    own = (masks.shape[1], masks.shape[2])
    every: dict[str, Any] = {"padded_size": own, "image_size": own, "original_size": own} | sizes
    return Output(features=torch.zeros(len(masks), 2), masks=masks, **every)


def one_hot(*classes: int, score: float = 0.9) -> Tensor:
    return score * F.one_hot(torch.tensor(classes), 4).float()


def columns(*spans: tuple[int, int]) -> Tensor:
    """(Q, 4, 10) logits of +-9: query q covers the columns of its span."""
    logits = torch.full((len(spans), 4, 10), -9.0)
    for query, (start, stop) in enumerate(spans):
        logits[query, :, start:stop] = 9
    return logits


def test_crop_comes_before_the_resize_to_the_original() -> None:
    """An 8 x 8 input of which 4 x 6 is image: the mask's left 3 columns are half of the image, not 3/8 of it."""
    logits = torch.full((1, 8, 8), -9.0)
    logits[0, :, :3] = 9
    ids, _ = predict(one_hot(0), logits, image_size=(4, 6), original_size=(40, 60))
    assert (ids[:, :29] == 1).all() and (ids[:, 31:] == 0).all()
    both = sized(torch.cat([logits, -logits]), image_size=(4, 6), original_size=(40, 60))
    classes = semantic_map(both, torch.cat([one_hot(0), one_hot(1, score=0.5)]).logit(), CLASSES)
    assert (classes[:, :28] == 0).all() and (classes[:, 32:] == 1).all()


def test_stuff_of_one_class_merges_and_things_do_not() -> None:
    logits = columns((0, 2), (2, 4), (4, 6), (6, 8))
    ids, segments = predict(torch.cat([one_hot(2, 1), one_hot(2, 1, score=0.95)]), logits)
    assert ids[0].tolist() == [1, 1, 2, 2, 1, 1, 3, 3, 0, 0]
    assert [(s.id, s.category_id) for s in segments] == [(1, 90), (2, 4), (3, 4)]
    assert [s.score for s in segments] == pytest.approx([0.95, 0.9, 0.95])


def test_object_threshold_is_exclusive() -> None:
    logits = columns((0, 5), (5, 10))
    ids, segments = predict(torch.cat([one_hot(0, score=0.5), one_hot(1, score=0.51)]), logits)
    assert [s.category_id for s in segments] == [4]
    assert ids[0].tolist() == [0] * 5 + [1] * 5
    ids, segments = predict(one_hot(0, 1, score=0.4), logits)
    assert segments == [] and not ids.any()


@pytest.mark.parametrize(("overlap_threshold", "kept"), [(0.6, True), (0.61, False)])
def test_overlapped_segments_are_dropped_to_void(overlap_threshold: float, kept: bool) -> None:
    """The second query keeps 3 of its 5 columns; the first, stronger one, covers the other two."""
    probabilities = torch.cat([one_hot(0), one_hot(1, score=0.8)])
    ids, segments = predict(probabilities, columns((0, 4), (2, 7)), overlap_threshold=overlap_threshold)
    assert len(segments) == 1 + kept
    assert ids[0].tolist() == [1] * 4 + [2 * kept] * 3 + [0] * 3


def test_seen_offset_moves_the_choice_but_not_the_score() -> None:
    probabilities = torch.tensor([[0.8, 0.7, 0.0, 0.0]])
    _, plain = predict(probabilities, columns((0, 5)))
    _, lowered = predict(probabilities, columns((0, 5)), seen_offset=0.2)
    assert [(s.category_id, round(s.score, 3)) for s in plain + lowered] == [(1, 0.8), (4, 0.7)]


def test_perfect_masks_give_perfect_pq() -> None:
    rng = np.random.default_rng(0)
    quality = PanopticQuality(CATEGORY_IDS.tolist())
    for image in range(5):
        gt_ids = rng.integers(0, 5, (6, 8)).repeat(8, 0).repeat(8, 1).astype(np.int32)  # 0 stays void
        present = np.unique(gt_ids[gt_ids > 0])
        gt = [Segment(id=int(i), category_id=int(CATEGORY_IDS[i - 1]), area=0, iscrowd=False) for i in present]
        logits = torch.stack([torch.from_numpy(np.where(gt_ids == i, 9.0, -9.0)) for i in present])
        ids, segments = predict(one_hot(*(present - 1).tolist()), logits)
        quality.update(gt_ids, gt, ids, segments, image=image)
    mean = quality.result().mean()
    assert (mean.pq, mean.absent) == (100, 0)
