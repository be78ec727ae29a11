"""The segmenter: backbone, pixel decoder and query decoder of Mask2Former, without its class head (see `projector`)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from models.backbone import Backbone
from models.pixel_decoder import PixelDecoder
from models.query_decoder import QueryDecoder


class SegmenterOutput(NamedTuple):
    """What every decoder output says, L = decoder layers + 1; the first comes from the queries alone, the last is F."""

    features: Tensor  # (L, B, Q, C) after the final norm
    masks: Tensor  # (L, B, Q, H/4, W/4) logits


class Segmenter(nn.Module):
    def __init__(self, backbone: Backbone, pixel_decoder: PixelDecoder, query_decoder: QueryDecoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.query_decoder = query_decoder

    def forward(self, images: Tensor) -> SegmenterOutput:
        """images (B, 3, H, W), normalised, H and W multiples of 32."""
        assert images.shape[-2] % 32 == 0 and images.shape[-1] % 32 == 0, f"image size {tuple(images.shape[-2:])}"
        return SegmenterOutput(*self.query_decoder(*self.pixel_decoder(self.backbone(images))))


def build_segmenter(
    *,
    backbone: str,
    backbone_weights: str | None,
    frozen_batchnorm: bool,
    queries: int,
    dim: int,
    heads: int,
    encoder_layers: int,
    encoder_ffn: int,
    encoder_points: int,
    decoder_layers: int,
    decoder_ffn: int,
) -> Segmenter:
    """Mask2Former over a timm backbone; the published R50 network is 100 queries, dim 256, 8 heads, 6 encoder layers of
    FFN 1024 and 4 points, 9 decoder layers of FFN 2048.

    backbone_weights: None (random), "imagenet" or a local file, see `Backbone`.
    Raises ValueError for a width that the heads or the norms cannot divide, and what `Backbone` raises.
    """
    if dim % 8 or (dim > 256 and dim % 32):
        raise ValueError(f"dim {dim} must be a multiple of 8, and of 32 above 256, for GroupNorm; choose such a width")
    if dim % heads:
        raise ValueError(f"dim {dim} must be a multiple of heads {heads}; choose another number of heads")
    body = Backbone(backbone, weights=backbone_weights, frozen_batchnorm=frozen_batchnorm)
    return Segmenter(
        body,
        PixelDecoder(
            channels=body.channels,
            dim=dim,
            heads=heads,
            layers=encoder_layers,
            ffn=encoder_ffn,
            points=encoder_points,
        ),
        QueryDecoder(queries=queries, dim=dim, heads=heads, layers=decoder_layers, ffn=decoder_ffn),
    )
