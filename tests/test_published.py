"""Beside the paper: our row is filled only with what was measured as the paper measured, and never with its numbers."""

from __future__ import annotations

from typing import Any

import pytest
from reports import panoptic_scores

from pipeline.data.benchmarks import SPLITS, load_benchmark
from pipeline.scoring.published import RESULTS, beside_the_paper

KEYS = "sPQ", "uPQ", "hPQ", "sIoU", "uIoU", "hIoU"
OURS = {
    row: panoptic_scores(**{key: 1000.0 * place + number for number, key in enumerate(KEYS)})
    for place, row in enumerate(("inductive", "transductive"), start=1)
}
FULL: dict[str, Any] = {"images": 5000, "marks": []}


def test_a_full_run_fills_its_row() -> None:
    table = beside_the_paper("coco-panoptic-zps", OURS, **FULL)
    assert table is not None
    assert table.columns == ["inductive hPQ", "sPQ", "uPQ", "transductive hPQ", "sPQ", "uPQ"]
    assert table.published["the paper"] == [20.8, 40.5, 14.0, 27.5, 39.2, 21.2]
    assert table.ours == {"this run": [1002, 1000, 1001, 2002, 2000, 2001]}
    assert table.note == ""
    semantic = beside_the_paper("coco-stuff-zss", OURS, **FULL)
    assert semantic is not None
    assert semantic.columns == ["hIoU", "sIoU", "uIoU"]
    assert semantic.published["the paper, R101c"] == [41.4, 42.4, 40.5]
    assert semantic.ours == {
        "this run, inductive": [1005, 1003, 1004],
        "this run, transductive": [2005, 2003, 2004],
    }


@pytest.mark.parametrize("benchmark", ["coco-panoptic-zps", "coco-stuff-zss"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": 4999}, "4,999 validation images were scored, and the paper's numbers are of all 5,000"),
        ({"marks": ["STAND-IN TEACHER"]}, "stand-in"),
        ({"beyond": ["regions"]}, "stage 1 learned from regions that nobody labelled"),
        ({"beyond": ["protocol"]}, "the training images are of another protocol than the paper's"),
    ],
)
def test_anything_less_stays_blank_and_says_why(benchmark: str, change: dict[str, Any], reason: str) -> None:
    table = beside_the_paper(benchmark, OURS, **(FULL | change))
    assert table is not None
    assert all(value is None for values in table.ours.values() for value in values)
    assert reason in table.note
    full = beside_the_paper(benchmark, OURS, **FULL)
    assert full is not None and table.published == full.published


def test_every_row_fits_its_columns() -> None:
    for benchmark in ("coco-panoptic-zps", "coco-stuff-zss"):
        table = beside_the_paper(benchmark, OURS, **FULL)
        assert table is not None
        for values in [*table.published.values(), *table.ours.values()]:
            assert len(values) == len(table.columns)


def test_other_benchmarks_have_no_table_and_the_results_are_no_benchmark() -> None:
    assert beside_the_paper("scenes-test", OURS, **FULL) is None
    assert RESULTS.is_file() and RESULTS not in set(SPLITS.glob("*.json"))
    with pytest.raises(ValueError, match="not found"):
        load_benchmark("paper-results")
