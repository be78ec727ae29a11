"""Where quality is lost: every kind of fault lands in its own row, and the rows add up to what is missing."""

from __future__ import annotations

from dataclasses import asdict
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quarters import BENCHMARK, CLASSES, HEIGHT, THRESHOLDS, WIDTH, perfect, quarters, sample
from torch import Tensor

from pipeline.inference.maps import Output
from pipeline.scoring.rows import GroundTruth, Row
from pipeline.scoring.waterfall import LOSSES, Pairs, Waterfall, pair
from storage.shards import Sample, decode_ids

CAT, DOG, SKY, SEA = range(4)


def waterfall(shown: Sample, output: Output, logits: Tensor) -> dict[str, Any]:
    """The loss table of one image."""
    result, gt, output = Waterfall(BENCHMARK), GroundTruth(shown, BENCHMARK), output.kept()
    pairs = paired(shown, output)
    masks, actual = Row(BENCHMARK), Row(BENCHMARK)
    masks.predict(gt, output, pairs.certain(pairs.classes, logits), CLASSES, THRESHOLDS)
    actual.predict(gt, output, logits, CLASSES, THRESHOLDS)
    result.update(gt, output, pairs, logits, CLASSES, THRESHOLDS)
    assert masks.quality is not None and actual.quality is not None
    return asdict(result.result(true_classes=masks.quality.result(), actual=actual.quality.result()))


def paired(shown: Sample, output: Output) -> Pairs:
    return pair(GroundTruth(shown, BENCHMARK), output)


def losses(shown: Sample, output: Output, logits: Tensor) -> dict[str, tuple[float, float]]:
    """(seen, unseen) points of each loss that is not zero."""
    found = waterfall(shown, output, logits)["losses"]
    assert tuple(found) == LOSSES
    return {name: (loss["sPQ"], loss["uPQ"]) for name, loss in found.items() if any(loss.values())}


def say(logits: Tensor, query: int, *classes: tuple[int, float]) -> Tensor:
    """The query's logits: -20 but for those classes."""
    logits[query] = -20.0
    for class_, value in classes:
        logits[query, class_] = value
    return logits


# ------------------------------------------------------------------------------------------------ one fault at a time


def test_perfect_queries_lose_nothing() -> None:
    assert losses(quarters(), *perfect(quarters())) == {}


def test_only_masks_wrong() -> None:
    """The dog's mask covers 5 of its 12 rows: no match, so of dog and sky one is left."""
    output, logits = perfect(quarters())
    output.masks[2, 17:] = -20.0
    assert losses(quarters(), output, logits) == {"masks": (0, 50)}


def test_only_a_class_wrong_within_its_group() -> None:
    """The sea is called a cat, both are seen: cat has 2 of 2 and a false alarm (PQ 2 / 2.5), sea 0; (80 + 0) / 2 are
    left."""
    output, logits = perfect(quarters())
    assert losses(quarters(), output, say(logits, 4, (CAT, 20.0))) == {"classification": pytest.approx((60, 0))}


def test_only_seen_bias() -> None:
    """The dog is a cat rather than a dog, but a dog rather than a sky: dog 0 of 100, cat 2 of 2 and a false alarm."""
    output, logits = perfect(quarters())
    logits = say(logits, 2, (CAT, 5.0), (DOG, 4.0), (SKY, 3.0))
    assert losses(quarters(), output, logits) == {"seen_bias": pytest.approx((10, 50))}
    right = waterfall(quarters(), output, logits)["named_right"]
    assert right["unseen"] == {"segments": 2, "within_group": 100.0, "over_all": 50.0}
    assert right["seen"] == {"segments": 3, "within_group": 100.0, "over_all": 100.0}


def test_only_the_threshold() -> None:
    """The sky's query is right, but scores 0.27, under the threshold of 0.3."""
    output, logits = perfect(quarters())
    assert losses(quarters(), output, say(logits, 3, (SKY, -1.0))) == {"selection": (0, 50)}


def test_a_spurious_winner_is_selection() -> None:
    """A spare query with the dog's mask calls it a cat and scores higher than the dog's own."""
    output, logits = perfect(quarters())
    output.masks[5] = output.masks[2]
    logits = say(say(logits, 2, (DOG, 1.0)), 5, (CAT, 3.0))
    assert losses(quarters(), output, logits) == {"selection": pytest.approx((10, 50))}


def test_absent_classes_are_no_fault() -> None:
    ids = decode_ids(quarters()).copy()
    ids[ids == 104] = 0  # the only sky
    shown = sample(ids, {s.id: s.category_id for s in quarters().segments if s.id != 104})
    assert losses(shown, *perfect(shown)) == {"absent": (0, 50)}


def test_a_gain_is_negative() -> None:
    """Two queries of one mask, the dog's: the paired one is wrong, the other is right and scores higher."""
    output, logits = perfect(quarters())
    output.masks[5] = output.masks[2] - 1.0
    output.masks[5, 12, 0] = -20.0  # so the dog's own fits better
    found = losses(quarters(), output, say(say(logits, 2, (SKY, -3.0)), 5, (DOG, 20.0)))
    assert found["classification"][1] > 0 > found["selection"][1]
    assert sum(unseen for _, unseen in found.values()) == pytest.approx(100 * (1 - 239 / 240) / 2)


