"""`zs-seg pq` from files on disk: equal to a slow reference, to panopticapi's way and to our accumulator; by hand; and
what it says about files that are at odds."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from panoptic_factory import CATEGORIES, IDS, Case, cases, slow_quality, write_panoptic
from PIL import Image

from flows.cli import main
from pipeline.bench import panopticapi_lite
from pipeline.bench.evaluate import panoptic_quality_rows
from pipeline.inference.maps import PredictedSegment
from pipeline.runtime import Runtime
from pipeline.scoring.metrics import PanopticQuality
from pipeline.scoring.pq import evaluate
from storage.shards import Segment, encode_ids

SAMPLE = Path(__file__).parents[2] / "shared" / "coco-sample" / "annotations"
CAT, DOG, SKY = IDS


@examples(300)
@given(st.lists(cases, min_size=1, max_size=3))
def test_equals_the_slow_reference_and_panopticapi(tmp_path_factory: pytest.TempPathFactory, many: list[Case]) -> None:
    folder = tmp_path_factory.mktemp("pq")
    gt = write_panoptic(folder, "gt", [c.gt_ids for c in many], [c.gt_segments for c in many])
    guess = write_panoptic(folder, "guess", [c.ids for c in many], [c.segments for c in many])
    scores = evaluate(gt, folder / "gt", guess, folder / "guess", unseen=[DOG])
    gt_items, items = (json.loads(path.read_text())["annotations"] for path in (gt, guess))
    theirs = panopticapi_lite.count(list(zip(gt_items, items, strict=True)), folder / "gt", folder / "guess")

    qualities = {}
    for row, (category, (iou_sum, tp, fp, fn)) in zip(scores["per_class"], slow_quality(many).items(), strict=True):
        assert (row["id"], row["tp"], row["fp"], row["fn"]) == (category, tp, fp, fn)
        assert theirs[category].tolist() == pytest.approx([iou_sum, tp, fp, fn], abs=1e-9)
        weight = tp + fp / 2 + fn / 2
        expected = (100 * iou_sum / (weight or 1), 100 * iou_sum / max(tp, 1), 100 * tp / (weight or 1))
        assert (row["PQ"], row["SQ"], row["RQ"]) == pytest.approx(expected, abs=1e-9)
        if weight:
            qualities[category] = expected
    assert scores["absent"] == 3 - len(qualities)
    for suffix, members in (("", IDS), ("_th", (CAT, DOG)), ("_st", (SKY,))):
        there = [qualities[category] for category in members if category in qualities]
        means = np.mean(there, axis=0).tolist() if there else [None] * 3
        for name, mean in zip(("PQ", "SQ", "RQ"), means, strict=True):
            assert scores[name + suffix] == (None if mean is None else pytest.approx(mean, abs=1e-9))
    none = (0.0, 0.0, 0.0)
    seen, unseen = (qualities.get(CAT, none)[0] + qualities.get(SKY, none)[0]) / 2, qualities.get(DOG, none)[0]
    assert (scores["sPQ"], scores["uPQ"]) == pytest.approx((seen, unseen), abs=1e-9)
    assert scores["hPQ"] == pytest.approx(2 * seen * unseen / (seen + unseen) if seen + unseen else 0, abs=1e-9)


def read_ids(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.int32) @ np.array([1, 256, 65536], np.int32)


def perturb(ids: np.ndarray, segments: list[Segment], category_ids: list[int], rng: np.random.Generator) -> Case:
    """The ground truth shifted by up to 12 pixels, with segments dropped, joined with another, and renamed."""
    moved = np.roll(ids, rng.integers(-12, 13, 2), (0, 1))
    category_of = {segment.id: segment.category_id for segment in segments}
    for segment in segments:
        draw = rng.random()
        if draw < 0.1:
            moved[moved == segment.id] = 0
        elif draw < 0.2:
            moved[moved == segment.id] = rng.choice(list(category_of))
        elif draw < 0.35:
            category_of[segment.id] = int(rng.choice(category_ids))
    present = np.unique(moved[moved > 0]).tolist()
    found = [PredictedSegment(id=id_, category_id=category_of[id_], score=1.0) for id_ in present]
    return Case(ids, segments, moved, found)


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.is_dir(), reason="shared/coco-sample is not here")
@pytest.mark.parametrize(("split", "seed"), [("val2017", 0), ("train2017", 1)])
def test_real_annotations_perturbed(tmp_path: Path, split: str, seed: int) -> None:
    """40 or 100 images of COCO with the three ways to count them agreeing to 1e-9, crowds and void included."""
    rng = np.random.default_rng(seed)
    gt, folder = SAMPLE / f"panoptic_{split}.json", SAMPLE / f"panoptic_{split}"
    content = json.loads(gt.read_text())
    category_ids = [category["id"] for category in content["categories"]]
    quality, annotations = PanopticQuality(category_ids), []
    (tmp_path / "guess").mkdir()
    for item in content["annotations"]:
        segments = [
            Segment(id=s["id"], category_id=s["category_id"], area=s["area"], iscrowd=bool(s["iscrowd"]))
            for s in item["segments_info"]
        ]
        case = perturb(read_ids(folder / item["file_name"]), segments, category_ids, rng)
        quality.update(case.gt_ids, case.gt_segments, case.ids, case.segments, image=item["image_id"])
        (tmp_path / "guess" / item["file_name"]).write_bytes(encode_ids(case.ids))
        infos = [{"id": s.id, "category_id": s.category_id} for s in case.segments]
        annotations.append({**item, "segments_info": infos})
    guess = tmp_path / "guess.json"
    guess.write_text(json.dumps({"annotations": annotations[::-1]}))

    scores, result = evaluate(gt, folder, guess, tmp_path / "guess"), quality.result()
    assert 20 < scores["PQ"] < 80
    assert scores["PQ"] == pytest.approx(result.mean(absent="skip").pq, abs=1e-9)
    assert scores["PQ"] == pytest.approx(panopticapi_lite.mean_pq(gt, folder, guess, tmp_path / "guess"), abs=1e-9)
    rows = scores["per_class"]
    assert [row["tp"] for row in rows] == result.tp.tolist()
    assert [row["fp"] for row in rows] == result.fp.tolist()
    assert [row["fn"] for row in rows] == result.fn.tolist()
    assert [row["PQ"] for row in rows] == pytest.approx(result.pq.tolist(), abs=1e-9)
    perfect = evaluate(gt, folder, gt, folder)
    assert (perfect["PQ"], perfect["SQ"], perfect["RQ"], perfect["PQ_st"]) == (100, 100, 100, 100)


Files = dict[str, Any]


def make_files(folder: Path) -> Files:
    """Two images of a cat (id 7), a dog (70000) and sky (9) over a row of void, predicted perfectly."""
    ids = np.zeros((8, 10), np.int32)
    ids[:4, :5], ids[:4, 5:], ids[5:] = 7, 70000, 9
    truth = [Segment(id=i, category_id=c, area=0, iscrowd=False) for i, c in ((7, CAT), (70000, DOG), (9, SKY))]
    guess = [PredictedSegment(id=s.id, category_id=s.category_id, score=1.0) for s in truth]
    paths = [
        write_panoptic(folder, "gt", [ids] * 2, [truth] * 2),
        write_panoptic(folder, "guess", [ids] * 2, [guess] * 2),
    ]
    return {"folder": folder, "ids": ids} | {path.stem: json.loads(path.read_text()) for path in paths}


def save(files: Files, **kwargs: Any) -> dict[str, Any]:
    """Write the JSONs of `files` and evaluate them."""
    folder = files["folder"]
    for name in ("gt", "guess"):
        if isinstance(files[name], dict):
            (folder / f"{name}.json").write_text(json.dumps(files[name]))
    return evaluate(folder / "gt.json", folder / "gt", folder / "guess.json", folder / "guess", **kwargs)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return make_files(tmp_path)


def segments(files: Files, name: str) -> list[dict[str, Any]]:
    """Those of the first image."""
    return files[name]["annotations"][0]["segments_info"]


def paint(files: Files, name: str, change: Callable[[np.ndarray], object]) -> None:
    """Change the first image's pixels."""
    ids = files["ids"].copy()
    change(ids)
    (files["folder"] / name / "1.png").write_bytes(encode_ids(ids))


