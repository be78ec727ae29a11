"""The segmenter: backbone, pixel decoder and query decoder of Mask2Former or MaskFormer. In place of their class head
stands the `projector`."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor, nn

from models.backbone import Backbone
from models.errors import ModelError
from models.mask_logits import MaskLogits
from models.maskformer import DETRDecoder, FPNPixelDecoder
from models.pixel_decoder import PixelDecoder
from models.query_decoder import QueryDecoder


class SegmenterOutput(NamedTuple):
    """All L decoder outputs; the last one is F.

    Mask2Former: L = decoder layers + 1, the first computed from the learned queries alone. MaskFormer: L = decoder
    layers.
    """

    features: Tensor  # (L, B, Q, C) after the final norm
    masks: Tensor | MaskLogits  # (L, B, Q, H/4, W/4) logits


class Segmenter(nn.Module):
    """Images to query features and mask logits, see `build_segmenter`."""

    def __init__(
        self,
        backbone: Backbone,
        pixel_decoder: PixelDecoder | FPNPixelDecoder,
        query_decoder: QueryDecoder | DETRDecoder,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.query_decoder = query_decoder

    def forward(self, images: Tensor, *, dense: bool = True) -> SegmenterOutput:
        """images (B, 3, H, W), normalised, H and W multiples of 32 -> query features and mask logits of all outputs.

        With `dense` the masks are a tensor of all outputs' maps, without they are MaskLogits, which computes maps on
        use.
        """
        assert images.shape[-2] % 32 == 0 and images.shape[-1] % 32 == 0, f"image size {tuple(images.shape[-2:])}"
        features, masks = self.query_decoder(*self.pixel_decoder(self.backbone(images)))
        return SegmenterOutput(features, masks.dense() if dense else masks)


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
    architecture: Literal["mask2former", "maskformer"] = "mask2former",
) -> Segmenter:
    """A segmenter over a timm backbone.

    The published R50 networks have 100 queries, dim 256, 8 heads, and decoder FFN 2048; Mask2Former 6 encoder layers of
    FFN 1024 and 4 points, 9 decoder layers; MaskFormer (COCO panoptic) 6 encoder layers of FFN 2048, 6 decoder layers.

    Args:
        backbone_weights: None (random), "imagenet", "shipped" or a local file, see `Backbone`.
        encoder_points: points a level of Mask2Former's deformable attention; MaskFormer's encoder has none.

    Raises:
        ModelError: the heads do not divide the width, or the norms cannot; and as `Backbone`.
        KeyError: another architecture.
    """
    if dim % 8 or (dim > 256 and dim % 32):
        raise ModelError(f"dim {dim} must be a multiple of 8, and of 32 above 256, for GroupNorm; choose such a width")
    if dim % heads:
        raise ModelError(f"dim {dim} must be a multiple of heads {heads}; choose another number of heads")
    body = Backbone(backbone, weights=backbone_weights, frozen_batchnorm=frozen_batchnorm)
    decoders = {
        "mask2former": (partial(PixelDecoder, points=encoder_points), QueryDecoder),
        "maskformer": (FPNPixelDecoder, DETRDecoder),
    }
    pixel_decoder, query_decoder = decoders[architecture]
    return Segmenter(
        body,
        pixel_decoder(channels=body.channels, dim=dim, heads=heads, layers=encoder_layers, ffn=encoder_ffn),
        query_decoder(queries=queries, dim=dim, heads=heads, layers=decoder_layers, ffn=decoder_ffn),
    )
