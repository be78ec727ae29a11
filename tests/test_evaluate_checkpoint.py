"""`zs-seg evaluate`: the report's numbers on the run's own folder, numbers by hand on label maps, and what is
refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_factory import edit_json
from label_factory import EVERY, HEIGHT, LAYOUTS, VALUES, WIDTH, make_layout, save_labels, stripes
from PIL import Image
from tiny import QUIET, build, tiny_config

from flows.cli import main
from pipeline import scenes
from pipeline.data.benchmarks import Benchmark, Category, load_benchmark
from pipeline.inference.maps import PredictedSegment
from pipeline.inference.model import load_model
from pipeline.inference.vocabulary import vocabulary_of
from pipeline.scoring import evaluate_checkpoint, exponents
from pipeline.scoring.metrics import PanopticQuality
from storage.shards import Segment, encode_ids
from storage.store import Manifest, Store

pytestmark = pytest.mark.slow  # a run that was trained long enough to find something

WORLD = scenes.ScenesConfig(shapes=("circle",), train_images=40, val_images=10)
BENCHMARK = scenes.benchmark(WORLD)


@dataclass(frozen=True)
class Run:
    """A finished tiny run: its generated COCO folder, its report, its checkpoints' keys, its benchmark as a file."""

    store: Store
    data: Path
    report: dict[str, Any]
    keys: dict[str, str]
    benchmark: Path

    def folder(self, stage: str) -> Path:
        return self.store.root / "checkpoint" / self.keys[stage]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    store = Store(tmp_path_factory.mktemp("store"))
    tiny = tiny_config()
    v2c = replace(tiny.v2c, steps=80, overlap_threshold=0.5)
    cpa = replace(tiny.cpa, lr=1e-3)  # the other tests' rate unlearns in six steps what stage 1 found
    steps = build(store, replace(tiny, data=WORLD, v2c=v2c, cpa=cpa))
    refs = {stage: step.recipe.ref for stage, step in steps.items()}
    return Run(
        store=store,
        data=store.open(refs["scenes"]).path,
        report=json.loads((store.open(refs["evaluate"]).path / "report.json").read_text()),
        keys={stage: refs[stage].key for stage in ("v2c", "cpa", "evaluate")},
        benchmark=write_benchmark(store.root.parent / "scenes-test.json", BENCHMARK.categories, BENCHMARK.unseen_ids),
    )


def write_benchmark(path: Path, categories: Sequence[Category], unseen_ids: Sequence[int] = (), **more: Any) -> Path:
    rows = [{"id": c.id, "name": c.name, "isthing": int(c.isthing)} for c in categories]
    path.write_text(json.dumps({"categories": rows, "unseen_ids": list(unseen_ids), "protocol": "none", **more}))
    return path


def evaluate(run: Run, benchmark: str | Path, data: Path, **change: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "checkpoint": run.keys["cpa"],
        "split": "val",
        "seen_offset": 0.0,
        "with_teacher": False,
        "alpha": 0.4,
        "beta": 0.8,
        "object_threshold": None,
        "match_names": False,
        "out": "",
        "teacher_weights": "",
    }
    asked |= {"benchmark": str(benchmark), "data": str(data), "store": run.store, "runtime": QUIET}
    return evaluate_checkpoint.run(**asked | change)  # fmt: skip


def fails(capsys: pytest.CaptureFixture[str], run: Run, *words: object, checkpoint: object = "") -> str:
    """The one line that the command fails with."""
    given = ["--store", run.store.root, "--checkpoint", checkpoint or run.keys["cpa"], *words]
    assert main(["evaluate", *map(str, given)]) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("evaluating: ")
    ]  # a bar is no message
    assert len(lines) == 1 and lines[0].startswith("zs-seg: "), lines
    return lines[0]


# ------------------------------------------------------------------------------------------------ panoptic


@pytest.mark.parametrize(
    ("stage", "offset", "row"), [("v2c", 0.0, "inductive"), ("cpa", 0.0, "transductive"), ("v2c", 0.35, "control")]
)
def test_the_runs_own_folder_gives_the_reports_numbers(run: Run, stage: str, offset: float, row: str) -> None:
    assert run.report[row]["PQ"] > 1 and run.report[row]["sIoU"] > 1
    result = evaluate(run, run.benchmark, run.data, checkpoint=run.keys[stage], seen_offset=offset)
    assert {**result["scores"], "per_class": result["per_class"]} == run.report[row]
    assert result["checkpoint"] == {"stage": stage, "key": run.keys[stage], "folder": str(run.folder(stage))}
    assert result["thresholds"]["object_threshold"] == run.report["settings"]["object_threshold"]
    assert result["counts"]["images"] == run.report["settings"]["images"] == 10
    assert result["counts"]["unseen"] == len(BENCHMARK.unseen_ids)
    assert result["marks"] == []


