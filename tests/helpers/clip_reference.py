"""The teacher's arithmetic once more, slowly and without its code: plain open_clip, numpy loops, one input at a
time.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.teacher import Teacher
from models.teacher_files import SMALL_CLIP


def small_clip() -> tuple[Any, Any]:
    """The shipped CLIP and its tokenizer, straight from open_clip."""
    name = f"local-dir:{SMALL_CLIP}"
    return open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)


def shrink(size: int, to: int) -> NDArray[np.float64]:
    """(to, size) weights of a bilinear reduction with antialiasing: a triangle as wide as one output pixel's
    neighbours.
    """
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


def covered_patches(mask: NDArray[np.bool_], teacher: Teacher, resize: str) -> NDArray[np.bool_]:
    """The patches (rows, columns) whose centre a mask (H, W) covers; of a mask that covers none, the first of those it
    covers most.
    """
    (height, width), (rows, columns), side = mask.shape, teacher.patches, teacher.image_size
    placed = (
        [side, side] if resize == "squeeze" else [max(round(n * side / max(height, width)), 1) for n in (height, width)]
    )
    border = [(side - n) // 2 for n in placed]
    own, covered = np.zeros((rows, columns), bool), np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            y = ((row + 0.5) * side / rows - border[0]) / placed[0] * height
            x = ((column + 0.5) * side / columns - border[1]) / placed[1] * width
            own[row, column] = 0 <= y < height and 0 <= x < width and mask[int(y), int(x)]
    if not own.any():
        for y, x in zip(*np.nonzero(mask), strict=True):
            row = (border[0] + (y + 0.5) / height * placed[0]) / side * rows
            column = (border[1] + (x + 0.5) / width * placed[1]) / side * columns
            covered[int(row), int(column)] += 1
        own[np.unravel_index(covered.argmax(), own.shape)] = True
    return own


@torch.no_grad()
def attended_by_vit(visual: Any, image: Tensor, own: NDArray[np.bool_]) -> Tensor:
    """The unit row (D,) of one more CLS token that sees the `own` (P,) patches of an input (3, S, S) and itself, and
    that nobody sees.
    """
    x = visual._embeds(image[None])
    x = torch.cat([x, x[:, :1]], 1)
    mask = torch.zeros(x.shape[1], x.shape[1])
    mask[:-1, -1] = -torch.inf
    mask[-1, 0] = -torch.inf
    mask[-1, 1:-1][~torch.from_numpy(own.copy())] = -torch.inf
    row = (visual.ln_post(visual.transformer(x, attn_mask=mask)[:, -1]) @ visual.proj)[0].double()
    return row / row.square().sum().sqrt()


@torch.no_grad()
def attended_by_resnet(visual: Any, image: Tensor, own: NDArray[np.bool_]) -> Tensor:
    """The unit row (D,) that attention pooling gives when there are no cells but the `own` (P,) ones of an input (3, S,
    S).
    """
    cells = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(image[None]))))).flatten(2)
    pool, index = copy.deepcopy(visual.attnpool), torch.from_numpy(np.flatnonzero(own))
    pool.positional_embedding = nn.Parameter(pool.positional_embedding[torch.cat([torch.zeros(1).long(), 1 + index])])
    row = pool(cells[..., None, index])[0].double()
    return row / row.square().sum().sqrt()
