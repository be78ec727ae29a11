"""The curves are the prediction at every setting, and at the headline's setting the headline itself."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from quarters import BENCHMARK, CLASSES, HEIGHT, WIDTH, quarters
from torch import Tensor

from pipeline.inference.maps import Output, Thresholds
from pipeline.scoring import sweeps as module
from pipeline.scoring.metrics import harmonic_mean
from pipeline.scoring.rows import GroundTruth, Row
from pipeline.scoring.sweeps import Sweeps
from storage.shards import Sample, decode_ids

STORED = Thresholds(object_threshold=0.35, overlap_threshold=0.5)
THRESHOLDS, OFFSETS = (0.1, 0.5, 0.8), (0.05, 0.2, 0.5)


def images(count: int) -> list[tuple[Sample, Output, Tensor]]:
    """The same truth under queries that wander, and hesitate between classes."""
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        shown, size = quarters(), (HEIGHT, WIDTH)
        ids = decode_ids(shown)
        masks = np.stack(
            [
                np.roll(np.where(ids == s.id, 3.0, -3.0), rng.integers(-3, 4, 2), (0, 1))
                for s in (*shown.segments, *shown.segments[:2])
            ]
        )
        output = Output(
            features=torch.zeros(7, 2), masks=torch.from_numpy(masks).float(), padded_size=size, image_size=size,
            original_size=size,
        )  # fmt: skip
        logits = torch.from_numpy(rng.normal(-0.5, 1.0, (7, 4)).astype(np.float32))
        for query, segment in enumerate(shown.segments):
            logits[query, BENCHMARK.index[segment.category_id]] += 1.0
        found.append((shown, output, logits))
    return found


def swept(
    shown: list[tuple[Sample, Output, Tensor]],
    thresholds: tuple[float, ...] = THRESHOLDS,
    offsets: tuple[float, ...] = OFFSETS,
) -> dict[str, list[dict[str, float]]]:
    curves = Sweeps(BENCHMARK, STORED, object_thresholds=thresholds, seen_offsets=offsets)
    for sample, output, logits in shown:
        curves.update(GroundTruth(sample, BENCHMARK), output, logits, CLASSES)
    return asdict(curves.curves())


def at(shown: list[tuple[Sample, Output, Tensor]], **change: float) -> dict[str, float]:
    """One setting's prediction, the usual way."""
    row, thresholds = Row(BENCHMARK), replace(STORED, **change)
    for sample, output, logits in shown:
        row.predict(GroundTruth(sample, BENCHMARK), output, logits, CLASSES, thresholds)
    scores = asdict(row.scores())
    return {key: scores[key] for key in ("sPQ", "uPQ", "hPQ")}


def test_every_point_is_the_prediction_there() -> None:
    shown = images(12)
    curves = swept(shown)
    assert {name: [point["value"] for point in curve] for name, curve in curves.items()} == {
        "object_threshold": [0.1, 0.35, 0.5, 0.8],  # with the stored one
        "seen_offset": [0.0, 0.05, 0.2, 0.5],  # with none
    }
    points = 0
    for name, curve in curves.items():
        for point in curve:
            assert point == at(shown, **{name: point["value"]}) | {"value": point["value"]}  # to the last bit
            assert point["hPQ"] == harmonic_mean(point["sPQ"], point["uPQ"])
            points += 1
    assert points == 8
    assert curves["object_threshold"][1] == curves["seen_offset"][0] | {"value": 0.35}
    for curve in curves.values():
        assert len({point["uPQ"] for point in curve}) >= 3  # the settings matter here


def test_equal_decisions_are_made_once(monkeypatch: Any) -> None:
    """Certain queries decide the same at all settings but the highest threshold: two maps, not eight."""
    calls = []
    merge = module.merge

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return merge(*args, **kwargs)

    monkeypatch.setattr(module, "merge", counted)
    ((shown, output, _),) = images(1)
    logits = torch.full((7, 4), -9.0)
    for query, segment in enumerate(shown.segments):
        logits[query, BENCHMARK.index[segment.category_id]] = 1.0  # scores 0.73
    swept([(shown, output, logits)])
    assert len(calls) == 2


def test_other_queries_of_the_same_class_are_another_decision() -> None:
    """Over 0.5 only the first query is kept, as a cat; with an offset of 0.4 it is a sky, too weak, and the second is
    a cat."""
    ((shown, output, _),) = images(1)
    probabilities = torch.full((7, 4), 1e-6)
    probabilities[0] = torch.tensor([0.6, 1e-6, 0.3, 1e-6])
    probabilities[1] = torch.tensor([0.45, 1e-6, 1e-6, 1e-6])
    sample = [(shown, output, probabilities.logit())]
    output.masks[1, 9:] = -3.0  # a worse mask than the first query's
    curves = swept(sample, (0.5,), (0.4,))
    high, offset = curves["object_threshold"][1], curves["seen_offset"][1]
    assert high == at(sample, object_threshold=0.5) | {"value": 0.5}
    assert offset == at(sample, seen_offset=0.4) | {"value": 0.4}
    assert high["sPQ"] != offset["sPQ"]
