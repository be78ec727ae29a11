"""Masked-attention query decoder of Mask2Former (Cheng et al. 2022).

Attention masks are computed from mask features resized once a level, not from full-size masks resized once a layer:
both are linear, so the result is the same, and full-size masks are computed only where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.deformable import Shapes
from models.linear import linear, make_feed_forward
from models.mask_logits import MaskLogits
from models.pixel_decoder import LEVELS, sine_positions
from models.portable import by_size


class Attention(nn.Module):
    """Multi-head attention whose keys may differ from its values; parameters packed as in `nn.MultiheadAttention`."""

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """query (B, Q, C), key and value (B, S, C), allowed (B, Q, S) bool, True = attends -> (B, Q, C)."""
        weights, biases = self.in_proj.weight.chunk(3), self.in_proj.bias.chunk(3)
        q, k, v = (
            linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = None if allowed is None else allowed.unsqueeze(1)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, FFN, each followed by its norm.

    x (B, Q, C), positions (Q, C), keys and values (B, S, C), allowed (B, Q, S) bool -> (B, Q, C).
    """

    def __init__(self, *, dim: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.cross_attention = Attention(dim=dim, heads=heads)
        self.cross_norm = nn.LayerNorm(dim)
        self.self_attention = Attention(dim=dim, heads=heads)
        self.self_norm = nn.LayerNorm(dim)
        self.ffn = make_feed_forward(dim, ffn)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
        x = self.cross_norm(x + self.cross_attention(x + positions, keys, values, allowed))
        placed = x + positions
        x = self.self_norm(x + self.self_attention(placed, placed, x))
        return self.ffn_norm(x + self.ffn(x))


class QueryDecoder(nn.Module):
    """Learned queries that attend to the pixel decoder's maps, strides 32, 16, 8 in turn, each inside its last mask.

    Args:
        queries: Q. dim: width C. heads: of the attention. layers: L - 1. ffn: hidden width of the FFNs.
    """

    def __init__(self, *, queries: int, dim: int, heads: int, layers: int, ffn: int) -> None:
        super().__init__()
        self.dim = dim
        self.query_features = nn.Embedding(queries, dim)
        self.query_positions = nn.Embedding(queries, dim)
        self.level_embed = nn.Embedding(LEVELS, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim=dim, heads=heads, ffn=ffn) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.mask_mlp = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        )

    def forward(self, levels: Sequence[Tensor], mask_features: Tensor) -> tuple[Tensor, MaskLogits]:
        """levels [(B, h w, dim)] at strides 32, 16, 8, mask_features (B, dim, H/4, W/4)
        -> features (L, B, Q, dim) after the final norm, and masks of L x B x Q maps (H/4, W/4), L = layers + 1.
        """
        height, width = mask_features.shape[-2:]
        shapes: Shapes = tuple((height * 4 // stride, width * 4 // stride) for stride in (32, 16, 8))
        values = [level + embed for level, embed in zip(levels, self.level_embed.weight, strict=True)]
        keys = [
            value + by_size(sine_positions, h, w, self.dim, value.device)
            for value, (h, w) in zip(values, shapes, strict=True)
        ]
        small = [
            F.interpolate(mask_features.detach(), size=shape, mode="bilinear", align_corners=False).flatten(2)
            for shape in shapes
        ]

        x = self.query_features.weight.expand(mask_features.shape[0], -1, -1)
        positions = self.query_positions.weight
        features = [self.norm(x)]
        embeddings = [self.mask_mlp(features[0])]
        for i, layer in enumerate(self.layers):
            level = i % LEVELS
            allowed = attention_mask(embeddings[-1].detach() @ small[level])
            x = layer(x, positions, keys[level], values[level], allowed)
            features.append(self.norm(x))
            embeddings.append(self.mask_mlp(features[-1]))
        return torch.stack(features), MaskLogits(torch.stack(embeddings), mask_features)


def attention_mask(logits: Tensor) -> Tensor:
    """Where a query attends, (B, Q, S) bool: at mask logits (B, Q, S) >= 0; everywhere if its mask is empty."""
    allowed = logits >= 0
    return allowed | ~allowed.any(-1, keepdim=True)
