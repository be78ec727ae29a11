"""The report's files: complete, self-contained, escaped, and with pictures whose pixels mean what they say."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import reports
from browser import chromium
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor
from reports import losses

from pipeline.data.benchmarks import Category
from pipeline.inference.maps import PredictedSegment
from pipeline.report.overlay import UNSEEN, Label
from pipeline.report.page import SETTINGS
from pipeline.report.pictures import TITLES, Picture, sheet
from pipeline.report.plots import loss_plot, spread
from pipeline.report.write import console_table, publish, write_report
from pipeline.scoring.metrics import ConfusionMatrix, PanopticQuality, class_map, scores, semantic_scores
from pipeline.scoring.published import beside_the_paper
from pipeline.scoring.records import (
    CHECKPOINTS,
    ROWS,
    TEACHER_ROWS,
    Built,
    PanopticScores,
    Report,
    Settings,
    read_report,
)
from storage.errors import UserError
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


def result(*category_ids: int) -> PanopticScores:
    """True masks under the given names."""
    gt = [Segment(id=i, category_id=i, area=0, iscrowd=False) for i in (1, 2, 3)]
    found = [PredictedSegment(id=i, category_id=c, score=1.0) for i, c in zip((1, 2, 3), category_ids, strict=True)]
    quality, confusion = PanopticQuality([1, 2, 3]), ConfusionMatrix(3)
    quality.update(IDS, gt, IDS, found, image=1)
    index = {1: 0, 2: 1, 3: 2}
    truth, guess = (class_map(IDS, segments, index, image=1) for segments in (gt, found))
    confusion.update(truth, np.maximum(guess, 0), image=1)
    return scores(quality.result(), confusion, categories=CATEGORIES, seen=SEEN)


def labelled(*names: str) -> tuple[np.ndarray, dict[int, Label]]:
    seen = {c.name: s for c, s in zip(CATEGORIES, SEEN, strict=True)}
    return IDS, {i: Label(name, None, seen[name]) for i, name in enumerate(names, start=1)}


PICTURE = Picture(
    image=np.full((12, 12, 3), 90, np.uint8),
    ground_truth=labelled("red circle", "<b>&star", "fog"),
    inductive=labelled("red circle", "red circle", "fog"),
    transductive=labelled("red circle", "<b>&star", "fog"),
)


@pytest.fixture(scope="module")
def report() -> Report:
    wrong, right = result(1, 1, 3), result(1, 2, 3)
    rows = {name: wrong if name in ("inductive", "control", "true_masks_inductive") else right for name in ROWS}
    lost = {"inductive": losses(masks=(10.0, 20.0), seen_bias=(-2.5, 43.21))}
    lost |= {name: losses() for name in ("transductive", *TEACHER_ROWS)}
    return reports.report(rows, marks=["stand-in teacher", "random weights"], losses=lost)


@pytest.fixture(scope="module")
def folder(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    rows = [{"step": s, "total": 3 / s, "mmd": 2 / s, "diversity": 1e-3 / s, "lr": 0.1} for s in (10, 20, 30)]
    write_report(path, report, curves={"v2c": rows, "g2s": rows[:1], "cpa": []}, pictures=[PICTURE] * 5)
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


def test_json_holds_the_report(folder: Path, report: Report) -> None:
    """All of it: the record comes back, and every number stands in the file under its name."""
    assert read_report(folder / "report.json") == report
    content = json.loads((folder / "report.json").read_text())
    assert list(content) == [
        "benchmark", "marks", *ROWS, "losses", "sweeps", "left_out", "teacher_accuracy", "published", "settings",
    ]  # fmt: skip
    row = report.rows["inductive"]
    assert isinstance(row, PanopticScores)
    assert (
        content["inductive"]["uPQ"] == row.uPQ
        and content["inductive"]["per_class"][1]["fn"] == row.per_class[1].fn == 1
    )
    assert content["losses"]["inductive"]["losses"]["seen_bias"] == {"sPQ": -2.5, "uPQ": 43.21}
    assert content["losses"]["inductive"]["named_right"]["unseen"]["over_all"] == 36.5
    assert content["sweeps"]["transductive"]["seen_offset"][1] == {"value": 0.1, "sPQ": 59.9, "uPQ": 30.1, "hPQ": 40.0}
    assert content["left_out"] == {"crowd segments": 1017, "segments without a query": 3}
    assert content["settings"]["object_threshold"] == 0.1 and content["published"] is None


def test_a_semantic_report_comes_back(report: Report) -> None:
    confusion = ConfusionMatrix(3)
    confusion.update(np.array([[0, 1, 2]]), np.array([[0, 0, 2]]), image=1)
    row = semantic_scores(confusion, categories=CATEGORIES, seen=SEEN)
    settings = Settings(seen_offset=0.0, control_offset=0.1, alpha=0.4, beta=0.8, images=1, teacher="t")
    semantic = replace(report, rows=dict.fromkeys(ROWS, row), losses=None, sweeps=None, settings=settings)
    assert Report.from_json(semantic.to_json()) == semantic
    assert not {"losses", "sweeps", "object_threshold"} & set(re.findall(r'"(\w+)":', semantic.to_json()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text[:-1], "JSONDecodeError"),
        (lambda text: text.replace('"ceiling"', '"roof"'), "KeyError: 'ceiling'"),
        (lambda text: text.replace('"segments"', '"pieces"'), "pieces"),
        (lambda text: "[]", "AttributeError"),
    ],
)
def test_what_is_no_report_is_named(report: Report, tmp_path: Path, change: Callable[[str], str], reason: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(change(report.to_json()))
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        read_report(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_nan_is_refused(tmp_path: Path, report: Report) -> None:
    settings = replace(report.settings, control_offset=float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path, replace(report, settings=settings), curves={}, pictures=[])
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
    assert sum(tag == "b" for tag, _ in parsed.tags) == 7  # the page's own, about the teacher and the losses
    assert "<b>&star unseen" in parsed.text  # in the class table
    assert "tiny <world>" in parsed.text
    assert "stand-in teacher" in parsed.text and "random weights" in parsed.text


def test_headline_and_teacher(folder: Path) -> None:
    """Inductive: circle 1 TP 1 FP = 66.7, fog 100, star 0; transductive: everything right."""
    rows = {
        key: next(r[1:] for r in page(folder).rows if len(r) == 12 and r[0].startswith(s.name))
        for key, s in SETTINGS.items()
    }
    assert rows["inductive"][:3] == ["83.3", "0.0", "0.0"]
    assert rows["transductive"] == ["100.0"] * 11
    text = page(folder).text
    assert "97.2 %" in text and "66.6 %" in text and "1,234 instances" in text


def test_class_rows(folder: Path) -> None:
    rows = [row for row in page(folder).rows if len(row) == 19]
    assert rows[1] == ["<b>&star unseen", "thing", "0.0", "0.0", *["100.0"] * 4, "0.0", "0.0"] + (
        ["100.0"] * 6 + ["1", "0", "0"]
    )  # the unseen class first
    assert [row[0] for row in rows[2:]] == ["red circle", "fog"]


def test_one_plot_for_each_stage_that_trained_and_each_sweep(folder: Path) -> None:
    assert [attrs["alt"] for tag, attrs in page(folder).tags if tag == "img" and attrs["alt"] not in TITLES] == [
        "losses of v2c", "losses of g2s", "inductive by object threshold", "transductive by object threshold",
        "inductive by seen offset", "transductive by seen offset",
        "inductive + teacher by alpha, of seen classes", "transductive + teacher by alpha, of seen classes",
        "inductive + teacher by beta, of unseen classes", "transductive + teacher by beta, of unseen classes",
    ]  # fmt: skip


def test_loss_table(folder: Path) -> None:
    """From the truth to the prediction; a loss with a minus, a gain with a plus; no row for absent classes where there
    are none."""
    _, *rows = [row for row in page(folder).rows if len(row) == 5]
    for row, title in zip(
        rows, ("the truth", "masks", "classification", "seen bias", "selection", "the pred"), strict=True
    ):
        assert row[0].startswith(title)
    none, minus = ["0.0"] * 2, "\N{MINUS SIGN}"
    assert [row[1:] for row in rows] == [
        ["100.0"] * 4,
        [f"{minus}10.0", f"{minus}20.0", *none],
        none * 2,
        ["+2.5", f"{minus}43.2", *none],
        none * 2,
        ["92.5", "36.8", "100.0", "100.0"],
    ]
    with_teacher = [row for row in page(folder).rows if len(row) == 7]
    assert with_teacher[1][1:] == ["100.0"] * 6 and with_teacher[2][1:] == ["0.0"] * 6
    text = page(folder).text
    assert "inductive + teachertransductive + teacherteacher alone" in text
    assert "largest loss of unseen PQ is seen bias (43.2 of 63.2 points)" in text
    assert "2,345 unseen segments" in text and "81.2 %" in text and "36.5 %" in text
    assert "1,017 crowd segments" in text and "3 segments have no query" in text


def test_absent_classes_have_a_row_where_there_are_some(report: Report, tmp_path: Path) -> None:
    lost = dict.fromkeys((*CHECKPOINTS, *TEACHER_ROWS), losses(absent=(5.0, 0.0)))
    write_report(tmp_path, replace(report, losses=lost), curves={}, pictures=[])
    assert "absent classes" in page(tmp_path).text


def test_sweeps_say_what_they_are(folder: Path) -> None:
    text = page(folder).text
    assert "on 300 of 5,000 validation images" in text and "Nothing was chosen from these curves" in text
    assert "object threshold 0.1, chosen on seen classes of training images" in text
    assert text.index("Diagnostic curves") > text.index("Classes")  # far from the headline


@pytest.mark.parametrize("images", [5000, 100])
def test_the_papers_table(report: Report, tmp_path: Path, images: int) -> None:
    published = beside_the_paper("coco-panoptic-zps", report.rows, images=images, marks=[])
    write_report(tmp_path, replace(report, published=published), curves={}, pictures=[])
    parsed = page(tmp_path)
    rows = {row[0]: row[1:] for row in parsed.rows if row}
    assert rows["the paper"] == ["20.8", "40.5", "14.0", "27.5", "39.2", "21.2"]
    assert rows["this run"] == (["0.0", "83.3", "0.0", "100.0", "100.0", "100.0"] if images == 5000 else [""] * 6)
    assert ("100 validation images were scored" in parsed.text) == (images == 100)


def test_csv_holds_every_class_and_setting(folder: Path, report: Report) -> None:
    with (folder / "per_class.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["red circle", "<b>&star", "fog"]
    assert [row["seen"] for row in rows] == ["True", "False", "True"]
    assert len(rows[0]) == 4 + 7 * len(SETTINGS)
    for row, facts in zip(rows, report.rows["inductive"].per_class, strict=True):
        assert {key: float(row[f"inductive_{key}"]) for key in ("PQ", "SQ", "RQ", "IoU", "tp", "fp", "fn")} == {
            key: getattr(facts, key) for key in ("PQ", "SQ", "RQ", "IoU", "tp", "fp", "fn")
        }


def test_learning_rate_is_not_drawn(report: Report, tmp_path: Path) -> None:
    pages = []
    for extra in ({}, {"lr": 0.1}, {"mmd": 0.1}):
        write_report(tmp_path, report, curves={"g2s": [{"step": 10, "total": 1.0} | extra]}, pictures=[])
        pages.append((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert pages[0] == pages[1] != pages[2]


def test_pictures_are_the_image_the_truth_and_both_predictions(folder: Path) -> None:
    """Five rows on the page; truth and transductive prediction agree and are the same picture."""
    tags = [attrs for tag, attrs in page(folder).tags if tag == "img" and attrs["alt"] in TITLES]
    assert [attrs["alt"] for attrs in tags] == [*TITLES] * 5
    shown = [Image.open(io.BytesIO(base64.b64decode(str(attrs["src"]).split(",")[1]))) for attrs in tags]
    assert {(picture.format, picture.size) for picture in shown} == {("WEBP", (480, 480))}
    image, truth, inductive, transductive = (np.asarray(panel).astype(int) for panel in PICTURE.panels())
    for panel, encoded in zip((image, truth, inductive, transductive), shown, strict=False):
        assert np.abs(panel - np.asarray(encoded.convert("RGB"))).mean() < 3
    assert (image == 90).all() and (truth == transductive).all()
    unseen = np.array(ImageColor.getrgb(UNSEEN))
    edge = (slice(300, 320), slice(160, 163))  # of the star, which the inductive prediction calls a circle
    assert (truth[edge] == unseen).all() and not (inductive == unseen).all(-1).any()
    circle = (slice(60, 100), slice(40, 46))
    assert (truth[circle] == inductive[circle]).all()  # one class, one colour


def test_the_pointer_finds_every_segments_name(folder: Path) -> None:
    """The map beside a picture has the place of every pixel's segment, 0 where nothing is annotated."""
    found = [attrs for tag, attrs in page(folder).tags if tag == "img" and "data-places" in attrs]
    assert [attrs["alt"] for attrs in found] == [*TITLES[1:]] * 5
    for attrs, (ids, labels) in zip(
        found, (PICTURE.ground_truth, PICTURE.inductive, PICTURE.transductive), strict=False
    ):
        places = np.asarray(Image.open(io.BytesIO(base64.b64decode(str(attrs["data-places"]).split(",")[1])))).astype(
            int
        )
        names = ["void", *json.loads(str(attrs["data-names"]))]
        named = np.array(names)[places[..., 0] + 256 * places[..., 1]]
        expected = {0: "void"} | {i: name + ("" if seen else ", unseen") for i, (name, _, seen) in labels.items()}
        assert (named == np.vectorize(expected.get)(ids)).all()
    assert "<b>&star, unseen" in str(found[0]["data-names"])


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 3e4])
@pytest.mark.parametrize("span", [1.0, 40.0, 300.0, 1e5])
def test_every_number_at_an_axis_can_be_read(scale: float, span: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain numbers inside of the picture, at least two of them at each axis, apart from each other."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig

    def kept(self: Figure, *arguments: object, **named: object) -> None:
        figures.append(self)
        save(self, *arguments, **named)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Figure, "savefig", kept)
    high = scale * span
    loss_plot([{"step": s, "total": high * (scale / high) ** (s / 900), "mmd": scale} for s in range(0, 1000, 100)])
    (axes,) = figures[0].axes
    inside = figures[0].bbox
    for axis, (low, top) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
        boxes = [label.get_window_extent() for at, label in ticks if low <= at <= top and label.get_text()]
        texts = [label.get_text() for label in axis.get_majorticklabels()]
        assert len(boxes) >= 2 and not [text for text in texts if "$" in text or "\N{MULTIPLICATION SIGN}" in text]
        assert not axis.get_offset_text().get_text()
        assert not [label for label in axis.get_minorticklabels() if label.get_text()]
        for box in boxes:
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        assert not any(one.overlaps(other) for one, other in pairwise(boxes))


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (420, "dark")])
def test_in_a_browser_pictures_are_enlarged_and_named(folder: Path, width: int, scheme: str) -> None:
    with chromium() as browser:
        opened, faults = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
        opened.on("pageerror", lambda error: faults.append(str(error)))
        opened.goto((folder / "report.html").as_uri())
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        ground = re.findall(r"\d+", opened.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (sum(map(int, ground)) < 200) == (scheme == "dark")
        truth = opened.locator(".panel >> nth=1")
        small = truth.bounding_box()["width"]
        truth.hover(position={"x": 0.2 * small, "y": 0.2 * small})
        opened.wait_for_selector(".tip:not([hidden]):text-is('red circle')")
        truth.click()
        large = opened.locator("dialog[open] img")
        assert large.bounding_box()["width"] >= min(1.9 * small, 400) and "ground truth, 2 of" in opened.inner_text(
            "dialog"
        )
        opened.keyboard.press("ArrowRight")
        assert "inductive, 3 of" in opened.inner_text("dialog")
        large.hover(position={"x": 0.55 * large.bounding_box()["width"], "y": 0.7 * large.bounding_box()["width"]})
        opened.wait_for_selector("dialog .tip:not([hidden]):text-is('red circle')")
        opened.keyboard.press("Escape")
        opened.wait_for_selector("dialog", state="hidden")
        assert faults == []


def test_the_preview_has_the_first_three_rows(folder: Path) -> None:
    with Image.open(folder / "preview.jpg") as preview:
        sheet = np.asarray(preview.convert("RGB")).astype(int)
    rows, columns = 3, len(TITLES)
    assert sheet.shape == (24 + rows * (280 + 8), 8 + columns * (280 + 8), 3)
    panels = [panel.resize((280, 280)) for panel in PICTURE.panels()]
    for row in range(rows):
        for column, panel in enumerate(panels):
            top, left = 24 + row * 288, 8 + column * 288
            part = sheet[top : top + 280, left : left + 280]
            assert np.abs(part - np.asarray(panel).astype(int)).mean() < 6
    assert (sheet[24:, :6] > 245).all() and (sheet[:24] < 100).any()  # white between them, titles above


def test_without_pictures_there_is_no_preview_and_publishing_removes_an_older_one(
    report: Report, folder: Path, tmp_path: Path
) -> None:
    published = tmp_path / "runs" / "demo"
    publish(folder, published, preset="demo", lineage={})
    assert (published / "preview.jpg").read_bytes() == (folder / "preview.jpg").read_bytes()
    (tmp_path / "bare").mkdir()
    write_report(tmp_path / "bare", report, curves={}, pictures=[])
    assert not (tmp_path / "bare" / "preview.jpg").exists()
    publish(tmp_path / "bare", published, preset="demo", lineage={})
    assert {path.name for path in published.iterdir()} == {"report.json", "report.html", "per_class.csv"}


def test_a_sheet_takes_pictures_of_several_shapes() -> None:
    wide, high = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (10, 30), "blue")
    result = sheet(["one", "two"], [[wide, wide], [high, wide]], side=60)
    assert result.size == (8 + 2 * 68, 24 + 30 + 60 + 2 * 8)
    pixels = {place: result.getpixel(place) for place in ((8, 24), (67, 53), (8, 62), (27, 121), (28, 62), (76, 62))}
    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    assert list(pixels.values()) == [red, red, blue, blue, white, red]


