"""The report's numbers: perfect predictions score 100, ceilings as calculated by hand; mismatches are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from quarters import BENCHMARK, CLASSES, HEIGHT, THRESHOLDS, WIDTH, perfect, quarters, sample
from tiny import QUIET, build, tiny_config
from torch import Tensor

from models.projector import Projector
from pipeline import evaluate, scenes
from pipeline.data.benchmarks import Benchmark
from pipeline.data.config import AugmentConfig, ResizeConfig
from pipeline.evaluate import _require_same_segmenter
from pipeline.inference.forward import outputs
from pipeline.inference.maps import Output, classes_of, panoptic_map, semantic_map
from pipeline.inference.model import CheckpointMeta, Model, build_model, load_model, require_same_classes, save_model
from pipeline.line import Stage
from pipeline.report.page import SETTINGS
from pipeline.scoring.metrics import ConfusionMatrix, PanopticQuality
from pipeline.scoring.published import marks
from pipeline.scoring.records import PAPER_ROWS, TEACHER_ROWS, read_report
from pipeline.scoring.rows import GroundTruth, Row
from pipeline.teacher.text_bank import ClassList, TextBank, open_text
from storage.checkpoints import FILES
from storage.keys import Recipe, Ref
from storage.shards import Sample, Shards, decode_ids, decode_image, read_shard
from storage.store import Build, Store
from storage.tokens import read_tokens, token_files, write_tokens

SCORES = ["sPQ", "uPQ", "hPQ", "sIoU", "uIoU", "hIoU", "PQ", "SQ", "RQ", "PQ_th", "PQ_st"]


def score(shown: Sample, output: Output, logits: Tensor, *, seen_offset: float = 0.0) -> dict[str, Any]:
    row = Row(BENCHMARK)
    thresholds = replace(THRESHOLDS, seen_offset=seen_offset)
    row.predict(GroundTruth(shown, BENCHMARK), output, logits, CLASSES, thresholds)
    return asdict(row.scores())


def ceiling(shown: Sample, guess: list[int]) -> dict[str, Any]:
    row = Row(BENCHMARK)
    row.rename(GroundTruth(shown, BENCHMARK), guess)
    return asdict(row.scores())


def right(shown: Sample) -> list[int]:
    return [BENCHMARK.index[s.category_id] for s in shown.segments]


def per_class(scores: dict[str, Any], key: str) -> dict[str, float]:
    return {row["name"]: row[key] for row in scores["per_class"]}


# ------------------------------------------------------------------------------------------------ predictions


def test_a_perfect_prediction_scores_100() -> None:
    scores = score(quarters(), *perfect(quarters()))
    assert {name: scores[name] for name in SCORES} == dict.fromkeys(SCORES, pytest.approx(100))
    assert per_class(scores, "tp") == {"cat": 2, "dog": 1, "sky": 1, "sea": 1}


def test_a_wrong_name_costs_both_classes() -> None:
    """A cat called dog: cat has 1 of 2 (PQ 1 / 1.5), dog 1 and a false alarm (PQ 1 / 1.5); pixels 240 of 480, 240 of
    480."""
    output, logits = perfect(quarters())
    logits[1, 0], logits[1, 1] = -20.0, 20.0
    scores = score(quarters(), output, logits)
    assert per_class(scores, "PQ") == pytest.approx({"cat": 200 / 3, "dog": 200 / 3, "sky": 100, "sea": 100})
    assert per_class(scores, "IoU") == pytest.approx({"cat": 50, "dog": 50, "sky": 100, "sea": 100})
    s = u = (200 / 3 + 100) / 2
    assert (scores["sPQ"], scores["uPQ"], scores["hPQ"]) == pytest.approx((s, u, s))
    assert (scores["sIoU"], scores["uIoU"], scores["hIoU"]) == pytest.approx((75, 75, 75))


def test_thresholds_and_seen_offset_reach_the_prediction() -> None:
    output, logits = perfect(quarters())
    logits[0] = torch.tensor([0.6, 0.5, -20.0, -20.0])  # sigmoid 0.646 cat (seen), 0.622 dog (unseen)
    assert per_class(score(quarters(), output, logits), "fp")["dog"] == 0
    lowered = score(quarters(), output, logits, seen_offset=0.1)
    assert per_class(lowered, "fp")["dog"] == 1
    assert per_class(lowered, "IoU") == pytest.approx({"cat": 50, "dog": 50, "sky": 100, "sea": 100})
    ids, segments = panoptic_map(output, logits, CLASSES, replace(THRESHOLDS, object_threshold=0.7))
    assert len(segments) == 4 and not ids[:12, :20].any()
    assert (semantic_map(output, logits, CLASSES)[:12, :20] == 0).all()
    assert (semantic_map(output, logits, CLASSES, seen_offset=0.1)[:12, :20] == 1).all()


# ------------------------------------------------------------------------------------------------ the ceiling


def test_the_ceiling_of_perfect_names_is_100() -> None:
    scores = ceiling(quarters(), right(quarters()))
    assert {name: scores[name] for name in SCORES} == dict.fromkeys(SCORES, pytest.approx(100))


def test_the_ceiling_with_a_class_renamed_by_hand() -> None:
    """The sea is taken for sky: sky 1 hit and 1 false alarm (PQ 1 / 1.5), sea missed; sky's pixels 120 of 240."""
    guess = right(quarters())
    guess[4] = 2
    scores = ceiling(quarters(), guess)
    assert per_class(scores, "PQ") == pytest.approx({"cat": 100, "dog": 100, "sky": 200 / 3, "sea": 0})
    assert per_class(scores, "IoU") == pytest.approx({"cat": 100, "dog": 100, "sky": 50, "sea": 0})
    s, u = 50, (100 + 200 / 3) / 2
    assert (scores["sPQ"], scores["uPQ"], scores["hPQ"]) == pytest.approx((s, u, 2 * s * u / (s + u)))
    assert (scores["sIoU"], scores["uIoU"]) == pytest.approx((50, 75))


