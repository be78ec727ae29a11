"""Paths of networks: the two that ship with the package, and a teacher in the layout of its repository on the hub.

Imports no torch, so that every config may import it.
"""

from __future__ import annotations

from pathlib import Path

SMALL_CLIP = Path(__file__).parent / "small_clip"  # config and weights of the shipped teacher
SMALL_BACKBONE = Path(__file__).parent / "small_backbone"  # <timm name>.safetensors

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"  # architecture and preprocessing
TOKENIZER = "tokenizer.json"  # only of models whose text tower is not CLIP's own


def is_teacher_folder(path: str | Path) -> bool:
    """Whether `path` is a folder with an open_clip model in the layout of its repository."""
    return (Path(path) / CONFIG).is_file()
