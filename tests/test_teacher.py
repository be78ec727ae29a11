"""The frozen teacher against plain open_clip, PIL, and arithmetic by hand; and what it says when it cannot be had."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
from clip_reference import embed, embed_text, masked, shrink, small_clip
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file

from models import teacher as teacher_module
from models.teacher import SMALL_CLIP, Fill, Teacher, _fuse_quick_gelu, load_teacher
from pipeline.runtime import Runtime
from pipeline.teacher.config import TeacherConfig, teacher_of
from pipeline.world.draw import draw_scene
from pipeline.world.names import stuff_names, thing_names
from storage.errors import UserError
from storage.keys import sha256_file


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(name="small", pretrained="shipped", fill="mean")


@pytest.fixture
def tiny_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The small CLIP's architecture under a name of its own, as open_clip's built-in models have one."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    config = json.loads((SMALL_CLIP / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    return "tiny-clip"


def scene(size: int) -> np.ndarray:
    """A picture (size, size, 3) uint8 of the kind that the small teacher knows."""
    names: dict[str, Any] = {"things": list(thing_names(("circle", "star"))), "stuff": list(stuff_names())}
    return draw_scene(np.random.default_rng(size), size=size, **names).image


def test_embeddings_are_open_clips_own(teacher: Teacher) -> None:
    clip, tokenizer = small_clip()
    inputs = torch.randn(3, 3, teacher.image_size, teacher.image_size, generator=torch.Generator().manual_seed(0))
    rows = teacher.encode_images(inputs)
    assert rows.shape == (3, teacher.dim) and rows.dtype == torch.float32
    assert torch.allclose(rows.double(), torch.stack([embed(clip, i) for i in inputs]), atol=1e-5)
    sentences = ["red circle", "a photo of a blue star", "green stripes"]
    rows = teacher.encode_texts(sentences)
    assert torch.allclose(rows.double(), torch.stack([embed_text(clip, tokenizer, s) for s in sentences]), atol=1e-5)


def test_the_teacher_is_frozen(teacher: Teacher) -> None:
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in teacher.clip.modules())
    assert not teacher.encode_images(torch.zeros(1, 3, 64, 64)).requires_grad


@pytest.mark.parametrize(("height", "width"), [(96, 96), (150, 210), (333, 64), (40, 50)])
def test_preparing_agrees_with_open_clips_own_preprocessing(teacher: Teacher, height: int, width: int) -> None:
    """Squeezed as a whole, bicubic. PIL rounds to whole grey levels twice, so a level or two may be between them."""
    config = teacher.clip.visual.preprocess_cfg
    assert config["resize_mode"] == "squash"
    picture = scene(max(height, width))[:height, :width]
    prepare: Any = image_transform_v2(PreprocessCfg(**config), is_train=False)
    theirs = prepare(Image.fromarray(picture))
    ours = teacher.prepare(torch.from_numpy(picture).permute(2, 0, 1))
    assert ours.shape == theirs.shape == (3, 64, 64)
    level = 1 / 255 / torch.tensor(config["std"]).view(3, 1, 1)
    assert ((ours - theirs).abs() <= 2.5 * level).all()
    assert float(embed(teacher.clip, ours) @ embed(teacher.clip, theirs)) >= 0.99


@pytest.mark.parametrize(("height", "width"), [(150, 210), (333, 64), (40, 50), (70, 70), (200, 5)])
def test_a_letterboxed_image_agrees_with_open_clips_own(teacher: Teacher, height: int, width: int) -> None:
    """open_clip's "longest": the whole image in its own shape, here between black borders."""
    black = Teacher(teacher.clip, teacher.tokenizer, fill="zero")
    config = teacher.clip.visual.preprocess_cfg | {"resize_mode": "longest"}
    picture = scene(max(height, width))[:height, :width]
    prepare: Any = image_transform_v2(PreprocessCfg(**config), is_train=False)
    theirs = prepare(Image.fromarray(picture))
    ours = black.prepare(torch.from_numpy(picture).permute(2, 0, 1), "letterbox")
    assert ours.shape == theirs.shape == (3, 64, 64)
    level = 1 / 255 / torch.tensor(config["std"]).view(3, 1, 1)
    assert ((ours - theirs).abs() <= 2.5 * level).all()


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_a_letterboxed_mask_lies_over_its_image(teacher: Teacher, fill: Fill) -> None:
    other = Teacher(teacher.clip, teacher.tokenizer, fill=fill)
    prepared = other.prepare(
        torch.from_numpy(scene(128)[:128, :62]).permute(2, 0, 1), "letterbox"
    )  # 31 columns: borders of 16 and 17
    masks = torch.zeros(2, 128, 62, dtype=torch.bool)
    masks[0], masks[1, :64] = True, True
    whole, top = other.mask(prepared, masks, "letterbox")
    assert torch.equal(whole, prepared)
    assert torch.equal(top[:, :31, 16:47], prepared[:, :31, 16:47])
    background = other.background.expand(3, 64, 64)
    assert torch.equal(top[:, 34:], background[:, 34:]) and torch.equal(prepared[:, :, :16], background[:, :, :16])
    assert torch.equal(prepared[:, :, 47:], background[:, :, 47:])
    assert not torch.isclose(prepared[:, :, 16:47], background[:, :, 16:47]).all()


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_masking_by_hand(teacher: Teacher, fill: Fill) -> None:
    other = Teacher(teacher.clip, teacher.tokenizer, fill=fill)
    config = teacher.clip.visual.preprocess_cfg
    prepared = other.prepare(torch.from_numpy(scene(96)).permute(2, 0, 1))
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)  # of the input's own size: no blending
    masks[0, 10:30, 5:50], masks[1] = True, True
    left, whole, nothing = other.mask(prepared, masks)
    colour = torch.zeros(3) if fill == "zero" else torch.tensor(config["mean"])
    background = ((colour - torch.tensor(config["mean"])) / torch.tensor(config["std"])).view(3, 1, 1).expand(3, 64, 64)
    assert torch.equal(left[:, 10:30, 5:50], prepared[:, 10:30, 5:50])
    assert torch.allclose(left[:, ~masks[0]], background[:, ~masks[0]], atol=1e-6)
    assert torch.equal(whole, prepared)
    assert torch.allclose(nothing, background, atol=1e-6)