def test_crowds_are_no_predictions_in_the_ceiling() -> None:
    """Neither right nor wrong names of a crowd count, and its pixels are left out."""
    shown = quarters(crowds={102})
    for name in range(4):
        guess = right(shown)
        guess[1] = name
        row = Row(BENCHMARK)
        row.rename(GroundTruth(shown, BENCHMARK), guess)
        assert row.confusion.counts.sum() == HEIGHT * WIDTH - 240
        scores = asdict(row.scores())
        assert {key: scores[key] for key in SCORES} == dict.fromkeys(SCORES, pytest.approx(100))
        assert per_class(scores, "tp")["cat"] == 1 and sum(per_class(scores, "fp").values()) == 0


def test_a_segment_without_a_token_is_no_prediction_in_the_ceiling() -> None:
    """It is missed, and no class has a false alarm."""
    shown = quarters()
    guess = right(shown)
    guess[4] = -1  # the sea
    row = Row(BENCHMARK)
    row.rename(GroundTruth(shown, BENCHMARK), guess)
    scores = asdict(row.scores())
    assert sum(per_class(scores, "fp").values()) == 0 and per_class(scores, "fn") == dict(cat=0, dog=0, sky=0, sea=1)
    assert row.confusion.counts.sum() == HEIGHT * WIDTH - (decode_ids(shown) == shown.segments[4].id).sum()


def test_void_pixels_count_nowhere_in_the_ceiling() -> None:
    ids = decode_ids(quarters()).copy()
    ids[:, :3] = 0
    shown = sample(ids, {s.id: s.category_id for s in quarters().segments})
    assert ceiling(shown, right(shown))["hIoU"] == pytest.approx(100)
    row = Row(BENCHMARK)
    row.rename(GroundTruth(shown, BENCHMARK), right(shown))
    assert row.confusion.counts.sum() == HEIGHT * (WIDTH - 3)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("names", lambda v: [v[1], v[0], *v[2:]], r"disagree in names \(position 0: \['cat'\] and \['dog'\]\)"),
        ("names", lambda v: v[:-1], r"disagree in names \(position 3: \['sea'\] and \[\]\)"),
        ("ids", lambda v: [*v[:2], 21, v[3]], r"disagree in ids \(position 2: \[20\] and \[21\]\)"),
        ("seen", lambda v: [*v[:1], not v[1], *v[2:]], r"disagree in seen \(position 1: \[False\] and \[True\]\)"),
        ("teacher", lambda v: {**v, "name": "other"}, r"disagree in teacher .*'other'"),
        ("key", lambda v: "1" * 16, r"disagree in text \('0{16}' and '1{16}'\)"),
    ],
)
def test_another_text_bank_is_refused_and_the_first_difference_named(
    field: str, change: Callable[[Any], Any], message: str
) -> None:
    categories = BENCHMARK.categories
    bank = TextBank(
        key="0" * 16, embedding=torch.eye(4), ids=[c.id for c in categories], names=[c.name for c in categories],
        isthing=[c.isthing for c in categories], seen=BENCHMARK.seen, teacher={"name": "small"}, templates=["{}"],
    )  # fmt: skip
    classes = ClassList(**json.loads(json.dumps(asdict(bank.classes()))))  # as a checkpoint holds it
    require_same_classes(classes, bank)
    with pytest.raises(ValueError, match=message) as caught:
        require_same_classes(classes, replace(bank, **{field: change(getattr(bank, field))}))
    assert "\n" not in str(caught.value) and "zs-seg run --from v2c" in str(caught.value)


