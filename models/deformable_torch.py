"""The sampling of deformable attention in PyTorch, on any device.

A bilinear sample is the weighted sum of four cells, so all samples of a query and head are one weighted bag of rows of
a table, which `embedding_bag` gathers and sums in one pass. `grid_sample` stores every sample first and takes four
times as long on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]


def sample(value: Tensor, shapes: Shapes, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """See `models.deformable.sample_levels`."""
    table = _Table(value.shape, shapes)
    corners = table.corners(x, y)
    shares = corners.shares(weights.reshape(corners.i.shape))
    bags = F.embedding_bag(corners.rows(), table.fill(value), mode="sum", per_sample_weights=shares)
    return bags.view(*weights.shape[:2], -1)


def sample_backward(
    grad: Tensor, value: Tensor, shapes: Shapes, x: Tensor, y: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of value, x, y and weights, shapes as theirs, from that of the result, (B, Q, M * D)."""
    table = _Table(value.shape, shapes)
    corners = table.corners(x, y)
    weight = weights.reshape(corners.i.shape)
    grad = grad.reshape(len(weight), -1)
    d_value = table.value_gradient(grad, corners, weight)

    # the contribution of each corner to <result, grad>, then the derivatives of the bilinear formula
    dots = _dots(grad, table.fill(value), corners.rows()).view(len(weight), 4, -1).unbind(1)
    upper_slope, lower_slope = dots[1] - dots[0], dots[3] - dots[2]
    upper = torch.addcmul(dots[0], upper_slope, corners.right)
    lower = torch.addcmul(dots[2], lower_slope, corners.right)
    inside_x, inside_y = table.inside(x, y)
    d_x = torch.lerp(upper_slope, lower_slope, corners.down).mul_(weight).mul_(inside_x.view_as(weight)).view_as(x)
    d_y = (lower - upper).mul_(weight).mul_(inside_y.view_as(weight)).view_as(y)
    return d_value, d_x, d_y, torch.lerp(upper, lower, corners.down).view_as(weights)


class _Corners(NamedTuple):
    """The four cells around N * K samples, each (N, K): N = B * Q * M bags of K = levels * P samples."""

    i: Tensor  # int32, the table's row of the upper left cell
    step: Tensor  # (K,) int32, rows of the table from a cell to the one below
    right: Tensor  # share of the right cells, in [0, 1)
    down: Tensor  # share of the lower cells

    def rows(self) -> Tensor:
        """The table's rows of the four cells: upper left, upper right, lower left, lower right, (N, 4 K)."""
        below = self.i + self.step
        return torch.cat([self.i, self.i + 1, below, below + 1], 1)

    def shares(self, weight: Tensor) -> Tensor:
        """weight (N, K), split over the four cells: (N, 4 K), in the order of `rows`."""
        lower = weight * self.down
        upper = weight - lower
        upper_right, lower_right = upper * self.right, lower * self.right
        return torch.cat([upper - upper_right, upper_right, lower - lower_right, lower_right], 1)


