"""Prediction: a checkpoint's teacher is found again from what the checkpoint records of it, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.teacher.config import TeacherConfig, teacher_of


def test_the_teacher_comes_back_from_its_identity(tmp_path: Path) -> None:
    weights = tmp_path / "clip.pt"
    weights.write_bytes(b"weights")
    for config in (
        TeacherConfig(),
        TeacherConfig(name="small", pretrained="shipped", fill="mean"),
        TeacherConfig(name="small", pretrained="random", seed=5),
    ):
        assert teacher_of(config.identity, "") == config
    local = TeacherConfig(pretrained=str(weights), fill="mean")
    assert teacher_of(local.identity, str(weights)) == local


def test_other_weights_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "clip.pt"
    weights.write_bytes(b"weights")
    identity = TeacherConfig(pretrained=str(weights)).identity
    with pytest.raises(ValueError, match="pass --teacher.pretrained FILE"):
        teacher_of(identity, "")
    weights.write_bytes(b"others")
    with pytest.raises(ValueError, match="are not those the checkpoint was trained with"):
        teacher_of(identity, str(weights))
