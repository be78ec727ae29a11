"""Checkpoints for use elsewhere: the ONNX file against torch, by onnxruntime and numpy alone, and folders without a
store."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from lively import lively
from PIL import Image
from tiny import build, tiny_config

import zs_seg
from flows.cli import main
from models.deformable import sample_levels
from models.portable import is_portable, portable
from models.segmenter import build_segmenter
from pipeline.data.transforms import channels_first, place_for_test
from pipeline.inference.model import load_model
from pipeline.inference.portable import Portable, with_vocabulary
from pipeline.inference.vocabulary import Vocabulary
from pipeline.inference.words import read_words
from storage.store import Store

TOLERANCE = 1e-3  # of logits, which span tens


@pytest.fixture(scope="module")
def trained(shared_store: Store) -> Path:
    return shared_store.path(build(shared_store, tiny_config(), until="v2c")["v2c"].recipe.ref)


@pytest.fixture(scope="module")
def checkpoint(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # masks whose logits are some tens, as those of a trained network; each layer takes seconds to export
    return lively(trained, tmp_path_factory.mktemp("lively"), sharpness=4.0, decoder_layers=1)


def test_samples_by_grid_are_those_of_the_operator() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 7), (3, 4), (1, 2))
    size = sum(h * w for h, w in shapes)
    value = torch.randn(2, size, 4, 6, generator=generator, dtype=torch.float64)
    x, y = (12 * torch.rand(2, 9, 4, 3, 5, generator=generator, dtype=torch.float64) - 3 for _ in range(2))
    weights = torch.rand(2, 9, 4, 3, 5, generator=generator, dtype=torch.float64)
    expected = sample_levels(value, shapes, x, y, weights)
    with portable():
        found = sample_levels(value, shapes, x, y, weights)
    assert not is_portable()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("architecture", ["mask2former", "maskformer"])
def test_the_portable_network_is_the_network(architecture: Any) -> None:
    torch.manual_seed(0)
    network = build_segmenter(
        backbone="test_resnet", backbone_weights=None, frozen_batchnorm=True, queries=5, dim=32, heads=4,
        encoder_layers=2, encoder_ffn=32, encoder_points=3, decoder_layers=3, decoder_ffn=32, architecture=architecture,
    ).eval()  # fmt: skip
    images = torch.randn(2, 3, 192, 256)
    with torch.no_grad():
        expected = network(images)
        with portable():
            found = network(images)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("onnx") / "net.onnx"
    words = ("export", str(checkpoint), "--onnx", str(file), "--names", "zebra,sofa|couch", "--stuff", "sea")
    assert main(words) == 0
    return file


@pytest.mark.slow
def test_onnxruntime_gives_torchs_logits_for_any_size_and_any_names(exported: Path, checkpoint: Path) -> None:
    assert {file.name for file in exported.parent.iterdir()} == {"net.onnx", "net.npy", "net.json"}
    session = onnxruntime.InferenceSession(exported)
    about, rows = json.loads(exported.with_suffix(".json").read_text()), np.load(exported.with_suffix(".npy"))
    assert [c["name"] for c in about["classes"]][-3:] == ["zebra", "sofa, couch", "sea"]
    assert [c["rows"] for c in about["classes"]] == [*([i] for i in range(57)), [57, 58], [59]]
    assert rows.shape == (60, 128) and rows.dtype == np.float32
    model = load_model(checkpoint)
    network, largest = Portable(model).eval(), 0.0
    rng = np.random.default_rng(0)
    for (height, width), names in (((96, 96), 60), ((64, 160), 1), ((288, 224), 7)):
        image = rng.uniform(0, 255, (1, 3, height, width)).astype(np.float32)
        found: Any = session.run(None, {"image": image, "text": rows[:names]})
        masks, classes = found
        assert masks.shape == (1, 20, height // 4, width // 4) and classes.shape == (1, 20, names)
        with torch.no_grad():
            expected = network(torch.from_numpy(image), torch.from_numpy(rows[:names]))
        for one, other in zip((masks, classes), expected, strict=True):
            assert np.ptp(other.numpy()) > 1
            largest = max(largest, float(np.abs(one - other.numpy()).max()))
    assert largest < TOLERANCE


@pytest.mark.slow
def test_the_example_of_the_readme_needs_onnxruntime_and_numpy_alone(
    exported: Path, checkpoint: Path, trained: Path, tmp_path: Path
) -> None:
    """And finds the segments that `zs_seg` finds."""
    readme = (Path(__file__).parents[1] / "flows" / "README.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "onnxruntime" in block]
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 16
    assert {word for line in lines for word in re.findall(r"^import (\w+)", line)} <= {"json", "numpy", "onnxruntime"}
    scene = np.asarray(Image.open(next((Path(trained).parents[1]).glob("scenes/*/val2017/*.jpg"))).convert("RGB"))
    np.save(tmp_path / "image.npy", scene)
    code = example.replace('"net.', f'"{exported.parent}/net.') + "\nprint(json.dumps([names, kept.tolist()]))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    names, kept = json.loads(ran.stdout.splitlines()[-1])

    seg = zs_seg.load(checkpoint, threads=1)
    look = seg.predictor.look(scene)
    chooser = seg.predictor.chooser(read_words(["zebra", "sofa|couch", "sea:stuff"]))
    scores = model_scores(seg, look, chooser)
    assert kept == (scores.amax(1) > chooser.thresholds.object_threshold).nonzero()[:, 0].tolist() and kept
    assert names == [chooser.vocabulary.classes.names[k] for k in scores[kept].argmax(1).tolist()]
    assert place_for_test(96, 96, seg.predictor.model.meta.resize).view == channels_first(scene).shape[1:]


def model_scores(seg: zs_seg.Segmenter, look: Any, chooser: Any) -> torch.Tensor:
    return seg.predictor.model.logits(look.output.features, chooser.classes.text).sigmoid()


@pytest.mark.slow
def test_a_folder_needs_no_store(
    shared_store: Store, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = tmp_path / "mine"
    store = ("--store", str(shared_store.root))
    words = ("export", trained.name, *store, "--folder", str(folder), "--names", "zebra", "--stuff", "sea")
    assert main(words) == 0
    assert {file.name for file in folder.iterdir()} == {"README.md", "meta.json", "tokens.json", "weights.safetensors"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZS_SEG_STORE", str(tmp_path / "none"))
    seg, source = zs_seg.load("mine", threads=1), zs_seg.load(trained, store=shared_store.root, threads=1)
    assert seg.classes == (*source.classes, "zebra", "sea")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)
    choices: list[dict[str, Any]] = [{}, {"with_teacher": True}]
    for options in choices:
        one = seg(image, object_threshold=0, **options)
        other = source(image, ["zebra", "sea:stuff"], object_threshold=0, **options)
        assert np.array_equal(one.map, other.map) and one.segments == other.segments
    assert seg.predictor.token_options == source.predictor.token_options

    card = (folder / "README.md").read_text()
    for stage in ("scenes", "shard", "text", "cache-clip", "v2c"):
        assert f"| {stage} | " in card
    assert "58 classes" in card and "*zebra*" in card and "mean nothing" in card
    capsys.readouterr()
    assert main(words) == 2 and "is there already and not empty" in capsys.readouterr().err
    only = tmp_path / "only"
    assert main(("export", "mine", "--folder", str(only), "--names", "sea", "--only")) == 0
    assert zs_seg.load(only).classes == ("sea",)
    assert "The store that it was exported from does not have it." in (only / "README.md").read_text()


@pytest.mark.slow
def test_the_card_has_the_scores_of_the_report(shared_store: Store, tmp_path: Path) -> None:
    stages = build(shared_store, tiny_config())
    ref = stages["cpa"].recipe.ref
    store = ("--store", str(shared_store.root))
    assert main(("export", ref.key, *store, "--folder", str(tmp_path / "mine"))) == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    report = json.loads((shared_store.path(stages["evaluate"].recipe.ref) / "report.json").read_text())
    expected = " | ".join(f"{report['transductive'][name]:.1f}" for name in ("sPQ", "uPQ", "hPQ"))
    assert f"{stages['evaluate'].recipe.ref} | {expected}" in card
    assert "transductive" in card and "| cpa | " in card and "| queries | " in card


def test_mistakes_are_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*words: str) -> str:
        assert main(("export", str(trained), *words)) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "nothing is asked for" in fails()
    assert "folder no/such not found" in fails("--onnx", "no/such/net.onnx")
    assert "nothing to choose from" in fails("--folder", str(tmp_path / "x"), "--only")
    assert not list(tmp_path.iterdir())


def test_a_model_with_another_vocabulary_keeps_the_rest(trained: Path) -> None:
    model = load_model(trained)
    classes = replace(model.meta.classes, ids=[7], names=["x"], isthing=[True], seen=[False])
    other = with_vocabulary(model, Vocabulary(embedding=model.text[:1], classes=classes))
    assert other.meta == replace(model.meta, classes=classes) and other.segmenter is model.segmenter
