from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.deformable import DeformableAttention, sample_levels, token_grid

SHAPES = ((2, 3), (4, 6))


def random_inputs(
    queries: int = 5, heads: int = 2, width: int = 3, points: int = 4
) -> tuple[Tensor, list[Tensor], Tensor]:
    """fp64 value, grids (some points outside the maps) and weights."""
    generator = torch.Generator().manual_seed(0)

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    value = rand(2, heads, width, sum(h * w for h, w in SHAPES)) - 0.5
    grids = [(rand(2, heads, points, 2, queries) - 0.5) * 2.6 for _ in SHAPES]
    return value, grids, rand(2, heads, len(SHAPES), points, queries)


def slow_sample(value: Tensor, grids: list[Tensor], weights: Tensor) -> Tensor:
    """One point, one corner, one channel vector at a time."""
    batch, heads, width, _ = value.shape
    _, _, levels, points, queries = weights.shape
    out = torch.zeros(batch, heads, width, queries, dtype=value.dtype)
    for b in range(batch):
        for m in range(heads):
            for q in range(queries):
                start = 0
                for level in range(levels):
                    h, w = SHAPES[level]
                    for p in range(points):
                        gx, gy = grids[level][b, m, p, :, q].tolist()
                        x, y = (gx + 1) / 2 * w - 0.5, (gy + 1) / 2 * h - 0.5  # in cells, cell centres at integers
                        for row in (math.floor(y), math.floor(y) + 1):
                            for column in (math.floor(x), math.floor(x) + 1):
                                if 0 <= row < h and 0 <= column < w:
                                    share = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[b, m, level, p, q]
                                    out[b, m, :, q] += share * value[b, m, :, start + row * w + column]
                    start += h * w
    return out.flatten(1, 2)


def test_sampling_equals_a_loop_over_points() -> None:
    value, grids, weights = random_inputs()
    torch.testing.assert_close(sample_levels(value, SHAPES, grids, weights), slow_sample(value, grids, weights))


def test_sampling_gradients() -> None:
    value, grids, weights = random_inputs(queries=2, points=2)
    leaves = [tensor.requires_grad_() for tensor in (value, *grids, weights)]
    assert torch.autograd.gradcheck(lambda v, *rest: sample_levels(v, SHAPES, rest[:2], rest[2]), leaves)


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
    grids = []
    for level, (h, w) in enumerate(SHAPES):
        place = centres[None, :, None, None] + offsets[:, :, :, level] / torch.tensor([w, h])  # (B, S, M, P, 2)
        grids.append((2 * place - 1).permute(0, 2, 3, 4, 1))
    value = module.value_proj(tokens).view(2, count, 2, 4).permute(0, 2, 3, 1)
    expected = module.output_proj(slow_sample(value, grids, weights.permute(0, 2, 3, 4, 1)).transpose(1, 2))

    torch.testing.assert_close(module(tokens, positions, SHAPES), expected, rtol=1e-6, atol=1e-6)


def test_start_looks_around_each_token() -> None:
    module = DeformableAttention(dim=16, heads=4, levels=2, points=3)
    offsets = module.sampling_offsets(torch.randn(16)).view(4, 2, 3, 2)
    # head 0 looks right, head 1 down, head 2 left, head 3 up, each point one cell further
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    expected = directions[:, None, None] * torch.arange(1, 4)[:, None]
    torch.testing.assert_close(offsets, expected.expand(4, 2, 3, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_cached_grid_serves_training_after_inference(mode: type) -> None:
    token_grid.cache_clear()
    module = DeformableAttention(dim=8, heads=2, levels=2, points=2)
    tokens, positions = torch.randn(1, 30, 8), torch.randn(30, 8)
    with mode():
        module(tokens, positions, SHAPES)
    module(tokens, positions, SHAPES).sum().backward()
    assert module.value_proj.weight.grad is not None
