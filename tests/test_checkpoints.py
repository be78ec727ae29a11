"""Checkpoints: tensors and state come back bit for bit; training goes on exactly; damage is an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from storage.checkpoints import (
    load_checkpoint,
    load_training_state,
    save_checkpoint,
    save_training_state,
)


def same(a: Any, b: Any) -> bool:
    """Equal in type, order and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    shared = torch.randn(4, 3)
    tensors = {
        "a": shared,
        "tied": shared,
        "transposed": shared.T,
        "half": shared.half(),
        "brain": shared.bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor([True]),
    }
    meta = {"classes": ["cat", "é"], "seen": [True, False], "threshold": 0.1, "nested": {"none": None}}
    save_checkpoint(tmp_path / "c", tensors, meta)
    loaded, loaded_meta = load_checkpoint(tmp_path / "c")
    assert loaded.keys() == tensors.keys() and all(same(loaded[name], tensors[name]) for name in tensors)
    assert loaded_meta == meta
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["meta.json", "weights.safetensors"]


def test_equal_checkpoints_have_equal_bytes(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.arange(i) for i in range(20)}
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, tensors, {"x": 1})
        save_training_state(tmp_path / name, {"model": tensors, "step": 3})
    for file in ("weights.safetensors", "meta.json", "training.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("file", ["weights.safetensors", "meta.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "noise"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, file: str, damage: str) -> None:
    folder = tmp_path / "c"
    save_checkpoint(folder, {"a": torch.ones(9)}, {"x": "y" * 50})
    path = folder / file
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut": data[:-9], "empty": b"", "noise": b"\xff" * 80}[damage])
    with pytest.raises(ValueError, match=f"checkpoint {folder} is missing or damaged") as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_nested_state_comes_back(tmp_path: Path) -> None:
    state = {
        "step": 10**30,
        "lr": [1e-4, float("inf")],
        "betas": (0.9, 0.999),
        "param": {0: {"exp": torch.randn(2, 2), "step": torch.tensor(3.0)}, 1: {}},
        "rng": {"torch": torch.get_rng_state(), "numpy": np.random.default_rng(1).bit_generator.state},
        "tensor": {"tensor": 1, "dict": []},  # names that the file itself uses
        "flags": [None, True, "text", [], ()],
    }
    assert load_training_state(tmp_path) is None
    save_training_state(tmp_path, state)
    assert same(load_training_state(tmp_path), state)
    assert [path.name for path in tmp_path.iterdir()] == ["training.safetensors"]


@pytest.mark.parametrize("value", [object(), np.float32(1), np.zeros(2), {1.5: 2}, {True: 1}, b"x", {1, 2}])
def test_what_cannot_come_back_is_refused(tmp_path: Path, value: object) -> None:
    save_training_state(tmp_path, {"step": 1})
    with pytest.raises(TypeError, match="training state"):
        save_training_state(tmp_path, {"x": [value]})
    assert load_training_state(tmp_path) == {"step": 1}  # the last good one stays


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_damaged_state_is_named(tmp_path: Path, length: int) -> None:
    save_training_state(tmp_path, {"a": torch.ones(50)})
    file = tmp_path / "training.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"training\.safetensors is damaged; delete it"):
        load_training_state(tmp_path)


def test_training_goes_on_exactly(tmp_path: Path) -> None:
    """Adam with momentum and a random stream: 3 + 3 steps through a file are the same bits as 6 steps."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer, torch.Generator]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1), torch.Generator().manual_seed(5)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, rng: torch.Generator) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(6, 4, generator=rng)).square().mean().backward()
            optimizer.step()

    model, optimizer, rng = start()
    train(model, optimizer, rng)
    save_training_state(
        tmp_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng.get_state()}
    )
    train(model, optimizer, rng)

    again, optimizer, rng = start()
    state = load_training_state(tmp_path)
    assert state is not None
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    rng.set_state(state["rng"])
    train(again, optimizer, rng)
    assert same(dict(again.state_dict()), dict(model.state_dict()))


def test_a_disk_that_takes_no_more_is_an_oserror_and_leaves_the_last_state(tmp_path: Path) -> None:
    """A limit on the size of files stands for the end of the disk; in a process of its own, for it cannot be lifted."""
    code = """
import resource, sys, torch
from pathlib import Path
from storage.checkpoints import load_training_state, save_training_state
folder = Path(sys.argv[1])
save_training_state(folder, {"step": 1, "weight": torch.ones(10)})
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save_training_state(folder, {"step": 2, "weight": torch.ones(10_000)})
except OSError as error:
    print(error.strerror, load_training_state(folder)["step"], sorted(p.name for p in folder.iterdir()))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "File too large 1 ['training.safetensors']\n"
