"""The sampling of deformable attention as Triton kernels: only the result, and the gradients, are written to memory.

A program holds a block of queries of one head and loops over their samples. Triton compiles at the first call, so there
is no build step. The gradient of the maps is summed by atomic additions, whose order is not fixed: it differs from run
to run by rounding. They are relaxed: nothing else is read or written in the order of these sums, and the default,
acquire-release, puts a fence before and after each of them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.deformable_torch import Shapes

BLOCK = 1024  # numbers in a program's accumulator


def sample(value: Tensor, shapes: Shapes, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """See `models.deformable.sample_levels`."""
    value, x, y, weights = (tensor.contiguous() for tensor in (value, x, y, weights))
    batch, queries, heads = weights.shape[:3]
    out = value.new_empty(batch, queries, heads * value.shape[3])
    grid, sizes = _launch(value, weights)
    # Triton launches on the current device, whichever the tensors' is
    with torch.cuda.device_of(value):
        _forward[grid](value, _levels(shapes, value.device), x, y, weights, out, **sizes)
    return out


def sample_backward(
    grad: Tensor, value: Tensor, shapes: Shapes, x: Tensor, y: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of value, x, y and weights, shapes as theirs, from that of the result, (B, Q, M * D)."""
    grad, value, x, y, weights = (tensor.contiguous() for tensor in (grad, value, x, y, weights))
    found = torch.zeros_like(value), torch.empty_like(x), torch.empty_like(y), torch.empty_like(weights)
    grid, sizes = _launch(value, weights)
    with torch.cuda.device_of(value):
        _backward[grid](grad, value, _levels(shapes, value.device), x, y, weights, *found, **sizes)
    return found


