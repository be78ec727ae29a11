"""Multi-scale deformable attention (Zhu et al. 2021, Eq. 3): each query samples a few points a level.

The sampling is one operator with its own backward: a Triton kernel on CUDA where Triton is installed, PyTorch
elsewhere. As an operator it is opaque to `torch.compile`, so it breaks no graph.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import deformable_torch
from models.deformable_torch import Shapes
from models.errors import ModelError
from models.linear import linear
from models.portable import by_size, is_portable

TRITON = importlib.util.find_spec("triton") is not None


def sample_levels(value: Tensor, shapes: Shapes, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples from several feature maps; a sample outside its map is zero.

    M heads of width D, P points a level. All tensors are of one floating type, float32 or float64; differentiable once.

    Args:
        value: (B, S, M, D), the maps of all levels flattened and joined, S = sum of h * w over `shapes`.
        shapes: (h, w) of each level's map.
        x, y: (B, Q, M, levels, P), places in cells of the level's map, where a cell's centre is at an integer.
        weights: (B, Q, M, levels, P).

    Returns:
        (B, Q, M * D).
    """
    if is_portable():
        return _sample_by_grid(value, shapes, x, y, weights)
    return torch.ops.zs_seg.deformable_sample(value, [side for shape in shapes for side in shape], x, y, weights)


def _sample_by_grid(value: Tensor, shapes: Shapes, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """`sample_levels` by `grid_sample`, level by level."""
    batch, queries, heads, _, points = weights.shape
    total = value.new_zeros(batch * heads, value.shape[3], queries)
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in shapes], dim=2)  # (B M, D, h w) each
    for level, (map_, (h, w)) in enumerate(zip(maps, shapes, strict=True)):
        places = torch.stack([(2 * x[..., level, :] + 1) / w - 1, (2 * y[..., level, :] + 1) / h - 1], -1)
        places = places.transpose(1, 2).reshape(batch * heads, queries, points, 2)
        samples = F.grid_sample(map_.unflatten(2, (h, w)), places, align_corners=False)  # (B M, D, Q, P)
        total = total + (
            samples * weights[..., level, :].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        ).sum(-1)
    return total.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


def _kernels(value: Tensor) -> Any:
    """The module whose `sample` and `sample_backward` are the fastest on the device of `value`."""
    if not (TRITON and value.is_cuda):
        return deformable_torch
    require_compiler()
    from models import deformable_triton

    return deformable_triton


@functools.cache
def require_compiler() -> None:
    """Check for the compiler and header with which Triton builds a small C module at a process's first kernel on a GPU.

    Raises ModelError where there is no C compiler or no Python.h, naming the package that contains it.
    """
    # Triton's order: CC, gcc, clang
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise ModelError(
            "Triton, which runs deformable attention on a GPU, needs a C compiler, and neither gcc nor clang is on "
            "PATH; install gcc (Debian, Ubuntu: apt-get install gcc libc6-dev), or name a compiler in the environment "
            "variable CC"
        )
    header = Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h"
    if not header.is_file():
        raise ModelError(
            f"Triton, which runs deformable attention on a GPU, needs Python's C headers, and {header} is missing; "
            f"install them (Debian, Ubuntu: apt-get install python{sysconfig.get_python_version()}-dev)"
        )


def _pairs(sides: Sequence[int]) -> Shapes:
    return tuple(zip(sides[::2], sides[1::2], strict=True))


@torch.library.custom_op("zs_seg::deformable_sample", mutates_args=())
def _sample(value: Tensor, sides: Sequence[int], x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return _kernels(value).sample(value, _pairs(sides), x, y, weights)


@torch.library.custom_op("zs_seg::deformable_sample_backward", mutates_args=())
def _sample_backward(
    grad: Tensor, value: Tensor, sides: Sequence[int], x: Tensor, y: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _kernels(value).sample_backward(grad, value, _pairs(sides), x, y, weights)


@_sample.register_fake
def _(value: Tensor, sides: Sequence[int], x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(*weights.shape[:2], value.shape[2] * value.shape[3])


@_sample_backward.register_fake
def _(
    grad: Tensor, value: Tensor, sides: Sequence[int], x: Tensor, y: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), x.new_empty(x.shape), y.new_empty(y.shape), weights.new_empty(weights.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sides, *places = inputs
    ctx.save_for_backward(value, *places)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, *places = ctx.saved_tensors
    d_value, *d_places = torch.ops.zs_seg.deformable_sample_backward(grad, value, ctx.sides, *places)
    return d_value, None, *d_places


_sample.register_autograd(_backward, setup_context=_save)


@functools.lru_cache(maxsize=16)
def token_places(shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and y of each token's own centre in cells of every map, cell centres at integers: (S, levels) float32 each."""
    # the result is cached, and an inference tensor could not be used in training later
    with torch.inference_mode(False):
        own = []
        for h, w in shapes:
            y = (torch.arange(h, device=device) + 0.5) / h
            x = (torch.arange(w, device=device) + 0.5) / w
            own.append(torch.cartesian_prod(y, x))
        places = torch.cat(own)[:, None] * torch.tensor(shapes, device=device) - 0.5  # (S, levels, 2)
        return places[..., 1].contiguous(), places[..., 0].contiguous()


class DeformableAttention(nn.Module):
    """Every token of a set of feature maps attends to `points` learned offsets from its own place on every map.

    Offsets are in cells of the sampled map. The sampling points are computed in float32 under autocast, since half
    precision cannot resolve neighbouring cells of a large map.

    Args:
        dim: C, width of the tokens, a multiple of heads. heads: M. levels: number of maps. points: P, samples a level.
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
        """The published initial values: equal weights, a direction of its own for each head, point i at distance i."""
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
        value = linear(tokens, self.value_proj.weight, self.value_proj.bias)
        value = value.unflatten(2, (self.heads, -1))  # (B, S, M, D)
        offsets = linear(queries, self.sampling_offsets.weight, self.sampling_offsets.bias).unflatten(2, (*split, 2))
        weights = linear(queries, self.attention_weights.weight, self.attention_weights.bias)
        # softmax over rows of 12 numbers is slow on a CPU, over columns it is not
        weights = weights.transpose(1, 2).contiguous()
        weights = weights.unflatten(1, (self.heads, -1)).softmax(2).flatten(1, 2).transpose(1, 2).unflatten(2, split)
        x, y = (
            place.repeat_interleave(self.points, 1).view(-1, 1, *split[1:]) + offset
            for place, offset in zip(by_size(token_places, shapes, tokens.device), offsets.unbind(-1), strict=True)
        )
        samples = sample_levels(value.to(x.dtype), shapes, x, y, weights.to(x.dtype))
        return linear(samples, self.output_proj.weight, self.output_proj.bias)