class _Table:
    """The cells of all maps as rows (B * M * rows, D), every map inside a frame of zero cells.

    Places beyond the frame are clamped onto it, so that samples near and outside a border need no special case.
    """

    def __init__(self, value: Sequence[int], shapes: Shapes) -> None:
        self.batch, self.tokens, self.heads, self.width = value
        self.shapes = shapes
        framed = [(h + 2) * (w + 2) for h, w in shapes]
        self.starts = [sum(framed[:level]) for level in range(len(shapes))]
        # a sample on the end of the last frame also reads cells beyond it, with weight 0
        self.rows = sum(framed) + shapes[-1][1] + 3

    def _maps(self, table: Tensor, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of the same cells, (B, M, h, w, D) each, level by level: of the table (B, M, rows, D) and of the tokens
        (B, S, M, D)."""
        sizes = [h * w for h, w in self.shapes]
        return [
            (
                table[:, :, start : start + (h + 2) * (w + 2)].unflatten(2, (h + 2, w + 2))[:, :, 1:-1, 1:-1],
                part.unflatten(1, (h, w)).permute(0, 3, 1, 2, 4),
            )
            for start, (h, w), part in zip(self.starts, self.shapes, tokens.split(sizes, 1), strict=True)
        ]

    def fill(self, value: Tensor) -> Tensor:
        """(B, S, M, D) -> (B * M * rows, D)."""
        table = value.new_zeros(self.batch, self.heads, self.rows, self.width)
        for framed, plain in self._maps(table, value):
            framed.copy_(plain)
        return table.flatten(0, 2)

    def _per_sample(self, values: Sequence[int], places: Tensor, dtype: torch.dtype) -> Tensor:
        """One number a level -> (M * K,), as the samples of a query lie in `places` (B, Q, M, levels, P)."""
        each = torch.tensor(values, dtype=dtype, device=places.device)
        return each.repeat_interleave(places.shape[-1]).repeat(self.heads)

    def inside(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Where places (B, Q, M, levels, P) are at most one cell outside their map, so that the gradient is not zero:
        two bool tensors (B, Q, M * levels * P), for x and for y."""
        height, width = self._sides(x)
        x, y = x.flatten(2), y.flatten(2)
        return (x >= -1) & (x <= width), (y >= -1) & (y <= height)

    def _sides(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Height and width of the maps that `places` are on, (M * K,) each."""
        heights, widths = zip(*self.shapes, strict=True)
        return (
            self._per_sample(heights, places, places.dtype),
            self._per_sample(widths, places, places.dtype),
        )

    def corners(self, x: Tensor, y: Tensor) -> _Corners:
        """The four cells around places (B, Q, M, levels, P)."""
        samples = x.shape[-2] * x.shape[-1]
        height, width = self._sides(x)
        origins = [start + w + 3 for start, (_, w) in zip(self.starts, self.shapes, strict=True)]
        block = torch.arange(self.batch * self.heads, dtype=torch.int32, device=x.device) * self.rows
        first = block.view(self.batch, 1, -1).repeat_interleave(samples, 2)
        first = first + self._per_sample(origins, x, torch.int32)  # (B, 1, M K): the row of each sample's cell (0, 0)

        border = x.new_tensor(-1.0)
        x, y = x.flatten(2).clamp(border, width), y.flatten(2).clamp(border, height)
        left, top = x.floor(), y.floor()
        return _Corners(
            ((top * (width + 2) + left).int() + first).view(-1, samples),
            (width[:samples] + 2).int(),
            (x - left).view(-1, samples),
            (y - top).view(-1, samples),
        )

    def value_gradient(self, grad: Tensor, corners: _Corners, weight: Tensor) -> Tensor:
        """The gradient of the maps, (B, S, M, D), from that of the bags, (N, D): a sum over the bags that read a cell.

        The samples are sorted by their upper left cell; the other three corners lie at a fixed distance from it.
        """
        cells = corners.i.flatten()
        order = torch.sort(cells, stable=True).indices
        counts = torch.bincount(cells, minlength=self.batch * self.heads * self.rows)
        ends = F.pad(counts.cumsum(0), (1, 0)).int()
        bags = torch.div(order, weight.shape[1], rounding_mode="floor").int()
        upper, upper_right, lower, lower_right = (
            F.embedding_bag(
                bags,
                grad,
                ends,
                mode="sum",
                per_sample_weights=share.flatten().index_select(0, order),
                include_last_offset=True,
            ).view(self.batch, self.heads, self.rows, self.width)
            for share in corners.shares(weight).chunk(4, 1)
        )
        upper[:, :, 1:] += upper_right[:, :, :-1]
        lower[:, :, 1:] += lower_right[:, :, :-1]
        for start, (h, w) in zip(self.starts, self.shapes, strict=True):
            end = start + (h + 2) * (w + 2)
            upper[:, :, start + w + 2 : end] += lower[:, :, start : end - w - 2]
        value = grad.new_empty(self.batch, self.tokens, self.heads, self.width)
        for framed, plain in self._maps(upper, value):
            plain.copy_(framed)
        return value


def _dots(grad: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """grad[n] . table[rows[n, k]], (N, D), (R, D) and (N, K) -> (N, K)."""
    count, width = rows.shape
    ends = torch.arange(0, count * width + 1, width, dtype=torch.int32, device=rows.device)
    # torch warns once a process that its sparse tensors are in beta state
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        nothing = grad.new_zeros(rows.numel())
        places = torch.sparse_csr_tensor(ends, rows.flatten(), nothing, (count, len(table)), check_invariants=False)
    return torch.sparse.sampled_addmm(places, grad, table.t(), beta=0.0).values().view(count, width)