def test_a_shrunken_mask_blends_by_its_share_of_a_pixel(teacher: Teacher) -> None:
    prepared = teacher.prepare(torch.from_numpy(scene(160)).permute(2, 0, 1))
    masks = np.zeros((2, 160, 200), bool)
    masks[0, 20:90, 33:150] = True
    masks[1, :, 101] = True  # one column of 200: nearest-neighbour sampling would lose it
    found = teacher.mask(prepared, torch.from_numpy(masks))
    for one, mask in zip(found, masks, strict=True):
        assert torch.allclose(one, masked(prepared, mask, torch.zeros(3)), atol=1e-5)
    assert np.isclose(shrink(200, 64)[:, 101].sum(), 64 / 200, atol=0.02)
    assert found[1].abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "pretrained", "cure"),
    [
        ("ViT-Z-9", "random", "open_clip.list_models()"),
        ("ViT-Z-9", "openai", "open_clip.list_models()"),
        ("RN50", "nosuchtag", "openai"),  # the tags there are
        ("RN50", "folder/missing.pt", "openai"),
        ("small", "openai", "its weights are 'shipped', 'random', or a file"),
        ("small", "folder/missing.pt", "its weights are 'shipped', 'random', or a file"),
        ("RN50", "shipped", "these are of the teacher 'small'"),
    ],
)
def test_a_teacher_that_cannot_be_had_says_so_in_one_line(name: str, pretrained: str, cure: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_teacher(name=name, pretrained=pretrained, fill="zero")
    message = str(caught.value)
    assert "\n" not in message and cure in message
    assert name in message
    assert pretrained in message or pretrained in ("random", "openai")


def test_weights_that_cannot_be_downloaded_say_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the variable is read at import only
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError) as caught:
        load_teacher(name="ViT-B-16-quickgelu", pretrained="openai", fill="zero")
    message = str(caught.value)
    assert "\n" not in message
    assert "timm/vit_base_patch16_clip_224.openai" in message and "--teacher.pretrained FILE" in message