def _world() -> Benchmark:
    data = tiny_config().data
    assert isinstance(data, scenes.ScenesConfig)
    return scenes.benchmark(data)


def tiny_model(seed: int) -> Model:
    config = tiny_config().v2c.segmenter
    segmenter = {
        "backbone": config.backbone, "backbone_weights": None, "frozen_batchnorm": False, "queries": 4, "dim": 16,
        "heads": 2, "encoder_layers": 1, "encoder_ffn": 16, "encoder_points": 2, "decoder_layers": 1, "decoder_ffn": 16,
    }  # fmt: skip
    torch.manual_seed(seed)
    projector = {"dim": 16, "text_dim": 4, "hidden": 8, "layers": 2}
    classes = ClassList(text="", ids=[], names=[], isthing=[], seen=[], teacher={}, clean_names=False)
    meta = CheckpointMeta(
        architecture={"segmenter": segmenter, "projector": projector}, stage="v2c", classes=classes, templates=[],
        resize=ResizeConfig(), augment=AugmentConfig(), matching={}, overlap_threshold=0.8,
    )  # fmt: skip
    model = build_model(meta, torch.eye(4))
    model.segmenter.eval()
    return model


def test_different_segmenters_are_refused() -> None:
    one, other = tiny_model(0), tiny_model(0)
    assert isinstance(other.projector, Projector)
    with torch.no_grad():
        other.projector.bias.add_(1)  # stage 3's work
    _require_same_segmenter(one, other)
    with torch.no_grad():
        next(b for b in other.segmenter.buffers() if b.is_floating_point()).add_(
            1e-3
        )  # BatchNorm's statistics count too
    with pytest.raises(ValueError, match="different segmenters; run `zs-seg run --from cpa`"):
        _require_same_segmenter(one, other)


def test_marks() -> None:
    world, coco = replace(BENCHMARK, name="scenes-test"), replace(BENCHMARK, name="coco-panoptic-zps")
    small = {"name": "small", "pretrained": "sha256:0"}
    assert marks(small, world) == []
    assert [mark.split(":")[0] for mark in marks(small, coco)] == ["STAND-IN TEACHER"]
    assert marks({"name": "ViT-B-16-quickgelu", "pretrained": "openai"}, coco) == []
    for benchmark in (world, coco):
        (mark,) = marks({"name": "small", "pretrained": "random"}, benchmark)
        assert "RANDOM" in mark


# ------------------------------------------------------------------------------------------------ inference