@pytest.mark.parametrize(
    ("stage", "row", "exponents"),
    [("v2c", "inductive_teacher", (0.4, 0.8)), ("cpa", "transductive_teacher", (0.4, 0.8)), ("v2c", "teacher", (1, 1))],
)
def test_with_the_teacher_it_gives_the_reports_rows(
    run: Run, stage: str, row: str, exponents: tuple[float, float]
) -> None:
    """But for the rounding of cached tokens, which are float16."""
    alpha, beta = exponents
    threshold = run.report["settings"][f"object_threshold_{row}"]
    result = evaluate(
        run, run.benchmark, run.data, checkpoint=run.keys[stage], with_teacher=True, alpha=alpha, beta=beta,
        object_threshold=threshold,
    )  # fmt: skip
    assert run.report[row]["sIoU"] != run.report["inductive"]["sIoU"]
    for name in ("PQ", "sIoU", "uIoU"):
        assert result["scores"][name] == pytest.approx(run.report[row][name], abs=0.3)
    assert result["thresholds"]["object_threshold"] == threshold
    assert (result["teacher"]["alpha"], result["teacher"]["beta"]) == exponents
    assert result["teacher"]["options"]["method"] == "pixels" and "teacher: alpha" in evaluate_checkpoint.about(result)


def test_with_the_teacher_the_semantic_map_does_not_depend_on_the_object_threshold(run: Run) -> None:
    low, high = (evaluate(run, run.benchmark, run.data, with_teacher=True, object_threshold=t) for t in (0.0, 0.9))
    assert low["scores"]["PQ"] != high["scores"]["PQ"]
    for name in ("sIoU", "uIoU"):
        assert low["scores"][name] == high["scores"][name] > 0


def test_the_command_tells_and_exports_what_it_scored(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "evaluate",
        "--checkpoint",
        str(run.folder("cpa")),
        "--benchmark",
        str(run.benchmark),
        "--data",
        str(run.data),
    ]
    words += [
        "--json",
        str(tmp_path / "scores.json"),
        "--out",
        str(tmp_path / "out"),
        "--store",
        str(tmp_path / "none"),
    ]
    assert main(words) == 0  # a checkpoint's folder needs no store
    message = capsys.readouterr().out
    result = json.loads((tmp_path / "scores.json").read_text())
    assert {**result["scores"], "per_class": result["per_class"]} == run.report["transductive"]
    for word in ("scenes-test", "hPQ", f"{result['scores']['PQ']:.1f}", "10 images"):
        assert word in message
    assert Path(result["data"]["root"]) / result["data"]["list"] == run.data / "annotations/panoptic_val2017.json"

    truth = json.loads((run.data / result["data"]["list"]).read_text())["annotations"]
    ours = json.loads((tmp_path / "out/panoptic.json").read_text())["annotations"]
    rles = json.loads((tmp_path / "out/panoptic_rle.json").read_text())
    assert [r["area"] for r in rles] == [s["area"] for prediction in ours for s in prediction["segments_info"]]
    quality = PanopticQuality([c.id for c in BENCHMARK.categories])
    for gt, prediction in zip(truth, ours, strict=True):
        assert gt["image_id"] == prediction["image_id"]
        segments = [
            PredictedSegment(id=s["id"], category_id=s["category_id"], score=s["score"])
            for s in prediction["segments_info"]
        ]
        quality.update(
            ids_of(run.data / "annotations/panoptic_val2017" / gt["file_name"]),
            [
                Segment(id=s["id"], category_id=s["category_id"], area=s["area"], iscrowd=False)
                for s in gt["segments_info"]
            ],
            ids_of(tmp_path / "out/panoptic" / prediction["file_name"]), segments, image=gt["image_id"],
        )  # fmt: skip
    assert quality.result().mean(absent="skip").pq == result["scores"]["PQ"]


def ids_of(path: Path) -> np.ndarray:
    rgb = np.asarray(Image.open(path).convert("RGB")).astype(np.int32)
    return rgb @ np.array([1, 256, 65536])


