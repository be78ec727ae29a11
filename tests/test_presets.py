"""The COCO presets: what is published about them, their arithmetic, and a few steps of each on files in COCO's
layout.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from coco_factory import make_coco

from flows.cli import main
from flows.presets import PRESETS, epochs, preset
from flows.request import Request, configure, shorten
from pipeline.data.config import CocoConfig
from pipeline.line import STAGES, line
from pipeline.teacher.config import TextConfig

ZPS = ("coco-zps-r50", "coco-zps-maskformer-r50")
ZSS = ("coco-zss-r50", "coco-zss-r101c")
REDUCED = (
    "--teacher.name", "small", "--teacher.pretrained", "shipped", "--teacher.fill", "mean", "--text.templates", "plain",
    "--v2c.segmenter.backbone-weights", "None", "--v2c.batch", "2", "--v2c.points", "112", "--v2c.calibration-images", "2",
    "--v2c.augment.size", "64", "--v2c.resize.short", "64", "--v2c.resize.longest", "96",
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
    assert segmenter.backbone == ("resnet101c" if name.endswith("r101c") else "resnet50")
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
        ("coco-zps-r50", (110_100, 27_525)), ("coco-zss-r50", (354_861, 88_715)), ("coco-zss-r101c", (354_861, 88_715)),
        ("coco-zps-maskformer-r50", (27_525, 27_525)),
    ],
)  # fmt: skip
def test_steps_are_epochs_of_the_images_left(name: str, steps: tuple[int, int]) -> None:
    config = preset(name)
    assert (config.v2c.steps, config.g2s.steps, config.cpa.steps) == (steps[0], steps[1], steps[1])
    message = PRESETS[name].__doc__ or ""
    if name != "coco-zss-r101c":  # which says that it is coco-zss-r50 with another backbone
        assert f"{steps[1]:,}" in message
    assert epochs(12, images=36_700, batch=16) == 27_525


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
