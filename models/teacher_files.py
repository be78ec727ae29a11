"""A teacher as files on this machine, in the layout of its repository on the hub: which files those are. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"  # architecture and preprocessing
TOKENIZER = "tokenizer.json"  # only of models whose text tower is not CLIP's own


def is_teacher_folder(path: str | Path) -> bool:
    """Does the folder hold an open_clip model as its repository does?"""
    return (Path(path) / CONFIG).is_file()
