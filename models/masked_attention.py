"""An image and all of its instances in one pass: each instance has a CLS token that attends to its own patches only.

No other token attends to the extra ones, so the image's embedding equals that of a plain pass, and so does that of an
instance that owns every patch. For towers whose output is the attention of one query over patches: open_clip's ViTs,
and its ResNets with attention pooling, where the query is the mean of the cells, here of the instance's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor

from models.errors import ModelError

CURE = "use --tokens.method pixels, or an open_clip ViT or ResNet as the teacher"


def patch_grid(visual: Any) -> tuple[int, int]:
    """Rows and columns of a tower's patches. Raises ModelError for a tower that `embed_by_instance` cannot run."""
    if isinstance(visual, ModifiedResNet):
        side = int(visual.image_size) // 32  # the stride of its last layer
        return side, side
    if not isinstance(visual, VisionTransformer):
        raise ModelError(
            f"method 'attention' needs patches and a CLS token, which a {type(visual).__name__} tower has not; {CURE}"
        )
    blocks = visual.transformer.resblocks
    if visual.pool_type != "tok" or visual.attn_pool or not all(type(b) is ResidualAttentionBlock for b in blocks):
        raise ModelError(
            f"method 'attention' needs a ViT with plain blocks and a CLS token, and this one differs; {CURE}"
        )
    return visual.grid_size


def embed_by_instance(visual: Any, images: Tensor, own: Tensor) -> Tensor:
    """Embeddings (B, 1 + O, D), not normalised, of prepared images (B, 3, S, S) and of their instances.

    `own` (B, O, P) bool: which of the image's P patches, row by row, are the instance's. The embedding of an empty row
    is defined but has no meaning, so that images can be padded to O instances.
    """
    return (_resnet if isinstance(visual, ModifiedResNet) else _vit)(visual, images, own)


def _vit(visual: Any, images: Tensor, own: Tensor) -> Tensor:
    x = visual._embeds(images)  # (B, 1 + P, W): CLS, patches
    first, count = x.shape[1], own.shape[1]
    x = torch.cat([x, x[:, :1].expand(-1, count, -1)], 1)  # (B, 1 + P + O, W): O more CLS tokens
    allowed = _with_itself(own)[:, None]
    for block in visual.transformer.resblocks:
        x = x + block.ls_1(_attend(block.attn, block.ln_1(x), first, allowed))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    tokens = visual.ln_post(torch.cat([x[:, :1], x[:, first:]], 1))
    return tokens if visual.proj is None else tokens @ visual.proj


def _attend(attention: Any, x: Tensor, first: int, allowed: Tensor) -> Tensor:
    """Self-attention of the first `first` tokens among themselves; the others attend to patches and to themselves,
    where `allowed` (B, 1, O, P + O) is True. x (B, 1 + P + O, W) -> the same shape."""
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, tokens, width of a head) each
    shared = F.scaled_dot_product_attention(q[:, :, :first], k[:, :, :first], v[:, :, :first])
    extra = F.scaled_dot_product_attention(q[:, :, first:], k[:, :, 1:], v[:, :, 1:], attn_mask=allowed)
    return attention.out_proj(torch.cat([shared, extra], 2).transpose(1, 2).flatten(2))


def _resnet(visual: Any, images: Tensor, own: Tensor) -> Tensor:
    x = visual.stem(images)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = layer(x)
    cells, pool = x.flatten(2).transpose(1, 2), visual.attnpool  # (B, P, W)
    own = torch.cat([own.new_ones(len(own), 1, own.shape[2]), own], 1)  # the image owns every cell
    share = own.to(cells.dtype)
    mean = (share / share.sum(-1, keepdim=True).clamp(min=1)) @ cells
    position = pool.positional_embedding.to(cells.dtype)
    query, cells = mean + position[0], cells + position[1:]
    sources = torch.cat([cells, query], 1)  # in the order of `_with_itself`

    def heads(tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)

    found = F.scaled_dot_product_attention(
        heads(pool.q_proj(query)),
        heads(pool.k_proj(sources)),
        heads(pool.v_proj(sources)),
        attn_mask=_with_itself(own)[:, None],
    )
    return pool.c_proj(found.transpose(1, 2).flatten(2))


def _with_itself(own: Tensor) -> Tensor:
    """(B, O, P) -> (B, O, P + O): a token that owns these patches also attends to itself, as the CLS token does."""
    itself = torch.eye(own.shape[1], dtype=torch.bool, device=own.device)
    return torch.cat([own, itself.expand(len(own), -1, -1)], -1)