def test_publish_adds_the_run(folder: Path, report: Report, tmp_path: Path) -> None:
    lineage = {"v2c": {"ref": "checkpoint/0123456789abcdef", "seconds": 75.0}}
    publish(folder, tmp_path / "runs" / "demo", preset="demo", lineage=lineage)
    publish(folder, tmp_path / "runs" / "demo", preset="demo", lineage=lineage)
    published = read_report(tmp_path / "runs" / "demo" / "report.json")
    built = {"v2c": Built(ref="checkpoint/0123456789abcdef", seconds=75.0)}
    assert published == replace(report, preset="demo", lineage=built)
    content = json.loads((tmp_path / "runs" / "demo" / "report.json").read_text())
    assert (content["preset"], content["lineage"]) == ("demo", lineage)
    table = tmp_path / "runs" / "demo" / "per_class.csv"
    assert table.read_bytes() == (folder / "per_class.csv").read_bytes()
    parsed = page(tmp_path / "runs" / "demo")
    assert "preset demo" in parsed.text
    assert ["v2c", "checkpoint/0123456789abcdef", "1 min 15 s"] in [row[:3] for row in parsed.rows]


def test_console_table(report: Report) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120)
    console.print(console_table(report))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    lines = {key: next(line for line in text.splitlines() if f" {s.name} " in line) for key, s in SETTINGS.items()}
    assert re.findall(r"\d+\.\d", lines["inductive"])[:3] == ["83.3", "0.0", "0.0"]
    assert re.findall(r"\d+\.\d", lines["true_masks_inductive"])[:3] == ["83.3", "0.0", "0.0"]
    assert re.findall(r"\d+\.\d", lines["ceiling"]) == re.findall(r"\d+\.\d", lines["true_classes"]) == ["100.0"] * 6
    assert "object_threshold 0.1, chosen on seen classes of training images" in text
    assert "stand-in teacher; random weights" in " ".join(text.split())


@given(st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=11))
def test_line_names_do_not_overlap(heights: list[float]) -> None:
    moved = spread(heights, gap=0.085)
    ordered = sorted(moved)
    assert all(b - a >= 0.085 - 1e-9 for a, b in pairwise(ordered))
    assert ordered[-1] <= 1 + 1e-9
    order = np.argsort(heights, kind="stable")
    assert (np.diff(np.array(moved)[order]) > 0).all() or len(set(heights)) < len(heights)


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = "import sys, pipeline.report.write; sys.exit(any(m in sys.modules for m in ('matplotlib', 'torch', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1]).returncode == 0
