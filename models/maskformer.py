"""Pixel decoder and query decoder of MaskFormer (Cheng et al. 2021), as in its COCO panoptic setting.

A transformer encoder over stride 32, an FPN from there to stride 4, and DETR's decoder over the encoder's map. There is
no dropout (published: 0.1): every random draw of a training step comes from the step's own generator, and dropout
cannot take one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.linear import make_feed_forward
from models.mask_logits import MaskLogits
from models.pixel_decoder import group_norm, sine_positions
from models.portable import by_size
from models.query_decoder import Attention, DecoderLayer


class EncoderLayer(nn.Module):
    """Self-attention and FFN, each followed by its norm; positions are added to queries and keys, not to values.

    tokens (B, S, dim), positions (S, dim) -> (B, S, dim).
    """

    def __init__(self, *, dim: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attention = Attention(dim=dim, heads=heads)
        self.attention_norm = nn.LayerNorm(dim)
        self.ffn = make_feed_forward(dim, ffn)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        placed = tokens + positions
        tokens = self.attention_norm(tokens + self.attention(placed, placed, tokens))
        return self.ffn_norm(tokens + self.ffn(tokens))


def _conv_norm(width: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, dim, 3, padding=1, bias=False), group_norm(dim), nn.ReLU(inplace=True))


class FPNPixelDecoder(nn.Module):
    """Four backbone maps to the map that the queries attend to, at stride 32, and the mask features, at stride 4.

    Args:
        channels: of the backbone maps at strides 4, 8, 16, 32. dim: width of all inner maps, a multiple of 8.
        heads: of the attention. ffn: hidden width of the FFNs.
        layers: 6 as published for COCO panoptic. With 0, the published semantic setting, the FPN starts from the
            backbone's own stride 32 map.
    """

    def __init__(self, *, channels: Sequence[int], dim: int, heads: int, layers: int, ffn: int) -> None:
        super().__init__()
        self.dim = dim
        *lateral, coarsest = channels
        self.input_proj = nn.Conv2d(coarsest, dim, 1)
        self.layers = nn.ModuleList(EncoderLayer(dim=dim, heads=heads, ffn=ffn) for _ in range(layers))
        self.stem = _conv_norm(dim if layers else coarsest, dim)
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, dim, 1, bias=False), group_norm(dim)) for width in reversed(lateral)
        )
        self.fpn = nn.ModuleList(_conv_norm(dim, dim) for _ in lateral)
        self.mask_features = nn.Conv2d(dim, dim, 3, padding=1)
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """[(B, channels, h, w)] at strides 4, 8, 16, 32
        -> tokens (B, H/32 * W/32, dim) and mask features (B, dim, H/4, W/4).
        """
        *finer, coarsest = features
        height, width = coarsest.shape[-2:]
        tokens = self.input_proj(coarsest).permute(0, 2, 3, 1).flatten(1, 2)
        positions = by_size(sine_positions, height, width, self.dim, tokens.device)
        for layer in self.layers:
            tokens = layer(tokens, positions)
        if self.layers:
            coarsest = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        map_ = self.stem(coarsest)
        for left, lateral, fpn in zip(reversed(finer), self.lateral, self.fpn, strict=True):
            map_ = fpn(lateral(left) + F.interpolate(map_, size=left.shape[-2:], mode="nearest"))
        return tokens, self.mask_features(map_)


class DETRLayer(DecoderLayer):
    """The parts of Mask2Former's layer in DETR's order: self-attention first, then cross-attention to the whole map."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        placed = x + positions
        x = self.self_norm(x + self.self_attention(placed, placed, x))
        x = self.cross_norm(x + self.cross_attention(x + positions, keys, values))
        return self.ffn_norm(x + self.ffn(x))


class DETRDecoder(nn.Module):
    """Queries that attend to the stride 32 map in every layer; they start at zero, and their positions are learned.

    Args:
        queries: Q. dim: width C. heads: of the attention. layers: L. ffn: hidden width of the FFNs.
    """

    def __init__(self, *, queries: int, dim: int, heads: int, layers: int, ffn: int) -> None:
        super().__init__()
        self.dim = dim
        self.query_positions = nn.Embedding(queries, dim)
        self.layers = nn.ModuleList(DETRLayer(dim=dim, heads=heads, ffn=ffn) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.mask_mlp = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        )

    def forward(self, tokens: Tensor, mask_features: Tensor) -> tuple[Tensor, MaskLogits]:
        """tokens (B, H/32 * W/32, dim), mask_features (B, dim, H/4, W/4)
        -> features (L, B, Q, dim) after the final norm, and masks of L x B x Q maps (H/4, W/4), L = layers. The queries
        before the first layer are all zero, so there is no output for them.
        """
        height, width = mask_features.shape[-2:]
        keys = tokens + by_size(sine_positions, height // 8, width // 8, self.dim, tokens.device)
        positions = self.query_positions.weight
        x = torch.zeros_like(positions).expand(len(tokens), -1, -1)
        features = []
        for layer in self.layers:
            x = layer(x, positions, keys, tokens)
            features.append(self.norm(x))
        features = torch.stack(features)
        return features, MaskLogits(self.mask_mlp(features), mask_features)
