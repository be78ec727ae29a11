"""What `zs-seg plan` says before anything starts: counts by a slow loop, rates from what was built, and which of them
is assumed.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from coco_factory import edit_json, make_coco
from many_artefacts import fill
from tiny import build, copy_artefacts, tiny_config
from torchvision.models import ViT_B_16_Weights, ViT_B_32_Weights, ViT_H_14_Weights, ViT_L_16_Weights, WeightsEnum

from flows.cli import main
from flows.presets import preset
from flows.request import Request, configure
from pipeline.data.benchmarks import load_benchmark
from pipeline.line import Config, line
from pipeline.planning.counts import Counts, count
from pipeline.planning.estimates import DEMO, FREE, SWITCHES, Estimator, teacher_dim, teacher_gflop
from pipeline.scoring.config import EvaluateConfig
from pipeline.training.config import CPAConfig, G2SConfig, QueriesConfig, SegmenterConfig, V2CConfig
from pipeline.world.config import ScenesConfig
from storage.lineage import Lineage
from storage.store import Store


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, list[str]], str]:
    """The table's rows by stage, and everything below them."""
    assert main(("plan", *words)) == 0
    table, _, rest = capsys.readouterr().out.partition("\n\n")
    rows = [re.split(r"\s{2,}", row) for row in table.splitlines()[1:]]  # a cell may hold single spaces
    return {row[0]: row[1:] for row in rows}, rest


@pytest.mark.parametrize("limit", [0, 7])
def test_counts_of_a_coco_folder_by_a_slow_loop(tmp_path: Path, limit: int) -> None:
    root = make_coco(tmp_path / "coco", train=20, val=4)
    unseen = set(load_benchmark("coco-panoptic-zps").unseen_ids)
    config = configure(Request(preset="coco-zps-r50", coco=str(root), overrides=("--shard.limit", str(limit))))
    found = count(config, line(config), Store(tmp_path / "store"))
    expected = {}
    for split in ("train2017", "val2017"):
        data = json.loads((root / "annotations" / f"panoptic_{split}.json").read_text())
        annotations = sorted(data["annotations"], key=lambda a: a["image_id"])[: limit or None]
        hidden = [{s["category_id"] for s in a["segments_info"]} & unseen for a in annotations]
        kept = [a for a, hide in zip(annotations, hidden, strict=True) if split == "val2017" or not hide]
        expected[split] = (len(annotations), len(kept), sum(len(a["segments_info"]) for a in kept))
    assert (found.train, found.left, found.train_instances) == expected["train2017"]
    assert (found.val, found.val, found.val_instances) == expected["val2017"]
    assert found.left and found.train_instances and found.val_instances and found.left < found.train
    assert found.inputs == found.left + found.val + found.train_instances + found.val_instances
    files = [p for p in root.rglob("*") if p.suffix in (".jpg", ".png")]
    if not limit:
        assert found.bytes == sum(p.stat().st_size for p in files)


def test_a_semantic_benchmark_counts_images_alone(tmp_path: Path) -> None:
    for split, number in (("train2017", 3), ("val2017", 2)):
        for folder, suffix in ((split, "jpg"), (f"stuffthingmaps/{split}", "png")):
            (tmp_path / folder).mkdir(parents=True)
            for i in range(number):
                (tmp_path / folder / f"{i:012d}.{suffix}").write_bytes(b"12345")
    config = configure(Request(preset="coco-zss-r50", coco=str(tmp_path)))
    assert count(config, [], Store(tmp_path)) == Counts(train=3, val=2, left=3, bytes=50)


def test_scenes_are_counted_once_they_are_drawn(shared_store: Store, tmp_path: Path) -> None:
    config, store = tiny_config(), Store(tmp_path)
    steps = line(config)
    assert count(config, steps, store) == Counts(train=40, val=10)
    limited = replace(config, shard=replace(config.shard, limit=7))
    assert count(limited, steps, store) == Counts(train=7, val=7)
    store = shared_store
    build(store, config, until="cache-clip")
    found, tokens = count(config, steps, store), store.open(steps[3].recipe.ref).manifest.counts
    assert found.left == tokens["train"]["encoded"] and found.train_instances == tokens["train"]["instances"]
    assert found.val_instances == tokens["val"]["instances"]
    assert found.inputs == sum(tokens[split][what] for split in tokens for what in ("encoded", "instances"))


@pytest.mark.parametrize(
    ("name", "gmacs", "dim"),
    [
        ("ViT-B-16-quickgelu", ViT_B_16_Weights.IMAGENET1K_V1, 512), ("ViT-B-32", ViT_B_32_Weights.IMAGENET1K_V1, 512),
        ("ViT-L-16", ViT_L_16_Weights.IMAGENET1K_V1, 768), ("ViT-H-14", ViT_H_14_Weights.IMAGENET1K_SWAG_LINEAR_V1, 1024),
    ],
)  # fmt: skip
def test_gflop_of_a_vit_is_twice_the_gmacs_that_torchvision_counted(name: str, gmacs: WeightsEnum, dim: int) -> None:
    assert teacher_gflop(name) == pytest.approx(2 * gmacs.meta["_ops"], rel=0.01)
    assert teacher_dim(name) == dim