def replace_png(files: Files, content: bytes) -> None:
    (files["folder"] / "guess" / "1.png").write_bytes(content)


def test_perfect_prediction_scores_100(files: Files) -> None:
    scores = save(files, unseen=[SKY])
    assert {scores[name] for name in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st", "sPQ", "uPQ", "hPQ")} == {100}
    assert (scores["images"], scores["absent"]) == (2, 0)


def test_one_class_renamed_by_hand(files: Files) -> None:
    """In one of two images the cat is called dog: cat 1 TP 1 FN = 200/3, dog 2 TP 1 FP = 80, sky 100."""
    segments(files, "guess")[0]["category_id"] = DOG
    scores = save(files, unseen=[DOG])
    assert [row["PQ"] for row in scores["per_class"]] == pytest.approx([200 / 3, 80, 100])
    assert [row["SQ"] for row in scores["per_class"]] == pytest.approx([100] * 3)
    assert [(row["tp"], row["fp"], row["fn"]) for row in scores["per_class"]] == [(1, 0, 1), (2, 1, 0), (2, 0, 0)]
    assert scores["PQ"] == pytest.approx((200 / 3 + 80 + 100) / 3)
    assert (scores["PQ_th"], scores["PQ_st"]) == pytest.approx(((200 / 3 + 80) / 2, 100))
    seen = (200 / 3 + 100) / 2
    assert (scores["sPQ"], scores["uPQ"], scores["hPQ"]) == pytest.approx((seen, 80, 2 * seen * 80 / (seen + 80)))
    assert [row["seen"] for row in scores["per_class"]] == [True, False, True]


def test_absent_classes_count_0_in_seen_and_unseen_alone(files: Files) -> None:
    for name in ("gt", "guess"):
        files[name]["categories"] += [
            {"id": 300, "name": "cow", "isthing": 1},
            {"id": 301, "name": "sea", "isthing": 0},
        ]
    scores = save(files, unseen=[DOG, 300])
    assert (scores["PQ"], scores["PQ_th"], scores["PQ_st"], scores["absent"]) == (100, 100, 100, 2)
    assert (scores["sPQ"], scores["absent_seen"]) == (pytest.approx(200 / 3), 1)
    assert (scores["uPQ"], scores["absent_unseen"]) == (50, 1)
    assert scores["per_class"][3] == {
        "id": 300, "name": "cow", "isthing": True, "seen": False, "PQ": 0, "SQ": 0, "RQ": 0, "tp": 0, "fp": 0, "fn": 0,
    }  # fmt: skip


def test_without_unseen_classes_sPQ_is_over_all(files: Files) -> None:
    segments(files, "guess")[0]["category_id"] = DOG
    scores = save(files)
    assert (scores["sPQ"], scores["uPQ"], scores["hPQ"]) == (pytest.approx((200 / 3 + 80 + 100) / 3), None, None)
    scores = save(files, unseen=IDS)
    assert (scores["sPQ"], scores["uPQ"], scores["hPQ"]) == (None, pytest.approx((200 / 3 + 80 + 100) / 3), None)


@pytest.mark.parametrize(("only", "there", "missing"), [(1, "_th", "_st"), (0, "_st", "_th")])
def test_only_things_or_only_stuff(files: Files, only: int, there: str, missing: str) -> None:
    for category in files["gt"]["categories"] + files["guess"]["categories"]:
        category["isthing"] = only
    scores = save(files)
    assert (scores["PQ"], scores[f"PQ{there}"], scores[f"PQ{missing}"], scores[f"SQ{missing}"]) == (
        100,
        100,
        None,
        None,
    )


def test_void_prediction_misses_everything(files: Files) -> None:
    segments(files, "guess").clear()
    paint(files, "guess", lambda ids: ids.fill(0))
    assert [(row["tp"], row["fp"], row["fn"]) for row in save(files)["per_class"]] == [(1, 0, 1)] * 3


def test_nothing_anywhere_has_no_quality(files: Files) -> None:
    for name in ("gt", "guess"):
        for item in files[name]["annotations"]:
            item["segments_info"].clear()
            (files["folder"] / name / item["file_name"]).write_bytes(encode_ids(np.zeros((8, 10), np.int32)))
    scores = save(files)
    assert (scores["PQ"], scores["PQ_th"], scores["absent"], scores["sPQ"]) == (None, None, 3, 0)


def test_crowd_of_the_ground_truth_is_ignored_and_of_the_prediction_is_not_read(files: Files) -> None:
    segments(files, "guess")[1]["iscrowd"] = 1
    assert save(files)["PQ"] == 100
    segments(files, "gt")[0]["iscrowd"] = 1
    assert [(row["tp"], row["fp"], row["fn"]) for row in save(files)["per_class"]] == [(1, 0, 0), (2, 0, 0), (2, 0, 0)]
    segments(files, "guess")[0]["category_id"] = DOG  # all of it on a crowd, but on one of cats
    assert save(files)["per_class"][1]["fp"] == 1


def test_areas_come_from_the_pixels_and_strings_may_be_image_ids(files: Files) -> None:
    for name in ("gt", "guess"):
        for item in files[name]["annotations"]:
            item["image_id"] = f"ADE_val_{item['image_id']}"
            for segment in item["segments_info"]:
                segment["area"] = 1
                del segment["iscrowd"]
    del files["guess"]["categories"], files["guess"]["images"]
    assert save(files)["PQ"] == 100
    segments(files, "guess").pop()
    with pytest.raises(
        ValueError, match="^image ADE_val_1: predicted segment 9 is in the PNG but not in segments_info"
    ):
        save(files)


def test_pixels_of_the_ground_truth_are_checked_on_demand(files: Files) -> None:
    segments(files, "gt").pop()
    assert save(files)["per_class"][2]["fp"] == 1
    with pytest.raises(ValueError, match="ground truth's segment 9 is in the PNG.*mend"):
        save(files, check_ground_truth=True)


MISTAKES: dict[str, tuple[Callable[[Files], object], str]] = {
    "no JSON": (lambda f: (f["folder"] / "guess.json").unlink() or f.update(guess=0), "guess.json"),
    "broken JSON": (
        lambda f: (f["folder"] / "guess.json").write_text('{"annot') and f.update(guess=0),
        "guess.json is no JSON",
    ),
    "a list": (
        lambda f: (f["folder"] / "guess.json").write_text("[]") and f.update(guess=0),
        "lacks a valid annotations",
    ),
    "no annotation": (lambda f: f["gt"].update(annotations=[]), "gt.json holds no annotations"),
    "no categories": (lambda f: f["gt"].pop("categories"), "gt.json has no categories"),
    "category twice": (lambda f: f["gt"]["categories"].append(f["gt"]["categories"][0]), "category 1 is listed twice"),
    "no isthing": (lambda f: f["gt"]["categories"][1].pop("isthing"), "category 4 lacks a valid isthing"),
    "other name": (
        lambda f: f["guess"]["categories"][1].update(name="cow"),
        "guess.json: category 4 has name 'cow', but 'dog' in",
    ),
    "other kind": (lambda f: f["guess"]["categories"][1].update(isthing=0), "category 4 has isthing 0, but 1 in"),
    "new category": (lambda f: f["guess"]["categories"].append({"id": 5}), "guess.json: category 5 is not in"),
    "unknown category": (
        lambda f: segments(f, "guess")[0].update(category_id=5),
        "guess.json: image 1: segment 7 is of category 5, which",
    ),
    "unknown true category": (
        lambda f: segments(f, "gt")[0].update(category_id=5),
        "gt.json: image 1: segment 7 is of category 5, which",
    ),
    "no prediction": (
        lambda f: f["guess"]["annotations"].pop(),
        "guess.json has no prediction for image 2, which is in",
    ),
    "no truth": (lambda f: f["gt"]["annotations"].pop(), "gt.json has no ground truth for image 2, which is in"),
    "image twice": (
        lambda f: f["guess"]["annotations"].append(f["guess"]["annotations"][0]),
        "guess.json: image 1 is annotated twice",
    ),
    "no file name": (lambda f: f["gt"]["annotations"][1].pop("file_name"), "gt.json: image 2 lacks a valid file_name"),
    "no segments": (lambda f: f["gt"]["annotations"][1].pop("segments_info"), "image 2 lacks a valid segments_info"),
    "segment twice": (
        lambda f: segments(f, "guess").append(segments(f, "guess")[0]),
        "guess.json: image 1: segment 7 is listed twice",
    ),
    "segment 0": (
        lambda f: segments(f, "gt")[0].update(id=0),
        "gt.json: image 1: a segment has id 0, which is below 1",
    ),
    "segment above 24 bits": (lambda f: segments(f, "gt")[0].update(id=2**24), "segment id 16777216 is above"),
    "segment without pixels": (
        lambda f: segments(f, "guess").append({"id": 12, "category_id": CAT}),
        "image 1: predicted segment 12 is in segments_info but not in the mask; mend .*guess.json",
    ),
    "pixels without segment": (
        lambda f: segments(f, "guess").pop(),
        "image 1: predicted segment 9 is in the PNG but not in segments_info; mend .*guess.json",
    ),
    "true segment without pixels": (
        lambda f: segments(f, "gt").append({"id": 12, "category_id": CAT}),
        "image 1: ground truth's segment 12 is in segments_info but not in the mask; mend .*gt.json",
    ),
    "true pixels without segment": (
        lambda f: paint(f, "gt", lambda ids: ids[4].fill(12)),
        "image 1: ground truth's segment 12 is in the PNG but not in segments_info; mend .*gt.json",
    ),
    "no PNG": (lambda f: (f["folder"] / "guess" / "1.png").unlink(), "guess/1.png: No such file"),
    "no folder": (lambda f: (f["folder"] / "gt").rename(f["folder"] / "other"), "folder .*gt not found"),
    "other size": (
        lambda f: replace_png(f, encode_ids(f["ids"][:4])),
        "image 1: ground truth is 8×10 but the prediction is",
    ),
    "cut PNG": (
        lambda f: replace_png(f, (f["folder"] / "guess" / "1.png").read_bytes()[:60]),
        "cannot decode panoptic PNG .*guess/1.png",
    ),
    "no image": (lambda f: replace_png(f, b"hello"), "cannot decode panoptic PNG .*guess/1.png"),
    "grey PNG": (
        lambda f: Image.fromarray(f["ids"].astype(np.uint8)).save(f["folder"] / "guess" / "1.png"),
        "guess/1.png is Grayscale",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(files: Files, capsys: pytest.CaptureFixture[str], mistake: str) -> None:
    make, message = MISTAKES[mistake]
    make(files)
    with pytest.raises((ValueError, OSError), match=message):
        save(files, check_ground_truth=True)
    line = message_of(capsys, *arguments(files), "--check-ground-truth")
    assert "1.png" in line or ".json" in line or "folder" in line


def arguments(files: Files) -> list[str]:
    folder = files["folder"]
    return ["pq", *(str(folder / name) for name in ("gt.json", "gt", "guess.json", "guess"))]


def message_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of a command that must exit with status 2."""
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("zs-seg: ")
    return lines[0]


def test_command_prints_and_writes_what_it_found(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    segments(files, "guess")[0]["category_id"] = DOG
    expected = save(files, unseen=[DOG, SKY])
    targets = ("--json", str(tmp_path / "scores.json"), "--csv", str(tmp_path / "classes.csv"))
    assert main((*arguments(files), "--unseen", f"{DOG}, {SKY}", *targets)) == 0
    printed = capsys.readouterr().out
    assert "2 images" in printed and "82.22" in printed and "73.33" in printed
    assert json.loads((tmp_path / "scores.json").read_text()) == expected
    with (tmp_path / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [category.name for category in CATEGORIES]
    assert [float(row["PQ"]) for row in rows] == [row["PQ"] for row in expected["per_class"]]
    assert rows[1] | {"PQ": "", "RQ": ""} == {
        "id": "4", "name": "dog", "isthing": "True", "seen": "False",
        "PQ": "", "SQ": "100.0", "RQ": "", "tp": "2", "fp": "1", "fn": "0",
    }  # fmt: skip


def test_command_refuses_wrong_flags(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--unseen: category 77 is not in" in message_of(capsys, *arguments(files), "--unseen", "1,77")
    assert "--unseen 'cat' is no list" in message_of(capsys, *arguments(files), "--unseen", "cat")
    assert "missing not found" in message_of(capsys, *arguments(files), "--json", str(tmp_path / "missing" / "a.json"))


def test_import_is_light() -> None:
    code = "import sys, pipeline.scoring.pq; print({'numpy', 'hotcoco', 'rich', 'torch'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.slow
def test_benchmark_measures_evaluators_that_agree() -> None:
    rows = list(panoptic_quality_rows(Runtime(), images=4))
    assert [row.unit for row in rows] == ["s"] * 3 and all(row.ours > 0 and row.reference > 0 for row in rows)
