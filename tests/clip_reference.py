"""The teacher's arithmetic once more, slowly and without its code: plain open_clip, numpy loops, one input at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.teacher import SMALL_CLIP


def small_clip() -> tuple[Any, Any]:
    """The shipped CLIP and its tokenizer, straight from open_clip."""
    name = f"local-dir:{SMALL_CLIP}"
    return open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)


def shrink(size: int, to: int) -> NDArray[np.float64]:
    """(to, size) weights of a bilinear reduction with antialiasing: a triangle as wide as one output pixel's neighbours."""
    scale = max(size / to, 1.0)
    weights = np.zeros((to, size))
    for i in range(to):
        centre = (i + 0.5) * size / to
        for j in range(size):
            weights[i, j] = max(0.0, 1.0 - abs(j + 0.5 - centre) / scale)
        weights[i] /= weights[i].sum()
    return weights


def masked(prepared: Tensor, mask: NDArray[np.bool_], background: Tensor) -> Tensor:
    """One masked instance: prepared (3, S, S), mask (H, W), background (3,) in the same units -> (3, S, S)."""
    size = prepared.shape[-1]
    share = shrink(mask.shape[0], size) @ mask @ shrink(mask.shape[1], size).T
    result = prepared.double() * torch.from_numpy(share) + background.double()[:, None, None] * (
        1 - torch.from_numpy(share)
    )
    return result.float()


@torch.no_grad()
def embed(clip: Any, image: Tensor) -> Tensor:
    """One prepared input (3, S, S) -> unit row (D,)."""
    row = clip.encode_image(image[None])[0].double()
    return row / row.square().sum().sqrt()


@torch.no_grad()
def embed_text(clip: Any, tokenizer: Any, sentence: str) -> Tensor:
    """One sentence -> unit row (D,)."""
    row = clip.encode_text(tokenizer([sentence]))[0].double()
    return row / row.square().sum().sqrt()
