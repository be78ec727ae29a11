"""The report's files: complete, self-contained, escaped, and with pictures whose pixels mean what they say."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.benchmarks import Category
from pipeline.metrics import ConfusionMatrix, PanopticQuality, PredictedSegment, class_map, scores
from pipeline.pictures import UNSEEN, Picture
from pipeline.report import _spread, console_table, publish, write_report
from storage.shards import Segment

CATEGORIES = (
    Category(id=1, name="red circle", isthing=True),
    Category(id=2, name="<b>&star", isthing=True),
    Category(id=3, name="fog", isthing=False),
)
SEEN = (True, False, True)
# Truth: a circle (1), a star (2) and fog (3) around them, a void column at the right.
IDS = np.full((12, 12), 3, np.int32)
IDS[1:5, 1:5], IDS[6:11, 4:10], IDS[:, 11] = 1, 2, 0


def result(*category_ids: int) -> dict[str, Any]:
    """True masks under the given names."""
    gt = [Segment(id=i, category_id=i, area=0, iscrowd=False) for i in (1, 2, 3)]
    found = [PredictedSegment(id=i, category_id=c, score=1.0) for i, c in zip((1, 2, 3), category_ids, strict=True)]
    quality, confusion = PanopticQuality([1, 2, 3]), ConfusionMatrix(3)
    quality.update(IDS, gt, IDS, found, image=1)
    index = {1: 0, 2: 1, 3: 2}
    truth, guess = (class_map(IDS, segments, index, image=1) for segments in (gt, found))
    confusion.update(truth, np.maximum(guess, 0), image=1)
    return scores(quality.result(), confusion, categories=CATEGORIES, seen=SEEN)


def overlay(*names: str) -> tuple[np.ndarray, dict[int, tuple[str, bool]]]:
    seen = {c.name: s for c, s in zip(CATEGORIES, SEEN, strict=True)}
    return IDS, {i: (name, seen[name]) for i, name in enumerate(names, start=1)}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return {
        "benchmark": "tiny <world>",
        "marks": ["stand-in teacher", "random weights"],
        "inductive": result(1, 1, 3),
        "control": result(1, 1, 3),
        "transductive": result(1, 2, 3),
        "ceiling": result(1, 2, 3),
        "teacher_accuracy": {"seen": 97.25, "unseen": 66.6, "instances": 1234},
        "settings": {"object_threshold": 0.1},
    }


@pytest.fixture(scope="module")
def folder(report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    picture = Picture(
        image=np.full((12, 12, 3), 90, np.uint8),
        ground_truth=overlay("red circle", "<b>&star", "fog"),
        inductive=overlay("red circle", "red circle", "fog"),
        transductive=overlay("red circle", "<b>&star", "fog"),
    )
    rows = [{"step": s, "total": 3 / s, "mmd": 2 / s, "diversity": 1e-3 / s, "lr": 0.1} for s in (10, 20, 30)]
    write_report(path, report, curves={"v2c": rows, "g2s": rows[:1], "cpa": []}, pictures=[picture])
    return path


class Page(HTMLParser):
    """Tags with attributes, and the text of every table row as its list of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def masks(folder: Path) -> list[np.ndarray]:
    """The three RGBA overlays of the picture row."""
    urls = [attrs["href"] for tag, attrs in page(folder).tags if tag == "image"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(str(url).split(",")[1])))) for url in urls]


def test_json_holds_the_report(folder: Path, report: dict[str, Any]) -> None:
    assert json.loads((folder / "report.json").read_text()) == report


def test_nan_is_refused(tmp_path: Path, report: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path, report | {"settings": {"x": float("nan")}}, curves={}, pictures=[])
    assert not list(tmp_path.iterdir())


