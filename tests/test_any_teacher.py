"""Teachers of other kinds: SigLIP's and ConvNeXt's towers, a folder of the hub's files, a tokenizer from a cache, a
file's preprocessing.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from open_clip.constants import INCEPTION_MEAN
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from models.errors import ModelError
from models.teacher import load_teacher
from pipeline.teacher.config import TeacherConfig
from pipeline.teacher.prompts import Prompts

SIGLIP: dict[str, Any] = {
    "embed_dim": 192, "init_logit_bias": -10, "custom_text": True,
    "vision_cfg": {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {"context_length": 16, "vocab_size": 32, "hf_tokenizer_name": "timm/tiny-siglip", "tokenizer_kwargs": {"clean": "canonicalize"},
                 "width": 64, "heads": 2, "layers": 1, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
}  # fmt: skip
CONVNEXT: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"timm_model_name": "convnext_atto", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear", "image_size": 64},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small models under names of their own, as open_clip's built-in ones have; no network, and a cache of our
    own.
    """
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    (tmp_path / "configs").mkdir()
    for name, config in (("tiny-siglip", SIGLIP), ("tiny-convnext", CONVNEXT)):
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def write_tokenizer(folder: Path) -> None:
    words = ["<pad>", "</s>", "<unk>", "red", "circle", "blue", "star", "a", "photo", "of"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def fill_cache(repository: Path) -> None:
    """The tokenizer's files as a run with a network leaves them, which also notes that there is no config.json."""
    write_tokenizer(repository / "snapshots" / "0123")
    for folder in ("refs", ".no_exist/0123"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    (repository / ".no_exist" / "0123" / "config.json").touch()


def write_repository(folder: Path, seed: int = 0) -> Path:
    """A SigLIP's files, as its repository on the hub has them."""
    torch.manual_seed(seed)
    clip = open_clip.create_model("tiny-siglip", load_weights=False)
    folder.mkdir()
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SIGLIP, "preprocess_cfg": half}))
    write_tokenizer(folder)
    return folder


def test_a_folder_of_the_hubs_files_brings_weights_tokenizer_and_preprocessing(tmp_path: Path) -> None:
    folder = write_repository(tmp_path / "siglip")
    teacher = load_teacher(name="tiny-siglip", pretrained=str(folder), fill="mean")
    theirs: Any = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red circle"])
    assert tokens.shape == (1, 16) and tokens[0, :3].tolist() == [7, 3, 4]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(theirs.encode_text(tokens), dim=-1)
    torch.testing.assert_close(teacher.encode_texts(["a red circle"]), expected)
    assert teacher.mean.flatten().tolist() == [0.5] * 3 and teacher.dim == 192
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    assert teacher.encode_images(teacher.prepare(image)[None]).shape == (1, 192)


def test_names_are_compared_by_the_teachers_own_tokenizer(tmp_path: Path) -> None:
    """This one has letters of one case and no name for cars: capitals, and every word unknown to it, are one to it."""
    config = TeacherConfig(name="tiny-siglip", pretrained=str(write_repository(tmp_path / "siglip")))
    prompts = Prompts(tokenizer=config.load_tokenizer(), templates=["{}", "a photo of a {}"], clean_names=False)
    assert prompts.length == 16
    apart = ["red circle", "blue circle", "red star", "star"]
    assert len(prompts.classes(apart)) == 4 and prompts.cut(apart) == []
    for one, other in (("red circle", "RED circle"), ("自動車", "自転車"), ("zebra", "giraffe")):
        with pytest.raises(ValueError, match=f"classes '{one}' and '{other}' are one to the teacher"):
            prompts.classes([one, "star", other])
    # the sentence "a photo of a red ... red" has 4 tokens more than the name
    for words, cut in ((11, False), (12, False), (13, True), (40, True)):
        assert prompts.is_cut(" ".join(["red"] * words)) == cut, words


