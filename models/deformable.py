"""Multi-scale deformable attention (Zhu et al. 2021, Eq. 3) in plain PyTorch: each query reads a few points a level."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = tuple[tuple[int, int], ...]


def sample_levels(value: Tensor, shapes: Shapes, grids: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples from several feature maps; a sample outside its map counts as zero.

    value: (B, M, D, S), the maps of all levels flattened and joined, S = sum of h * w over `shapes` (h, w)
    grids: one a level, (B, M, P, 2, Q), points (x, y), where -1 and 1 are a map's outer borders
    weights: (B, M, levels, P, Q)
    -> (B, M * D, Q)
    """
    maps = value.flatten(0, 1).split([h * w for h, w in shapes], dim=-1)  # (B M, D, h w) a level
    total = torch.zeros((), dtype=value.dtype, device=value.device)
    for map_, shape, grid, weight in zip(maps, shapes, grids, weights.unbind(2), strict=True):
        points = grid.flatten(0, 1).transpose(-1, -2)  # (B M, P, Q, 2), the queries contiguous: the fast case
        samples = F.grid_sample(map_.unflatten(-1, shape), points, padding_mode="zeros", align_corners=False)
        total = total + (samples * weight.flatten(0, 1).unsqueeze(1)).sum(2)
    return total.view(value.shape[0], -1, weights.shape[-1])


@functools.lru_cache(maxsize=32)
def token_grid(shapes: Shapes, device: torch.device) -> Tensor:
    """Centre of each token's own cell, as (x, y) in [-1, 1]: (2, S) float32, the levels joined in the order given."""
    with torch.inference_mode(False):  # a cached inference tensor could not be used in training later
        centres = []
        for h, w in shapes:
            y = (torch.arange(h, device=device) * 2 + 1) / h - 1
            x = (torch.arange(w, device=device) * 2 + 1) / w - 1
            centres.append(torch.cartesian_prod(y, x).flip(-1))
        return torch.cat(centres).T.contiguous()


class DeformableAttention(nn.Module):
    """Every token of a set of feature maps attends to `points` learned offsets from its own place on every map.

    Offsets are in cells of the map that is read. The sampling points are computed in float32 under autocast, since half
    types cannot tell neighbouring cells of a large map apart.
    """

    def __init__(self, *, dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published start: equal weights, heads looking in different directions, point i at distance i."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.points + 1)
        offsets = direction[:, None, None] * distance[:, None]  # (heads, 1, points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, tokens: Tensor, positions: Tensor, shapes: Shapes) -> Tensor:
        """tokens (B, S, C), positions (S, C) added for offsets and weights only, shapes (h, w) a level -> (B, S, C)."""
        split = (self.heads, self.levels, self.points)
        queries = tokens + positions
        offsets = _channels_first(self.sampling_offsets, queries).unflatten(1, (*split, 2))  # (B, M, levels, P, 2, S)
        weights = _channels_first(self.attention_weights, queries).unflatten(1, (self.heads, -1)).softmax(2)
        value = _channels_first(self.value_proj, tokens).unflatten(1, (self.heads, -1))  # (B, M, D, S)
        centres = token_grid(shapes, tokens.device)
        grids = [
            centres + offset * centres.new_tensor([2 / w, 2 / h])[:, None]
            for offset, (h, w) in zip(offsets.unbind(2), shapes, strict=True)
        ]
        dtype = grids[0].dtype
        samples = sample_levels(value.to(dtype), shapes, grids, weights.to(dtype).unflatten(2, split[1:]))
        return self.output_proj(samples.transpose(1, 2))


def _channels_first(linear: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer whose output is written transposed, (B, S, in) -> (B, out, S), as sampling wants it."""
    weight = linear.weight.expand(x.shape[0], -1, -1)
    return torch.baddbmm(linear.bias[:, None], weight, x.transpose(1, 2))
