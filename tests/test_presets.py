"""The COCO presets: what is published about them, their arithmetic, and a few steps of each on files in COCO's
layout.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from coco_factory import make_coco

from flows.cli import main
from flows.presets import GPU_PRESETS, PRESETS, epochs, preset
from flows.request import Request, configure, shorten
from pipeline import v2c
from pipeline.data.config import CocoConfig, SemanticAugmentConfig
from pipeline.line import STAGES, line
from pipeline.teacher.config import TextConfig
from pipeline.training.config import V2CConfig
from storage.keys import Ref

ZPS = ("coco-zps-r50", "coco-zps-maskformer-r50", "coco-zps-r50-regions")
ZSS = ("coco-zss-r50", "coco-zss-r101c", "coco-zss-r50-regions", "coco-zss-r101c-regions")
REGIONS = {"coco-zps-r50-regions": "coco-zps-r50", "coco-zss-r50-regions": "coco-zss-r50", "coco-zss-r101c-regions": "coco-zss-r101c", "demo-regions": "demo"}  # fmt: skip
REDUCED = (
    "--teacher.name", "small", "--teacher.pretrained", "shipped", "--teacher.fill", "mean", "--text.templates", "plain",
    "--v2c.segmenter.backbone-weights", "None", "--v2c.batch", "2", "--v2c.points", "112", "--v2c.calibration-images", "2",
    "--v2c.augment.size", "64", "--v2c.resize.short", "64", "--v2c.resize.longest", "96", "--device", "cpu",
)  # fmt: skip


@pytest.mark.parametrize("name", [*ZPS, *ZSS])
def test_the_published_numbers(name: str) -> None:
    """Mask2Former's and MaskFormer's own training settings, and the paper's."""
    config = preset(name)
    v2c, segmenter = config.v2c, config.v2c.segmenter
    assert config.preset == name and isinstance(config.data, CocoConfig)
    assert (config.teacher.name, config.teacher.pretrained) == ("ViT-B-16-quickgelu", "openai")
    assert config.text == TextConfig(templates=("published",))
    assert (v2c.batch, v2c.lr, v2c.backbone_lr, v2c.clip, v2c.decay) == (16, 1e-4, 0.1, 0.01, "step")
    assert (segmenter.queries, segmenter.dim, segmenter.heads, segmenter.frozen_batchnorm) == (100, 256, 8, True)
    assert segmenter.backbone_weights == "imagenet"
    assert (config.tokens.dtype, v2c.precision, config.queries.views) == ("bfloat16", "bfloat16", 4)
    assert segmenter.backbone == ("resnet101c" if "r101c" in name else "resnet50")
    assert config.data.benchmark == ("coco-panoptic-zps" if name in ZPS else "coco-stuff-zss")
    assert v2c.augment.size == (1024 if name in ZPS else 640)
    if "maskformer" in name:
        assert (segmenter.architecture, segmenter.decoder_layers, v2c.weight_decay) == ("maskformer", 6, 1e-4)
        assert (v2c.mask_loss, v2c.bce_weight, v2c.dice_weight) == ("full", 20, 1)
    else:
        assert (segmenter.architecture, segmenter.decoder_layers, v2c.weight_decay) == ("mask2former", 9, 0.05)
        assert (v2c.class_weight, v2c.bce_weight, v2c.dice_weight, v2c.points) == (2, 5, 5, 12544)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("coco-zps-r50", (134_736, 33_684, 9_000)), ("coco-zss-r50", (354_861, 88_715, 9_000)),
        ("coco-zss-r101c", (354_861, 88_715, 9_000)), ("coco-zps-maskformer-r50", (33_684, 33_684, 33_684)),
        ("coco-zps-r50-regions", (354_861, 88_715, 9_000)), ("coco-zss-r50-regions", (354_861, 88_715, 9_000)),
        ("coco-zss-r101c-regions", (354_861, 88_715, 9_000)),
    ],
)  # fmt: skip
def test_steps_are_epochs_of_the_images_left(name: str, steps: tuple[int, int, int]) -> None:
    config = preset(name)
    assert (config.v2c.steps, config.g2s.steps, config.cpa.steps) == steps
    message = PRESETS[name].__doc__ or ""
    if "zss" not in name or name == "coco-zss-r50":  # the others point to it
        assert all(f"{number:,}" in message for number in steps)
    assert epochs(12, images=44_912, batch=16) == 33_684
    assert 140_350 * 16 / 50 == 44_912


@pytest.mark.parametrize("name", [*ZPS, *ZSS])
def test_stage_3_sums_its_rates_to_what_was_chosen_for_the_ablations(name: str) -> None:
    summed = [
        sum(cpa.lr * cpa.factor(step) for step in range(cpa.steps)) for cpa in (preset(name).cpa, preset("scenes").cpa)
    ]
    assert abs(summed[0] / summed[1] - 1) < 0.01