# ------------------------------------------------------------------------------------------------ semantic


def own_semantic(run: Run, tmp_path: Path, change: Sequence[Category] = BENCHMARK.categories) -> Path:
    """A benchmark file for the run's own images with label maps in `maps`."""
    (tmp_path / "val2017").symlink_to(run.data / "val2017")
    more = {"task": "semantic", "images": "val2017/*.jpg", "labels": "maps/*.png", "ignored": [255]}
    return write_benchmark(tmp_path / "scenes-test.json", change, BENCHMARK.unseen_ids, **more)


def blank_maps(run: Run, tmp_path: Path, value: int) -> None:
    for image in (run.data / "val2017").iterdir():
        save_labels(tmp_path / "maps" / f"{image.stem}.png", np.full((96, 96), value, np.uint8))


def test_label_maps_from_the_predictions_themselves(run: Run, tmp_path: Path) -> None:
    """The exported maps as ground truth score 100; calling all of one class by another's name costs both, by hand."""
    file = own_semantic(run, tmp_path)
    blank_maps(run, tmp_path, BENCHMARK.categories[0].id)
    evaluate(run, file, tmp_path, out=str(tmp_path / "out"))
    maps = {path.name: np.array(Image.open(path)) for path in (tmp_path / "out").glob("*.png")}
    assert len(maps) == 10
    shutil.rmtree(tmp_path / "maps")
    shutil.move(tmp_path / "out", tmp_path / "maps")
    result = evaluate(run, file, tmp_path)
    assert (result["scores"]["mIoU"], result["scores"]["accuracy"]) == (100, 100)
    assert result["counts"]["pixels"] == 10 * 96 * 96 and result["counts"]["ignored_percent"] == 0

    values, counts = np.unique(np.stack(list(maps.values())), return_counts=True)
    a, b = values[np.argsort(counts)[-2:]]
    for name, values_of in maps.items():
        renamed = np.where(values_of == a, b, values_of)
        if name == min(maps):
            renamed[:48] = 255
        save_labels(tmp_path / "maps" / name, renamed.astype(np.uint8))
    result = evaluate(run, file, tmp_path)
    iou = {row["id"]: row["IoU"] for row in result["per_class"]}
    inside = np.concatenate([values_of[48 * (name == min(maps)) :] for name, values_of in maps.items()])
    said_a, said_b = (int((inside == value).sum()) for value in (a, b))
    assert iou[a] == 0
    assert iou[b] == pytest.approx(100 * said_b / (said_a + said_b))
    assert result["counts"]["ignored_percent"] == pytest.approx(5)
    assert result["scores"]["accuracy"] == pytest.approx(100 - 100 * said_a / (10 * 96 * 96 - 48 * 96))