def test_outputs_do_not_depend_on_their_neighbours() -> None:
    """In order, for sizes that change in between, alone as in a batch."""
    model = tiny_model(0)
    rng = torch.Generator().manual_seed(0)
    sizes = [(40, 60), (40, 60), (40, 60), (60, 40), (40, 60), (33, 50), (64, 64)]
    images = [(i, torch.randint(256, (3, *size), dtype=torch.uint8, generator=rng)) for i, size in enumerate(sizes)]
    resize = ResizeConfig(short=48, longest=96)
    alone = [next(outputs(model.segmenter, [image], resize, batch=1)) for image in images]
    together = list(outputs(model.segmenter, images, resize, batch=2))
    assert [tag for tag, _ in together] == list(range(len(sizes)))
    assert [o.image_size for _, o in together] == [(48, 72)] * 3 + [(72, 48), (48, 72), (48, 73), (48, 48)]
    assert [o.padded_size for _, o in together] == [(64, 96)] * 3 + [(96, 64), (64, 96), (64, 96), (64, 64)]
    for (_, one), (_, other), size in zip(alone, together, sizes, strict=True):
        assert (one.padded_size, one.image_size) == (other.padded_size, other.image_size) and one.original_size == size
        assert torch.allclose(one.features, other.features, atol=1e-4) and torch.allclose(
            one.masks, other.masks, atol=1e-3
        )
    assert not torch.allclose(alone[0][1].features, alone[1][1].features, atol=1e-2)


@pytest.mark.parametrize(
    ("window", "passes"),
    [
        (1, [(2, 64, 96), (1, 64, 96), (1, 96, 64), (2, 64, 96), (1, 64, 64)]),
        (7, [(1, 64, 64), (2, 64, 96), (2, 64, 96), (1, 64, 96), (1, 96, 64)]),
    ],
)
def test_sorted_by_size_batches_are_fuller_and_results_the_same(
    window: int, passes: list[tuple[int, int, int]]
) -> None:
    """In order, however few of the images before one have its size."""
    model = tiny_model(0)
    rng = torch.Generator().manual_seed(0)
    sizes = [(40, 60), (40, 60), (40, 60), (60, 40), (40, 60), (33, 50), (64, 64)]
    images = [(i, torch.randint(256, (3, *size), dtype=torch.uint8, generator=rng)) for i, size in enumerate(sizes)]
    resize = ResizeConfig(short=48, longest=96)
    alone = [next(outputs(model.segmenter, [image], resize, batch=1)) for image in images]
    seen: list[tuple[int, ...]] = []
    model.segmenter.register_forward_pre_hook(lambda _, given: seen.append((len(given[0]), *given[0].shape[-2:])))
    together = list(outputs(model.segmenter, images, resize, batch=2, window=window))
    assert seen == passes
    assert [tag for tag, _ in together] == list(range(len(sizes)))
    for (_, one), (_, other) in zip(alone, together, strict=True):
        assert (one.padded_size, one.image_size) == (other.padded_size, other.image_size)
        assert one.original_size == other.original_size
        assert torch.allclose(one.features, other.features, atol=1e-4)
        assert torch.allclose(one.masks, other.masks, atol=1e-3)
    seen.clear()
    list(outputs(model.segmenter, images, resize, batch=2))
    assert seen == [(2, 64, 96), (1, 64, 96), (1, 96, 64), (2, 64, 96), (1, 64, 64)]  # neighbours, on a CPU


# ------------------------------------------------------------------------------------------------ end to end


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Stage]]:
    store = Store(tmp_path_factory.mktemp("store"))
    return store, build(store, tiny_config())


@pytest.fixture(scope="module")
def report(world: tuple[Store, dict[str, Stage]]) -> dict[str, Any]:
    store, steps = world
    return json.loads((store.open(steps["evaluate"].recipe.ref).path / "report.json").read_text())