def test_a_folder_counts_by_its_files(tmp_path: Path) -> None:
    def identity(folder: Path) -> dict[str, Any]:
        return TeacherConfig(name="tiny-siglip", pretrained=str(folder)).identity

    first = write_repository(tmp_path / "a")
    same = Path(shutil.copytree(first, tmp_path / "b"))
    (same / "README.md").write_text("of no account")
    assert identity(first) == identity(same) != identity(write_repository(tmp_path / "c", seed=1))
    assert str(tmp_path) not in str(identity(first))
    tokenizer = (same / "tokenizer.json").read_text()
    (same / "tokenizer.json").write_text(tokenizer.replace('"circle"', '"disc"'))
    assert identity(first) != identity(same)
    (same / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"open_clip_model.safetensors not found; correct --teacher.pretrained"):
        identity(same)


def test_random_siglip_needs_its_tokenizer_and_says_which_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_teacher(name="tiny-siglip", pretrained="random", fill="zero")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("tokenizer.json", "https://huggingface.co/timm/tiny-siglip", "FOLDER", str(tmp_path / "cache")):
        assert part in message


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as Python notes a package that cannot be imported
    with pytest.raises(
        ModelError, match="'tiny-siglip' .*transformers.* not installed.*`make install-dev`.*\\[hf\\]"
    ) as caught:
        load_teacher(name="tiny-siglip", pretrained="random", fill="zero")
    assert "\n" not in str(caught.value)
    assert load_teacher(name="tiny-convnext", pretrained="random", fill="zero").dim == 64


def test_a_random_convnext_embeds_images_and_texts() -> None:
    teacher = load_teacher(name="tiny-convnext", pretrained="random", fill="zero", seed=3)
    assert teacher.dim == 64 and teacher.tokenizer(["a red circle"]).shape == (1, 20)
    rows = teacher.encode_texts(["a red circle", "a blue star"])
    assert torch.isfinite(rows).all() and not torch.allclose(rows[0], rows[1])
    assert teacher.encode_images(torch.zeros(1, 3, 64, 64)).shape == (1, 64)


def test_a_broken_folder_is_named(tmp_path: Path) -> None:
    folder = write_repository(tmp_path / "siglip")
    with pytest.raises(ValueError, match="cannot be read as tiny-convnext") as caught:
        load_teacher(name="tiny-convnext", pretrained=str(folder), fill="zero")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_bare_file_is_normalised_as_the_models_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP's file does not say that its images are normalised otherwise than CLIP's; open_clip's list of weights
    does.
    """
    folder = write_repository(tmp_path / "siglip")
    fill_cache(tmp_path / "cache" / "models--timm--tiny-siglip")
    known = {**open_clip.pretrained._PRETRAINED, "tiny-siglip": {"webli": open_clip.pretrained._slpcfg(hf_hub="x/y/")}}
    monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", known)
    file = str(folder / "open_clip_model.safetensors")
    teacher = load_teacher(name="tiny-siglip", pretrained=file, fill="mean")
    assert teacher.mean.flatten().tolist() == list(INCEPTION_MEAN)
    known["tiny-siglip"]["other"] = open_clip.pretrained._pcfg(hf_hub="x/z/")
    with pytest.raises(ValueError, match="differ in how images are normalised.*open_clip_config.json.*FOLDER"):
        load_teacher(name="tiny-siglip", pretrained=file, fill="mean")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "context"), [("convnext_base", 77), ("ViT-B-16-quickgelu", 77)])
def test_real_towers_load_with_random_weights(name: str, context: int) -> None:
    teacher = load_teacher(name=name, pretrained="random", fill="zero")
    assert teacher.dim == 512 and teacher.tokenizer(["a dog"]).shape == (1, context)
    image = teacher.prepare(torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8))[None]
    assert teacher.encode_images(image).shape == (1, 512)


@pytest.mark.slow
def test_real_siglip_loads_with_random_weights_and_a_tokenizer_from_the_cache(tmp_path: Path) -> None:
    fill_cache(tmp_path / "cache" / "models--timm--ViT-B-16-SigLIP")
    teacher = load_teacher(name="ViT-B-16-SigLIP", pretrained="random", fill="mean")
    assert teacher.dim == 768 and teacher.tokenizer(["a red circle"]).shape == (1, 64)
    assert teacher.encode_images(torch.zeros(1, 3, 224, 224)).shape == (1, 768)
