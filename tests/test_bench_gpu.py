"""The script for a GPU runs here at toy size: every section, every row in the file, and an exit status that is a verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flows.presets import preset
from models import deformable_torch
from pipeline.bench import gpu


@pytest.mark.slow
def test_every_section_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    assert gpu.main(["--device", "cpu", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    errors = [row for row in rows if row["name"].startswith("error of")]
    assert len(errors) >= 10 and all(row["ratio"] <= 1 for row in errors)
    assert any("coco-zps-r50" in row["name"] for row in rows)
    assert (tmp_path / "rows.profile.txt").stat().st_size
    said = capsys.readouterr().err
    assert all(f"{name}: at " in said for name in gpu.SECTIONS)


@pytest.mark.parametrize("name", gpu.PRESETS)
def test_stage_1_is_that_of_the_presets(name: str) -> None:
    assert replace(preset(name).v2c, steps=1) == gpu.PRESETS[name]


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = deformable_torch.sample

    def wrong(value: torch.Tensor, *rest: object) -> torch.Tensor:
        out = right(value, *rest)  # pyright: ignore[reportArgumentType]
        return out * 1.001 if value.dtype == torch.float32 else out

    monkeypatch.setattr(deformable_torch, "sample", wrong)
    assert gpu.main(["--device", "cpu", "--only", "sampling"]) == 1


def test_a_section_that_raises_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(card: gpu.Card) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(gpu.SECTIONS, "step", broken)  # pyright: ignore[reportArgumentType]
    file = tmp_path / "rows.json"
    assert gpu.main(["--device", "cpu", "--json", str(file), "--only", "sampling", "step", "half"]) == 1
    names = [row["name"] for row in json.loads(file.read_text())]
    assert any("sampling" in name for name in names) and any("bfloat16" in name for name in names)


def test_no_section_starts_after_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--minutes", "0", "--only", "sampling", "half"]) == 0
    assert capsys.readouterr().err.count("not run") == 2