@functools.lru_cache(maxsize=16)
def _levels(shapes: Shapes, device: torch.device) -> Tensor:
    """Height, width and index of the first cell of every map, (levels, 3) int32."""
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    rows = [(h, w, start) for (h, w), start in zip(shapes, starts, strict=True)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _launch(value: Tensor, weights: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    cells, width = value.shape[1], value.shape[3]
    batch, queries, heads, levels, points = weights.shape
    columns = triton.next_power_of_2(width)
    rows = max(BLOCK // columns, 1)
    sizes = {
        "CELLS": cells,
        "QUERIES": queries,
        "HEADS": heads,
        "WIDTH": width,
        "LEVELS": levels,
        "POINTS": points,
        "ROWS": rows,
        "COLUMNS": columns,
        "bags": batch * queries,
    }
    return (triton.cdiv(batch * queries, rows), heads), sizes


@triton.jit
def _corner(value, first, h, w, row, column, stride, d, valid):
    """Cells (ROWS, COLUMNS) at (row, column) of maps that begin at `first`, zero outside; their offsets in memory, and
    whether they exist."""
    there = valid & ((row >= 0) & (row < h) & (column >= 0) & (column < w))[:, None]
    at = (first + (row * w + column) * stride)[:, None] + d[None, :]
    return tl.load(value + at, mask=there, other=0.0), at, there


@triton.jit
def _forward(
    value, levels, x, y, weights, out, bags,
    CELLS, QUERIES, HEADS, WIDTH: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    bag = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, COLUMNS)
    exists = bag < bags
    valid = exists[:, None] & (d < WIDTH)[None, :]
    stride = HEADS * WIDTH
    image = bag // QUERIES * CELLS * stride + head * WIDTH
    sample_ = (bag * HEADS + head) * (LEVELS * POINTS)
    total = tl.zeros((ROWS, COLUMNS), dtype=value.dtype.element_ty)
    for level in range(LEVELS):
        h = tl.load(levels + level * 3)
        w = tl.load(levels + level * 3 + 1)
        first = image + tl.load(levels + level * 3 + 2) * stride
        for point in range(POINTS):
            k = sample_ + level * POINTS + point
            # samples beyond -1 and the map's end are zero; clamping keeps floats that fit no integer out of the cast
            px = tl.minimum(tl.maximum(tl.load(x + k, mask=exists, other=0.0), -1.0), w)
            py = tl.minimum(tl.maximum(tl.load(y + k, mask=exists, other=0.0), -1.0), h)
            weight = tl.load(weights + k, mask=exists, other=0.0)
            left = tl.floor(px)
            top = tl.floor(py)
            right, down = (px - left)[:, None], (py - top)[:, None]
            column, row = left.to(tl.int32), top.to(tl.int32)
            a, _, _ = _corner(value, first, h, w, row, column, stride, d, valid)
            b, _, _ = _corner(value, first, h, w, row, column + 1, stride, d, valid)
            upper = a + (b - a) * right
            a, _, _ = _corner(value, first, h, w, row + 1, column, stride, d, valid)
            b, _, _ = _corner(value, first, h, w, row + 1, column + 1, stride, d, valid)
            lower = a + (b - a) * right
            total += weight[:, None] * (upper + (lower - upper) * down)
    at = ((bag * HEADS + head) * WIDTH)[:, None] + d[None, :]
    tl.store(out + at, total, mask=valid)


@triton.jit
def _backward(
    grad, value, levels, x, y, weights, d_value, d_x, d_y, d_weights, bags,
    CELLS, QUERIES, HEADS, WIDTH: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    bag = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, COLUMNS)
    exists = bag < bags
    valid = exists[:, None] & (d < WIDTH)[None, :]
    stride = HEADS * WIDTH
    image = bag // QUERIES * CELLS * stride + head * WIDTH
    sample_ = (bag * HEADS + head) * (LEVELS * POINTS)
    g = tl.load(grad + ((bag * HEADS + head) * WIDTH)[:, None] + d[None, :], mask=valid, other=0.0)
    for level in range(LEVELS):
        h = tl.load(levels + level * 3)
        w = tl.load(levels + level * 3 + 1)
        first = image + tl.load(levels + level * 3 + 2) * stride
        for point in range(POINTS):
            k = sample_ + level * POINTS + point
            px = tl.load(x + k, mask=exists, other=0.0)
            py = tl.load(y + k, mask=exists, other=0.0)
            weight = tl.load(weights + k, mask=exists, other=0.0)
            inside_x = (px >= -1.0) & (px <= w)
            inside_y = (py >= -1.0) & (py <= h)
            px = tl.minimum(tl.maximum(px, -1.0), w)
            py = tl.minimum(tl.maximum(py, -1.0), h)
            left = tl.floor(px)
            top = tl.floor(py)
            right, down = px - left, py - top
            column, row = left.to(tl.int32), top.to(tl.int32)

            a, at, there = _corner(value, first, h, w, row, column, stride, d, valid)
            tl.atomic_add(d_value + at, g * (weight * (1 - right) * (1 - down))[:, None], mask=there, sem="relaxed")
            b, at, there = _corner(value, first, h, w, row, column + 1, stride, d, valid)
            tl.atomic_add(d_value + at, g * (weight * right * (1 - down))[:, None], mask=there, sem="relaxed")
            upper_slope = tl.sum(g * (b - a), 1)
            upper = tl.sum(g * a, 1) + upper_slope * right
            a, at, there = _corner(value, first, h, w, row + 1, column, stride, d, valid)
            tl.atomic_add(d_value + at, g * (weight * (1 - right) * down)[:, None], mask=there, sem="relaxed")
            b, at, there = _corner(value, first, h, w, row + 1, column + 1, stride, d, valid)
            tl.atomic_add(d_value + at, g * (weight * right * down)[:, None], mask=there, sem="relaxed")
            lower_slope = tl.sum(g * (b - a), 1)
            lower = tl.sum(g * a, 1) + lower_slope * right

            slope = upper_slope + (lower_slope - upper_slope) * down  # pyright: ignore[reportOperatorIssue]
            tl.store(d_x + k, tl.where(inside_x, weight * slope, 0.0), mask=exists)
            tl.store(d_y + k, tl.where(inside_y, weight * (lower - upper), 0.0), mask=exists)
            tl.store(d_weights + k, upper + (lower - upper) * down, mask=exists)