@pytest.mark.slow
def test_the_line_ends_in_a_report(world: tuple[Store, dict[str, Stage]], report: dict[str, Any]) -> None:
    store, steps = world
    artefact = store.open(steps["evaluate"].recipe.ref)
    assert report["benchmark"] == "scenes-test" and report["marks"] == []
    for setting in SETTINGS:
        assert set(SCORES) < report[setting].keys()
        assert all(0 <= report[setting][name] <= 100 for name in SCORES)
        assert len(report[setting]["per_class"]) == 56
        assert artefact.manifest.counts[setting] == {
            key: round(report[setting][key], 3) for key in ("sPQ", "uPQ", "hPQ")
        }
    assert report["settings"]["images"] == artefact.manifest.counts["images"] == 10
    assert report["published"] is None and artefact.manifest.counts["left_out"] == report["left_out"]
    meta = load_model(store.path(steps["v2c"].recipe.ref)).meta
    assert report["settings"]["object_threshold"] == meta.object_threshold
    assert report["settings"]["overlap_threshold"] == meta.overlap_threshold
    text = (artefact.path / "report.json").read_text()
    assert read_report(artefact.path / "report.json").to_json() == text
    page = (artefact.path / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("<div class=pictures>") == 2
    with Image.open(artefact.path / "preview.jpg") as preview:
        assert preview.size == (8 + 4 * 288, 24 + 2 * 288)
    assert all(f"losses of {stage}" in page for stage in ("v2c", "g2s", "cpa"))
    assert len((artefact.path / "per_class.csv").read_text().splitlines()) == 57


@pytest.mark.slow
def test_losses_and_sweeps_end_in_the_headline(report: dict[str, Any]) -> None:
    for name in TEACHER_ROWS:
        for key in ("sPQ", "uPQ"):
            lost = sum(loss[key] for loss in report["losses"][name]["losses"].values())
            assert lost == pytest.approx(100 - report[name][key])
    for name in ("inductive", "transductive"):
        losses, sweeps = report["losses"][name], report["sweeps"][name]
        for key in ("sPQ", "uPQ"):
            assert sum(loss[key] for loss in losses["losses"].values()) == pytest.approx(100 - report[name][key])
            assert losses["levels"]["masks"][key] == report["true_classes"][key]
        threshold = report["settings"]["object_threshold"]
        exponents = report["sweeps"][f"{name}_teacher"]
        for curve, value in (("alpha", 0.4), ("beta", 0.8)):
            (point,) = (point for point in exponents[curve] if point["value"] == value)
            assert {key: report[f"{name}_teacher"][key] for key in ("sPQ", "uPQ", "hPQ")} | {"value": value} == point
        assert [p["value"] for p in sweeps["seen_offset"]] == list(tiny_config().evaluate.seen_offsets)
        for curve, value in (("seen_offset", 0.0), ("object_threshold", threshold)):
            (point,) = (point for point in sweeps[curve] if point["value"] == value)
            assert {key: report[name][key] for key in ("sPQ", "uPQ", "hPQ")} | {"value": value} == point
    assert report["sweeps"]["images"] == report["sweeps"]["of"] == 10


@pytest.mark.slow
def test_sweeps_see_only_their_images(world: tuple[Store, dict[str, Stage]], report: dict[str, Any]) -> None:
    store, _ = world
    ref = evaluate_again(world, config=replace(tiny_config().evaluate, pictures=0, sweep_images=3))
    again = json.loads((store.open(ref).path / "report.json").read_text())
    assert (again["sweeps"]["images"], again["sweeps"]["of"]) == (3, 10)
    assert {key: again[key] for key in SETTINGS} == {key: report[key] for key in SETTINGS}


@pytest.mark.slow
def test_the_teacher_changes_its_own_rows_alone(world: tuple[Store, dict[str, Stage]], report: dict[str, Any]) -> None:
    """At exponents of 0 they are the checkpoints' own rows, and all others keep every digit."""
    store, _ = world
    ref = evaluate_again(world, config=replace(tiny_config().evaluate, pictures=0, alpha=0.0, beta=0.0))
    again = json.loads((store.open(ref).path / "report.json").read_text())
    for name in PAPER_ROWS:
        assert again[name] == report[name]
    assert again["teacher"] == report["teacher"] and again["settings"]["alpha"] == 0
    for name in ("inductive", "transductive"):
        ious, found = ([row["IoU"] for row in again[key]["per_class"]] for key in (name, f"{name}_teacher"))
        assert found == pytest.approx(ious, abs=0.01)  # q is computed from logarithms
    assert report["settings"]["alpha"] == 0.4 and report["settings"]["beta"] == 0.8


@pytest.mark.slow
def test_each_setting_from_its_own_checkpoint(world: tuple[Store, dict[str, Stage]], report: dict[str, Any]) -> None:
    """Once more, one image at a time. A few steps of training find no object, but the pixels' classes differ."""
    store, steps = world
    bank = open_text(store.path(steps["text"].recipe.ref), "")
    classes = classes_of(bank.embedding, bank.classes(), torch.device("cpu"))
    found: dict[str, list[float]] = {}
    for setting, stage, offset in (("inductive", "v2c", 0.0), ("control", "v2c", 0.1), ("transductive", "cpa", 0.0)):
        model = load_model(store.path(steps[stage].recipe.ref))
        confusion, quality = ConfusionMatrix(len(bank.ids)), PanopticQuality(bank.ids)
        for tar in Shards(store.path(steps["shard"].recipe.ref)).tars("val"):
            for shown in read_shard(tar):
                gt = decode_ids(shown)
                image = torch.from_numpy(decode_image(shown)).permute(2, 0, 1)
                _, output = next(outputs(model.segmenter, [(None, image)], ResizeConfig(short=96, longest=96), batch=1))
                logits = model.projector.logits(model.projector(output.features), bank.embedding)
                thresholds = replace(model.meta.thresholds, seen_offset=offset)
                ids, segments = panoptic_map(output, logits, classes, thresholds)
                quality.update(gt, shown.segments, ids, segments, image=shown.image_id)
                truth = np.full(gt.shape, -1)
                for segment in shown.segments:
                    truth[gt == segment.id] = bank.ids.index(segment.category_id)
                confusion.update(truth, semantic_map(output, logits, classes, seen_offset=offset), image=shown.image_id)
        found[setting] = confusion.iou.tolist()
        rows = report[setting]["per_class"]
        assert [row["IoU"] for row in rows] == pytest.approx(found[setting], abs=0.05)  # batches move the last bits
        assert [row["tp"] + row["fn"] for row in rows] == (quality.result().tp + quality.result().fn).tolist()
    assert found["inductive"] != pytest.approx(found["control"], abs=0.1)
    assert found["inductive"] != pytest.approx(found["transductive"], abs=0.1)


@pytest.fixture(scope="module", params=["the teacher's own tokens", "tokens of neighbours"])
def judged(
    request: pytest.FixtureRequest, world: tuple[Store, dict[str, Stage]], report: dict[str, Any]
) -> tuple[Ref, dict[str, Any]]:
    """Tokens, and a report on them; of the second every other one is its neighbour's."""
    store, steps = world
    good = steps["cache-clip"].recipe.ref
    if request.param == "the teacher's own tokens":
        return good, report

    bad = with_instances(store, good, lambda rows: rows[np.arange(len(rows)) // 2 * 2])
    ref = evaluate_again(world, tokens=bad)
    return bad, json.loads((store.open(ref).path / "report.json").read_text())


def with_instances(store: Store, tokens: Ref, change: Callable[[np.ndarray], np.ndarray]) -> Ref:
    """The tokens with other rows of the instances (m, D) of every tar."""

    def work(build: Build) -> None:
        for path in sorted(store.path(tokens).glob("*.zarr")):
            group = read_tokens(path)
            arrays: dict[str, Any] = {**group.arrays(), "instance": change(group.instance)}
            write_tokens(build.path / path.name, global_=arrays.pop("global"), **arrays)
            build.add(*token_files(build.path / path.name))

    return store.build(Recipe(kind="tokens", stage="cache-clip", version=0, config=change.__name__, inputs={}), work)


@pytest.mark.slow
def test_the_teachers_accuracy_and_ceiling_leave_out_what_is_too_small_for_a_token(
    world: tuple[Store, dict[str, Stage]], report: dict[str, Any]
) -> None:
    store, steps = world

    def every_third_is_zero(rows: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(rows))[:, None] % 3 == 0, 0, rows).astype(rows.dtype)

    bad = with_instances(store, steps["cache-clip"].recipe.ref, every_third_is_zero)
    other = json.loads((store.open(evaluate_again(world, tokens=bad, min_area=9)).path / "report.json").read_text())
    names = [tar.stem for tar in Shards(store.path(steps["shard"].recipe.ref)).tars("val")]
    rows = [len(read_tokens(store.path(bad) / f"{name}.zarr").instance) for name in names]
    small = sum((count + 2) // 3 for count in rows)
    assert other["teacher_accuracy"]["instances"] == sum(rows) - small > 0
    assert report["teacher_accuracy"]["instances"] == sum(rows)
    assert other["left_out"]["segments without a token"] == small
    assert "segments without a token" not in report["left_out"]
    total = {name: sum(one[name] for one in other["ceiling"]["per_class"]) for name in ("tp", "fp", "fn")}
    assert total["tp"] + total["fp"] == sum(rows) - small and total["fn"] >= small


def evaluate_again(
    world: tuple[Store, dict[str, Stage]],
    config: evaluate.EvaluateConfig | None = None,
    *,
    min_area: int = 0,
    **others: Ref,
) -> Ref:
    """The last stage once more with other inputs or settings."""
    store, steps = world
    stages = {
        "shards": "shard", "tokens": "cache-clip", "text": "text",
        "inductive": "v2c", "generator": "g2s", "transductive": "cpa", "mask_tokens": "mask-tokens",
    }  # fmt: skip
    inputs: dict[str, Any] = {name: steps[stage].recipe.ref for name, stage in stages.items()} | others
    config = config or replace(tiny_config().evaluate, pictures=0)
    given: dict[str, Any] = {"benchmark": _world(), "threshold_slack": 0.5, "beyond": (), "min_area": min_area}
    return Stage.of(evaluate, config, **given, **inputs).run(store, QUIET)


@pytest.mark.slow
def test_the_ceiling_and_the_teachers_accuracy_from_the_artefacts(
    world: tuple[Store, dict[str, Stage]], judged: tuple[Ref, dict[str, Any]]
) -> None:
    """Once more from tokens and text rows, one instance at a time; with perfect masks PQ is counting names."""
    (store, steps), (tokens_ref, report) = world, judged
    bank = open_text(store.path(steps["text"].recipe.ref), "")
    right: dict[bool, list[bool]] = {True: [], False: []}
    tp, fp, fn = ({i: 0 for i in bank.ids} for _ in range(3))
    for tar in Shards(store.path(steps["shard"].recipe.ref)).tars("val"):
        group = read_tokens(store.path(tokens_ref) / f"{tar.stem}.zarr")
        for i, shown in enumerate(read_shard(tar)):
            tokens = group.instance[group.offsets[i] : group.offsets[i + 1]]
            for segment, token in zip(shown.segments, tokens, strict=True):
                cosines = [float(torch.from_numpy(token).double() @ row.double()) for row in bank.embedding]
                guess = bank.ids[cosines.index(max(cosines))]
                right[bank.seen[bank.ids.index(segment.category_id)]].append(guess == segment.category_id)
                if guess == segment.category_id:
                    tp[guess] += 1
                else:
                    fp[guess] += 1
                    fn[segment.category_id] += 1
    pq = {i: 100 * tp[i] / max(tp[i] + fp[i] / 2 + fn[i] / 2, 1e-9) for i in bank.ids}
    for name, flag in (("sPQ", True), ("uPQ", False)):
        values = [pq[i] for i, seen in zip(bank.ids, bank.seen, strict=True) if seen == flag]
        assert report["ceiling"][name] == pytest.approx(sum(values) / len(values))
    assert report["teacher_accuracy"] == {
        "instances": len(right[True]) + len(right[False]),
        "seen": pytest.approx(100 * sum(right[True]) / len(right[True])),
        "unseen": pytest.approx(100 * sum(right[False]) / len(right[False])),
    }


@pytest.mark.slow
def test_the_two_settings_share_a_segmenter_and_a_threshold(world: tuple[Store, dict[str, Stage]]) -> None:
    store, steps = world
    one, other = (load_model(store.path(steps[stage].recipe.ref)) for stage in ("v2c", "cpa"))
    _require_same_segmenter(one, other)
    assert not torch.equal(next(one.projector.parameters()), next(other.projector.parameters()))
    assert replace(one.meta, stage="cpa") == other.meta
    assert (one.meta.stage, other.meta.stage) == ("v2c", "cpa")


@pytest.mark.slow
def test_checkpoints_of_different_runs_are_refused(world: tuple[Store, dict[str, Stage]]) -> None:
    """The transductive checkpoint beside a stage 1 that it did not start from, through the stage itself."""
    store, steps = world
    model = load_model(store.path(steps["v2c"].recipe.ref))
    with torch.no_grad():
        next(model.segmenter.parameters()).mul_(1.01)
    recipe = Recipe(kind="checkpoint", stage="v2c", version=0, config={}, inputs={})

    def work(build: Build) -> None:
        save_model(build.path, model)
        build.add(*(build.path / name for name in FILES))

    strange = store.build(recipe, work)
    with pytest.raises(ValueError, match="different segmenters"):
        evaluate_again(world, inductive=strange)