@pytest.mark.parametrize(("file", "content"), [("a.safetensors", b"junk"), ("a.pt", b"junk"), ("empty.pt", b"")])
def test_a_broken_weights_file_says_so_in_one_line(tmp_path: Path, tiny_clip: str, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    for name in (tiny_clip, "small"):
        with pytest.raises(ValueError) as caught:
            load_teacher(name=name, pretrained=str(tmp_path / file), fill="zero")
        assert "\n" not in str(caught.value) and file in str(caught.value) and "cannot be read" in str(caught.value)


@pytest.mark.parametrize("content", [None, b"junk"])
def test_the_shipped_weights_are_never_replaced_by_random_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    shutil.copy(SMALL_CLIP / "open_clip_config.json", tmp_path)
    if content:
        (tmp_path / "open_clip_model.safetensors").write_bytes(content)
    monkeypatch.setattr(teacher_module, "SMALL_CLIP", tmp_path)
    with pytest.raises(ValueError, match=r"shipped teacher in .* cannot be read .*; install the package again"):
        load_teacher(name="small", pretrained="shipped", fill="mean")


def test_weights_from_a_local_file(tmp_path: Path, tiny_clip: str, teacher: Teacher) -> None:
    path = shutil.copy(SMALL_CLIP / "open_clip_model.safetensors", tmp_path / "mine.safetensors")
    other = load_teacher(name=tiny_clip, pretrained=str(path), fill="mean")
    assert torch.equal(other.encode_texts(["red circle"]), teacher.encode_texts(["red circle"]))


def test_the_small_teacher_takes_other_weights_of_its_architecture(
    tmp_path: Path, teacher: Teacher, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = load_teacher(name="small", pretrained="random", fill="mean", seed=3)
    file = tmp_path / "mine.safetensors"
    save_file({name: value.contiguous() for name, value in drawn.clip.state_dict().items()}, file)
    caplog.clear()
    mine = load_teacher(name="small", pretrained=str(file), fill="mean")
    assert not caplog.records  # such as of weights that are ignored, or drawn
    assert torch.equal(mine.encode_texts(["red circle"]), drawn.encode_texts(["red circle"]))
    assert not torch.allclose(mine.encode_texts(["red circle"]), teacher.encode_texts(["red circle"]), atol=1e-2)
    # its content is in the keys, and a checkpoint trained with it refuses the shipped weights
    config = TeacherConfig(name="small", pretrained=str(file), fill="mean")
    assert config.identity["pretrained"] == f"sha256:{sha256_file(file)}"
    assert teacher_of(config.identity, str(file)) == config
    with pytest.raises(UserError, match="are not those the checkpoint was trained with"):
        teacher_of(config.identity, "")


def test_random_weights_come_from_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.randn(4)
    torch.manual_seed(7)
    rows = [load_teacher(name="small", pretrained="random", fill="zero", seed=s).encode_texts(["a"]) for s in (3, 3, 4)]
    assert torch.equal(torch.randn(4), expected)
    assert torch.equal(rows[0], rows[1]) and not torch.allclose(rows[0], rows[2], atol=1e-2)
    torch.manual_seed(8)  # nor does the global generator move them
    again = load_teacher(name="small", pretrained="random", fill="zero", seed=3)
    assert torch.equal(again.encode_texts(["a"]), rows[0])


@pytest.mark.parametrize(("name", "fill"), [("small", "zero"), ("ViT-B-16-quickgelu", "mean")])
def test_the_shipped_weights_have_their_own_name_and_fill(name: str, fill: Fill) -> None:
    with pytest.raises(ValueError, match="name 'small' and were trained with fill 'mean'; set both"):
        TeacherConfig(name=name, pretrained="shipped", fill=fill)


def test_a_weights_file_counts_by_its_content(tmp_path: Path) -> None:
    for name, content in (("a.pt", b"one"), ("b.pt", b"one"), ("c.pt", b"two")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (TeacherConfig(pretrained=str(tmp_path / f"{name}.pt")).identity for name in "abc")
    assert a == b != c
    assert str(tmp_path) not in str(a)
    with pytest.raises(ValueError, match=r"d\.pt not found; correct --teacher\.pretrained"):
        _ = TeacherConfig(pretrained=str(tmp_path / "d.pt")).identity


def test_a_tag_counts_by_its_name() -> None:
    assert TeacherConfig().identity["pretrained"] == "openai"
    one, other = (TeacherConfig(name="RN50", pretrained="random", seed=seed).identity for seed in (0, 1))
    assert one != other


def test_a_config_loads_the_teacher_it_names(teacher: Teacher) -> None:
    loaded = TeacherConfig(name="small", pretrained="shipped", fill="mean").load(Runtime(device="cpu"))
    assert loaded.fill == "mean"
    assert torch.equal(loaded.encode_texts(["red circle"]), teacher.encode_texts(["red circle"]))


def test_quick_gelu_in_half_precision_is_fused() -> None:
    """One SiLU gives the activation's numbers: to rounding in float32, and in bfloat16 no worse than three kernels."""
    vit = open_clip.model._build_vision_tower(
        64, open_clip.CLIPVisionCfg(image_size=32, patch_size=8, width=64, layers=3, head_width=16), quick_gelu=True
    ).eval()
    inputs = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fused = _fuse_quick_gelu(copy.deepcopy(vit))
    assert not any(isinstance(module, QuickGELU) for module in fused.modules())
    assert any(isinstance(module, QuickGELU) for module in vit.modules())
    with torch.no_grad():
        expected = vit(inputs)
        torch.testing.assert_close(fused(inputs), expected, rtol=1e-5, atol=1e-5)
        error, eager = (
            (tower.to(torch.bfloat16)(inputs.bfloat16()).float() - expected).norm() / expected.norm()
            for tower in (fused, copy.deepcopy(vit))
        )
    assert error < 1.5 * eager
