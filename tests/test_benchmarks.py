"""Benchmarks: the published split is what the paper says; a file at odds with itself is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks import Benchmark, Category, load_benchmark


def test_the_coco_panoptic_split() -> None:
    benchmark = load_benchmark("coco-panoptic-zps")
    assert benchmark.name == "coco-panoptic-zps"
    assert benchmark.protocol == "image-filter"
    assert len(benchmark.categories) == 133
    assert sum(category.isthing for category in benchmark.categories) == 80
    assert (sum(benchmark.seen), benchmark.seen.count(False)) == (119, 14)
    unseen = {name for name, seen in zip(benchmark.names, benchmark.seen, strict=True) if not seen}
    assert {"giraffe", "cow", "grass-merged"} <= unseen and "person" not in unseen
    for position, category in enumerate(benchmark.categories):
        assert benchmark.index[category.id] == position
    assert [category.id for category in benchmark.categories] == sorted(benchmark.index)


FILE: dict[str, Any] = {
    "categories": [{"id": 7, "name": "star", "isthing": 1}, {"id": 2, "name": "fog", "isthing": 0}],
    "unseen_ids": [2],
    "unseen_names": ["fog"],
    "protocol": "none: explained",
}


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(FILE))
    assert load_benchmark(str(path)) == Benchmark(
        name="mine",
        categories=(Category(id=7, name="star", isthing=True), Category(id=2, name="fog", isthing=False)),
        unseen_ids=(2,),
        protocol="none",
    )
    assert load_benchmark(str(path)).seen == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(protocol="maybe"), "protocol 'maybe' is unknown"),
        (lambda f: f.update(protocol="pixel-ignore: x"), "protocol 'pixel-ignore' is not implemented in training yet"),
        (lambda f: f.update(unseen_ids=[3]), r"unseen_ids \[3\] are no category ids"),
        (lambda f: f.update(unseen_ids=[2, 2]), "unseen id 2 is listed twice"),
        (lambda f: f.update(unseen_names=["star"]), "unseen_names are not the names"),
        (lambda f: f.update(categories=[]), "categories is empty"),
        (lambda f: f["categories"].append({"id": 7, "name": "x", "isthing": 1}), "category id 7 is listed twice"),
        (
            lambda f: f["categories"].append({"id": 8, "name": "star", "isthing": 1}),
            "category name 'star' is listed twice",
        ),
        (lambda f: f["categories"][0].pop("isthing"), "'isthing' is missing"),
        (lambda f: f.pop("unseen_ids"), "'unseen_ids' is missing"),
        (lambda f: f.update(categories=3), "missing or malformed"),
        (lambda f: f.update(protocol=3), "missing or malformed"),
    ],
)
def test_a_file_at_odds_with_itself(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    data = json.loads(json.dumps(FILE))
    change(data)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as caught:
        load_benchmark(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_and_broken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'coco-zps' not found; use one of .*coco-panoptic-zps"):
        load_benchmark("coco-zps")
    with pytest.raises(ValueError, match="not found"):
        load_benchmark(str(tmp_path / "mine.json"))
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        load_benchmark(str(tmp_path / "mine.json"))
