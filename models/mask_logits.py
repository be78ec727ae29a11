"""Mask logits kept as the two factors of their product, so that only the maps in use are computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.deformable import sample_levels
from models.losses import at_least_float32
from models.transfer import send


@dataclass(frozen=True)
class MaskLogits:
    """Logit of a query at a pixel = its embedding . the pixel's features: L x B x Q maps of (h, w).

    All maps of a training step would be gigabytes; prediction uses those of one output, the losses those of the matched
    queries, the matcher a few points of all. Indexed like the tensor (L, B, Q, h, w) that it represents.
    """

    embeddings: Tensor  # (L, B, Q, C)
    pixels: Tensor  # (B, C, h, w)

    def dense(self) -> Tensor:
        """All maps, (L, B, Q, h, w)."""
        return torch.einsum("lbqc,bchw->lbqhw", self.embeddings, self.pixels)

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, index: Any) -> Any:
        """[layer] -> the tensor (B, Q, h, w) of one output; [slice] -> the MaskLogits of these outputs;
        [layer, image, query], three index tensors (N,) on the CPU, images in order -> the tensor (N, h, w)."""
        if isinstance(index, int):
            return torch.einsum("bqc,bchw->bqhw", self.embeddings[index], self.pixels)
        if isinstance(index, slice):
            return MaskLogits(self.embeddings[index], self.pixels)
        return self._rows(*index)

    def _rows(self, layer: Tensor, image: Tensor, query: Tensor) -> Tensor:
        images, _, *size = self.pixels.shape
        # counted where it needs no wait for the device
        counts = torch.bincount(image, minlength=images).tolist()
        embeddings = self.embeddings[send(torch.stack((layer, image, query)), self.embeddings.device).unbind()]
        parts = zip(embeddings.split(counts), self.pixels.flatten(2), strict=True)
        return torch.cat([part @ pixels for part, pixels in parts]).unflatten(1, size)

    def sample(self, points: Tensor) -> Iterator[Tensor]:
        """Bilinear values in float32 at (B, P, 2) points (x, y) in [0, 1], output by output: L x (B, Q, P)."""
        pixels = at_least_float32(self.pixels)
        height, width = pixels.shape[-2:]
        points = points.to(pixels.dtype)[:, :, None, None, None]
        x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
        cells = pixels.flatten(2).transpose(1, 2).unsqueeze(2)  # (B, h w, 1, C)
        sampled = sample_levels(cells, ((height, width),), x, y, torch.ones_like(x)).transpose(1, 2)
        for embeddings in at_least_float32(self.embeddings):
            yield embeddings @ sampled