def test_page_stands_alone(folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    outside = [
        value
        for _, attrs in page(folder).tags
        for name, value in attrs.items()
        if name in ("src", "href", "srcset", "data") and not str(value).startswith("data:image/")
    ]
    assert outside == []
    assert all(url.startswith("data:image/") for url in re.findall(r"url\(\s*([^)]{0,30})", html))
    assert "http" not in html and "@import" not in html and "<link" not in html


def test_names_are_escaped_and_marks_shown(folder: Path) -> None:
    parsed = page(folder)
    assert sum(tag == "b" for tag, _ in parsed.tags) == 2  # the page's own, in the line about the teacher
    assert parsed.text.count("<b>&star") >= 3  # class table, ground truth, transductive
    assert "tiny <world>" in parsed.text
    assert "stand-in teacher" in parsed.text and "random weights" in parsed.text


def test_headline_and_teacher(folder: Path) -> None:
    """Inductive: circle 1 TP 1 FP = 66.7, fog 100, star 0; transductive: everything right."""
    rows = {row[0].split("unseen names")[0]: row[1:] for row in page(folder).rows if len(row) == 12}
    assert rows["inductive"][:3] == ["83.3", "0.0", "0.0"]
    assert rows["transductive"] == ["100.0"] * 11
    text = page(folder).text
    assert "97.2 %" in text and "66.6 %" in text and "1,234 instances" in text


def test_class_rows(folder: Path) -> None:
    rows = [row for row in page(folder).rows if len(row) == 15]
    assert rows[1] == ["<b>&star unseen", "thing", "0.0", "0.0", "100.0", "100.0", "0.0", "0.0"] + (
        ["100.0"] * 4 + ["1", "0", "0"]
    )  # the unseen class first
    assert [row[0] for row in rows[2:]] == ["red circle", "fog"]


def test_one_plot_for_each_stage_that_trained(folder: Path) -> None:
    assert [attrs["alt"] for tag, attrs in page(folder).tags if tag == "img"] == ["losses of v2c", "losses of g2s"]


def test_learning_rate_is_not_drawn(report: dict[str, Any], tmp_path: Path) -> None:
    pages = []
    for extra in ({}, {"lr": 0.1}, {"mmd": 0.1}):
        write_report(tmp_path, report, curves={"g2s": [{"step": 10, "total": 1.0} | extra]}, pictures=[])
        pages.append((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert pages[0] == pages[1] != pages[2]


def test_overlays(folder: Path) -> None:
    truth, inductive, transductive = masks(folder)
    unseen = [int(UNSEEN[i : i + 2], 16) for i in (1, 3, 5)] + [255]
    assert truth.shape == (480, 480, 4)  # 12 pixels, 40 times larger
    assert (truth[:, 442:, 3] == 0).all()  # the void column
    circle, star = (slice(100, 140),) * 2, (slice(320, 360), slice(260, 300))
    assert len(np.unique(truth[circle].reshape(-1, 4), axis=0)) == 1
    assert (truth[circle] == inductive[circle]).all() and (truth[circle] == transductive[circle]).all()
    assert (inductive[star] == inductive[circle]).all()  # called a circle
    assert (truth[star] != truth[circle]).any() and (truth[star] == transductive[star]).all()
    assert truth[300, 163].tolist() == unseen  # inside the star's left edge at x = 160
    assert not (inductive == unseen).all(-1).any()  # no unseen name there


def test_publish_adds_the_run(folder: Path, report: dict[str, Any], tmp_path: Path) -> None:
    lineage = {"v2c": {"ref": "checkpoint/0123456789abcdef", "seconds": 75.0}}
    publish(folder, tmp_path / "runs" / "demo", preset="demo", lineage=lineage)
    publish(folder, tmp_path / "runs" / "demo", preset="demo", lineage=lineage)
    content = json.loads((tmp_path / "runs" / "demo" / "report.json").read_text())
    assert content == report | {"preset": "demo", "lineage": lineage}
    parsed = page(tmp_path / "runs" / "demo")
    assert "preset demo" in parsed.text
    assert ["v2c", "checkpoint/0123456789abcdef", "1 min 15 s"] in [row[:3] for row in parsed.rows]


def test_console_table(report: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120)
    console.print(console_table(report))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    lines = {name: next(line for line in text.splitlines() if f" {name} " in line) for name in ("inductive", "ceiling")}
    assert re.findall(r"\d+\.\d", lines["inductive"])[:3] == ["83.3", "0.0", "0.0"]
    assert re.findall(r"\d+\.\d", lines["ceiling"]) == ["100.0"] * 6
    assert "stand-in teacher; random weights" in text


@given(st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=11))
def test_line_names_do_not_overlap(heights: list[float]) -> None:
    moved = _spread(heights, gap=0.085)
    ordered = sorted(moved)
    assert all(b - a >= 0.085 - 1e-9 for a, b in pairwise(ordered))
    assert ordered[-1] <= 1 + 1e-9
    order = np.argsort(heights, kind="stable")
    assert (np.diff(np.array(moved)[order]) > 0).all() or len(set(heights)) < len(heights)


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = "import sys, pipeline.report; sys.exit(any(m in sys.modules for m in ('matplotlib', 'torch', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1]).returncode == 0
