from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import deformable_torch
from models.deformable import DeformableAttention, require_compiler, sample_levels, token_places
from models.errors import ModelError

SHAPES = ((2, 3), (4, 6))
TRITON_SAMPLES = Path(__file__).parent / "helpers" / "triton_samples.py"


def random_inputs(
    queries: int = 5, heads: int = 2, width: int = 3, points: int = 4, shapes: deformable_torch.Shapes = SHAPES
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp64 value, x, y (a third of the places outside the maps) and weights, of two images."""
    generator = torch.Generator().manual_seed(0)

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    places = (2, queries, heads, len(shapes), points)
    height, breadth = torch.tensor(shapes, dtype=torch.float64)[:, :, None].unbind(1)
    value = rand(2, sum(h * w for h, w in shapes), heads, width) - 0.5
    return value, rand(*places) * (breadth + 3) - 2, rand(*places) * (height + 3) - 2, rand(*places)


@torch.no_grad()
def slow_sample(value: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """One point, one corner, one channel vector at a time."""
    batch, queries, heads, levels, points = weights.shape
    out = torch.zeros(batch, queries, heads, value.shape[3], dtype=value.dtype)
    for b in range(batch):
        for q in range(queries):
            for m in range(heads):
                start = 0
                for level in range(levels):
                    h, w = SHAPES[level]
                    for p in range(points):
                        i = (b, q, m, level, p)
                        for row in (math.floor(y[i]), math.floor(y[i]) + 1):
                            for column in (math.floor(x[i]), math.floor(x[i]) + 1):
                                if 0 <= row < h and 0 <= column < w:
                                    share = (1 - abs(x[i] - column)) * (1 - abs(y[i] - row)) * weights[i]
                                    out[b, q, m] += share * value[b, start + row * w + column, m]
                    start += h * w
    return out.flatten(2)


def test_sampling_equals_a_loop_over_points() -> None:
    value, x, y, weights = random_inputs()
    assert ((x < -1) | (x > 6)).any() and (y < 0).any()
    torch.testing.assert_close(sample_levels(value, SHAPES, x, y, weights), slow_sample(value, x, y, weights))


def test_places_on_cells_borders_and_far_away() -> None:
    value, x, y, weights = random_inputs(queries=6)
    x[:, 0], y[:, 0] = 0.0, 1.0
    x[:, 1], y[:, 1] = -1.0, -1.0
    x[..., 0, 0][:, 2], y[..., 0, 0][:, 2] = 3.0, 2.0  # one cell beyond the coarse map's end
    x[..., 1, 0][:, 2], y[..., 1, 0][:, 2] = 6.0, 4.0
    expected = slow_sample(value, x, y, weights)
    torch.testing.assert_close(sample_levels(value, SHAPES, x, y, weights), expected)
    x[:, 3], y[:, 4] = 1e30, -1e30
    found = sample_levels(value, SHAPES, x, y, weights)
    assert not found[:, 3:5].any()
    torch.testing.assert_close(found[:, :3], expected[:, :3])


def test_sampling_gradients() -> None:
    """All four, also of queries that are not the tokens, and of places outside the maps."""
    leaves = [tensor.requires_grad_() for tensor in random_inputs(queries=3, points=2)]
    assert torch.autograd.gradcheck(lambda v, x, y, w: sample_levels(v, SHAPES, x, y, w), leaves)


def test_sampling_is_a_sound_operator() -> None:
    """Schema, shapes without data, autograd and tracing, as torch.compile relies on them."""
    value, x, y, weights = (tensor.requires_grad_() for tensor in random_inputs(queries=2))
    torch.library.opcheck(torch.ops.zs_seg.deformable_sample.default, (value, [2, 3, 4, 6], x, y, weights))


def test_module_equals_a_loop_over_points() -> None:
    torch.manual_seed(0)
    module = DeformableAttention(dim=8, heads=2, levels=2, points=3).double()
    for parameter in module.parameters():  # the start has zero weights: nothing would depend on the query
        torch.nn.init.normal_(parameter, std=0.5)
    count = sum(h * w for h, w in SHAPES)
    tokens, positions = torch.randn(2, count, 8).double(), torch.randn(count, 8).double()

    queries = tokens + positions
    offsets = module.sampling_offsets(queries).view(2, count, 2, 2, 3, 2)
    weights = module.attention_weights(queries).view(2, count, 2, 6).softmax(-1).view(2, count, 2, 2, 3)
    centres = torch.cat(
        [torch.tensor([[(i + 0.5) / w, (j + 0.5) / h] for j in range(h) for i in range(w)]) for h, w in SHAPES]
    ).double()
    places = torch.empty_like(offsets)
    for level, (h, w) in enumerate(SHAPES):
        own = centres * torch.tensor([w, h]) - 0.5  # in cells, cell centres at integers
        places[:, :, :, level] = own[None, :, None, None] + offsets[:, :, :, level]
    value = module.value_proj(tokens).view(2, count, 2, 4)
    expected = module.output_proj(slow_sample(value, places[..., 0], places[..., 1], weights))

    torch.testing.assert_close(module(tokens, positions, SHAPES), expected, rtol=1e-6, atol=1e-6)


def test_start_looks_around_each_token() -> None:
    module = DeformableAttention(dim=16, heads=4, levels=2, points=3)
    offsets = module.sampling_offsets(torch.randn(16)).view(4, 2, 3, 2)
    # head 0 looks right, head 1 down, head 2 left, head 3 up, each point one cell further
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    expected = directions[:, None, None] * torch.arange(1, 4)[:, None]
    torch.testing.assert_close(offsets, expected.expand(4, 2, 3, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_cached_places_serve_training_after_inference(mode: type) -> None:
    token_places.cache_clear()
    module = DeformableAttention(dim=8, heads=2, levels=2, points=2)
    tokens, positions = torch.randn(1, 30, 8), torch.randn(30, 8)
    with mode():
        module(tokens, positions, SHAPES)
    module(tokens, positions, SHAPES).sum().backward()
    assert module.value_proj.weight.grad is not None


# Triton


@pytest.mark.slow
@pytest.mark.parametrize("task", ["interpret", "compile"])
def test_triton_kernels_without_a_gpu(task: str) -> None:
    """Triton's interpreter runs them on CPU tensors and they equal the PyTorch ones; and its compiler takes them down
    to an H100's machine code. In a process of their own, since Triton reads the switch when a kernel is defined."""
    pytest.importorskip("triton")
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if task == "interpret" else {})
    ran = subprocess.run(
        [sys.executable, str(TRITON_SAMPLES), task], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["ok"] * (6 if task == "interpret" else 4)


@pytest.mark.parametrize(
    ("tools", "compiler", "missing"),
    [
        (["gcc"], "", ""),
        (["clang"], "", ""),
        ([], "/opt/cc", ""),
        (["cc", "g++"], "", "install gcc .*apt-get install gcc libc6-dev.* CC$"),
    ],
)
def test_a_missing_compiler_is_named_before_triton_looks_for_it(
    tools: list[str], compiler: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in tools:
        (tmp_path / name).touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    with pytest.raises(ModelError, match=missing) if missing else contextlib.nullcontext():
        require_compiler.__wrapped__()


def test_missing_headers_of_python_are_named_with_their_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", "/opt/cc")
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    with pytest.raises(ModelError, match=rf"{tmp_path}/Python.h is missing; .*apt-get install python3\.\d+-dev"):
        require_compiler.__wrapped__()


def test_triton_launches_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """It launches on the current device by itself; here both launches are only looked at, and the guard around them."""
    pytest.importorskip("triton")
    from models import deformable_triton

    guarded: list[Tensor] = []
    launched: list[bool] = []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        guarded.append(tensor)
        yield
        guarded.pop()

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *tensors, **sizes: launched.append(bool(guarded) and guarded[-1].device == tensors[0].device)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(deformable_triton, name, Kernel())
    value, x, y, weights = random_inputs()
    deformable_triton.sample(value, SHAPES, x, y, weights)
    deformable_triton.sample_backward(torch.zeros(2, 5, 6), value, SHAPES, x, y, weights)
    assert launched == [True, True] and not guarded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_kernels_equal_pytorch_on_the_gpu() -> None:
    """In float64, at the published sizes of one 256 px image."""
    from models import deformable_triton

    shapes = ((8, 8), (16, 16), (32, 32))
    inputs = [tensor.cuda() for tensor in random_inputs(queries=1344, heads=8, width=32, shapes=shapes)]
    value, x, y, weights = inputs
    grad = torch.randn(2, 1344, 256, dtype=torch.float64, device="cuda")
    torch.testing.assert_close(
        sample_levels(value, shapes, x, y, weights), deformable_torch.sample(value, shapes, x, y, weights)
    )
    for found, expected in zip(
        deformable_triton.sample_backward(grad, value, shapes, x, y, weights),
        deformable_torch.sample_backward(grad, value, shapes, x, y, weights),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
