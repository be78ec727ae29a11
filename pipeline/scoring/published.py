"""A run's numbers beside those that the method's paper reports for the same benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.data.benchmarks import Benchmark
from pipeline.scoring.records import Published, Scores

RESULTS = Path(__file__).parent / "paper_results.json"
Beyond = Literal["regions", "protocol"]
# what a run has that the paper's have not -> why its numbers do not stand beside the paper's
REASONS: Mapping[Beyond, str] = {
    "regions": "stage 1 learned from regions that nobody labelled",
    "protocol": "the training images are of another protocol than the paper's",
}


def beside_the_paper(
    benchmark: str, rows: Mapping[str, Scores], *, images: int, marks: Sequence[str], beyond: Sequence[Beyond] = ()
) -> Published | None:
    """The paper's table for `benchmark` and our rows in its columns; None where the paper has none.

    Our numbers stand there only if they are comparable: every image of the benchmark's validation set was scored, with
    a real teacher, and nothing is beyond the paper. Else our rows are blank (None) and `note` names what was not measured.

    Args:
        benchmark: its name, such as "coco-panoptic-zps".
        rows: the report's rows, "inductive" and "transductive" among them.
        images: how many validation images were scored.
        marks: warnings of the teacher.
        beyond: what the training had that the paper's has not.

    Returns:
        the table with its name in the paper; numbers in percent; `note` is empty where ours are filled.
    """
    table = json.loads(RESULTS.read_text(encoding="utf-8")).get(benchmark)
    if table is None:
        return None
    reasons = []
    if images != table["images"]:
        reasons.append(
            f"{images:,} validation images were scored, and the paper's numbers are of all {table['images']:,}"
        )
    if marks:
        reasons.append("the teacher is a stand-in that knows nothing of these classes")
    reasons += [REASONS[one] for one in beyond]
    note = f"This run's row is blank: {'; '.join(reasons)}." if reasons else ""
    return Published(
        table=table["table"],
        columns=table["columns"],
        published=table["rows"],
        ours={
            name: [None if reasons else getattr(rows[row], score) for row, score in cells]
            for name, cells in table["ours"].items()
        },
        note=note,
    )


def outlines(beyond: Sequence[Beyond]) -> list[str]:
    """What stands before any number of a run with candidate regions."""
    return ["BEYOND THE PAPER: stage 1 used the outlines of what has no label in its images, as regions without a class. "
            "No label, and no name of an unseen class, was used."] * ("regions" in beyond)  # fmt: skip


def marks(teacher: Mapping[str, Any], benchmark: Benchmark) -> list[str]:
    """Warnings that stand before any number: a teacher that was not trained on these classes."""
    if teacher["pretrained"] == "random":
        return [
            "The teacher has RANDOM weights: every number here is noise, "
            "a proof that the pipeline runs and nothing else."
        ]
    if teacher["name"] == "small" and benchmark.name not in ("scenes-test", "scenes-validation"):
        return [
            "STAND-IN TEACHER: the small CLIP that ships with the package was trained on generated scenes and knows "
            "nothing of these classes. These numbers prove that the pipeline runs on these files, and nothing about "
            "the method."
        ]
    return []
