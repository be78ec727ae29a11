"""Tiny CLIPs of other makes than the shipped one, with random weights, under names of their own in open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest

from models.teacher import Fill, Teacher, load_teacher

TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1}
VISION: dict[str, dict[str, Any]] = {
    "tiny-vit": {"image_size": 64, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16},
    "tiny-map-pooling": {
        "image_size": 64, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none",
    },
    "tiny-convnext": {
        "image_size": 64, "timm_model_name": "test_convnext", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear",
    },
}  # fmt: skip


def tiny_clip(name: str, folder: Path, patch: pytest.MonkeyPatch, *, fill: Fill = "zero") -> Teacher:
    """A teacher of `VISION`; open_clip forgets its name with the `patch`."""
    add_config(name, {"embed_dim": 32, "vision_cfg": VISION[name], "text_cfg": TEXT}, folder, patch)
    return load_teacher(name=name, pretrained="random", fill=fill, seed=3)


def add_config(name: str, config: dict[str, Any], folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Give open_clip a model of its own making."""
    patch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    patch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    (folder / name).mkdir()
    (folder / name / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / name)