# ------------------------------------------------------------------------------------------------ the whole


def random_case(seed: int, queries: int) -> tuple[Sample, Output, Tensor]:
    """Random blocks, some void, a crowd now and then, and queries that roughly follow some of them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 7, (3, 4)).repeat(HEIGHT // 3, 0).repeat(WIDTH // 4, 1).astype(np.int32)
    present = [int(i) for i in np.unique(ids) if i]
    categories = {i: int(rng.choice([7, 3, 20, 5])) for i in present}
    shown = sample(ids, categories, {i for i in present if rng.random() < 0.2})
    masks = torch.from_numpy(rng.normal(-2, 1, (queries, HEIGHT, WIDTH)).astype(np.float32))
    for query in range(queries):
        if present and rng.random() < 0.8:
            masks[query] += torch.from_numpy(4 * np.roll(ids == rng.choice(present), rng.integers(-4, 5, 2), (0, 1)))
    size = (HEIGHT, WIDTH)
    output = Output(
        features=torch.zeros(queries, 2), masks=masks, padded_size=size, image_size=size, original_size=size
    )
    return shown, output, torch.from_numpy(rng.normal(0, 2, (queries, 4)).astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), queries=st.integers(1, 8))
def test_the_losses_add_up(seed: int, queries: int) -> None:
    shown, output, logits = random_case(seed, queries)
    found = waterfall(shown, output, logits)
    row = Row(BENCHMARK)
    row.predict(GroundTruth(shown, BENCHMARK), output, logits, CLASSES, THRESHOLDS)
    scores = asdict(row.scores())
    for key in ("sPQ", "uPQ"):
        assert sum(loss[key] for loss in found["losses"].values()) == pytest.approx(100 - scores[key], abs=1e-9)
        assert found["levels"]["selection"][key] == scores[key]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), queries=st.integers(1, 5))
def test_pairs_are_the_best_there_are(seed: int, queries: int) -> None:
    """Every possible assignment, pixel sets, and the rule that void counts in no union."""
    shown, output, _ = random_case(seed, queries)
    pairs, ids = paired(shown, output), decode_ids(shown)
    segments = [s for s in shown.segments if not s.iscrowd][:5]
    if len(segments) < len([s for s in shown.segments if not s.iscrowd]):
        return
    assert [shown.segments[i] for i in pairs.segments] == segments
    masks = output.masks.sigmoid().numpy() >= 0.5

    def iou(segment: int, query: int) -> float:
        truth, guess = ids == segments[segment].id, masks[query] & (ids != 0)
        return float((truth & guess).sum() / (truth | guess).sum())

    places = [*range(queries), *[None] * len(segments)]
    best = max(
        sum(iou(s, q) for s, q in enumerate(choice) if q is not None)
        for choice in set(permutations(places, len(segments)))
    )
    taken = [int(q) for q in pairs.query if q >= 0]
    assert len(set(taken)) == len(taken)
    assert sum(iou(s, q) for s, q in enumerate(pairs.query) if q >= 0) == pytest.approx(best)
    assert all(iou(s, q) > 0 for s, q in enumerate(pairs.query) if q >= 0)
    probabilities = output.masks.sigmoid().double().numpy()
    for position, (query, nearest) in enumerate(zip(pairs.query, pairs.nearest, strict=True)):
        inside = probabilities[:, ids == segments[position].id].sum(1)
        assert nearest == query if query >= 0 else inside[nearest] == pytest.approx(inside.max())


def test_spilling_into_void_costs_a_query_nothing() -> None:
    """The spare query covers 11 rows of the dog; the dog's own covers it all and much void, and is the better one."""
    ids = decode_ids(quarters()).copy()
    ids[:, 20:] = 0
    shown = sample(ids, {101: 7, 103: 3})
    output, _ = perfect(shown)
    output.masks[2] = output.masks[1]
    output.masks[2, 23] = -20.0
    output.masks[1, :, 20:] = 20.0
    assert paired(shown, output).query.tolist() == [0, 1]


def test_a_segment_without_any_overlap_has_no_query() -> None:
    """As many queries as segments, but one of them lies nowhere: it is not the sea's, which is named by the likeliest
    query."""
    output, logits = perfect(quarters(), spare=0)
    output.masks[4] = -20.0
    output.masks[1, 12:, 30:] = -1.0  # the second cat comes nearest to the sea
    pairs = paired(quarters(), output)
    assert pairs.query.tolist() == [0, 1, 2, 3, -1] and pairs.nearest.tolist() == [0, 1, 2, 3, 1]
    assert losses(quarters(), output, logits) == {"masks": (50, 0)}


def test_an_image_of_crowds_only() -> None:
    shown = quarters(crowds={101, 102, 103, 104, 105})
    assert len(paired(shown, perfect(shown)[0]).segments) == 0
    assert losses(shown, *perfect(shown)) == {"absent": (100, 100)}