def test_of_other_towers_it_says_nothing() -> None:
    assert [teacher_gflop(name) for name in ("small", "RN50", "convnext_base", "no-such")] == [None] * 4
    assert [teacher_dim(name) for name in ("small", "RN50", "no-such")] == [128, 1024, None]


def test_without_anything_measured_it_says_what_it_assumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_coco(tmp_path / "coco", train=20)
    words = ("--preset", "coco-zps-r50", "--coco", str(root), "--store", str(tmp_path / "store"))
    rows, rest = plan(capsys, *words)
    assert "cache-clip assumed: 35.1 GFLOP a teacher input at 50 TFLOP/s" in rest and "measured:" not in rest
    assert rows["v2c"][2] == "-" and rows["v2c"][4] == "no v2c in this store yet"
    # 16 views of 1024 x 1024 pixels
    assert f"v2c assumed: {398 * 16 * 4:,}.0 GFLOP a step at 50 TFLOP/s" in rest and rows["cache-clip"][2].startswith(
        "~"
    )
    assert "g2s assumed: 0.067 s a step" in rest and rows["evaluate"][3] == "-" and "- has no time" in rest
    rows, rest = plan(capsys, *words, "--step-seconds", "0.4", "--tflops", "0.1")
    assert rows["v2c"][3] == "~14 h 58 min"  # 134,736 steps
    assert "v2c stated: 0.4 s a step; 1 h 52 min on 8 such devices" in rest and "at 0.1 TFLOP/s" in rest
    found = count(config := configure(Request(preset="coco-zps-r50", coco=str(root))), line(config), Store(tmp_path))
    assert str(found) in rest
    assert f"{134_736 * 16 / (found.left or 0):.1f} epochs" in rest


@pytest.mark.parametrize("flag", [("--tflops", "0"), ("--step-seconds", "-1")])
def test_a_speed_that_cannot_be_is_refused(flag: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("plan", "--preset", "demo", *flag)) == 2
    assert f"{flag[0]} must be above 0" in capsys.readouterr().err


def test_measured_rates_are_scaled_and_used_only_for_the_like(shared_store: Store, tmp_path: Path) -> None:
    store, config = Store(tmp_path), tiny_config()
    made = build(shared_store, config, until="cache-clip")
    copy_artefacts(shared_store, store, [stage.recipe.ref for stage in made.values()])
    longer = replace(config, data=replace(config.data, seed=1))
    steps = line(longer)
    build(store, longer, until="scenes")
    counts = count(longer, steps, store)
    estimator = Estimator(longer, steps, Lineage(store), counts, tflops=1, step_seconds=0)
    tokens, built = steps[3], store.open(line(config)[3].recipe.ref).manifest
    did = sum(built.counts[split][what] for split in ("train", "val") for what in ("encoded", "instances"))
    guess = estimator.estimate(tokens)
    assert guess.seconds == pytest.approx(built.provenance["seconds"] * (counts.inputs or 0) / did)
    assert guess.bytes == pytest.approx(built.bytes * (counts.inputs or 0) / did)
    assert guess.source.startswith("measured: ") and str(built.ref) in guess.source and "on cpu" in guess.source
    assert estimator.estimate(steps[4]).assumed  # no v2c was made
    for other in (
        replace(longer, teacher=replace(longer.teacher, pretrained="random")),
        replace(longer, tokens=replace(longer.tokens, batch=5)),
    ):
        steps = line(other)
        assert Estimator(other, steps, Lineage(store), counts, tflops=1, step_seconds=0).estimate(steps[3]).assumed
    store.remove(line(config)[1].recipe.ref)  # what those shards were is no longer known
    estimator = Estimator(longer, line(longer), Lineage(store), counts, tflops=1, step_seconds=0)
    assert estimator.estimate(tokens).assumed


TUNED = {
    "v2c": {"lr": 3e-3, "seed": 5, "weight_decay": 0.1, "warmup": 9, "decay": "step", "tau": 0.2, "class_weight": 3.0},
    "g2s": {"lr": 2e-3, "seed": 6, "kl_weight": 0.5, "text_scale": 1.0},
    "cpa": {"lr": 1e-3, "seed": 7, "real_weight": 2.0},
}
OTHER_WORK = {
    "v2c": ({"instance_weight": 0.0}, {"points": 65}, {"batch": 5}, {"segmenter": replace(tiny_config().v2c.segmenter, dim=72)}),
    "g2s": ({"kl_weight": 0.0}, {"hidden": 64}),
    "cpa": ({"synthetic": 25}, {"clip": 0.0}),
}  # fmt: skip


