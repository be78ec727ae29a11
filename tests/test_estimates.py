"""What `zs-seg plan` says before anything starts: counts by a slow loop, rates from what was built, and which of them
is assumed.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from coco_factory import edit_json, make_coco
from tiny import build, copy_artefacts, tiny_config
from torchvision.models import ViT_B_16_Weights, ViT_B_32_Weights, ViT_H_14_Weights, ViT_L_16_Weights, WeightsEnum

from flows.cli import main
from flows.request import Request, configure
from pipeline.data.benchmarks import load_benchmark
from pipeline.line import line
from pipeline.planning.counts import Counts, count
from pipeline.planning.estimates import Estimator, teacher_dim, teacher_gflop
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
    assert "cache-clip assumed: 35.1 GFLOP an input at 50 TFLOP/s" in rest and "measured:" not in rest
    assert rows["v2c"][2:] == ["-", "-", "no v2c in this store yet"] and rows["cache-clip"][2].startswith("~")
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
    assert estimator.estimate(steps[4]).seconds is None  # no v2c was made
    for other in (
        replace(longer, teacher=replace(longer.teacher, pretrained="random")),
        replace(longer, tokens=replace(longer.tokens, batch=5)),
    ):
        steps = line(other)
        assert (
            Estimator(other, steps, Lineage(store), counts, tflops=1, step_seconds=0).estimate(steps[3]).seconds is None
        )
    store.remove(line(config)[1].recipe.ref)  # what those shards were is no longer known
    estimator = Estimator(longer, line(longer), Lineage(store), counts, tflops=1, step_seconds=0)
    assert estimator.estimate(tokens).seconds is None


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
    known = [step.name for step in steps if estimator.estimate(step).seconds is not None]
    assert known == ["scenes", "shard", "text", "cache-clip"]


def test_an_image_that_the_json_spoils_is_not_counted(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "coco", train=6)
    config = configure(Request(preset="coco-zps-r50", coco=str(root)))
    before = count(config, line(config), Store(tmp_path))
    edit_json(root, lambda data: data["annotations"].pop())
    assert count(config, line(config), Store(tmp_path)).train == before.train - 1
