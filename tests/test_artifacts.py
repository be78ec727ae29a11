"""What Prefect's pages show of a report: its headline, and its preview picture."""

from __future__ import annotations

import base64
from pathlib import Path

from reports import panoptic_scores, report

from flows.artifacts import preview, score_rows, summary
from pipeline.report.page import SETTINGS


def test_scores_are_the_headline_a_row_a_setting() -> None:
    rows = score_rows(
        report({"control": panoptic_scores(sPQ=61.25, uPQ=30.04, hPQ=40.0, sIoU=1, uIoU=2, hIoU=3, PQ=9)})
    )
    assert [row["percent"] for row in rows] == [setting.name for setting in SETTINGS.values()]
    assert rows[1] == {
        "percent": "inductive + offset",
        "sPQ": "61.2", "uPQ": "30.0", "hPQ": "40.0", "sIoU": "1.0", "uIoU": "2.0", "hIoU": "3.0",
    }  # fmt: skip


def test_the_preview_is_the_reports_own_file(tmp_path: Path) -> None:
    assert preview(tmp_path) == ""
    (tmp_path / "preview.jpg").write_bytes(b"a picture")
    text, image = preview(tmp_path).split("\n\n")
    assert text.startswith("image, ground truth, inductive, transductive")
    assert image == f"![{text}](data:image/jpeg;base64,{base64.b64encode(b'a picture').decode()})"


def test_the_summary_counts_and_names_cached_and_built_stages() -> None:
    assert summary({"shard": "cached", "text": "cached", "v2c": "built"}) == (
        "3 stages: 2 cached (shard, text), 1 built (v2c)"
    )
    assert summary({"v2c": "built"}) == "1 stage: 0 cached, 1 built (v2c)"
