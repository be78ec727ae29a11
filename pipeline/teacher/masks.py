"""The teacher's tokens of masks that a network finds in an image. They may overlap, so no map of ids can hold them.

A mask gets the token that stage "cache-clip" computes, with the same options, of a segment with the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from models.teacher import Teacher
from pipeline.teacher.config import TokensConfig
from pipeline.teacher.encode import INSTANCES_A_PASS, MASK_PIXELS
from pipeline.teacher.instances import instance_box, own_patches


def encode_masks(teacher: Teacher, image: Tensor, masks: Tensor | Iterable[Tensor], options: TokensConfig) -> Tensor:
    """Unit tokens (k, D) float32 of the k masks of an image (3, H, W) uint8, on the teacher's device.

    `masks` (k, H, W) bool, or parts of them one after the other, so that not all need to be held at full size; each
    has a pixel. Of the options, `method`, `crop`, `margin`, `resize`, `dtype` and `batch` count. The tokens of an image
    depend on no other image.

    Raises ModelError when the teacher does not support `options.method`.
    """
    device = teacher.mean.device
    image, parts = image.to(device), (masks,) if isinstance(masks, Tensor) else masks
    dtype = getattr(torch, options.dtype)
    if options.method == "attention":
        own = [_own_patches(teacher, mask, options) for part in parts for mask in part]
        prepared = teacher.prepare(image, options.resize)[None]
        passes = torch.stack(own).to(device).split(INSTANCES_A_PASS) if own else ()
        rows = [teacher.encode_by_instance(prepared, some[None], dtype)[0, 1:] for some in passes]
    else:
        inputs = [some for part in parts for some in _inputs(teacher, image, part.to(device), options)]
        batches = torch.cat(inputs).split(options.batch) if inputs else ()
        rows = [teacher.encode_images(some, dtype) for some in batches]
    return torch.cat(rows) if rows else torch.zeros(0, teacher.dim, device=device)


def _inputs(teacher: Teacher, image: Tensor, masks: Tensor, options: TokensConfig) -> Iterator[Tensor]:
    """The teacher's inputs (m, 3, S, S) of some masks after the other."""
    if options.crop == "full":
        prepared = teacher.prepare(image, options.resize)
        for some in masks.split(max(MASK_PIXELS // masks[0].numel(), 1) if len(masks) else 1):
            yield teacher.mask(prepared, some, options.resize)
        return
    for mask in masks:
        top, left, bottom, right = instance_box(mask.cpu().numpy(), options.margin)
        prepared = teacher.prepare(image[:, top:bottom, left:right], options.resize)
        yield teacher.mask(prepared, mask[None, top:bottom, left:right], options.resize)


def _own_patches(teacher: Teacher, mask: Tensor, options: TokensConfig) -> Tensor:
    """Which of the P patches are the mask's, (P,) bool."""
    place, patch = teacher.place(mask.shape, options.resize), teacher.image_size // teacher.patches[0]
    ids, wanted = mask.cpu().numpy().astype(np.int32), np.ones(1, np.int32)
    return torch.from_numpy(own_patches(ids, wanted, grid=teacher.patches, patch=patch, place=place))[0]