def test_the_seen_offset_and_the_split_reach_the_prediction(run: Run, tmp_path: Path) -> None:
    file = own_semantic(run, tmp_path)
    blank_maps(run, tmp_path, BENCHMARK.unseen_ids[0])
    result = evaluate(run, file, tmp_path, seen_offset=1000.0, out=str(tmp_path / "out"))
    said = {int(value) for path in (tmp_path / "out").glob("*.png") for value in np.unique(np.array(Image.open(path)))}
    assert said <= set(BENCHMARK.unseen_ids)
    assert result["seen_offset"] == 1000 and result["counts"]["unseen"] == len(BENCHMARK.unseen_ids)
    train = evaluate(run, run.benchmark, run.data, split="train")
    assert train["counts"]["images"] == 40 and train["data"]["images"] == "train2017"
    assert evaluate(run, run.benchmark, run.data, split="train2017")["scores"] == train["scores"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_on_the_known_data_sets(run: Run, tmp_path: Path, name: str) -> None:
    """Any checkpoint on any benchmark: the classes are the data set's, none of these was seen by name."""
    data = make_layout(tmp_path / "data", LAYOUTS[name][0], VALUES[name][:3])
    result = evaluate(run, name, data, out=str(tmp_path / "out"))
    benchmark = load_benchmark(name)
    assert [(row["id"], row["name"]) for row in result["per_class"]] == [(c.id, c.name) for c in benchmark.categories]
    assert result["counts"] == {
        "images": 2, "pixels": 2 * HEIGHT * WIDTH, "ignored_percent": pytest.approx(100 / 3),
        "classes": len(benchmark.categories), "seen": 0, "unseen": len(benchmark.categories),
    }  # fmt: skip
    assert sum(row["pixels"] for row in result["per_class"]) == 2 * HEIGHT * WIDTH * 2 // 3
    assert result["scores"]["sIoU"] is None and result["scores"]["hIoU"] is None
    assert result["scores"]["uIoU"] >= 0 and result["task"] == "semantic"
    assert result["marks"][0].startswith("STAND-IN TEACHER")
    for prediction in ("a_1", "b_2"):
        values = np.array(Image.open(tmp_path / "out" / f"{prediction}.png"))
        assert values.shape == (HEIGHT, WIDTH) and set(np.unique(values)) <= set(benchmark.index)


def test_a_turned_photo_is_scored_as_its_label_map_lies(run: Run, tmp_path: Path) -> None:
    """Phone photos give the upright ones' maps; where the map's size does not tell how they lie, they are refused."""
    file = own_semantic(run, tmp_path)
    (tmp_path / "val2017").unlink()
    (tmp_path / "val2017").mkdir()
    exif = Image.Exif()
    exif[274] = 6
    photos = [Image.open(path).crop((0, 0, 96, 64)) for path in sorted((run.data / "val2017").iterdir())[:3]]
    for number, upright in enumerate(photos):
        upright.save(tmp_path / "val2017" / f"{number}.jpg", format="PNG")
        stored = upright.transpose(Image.Transpose.ROTATE_90)
        stored.save(tmp_path / "val2017" / f"{number}_turned.JPG", format="PNG", exif=exif)
        for name in (f"{number}", f"{number}_turned"):
            save_labels(tmp_path / "maps" / f"{name}.png", np.full((64, 96), BENCHMARK.categories[0].id, np.uint8))
    evaluate(run, file, tmp_path, out=str(tmp_path / "out"))
    for number in range(3):
        one, other = (np.array(Image.open(tmp_path / "out" / f"{number}{end}.png")) for end in ("", "_turned"))
        np.testing.assert_array_equal(one, other)

    save_labels(tmp_path / "maps" / "0.png", np.full((64, 95), BENCHMARK.categories[0].id, np.uint8))
    with pytest.raises(
        ValueError, match=r"0\.jpg is 96 x 64 pixels, but 95 x 64 in its label map .*0\.png; replace it"
    ):
        evaluate(run, file, tmp_path)
    save_labels(tmp_path / "maps" / "0.png", np.full((64, 96), BENCHMARK.categories[0].id, np.uint8))
    exif[274] = 3
    photos[0].save(tmp_path / "val2017" / "0.jpg", format="PNG", exif=exif)
    with pytest.raises(ValueError, match=r"0\.jpg states orientation 3, and its size does not tell"):
        evaluate(run, file, tmp_path)


# ------------------------------------------------------------------------------------------------ zs-seg sweep


def test_a_sweep_is_the_report_at_other_exponents(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the report's own exponents its rows, at those of its curves their points, to the digit; neither the teacher nor
    the segmenter is loaded."""
    for module in ("models.teacher.load_teacher", "pipeline.inference.model.load_model"):
        monkeypatch.setattr(module, None)
    words = ("sweep", run.keys["evaluate"], "--store", run.store.root, "--beta", "0.8", "0.2")
    assert main([*map(str, words), "--json", str(tmp_path / "points.json")]) == 0
    assert "inductive + teacher" in capsys.readouterr().out
    found = {(point["row"], point["beta"]): point for point in json.loads((tmp_path / "points.json").read_text())}
    assert len(found) == 4
    for (row, beta), point in found.items():
        (expected,) = (at for at in run.report["sweeps"][row]["beta"] if at["value"] == beta)
        assert {key: point[key] for key in ("sPQ", "uPQ", "hPQ")} | {"value": beta} == expected
        assert beta != 0.8 or point["sPQ"] == run.report[row]["sPQ"]
    assert len({point["sPQ"] for point in found.values()}) > 1
    (first, *_) = exponents.run(
        report=run.keys["evaluate"], alphas=(1.0,), betas=(1.0,), images=3, store=run.store, runtime=QUIET
    )
    assert (first.row, first.alpha, first.beta) == ("inductive_teacher", 1.0, 1.0)


def test_what_a_sweep_refuses(run: Run, tmp_path: Path) -> None:
    given: dict[str, Any] = {"alphas": (), "betas": (), "images": 0, "runtime": QUIET}
    wrong: dict[str, Any] = {**given, "alphas": (0.2, 1.5)}
    with pytest.raises(ValueError, match=r"--alpha and --beta must lie in 0..1, not 1.5"):
        exponents.run(report=run.keys["evaluate"], store=run.store, **wrong)
    store = Store(tmp_path)
    shutil.copytree(run.store.root / "report" / run.keys["evaluate"], tmp_path / "report" / run.keys["evaluate"])
    manifest = tmp_path / "report" / run.keys["evaluate"] / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"] = {name: facts for name, facts in content["files"].items() if "zarr" not in name}
    del content["checksum"]
    manifest.write_text(Manifest(**content).dumps())
    with pytest.raises(ValueError, match=r"has kept no image; run it again with --evaluate.kept-images N"):
        exponents.run(report=run.keys["evaluate"], store=store, **given)


# ------------------------------------------------------------------------------------------------ classes


def test_other_classes_are_embedded_by_the_checkpoints_teacher(run: Run) -> None:
    """A benchmark of some of the checkpoint's classes and a new one: rows by name, seen by name."""
    model = load_model(run.folder("cpa"))
    mixed = (*BENCHMARK.categories[5:2:-1], Category(id=500, name="airship", isthing=True))
    asked = Benchmark(name="mixed", categories=mixed, unseen_ids=(), protocol="none")
    matched = vocabulary_of(model, asked, "", QUIET)
    known, vocabulary = matched.benchmark, matched.vocabulary
    seen = dict(zip(BENCHMARK.names, BENCHMARK.seen, strict=True))
    assert known.seen == [*(seen[c.name] for c in mixed[:3]), False]
    torch.testing.assert_close(vocabulary.embedding[:3], model.text[[5, 4, 3]])
    assert vocabulary.classes.ids == [c.id for c in mixed] and vocabulary.classes.seen == known.seen


def test_who_says_what_is_seen_of_the_checkpoints_own_classes(run: Run) -> None:
    model = load_model(run.folder("cpa"))
    for unseen, expected in (((), BENCHMARK.unseen_ids), (BENCHMARK.unseen_ids[:1], BENCHMARK.unseen_ids[:1])):
        asked = Benchmark(name="own", categories=BENCHMARK.categories, unseen_ids=unseen, protocol="none")
        assert vocabulary_of(model, asked, "", QUIET).benchmark.unseen_ids == expected


def test_the_checkpoints_own_classes_need_no_teacher(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(run.folder("cpa"), folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["classes"]["teacher"] = {"name": "ViT-B-16", "pretrained": "sha256:00", "fill": "zero"}
    (folder / "meta.json").write_text(json.dumps(meta))
    result = evaluate(run, run.benchmark, run.data, checkpoint=str(folder))
    assert result["scores"]["PQ"] == run.report["transductive"]["PQ"]
    data = make_layout(tmp_path / "data", LAYOUTS["voc20"][0], (1,))
    message = fails(capsys, run, "--benchmark", "voc20", "--data", data, checkpoint=folder)
    assert "teacher ViT-B-16 had local weights; pass --teacher.pretrained FILE" in message


def test_another_order_of_the_same_classes_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    c = BENCHMARK.categories
    swapped = write_benchmark(tmp_path / "swapped.json", (*c[:3], c[4], c[3], *c[5:]))
    message = fails(capsys, run, "--benchmark", swapped, "--data", run.data)
    ours, theirs = f"{c[3].name!r} (id 4) in the checkpoint", f"{c[4].name!r} (id 5) in the benchmark"
    assert "benchmark swapped" in message and f"first at position 3: {ours}, {theirs}" in message
    maps = own_semantic(run, tmp_path, [Category(id=x.id - 1, name=x.name, isthing=x.isthing) for x in c])
    file = json.loads(maps.read_text()) | {"unseen_ids": []}
    maps.write_text(json.dumps(file))
    blank_maps(run, tmp_path, 0)
    message = fails(capsys, run, "--benchmark", maps, "--data", tmp_path)
    assert f"position 0: {c[0].name!r} (id 1) in the checkpoint, {c[0].name!r} (id 0) in the benchmark" in message


def test_names_in_capitals_and_another_order_give_the_same_scores(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained classes stay seen in any spelling, and every class keeps its scores in any place."""
    c, report = BENCHMARK.categories, run.report["transductive"]
    capitals = [replace(one, name=one.name.upper().replace(" ", "  ")) for one in c]
    data = tmp_path / "data"  # whose annotations name no categories, which would have to be spelled as the benchmark's
    shutil.copytree(run.data, data)
    edit_json(data, lambda facts: facts.pop("categories"), "val2017")
    loud = evaluate(run, write_benchmark(tmp_path / "loud.json", capitals), data)
    assert {
        **loud["scores"],
        "per_class": [{**r, "name": r["name"].lower().replace("  ", " ")} for r in loud["per_class"]],
    } == report
    assert loud["counts"]["unseen"] == len(BENCHMARK.unseen_ids) and len(loud["respelled"]) == len(c)

    turned = write_benchmark(tmp_path / "turned.json", capitals[::-1])
    assert "--match-names" in fails(capsys, run, "--benchmark", turned, "--data", data)
    words = ["--checkpoint", run.keys["cpa"], "--store", run.store.root, "--benchmark", turned, "--data", data]
    assert main(["evaluate", *map(str, words), "--match-names", "--json", str(tmp_path / "scores.json")]) == 0
    assert f"the checkpoint has {len(c)} in another spelling" in capsys.readouterr().out
    result = json.loads((tmp_path / "scores.json").read_text())
    assert {row["id"]: row["PQ"] for row in result["per_class"]} == {
        row["id"]: row["PQ"] for row in report["per_class"]
    }
    for score in ("sPQ", "uPQ", "hPQ"):
        assert result["scores"][score] == pytest.approx(report[score])


# ------------------------------------------------------------------------------------------------ mistakes


def test_mistakes_are_one_line_and_status_2(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, layout = EVERY[2]
    data = make_layout(tmp_path / "data", layout, VALUES[name][:2])
    good = ["--benchmark", name, "--data", data]
    assert "voc21" in fails(capsys, run, "--benchmark", "voc21", "--data", data)
    assert "no-such not found" in fails(capsys, run, "--benchmark", name, "--data", tmp_path / "no-such")
    assert "panoptic_val2017.json not found" in fails(capsys, run, "--benchmark", run.benchmark, "--data", data)
    assert "split 'test' is unknown" in fails(capsys, run, *good, "--split", "test")
    assert "--seen-offset must be a finite number" in fails(capsys, run, *good, "--seen-offset", "nan")
    assert "--object-threshold must lie in 0..1" in fails(capsys, run, *good, "--object-threshold", "1.5")
    assert "--alpha and --beta must lie in 0..1" in fails(capsys, run, *good, "--with-teacher", "--beta", "-1")
    assert f"--json {tmp_path}/no/such.json" in fails(capsys, run, *good, "--json", tmp_path / "no" / "such.json")
    assert "is no checkpoint of v2c or cpa" in fails(capsys, run, *good, checkpoint=tmp_path)
    save_labels(data / layout[1] / "a_1.png", stripes((1, 21)))
    assert f"{layout[1]}/a_1.png has pixels of value 21" in fails(capsys, run, *good)
    save_labels(data / layout[1] / "a_1.png", stripes((1,))[1:])
    assert f"a_1.jpg is {WIDTH} x {HEIGHT} pixels, but {WIDTH} x {HEIGHT - 1} in its label map" in fails(
        capsys, run, *good
    )


def test_images_without_a_pixel_to_score_are_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = own_semantic(run, tmp_path)
    blank_maps(run, tmp_path, 255)
    message = fails(capsys, run, "--benchmark", file, "--data", tmp_path)
    assert "no pixel of 10 images of split val has a class to score" in message
    save_labels(next((tmp_path / "maps").iterdir()), np.full((96, 96), BENCHMARK.categories[0].id, np.uint8))
    assert evaluate(run, file, tmp_path)["counts"]["ignored_percent"] == pytest.approx(90)


def test_a_panoptic_image_that_cannot_be_used_is_named(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "coco"
    shutil.copytree(run.data, data)
    png = data / "annotations/panoptic_val2017/000000000003.png"
    png.write_bytes(encode_ids(np.ones((96, 95), np.int32)))
    message = fails(capsys, run, "--benchmark", run.benchmark, "--data", data)
    assert "val2017 image 3 has a file 'annotations/panoptic_val2017/000000000003.png' that is 95 x 96" in message
    png.unlink()
    assert "lacks its file 'annotations/panoptic_val2017/000000000003.png'" in fails(
        capsys, run, "--benchmark", run.benchmark, "--data", data
    )