def test_settings_that_cost_no_time_do_not_spoil_a_rate(tmp_path: Path) -> None:
    """Of stages that were "built" in no time at all, which is enough for their conditions."""
    store, config = Store(tmp_path), preset("demo")
    fill(store, line(config))

    def measured(config: Config) -> set[str]:
        steps = line(config)
        estimator = Estimator(config, steps, Lineage(store), Counts(train=50, val=50, left=50))
        return {step.name for step in steps if estimator.estimate(step).source.startswith("measured: ")}

    known = measured(config)
    assert {"v2c", "queries", "g2s", "cpa", "mask-tokens", "evaluate"} <= known
    for stage, settings in TUNED.items():
        for name, value in settings.items():
            assert getattr(getattr(config, stage), name) != value
            assert measured(replace(config, **{stage: replace(getattr(config, stage), **{name: value})})) == known
    for stage, changes in OTHER_WORK.items():
        for settings in changes:
            other = replace(config, **{stage: replace(getattr(config, stage), **settings)})
            assert stage not in measured(other), settings


@pytest.mark.parametrize(("seconds", "units"), [("v2c", 1600 * 16), ("g2s", 1000), ("scenes", 3300), ("evaluate", 300)])
def test_in_an_empty_store_the_demo_has_the_seconds_that_it_once_took(seconds: str, units: int, tmp_path: Path) -> None:
    config = preset("demo")
    steps = line(config)
    estimator = Estimator(config, steps, Lineage(Store(tmp_path)), count(config, steps, Store(tmp_path)))
    guesses = {step.name: estimator.estimate(step) for step in steps}
    assert all(guess.assumed and guess.seconds for guess in guesses.values())
    assert guesses["cache-clip"].seconds == pytest.approx(3300 * 5 * DEMO["cache-clip"])
    assert guesses["cache-clip"].source.endswith("; 5 an image, as not counted yet")
    # 9 min 30 s with the installation, as the README has it
    assert 500 < sum(guess.seconds or 0 for guess in guesses.values()) < 570
    assert guesses[seconds].seconds == pytest.approx(units * DEMO[seconds])
    larger = replace(config, v2c=replace(config.v2c, augment=replace(config.v2c.augment, size=192)))
    guess = Estimator(larger, line(larger), Lineage(Store(tmp_path)), estimator.counts).estimate(line(larger)[4])
    assert guess.seconds == pytest.approx(4 * (guesses["v2c"].seconds or 0))


def test_what_is_free_or_a_switch_is_a_setting() -> None:
    """A field that is renamed may not turn into a condition in silence."""
    parts = (
        ScenesConfig(),
        V2CConfig(),
        SegmenterConfig(),
        QueriesConfig(),
        G2SConfig(),
        CPAConfig(),
        EvaluateConfig(),
    )
    there = {field.name for part in parts for field in fields(part)}
    assert there >= FREE | SWITCHES
    assert {name for name in there if name.endswith("_weight")} <= SWITCHES


@pytest.mark.slow
def test_after_a_run_every_stage_of_a_longer_one_has_an_estimate(shared_store: Store, tmp_path: Path) -> None:
    store, config = Store(tmp_path), tiny_config()
    copy_artefacts(shared_store, store, [stage.recipe.ref for stage in build(shared_store, config).values()])
    longer = replace(
        config,
        data=replace(config.data, seed=1),
        v2c=replace(config.v2c, steps=60),
        g2s=replace(config.g2s, steps=12),
    )
    build(store, longer, until="scenes")
    steps = line(longer)
    estimator = Estimator(longer, steps, Lineage(store), count(longer, steps, store), tflops=1, step_seconds=0)
    guesses = {step.name: estimator.estimate(step) for step in steps}
    assert all(guess.source.startswith("measured: ") for guess in guesses.values())
    built = {step.name: store.open(step.recipe.ref).manifest for step in line(config)}
    assert guesses["v2c"].seconds == pytest.approx(10 * built["v2c"].provenance["seconds"])
    assert guesses["v2c"].bytes == built["v2c"].bytes
    assert guesses["g2s"].seconds == pytest.approx(2 * built["g2s"].provenance["seconds"])
    wider = replace(longer, v2c=replace(longer.v2c, points=65))
    steps = line(wider)
    estimator = Estimator(wider, steps, Lineage(store), count(wider, steps, store), tflops=1, step_seconds=0)
    known = [step.name for step in steps if not estimator.estimate(step).assumed]
    assert known == ["scenes", "shard", "text", "cache-clip"]


def test_an_image_that_the_json_spoils_is_not_counted(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "coco", train=6)
    config = configure(Request(preset="coco-zps-r50", coco=str(root)))
    before = count(config, line(config), Store(tmp_path))
    edit_json(root, lambda data: data["annotations"].pop())
    assert count(config, line(config), Store(tmp_path)).train == before.train - 1