@pytest.mark.parametrize("name", [*ZPS, *ZSS])
def test_resnet50_starts_from_the_published_weights(name: str, tmp_path: Path) -> None:
    """Their name is in stage 1's key; other weights, and other backbones, have the keys that they had."""
    root = make_coco(tmp_path / "coco") if name in ZPS else None
    config = preset(name).v2c
    ref = Ref(kind="shards", key="0" * 16)

    def weights(config: V2CConfig) -> str | None:
        return v2c.recipe(config, shards=ref, tokens=ref, text=ref).config.segmenter.backbone_weights

    assert weights(config) == ("imagenet" if "r101c" in name else "resnet50.tv_in1k")
    assert weights(replace(config, segmenter=replace(config.segmenter, backbone_weights=None))) is None
    assert weights(replace(config, segmenter=replace(config.segmenter, backbone="resnet18"))) == "imagenet"
    if root:
        (stage,) = (s for s in line(configure(Request(preset=name, coco=str(root)))) if s.name == "v2c")
        assert stage.recipe.config.segmenter.backbone_weights == "resnet50.tv_in1k"


@pytest.mark.parametrize("name", REGIONS)
def test_regions_are_all_that_their_presets_add(name: str) -> None:
    """Besides the protocol, and with it the images, where the other preset has the image filter."""
    config, base = preset(name), preset(REGIONS[name])
    assert config.v2c.candidates and config.tokens.regions == "components"
    assert "outline of the unlabelled area is used, its classes never" in " ".join(
        (PRESETS[name].__doc__ or "").split()
    )
    assert config.data.protocol == ("own" if "zss" in name else "pixel-ignore")
    plain = replace(config.v2c, candidate_mask_weight=0.0, candidate_token_weight=0.0, steps=base.v2c.steps)
    assert plain == base.v2c
    assert replace(config.tokens, regions="none", region_min_area=40) == base.tokens
    for part in ("shard", "teacher", "text", "queries", "cpa"):
        assert getattr(config, part) == getattr(base, part)
    # the offset that serves each best on the validation split
    assert replace(config.evaluate, control_offset=base.evaluate.control_offset) == base.evaluate
    assert replace(config.g2s, steps=base.g2s.steps) == base.g2s
    assert not base.v2c.candidates and base.tokens.regions == "none"


def test_semantic_views_are_those_of_the_semantic_presets_alone() -> None:
    for name in PRESETS:
        augment = preset(name).v2c.augment
        assert isinstance(augment, SemanticAugmentConfig) == (name in ZSS)
        if name in ZSS:
            assert augment == SemanticAugmentConfig(size=640, jitter=(0.5, 2.0), flip=True, colours=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [("run", "--until", "cache-clip"), ("run",), ("ablate", "table4")])
def test_a_gpu_preset_asks_before_it_takes_the_cpu(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--preset", "coco-zps-r50", "--coco", str(make_coco(tmp_path / "coco")), "--teacher.pretrained", "random")
    assert main((*command, *words)) == 2
    error = capsys.readouterr().err
    assert "zs-seg: preset coco-zps-r50 is made for a GPU, and torch finds none: " in error
    assert "pass --device cpu" in error and error.count("\n") == 1
    assert not (tmp_path / "artifacts").exists()
    for free in (("plan",), ("run", "--until", "shard")):
        assert main((*free, *words)) == 0
    assert {*ZPS, *ZSS} == GPU_PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_configures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COCO_ROOT", raising=False)
    real = isinstance(preset(name).data, CocoConfig)
    config = configure(Request(preset=name, coco=str(tmp_path) if real else "", max_steps=20))
    assert {config.v2c.steps, config.g2s.steps, config.cpa.steps} == {20}
    if name in ZPS:
        root = make_coco(tmp_path / "coco")
        steps = line(configure(Request(preset=name, coco=str(root))))
        assert tuple(step.name for step in steps) == STAGES[1:]


def test_max_steps_cuts_but_does_not_stretch_and_is_in_the_keys() -> None:
    demo = configure(Request(preset="demo"))
    cut = configure(Request(preset="demo", max_steps=400))
    assert (cut.v2c.steps, cut.g2s.steps, cut.cpa.steps) == (400, 400, demo.cpa.steps)
    assert configure(Request(preset="demo", max_steps=10_000)) == demo
    keys = [{step.name: step.recipe.key for step in line(config)} for config in (demo, cut)]
    assert [stage for stage in STAGES if keys[0][stage] != keys[1][stage]] == [
        "v2c",
        "queries",
        "g2s",
        "cpa",
        "mask-tokens",
        "evaluate",
    ]
    request = Request(preset="demo", max_steps=400, overrides=("--v2c.lr", "1"))
    assert request.command("run") == "zs-seg run --preset demo --max-steps 400 --v2c.lr 1"
    with pytest.raises(ValueError, match="--max-steps must be 1 or more"):
        shorten(demo, -1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "last"), [("coco-zps-r50", "evaluate"), ("coco-zps-maskformer-r50", "v2c")])
def test_a_reduced_run_goes_through(
    name: str, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The published networks, random weights, two steps a stage, tiny images; without a network connection. Every stage
    of the first; the second differs in stage 1 alone."""
    monkeypatch.chdir(tmp_path)
    root = make_coco(tmp_path / "coco", train=60)
    words = ("run", "--preset", name, "--max-steps", "2", "--coco", str(root), "--threads", "1")
    assert main((*words, *REDUCED, "--until", last)) == 0
    built = [row.split()[1] for row in capsys.readouterr().out.splitlines() if "built in" in row]
    assert built == list(STAGES[1 : STAGES.index(last) + 1])
    if last == "evaluate":
        report = json.loads((tmp_path / "runs" / name / "report.json").read_text())
        assert list(report["lineage"]) == built
