"""Pixel decoder of Mask2Former (Cheng et al. 2022): deformable attention over strides 8 to 32, then one FPN level.

GroupNorm has 8 channels a group below width 256, and 32 groups from there on; at the published width 256 these agree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.deformable import DeformableAttention, Shapes
from models.linear import feed_forward, make_feed_forward
from models.portable import by_size

LEVELS = 3  # strides 32, 16, 8: the maps of the attention, in this order


def group_norm(dim: int) -> nn.GroupNorm:
    return nn.GroupNorm(32 if dim >= 256 else dim // 8, dim)


@functools.lru_cache(maxsize=16)
def sine_positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Sine position embedding, normalised to 2 pi: (height * width, dim) float32, y in the first half, then x."""
    # the result is cached, and an inference tensor could not be used in training later
    with torch.inference_mode(False):
        pairs = torch.arange(dim // 4, device=device)
        period = 10000 ** (pairs / (dim // 4))

        def encode(size: int) -> Tensor:
            place = torch.arange(1, size + 1, device=device) / (size + 1e-6) * (2 * math.pi)
            angle = place[:, None] / period
            return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)  # (size, dim / 2)

        y = encode(height)[:, None].expand(-1, width, -1)
        x = encode(width)[None].expand(height, -1, -1)
        return torch.cat([y, x], -1).flatten(0, 1)


class EncoderLayer(nn.Module):
    """Deformable attention and FFN, each followed by its norm; tokens (B, S, dim), positions (S, dim) -> tokens."""

    def __init__(self, *, dim: int, heads: int, points: int, ffn: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(dim=dim, heads=heads, levels=LEVELS, points=points)
        self.attention_norm = nn.LayerNorm(dim)
        self.ffn = make_feed_forward(dim, ffn)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, positions: Tensor, shapes: Shapes) -> Tensor:
        tokens = self.attention_norm(tokens + self.attention(tokens, positions, shapes))
        return self.ffn_norm(tokens + feed_forward(tokens, self.ffn))


class PixelDecoder(nn.Module):
    """Four backbone maps to three encoded maps and the mask features.

    Args:
        channels: of the backbone maps at strides 4, 8, 16, 32. dim: width of all inner maps, a multiple of 8.
        heads, points: of the deformable attention, points a level. layers: of the encoder. ffn: hidden width of the
            FFNs.
    """

    def __init__(self, *, channels: Sequence[int], dim: int, heads: int, layers: int, ffn: int, points: int) -> None:
        super().__init__()
        self.dim = dim
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, dim, 1), group_norm(dim)) for width in reversed(channels[-LEVELS:])
        )
        self.level_embed = nn.Embedding(LEVELS, dim)
        self.layers = nn.ModuleList(EncoderLayer(dim=dim, heads=heads, points=points, ffn=ffn) for _ in range(layers))
        self.lateral = nn.Sequential(nn.Conv2d(channels[0], dim, 1, bias=False), group_norm(dim))
        self.fpn = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), group_norm(dim), nn.ReLU(inplace=True))
        self.mask_features = nn.Conv2d(dim, dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initial values of the convolutions; the deformable layers have their own."""
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        for conv in (module for module in self.input_proj.modules() if isinstance(module, nn.Conv2d)):
            nn.init.xavier_uniform_(conv.weight)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """[(B, channels, h, w)] at strides 4, 8, 16, 32
        -> levels [(B, h w, dim)] at strides 32, 16, 8, and mask features (B, dim, H/4, W/4).
        """
        finest, *coarse = features
        maps = [project(map_) for project, map_ in zip(self.input_proj, reversed(coarse), strict=True)]
        shapes: Shapes = tuple((map_.shape[-2], map_.shape[-1]) for map_ in maps)
        sizes = [h * w for h, w in shapes]

        tokens = torch.cat([map_.permute(0, 2, 3, 1).flatten(1, 2) for map_ in maps], dim=1)  # (B, S, dim)
        places = [by_size(sine_positions, h, w, self.dim, tokens.device) for h, w in shapes]
        positions = torch.cat([place + level for place, level in zip(places, self.level_embed.weight, strict=True)])
        for layer in self.layers:
            tokens = layer(tokens, positions, shapes)

        levels = list(tokens.split(sizes, dim=1))
        stride8 = levels[-1].unflatten(1, shapes[-1]).permute(0, 3, 1, 2)  # channels last, like the backbone's maps
        lateral = self.lateral(finest)
        stride4 = lateral.add_(F.interpolate(stride8, size=lateral.shape[-2:], mode="bilinear", align_corners=False))
        return levels, self.mask_features(self.fpn(stride4))
