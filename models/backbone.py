"""Backbone: a timm network whose four stages are read at strides 4, 8, 16 and 32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.format import Format
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.backbone_weights import read_weights
from models.errors import ModelError
from models.teacher_files import IMAGENET, SMALL_BACKBONE

STRIDES = (4, 8, 16, 32)


class Backbone(nn.Module):
    """The four feature maps of a timm network, strides 4, 8, 16, 32.

    ResNets (the paper's are resnet50 and, with a deep stem, resnet101c), Swin, ConvNeXt and others. Swin takes images
    of any size, partitions, pads and shifts its windows at every size, and each of its maps passes a LayerNorm, all as
    in the published segmenters over Swin.

    `weights` is None (random), "imagenet" (timm's default pretrained weights, for resnet50 the published ones instead,
    see `IMAGENET`; downloaded from its hub and cached),
    "shipped" (the package's own, of the small network for generated scenes) or the path of a local file that holds
    `timm.create_model(name).state_dict()`, as .safetensors or as a torch file of plain tensors. A classifier in the
    file is ignored; one over COCO's categories is refused, see `read_weights`.

    With `frozen_batchnorm` the affine parameters and running statistics of every BatchNorm stay as loaded, also after
    `.train()`, as in the published ResNet settings; on a network without BatchNorm it changes nothing.

    Raises ModelError for a name that timm does not have, a network without these strides, weights that cannot be
    downloaded, and a file that is missing, unreadable, made for another network, or trained on COCO's categories.
    """

    def __init__(self, name: str, *, weights: str | None = None, frozen_batchnorm: bool = False) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise ModelError(f"backbone {name!r} is not a timm model; timm.list_models() prints their names")
        self.net = _create(name, weights)
        info: Any = self.net.feature_info
        strides = tuple(info.reduction())
        if strides != STRIDES:
            raise ModelError(
                f"backbone {name!r} has feature strides {strides}, not {STRIDES}; "
                f"choose a timm model with four stages, such as resnet50"
            )
        # a third faster on a CPU, and the layout of tensor cores
        self.net.to(memory_format=torch.channels_last)
        self.channels: tuple[int, ...] = tuple(info.channels())
        # Swin and similar networks return their maps with channels last
        last = getattr(self.net, "output_fmt", Format.NCHW) == Format.NHWC
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels) if last else None
        self.frozen_batchnorm = frozen_batchnorm
        if frozen_batchnorm:
            for norm in self._batchnorms():
                norm.requires_grad_(False)
                if type(norm) is nn.BatchNorm2d:
                    # of this type still, as `for_inference` needs it
                    norm.forward = functools.partial(_frozen_batchnorm, norm)
        self.train()

    def _batchnorms(self) -> list[_BatchNorm]:
        return [module for module in self.net.modules() if isinstance(module, _BatchNorm)]

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        if self.frozen_batchnorm:
            for norm in self._batchnorms():
                norm.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> [(B, channels[i], H / STRIDES[i], W / STRIDES[i])]."""
        maps = self.net(images.contiguous(memory_format=torch.channels_last))
        if self.norms is None:
            return maps
        return [norm(map_).permute(0, 3, 1, 2) for norm, map_ in zip(self.norms, maps, strict=True)]


def _frozen_batchnorm(norm: nn.BatchNorm2d, input: Tensor) -> Tensor:
    """`norm`, whose parameters and statistics never change, of `input` (B, C, h, w): on a GPU as one product and sum.

    The numbers are those of torch's own kernels, which a CPU uses; on a GPU theirs of the input's gradient is slow: a
    step of coco-zps-r50 took 0.389 s with it and 0.354 s without (NVIDIA H200). In half precision the factor and the
    summand are rounded before the product.
    """
    if input.device.type == "cpu":
        return nn.BatchNorm2d.forward(norm, input)
    return _affine(norm, input)


def _affine(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    assert not norm.training and norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    summand = norm.bias - norm.running_mean * factor
    factor, summand = (each.to(x.dtype)[:, None, None] for each in (factor, summand))
    return torch.addcmul(summand, x, factor)


def _create(name: str, weights: str | None) -> nn.Module:
    if not name.startswith("swin") or name.startswith("swinv2_cr"):
        return _create_features(name, weights)
    net = _create_features(name, weights, strict_img_size=False, always_partition=True)
    blocks: Any = [module for module in net.modules() if hasattr(module, "shift_size")]
    for block in blocks:
        block._attn = functools.partial(_padded_attention, block._attn, block.window_size)
    return net


def _padded_attention(attention: Callable[[Tensor], Tensor], window: tuple[int, int], x: Tensor) -> Tensor:
    """Swin's windowed attention on maps (B, H, W, C) that are padded to whole windows first, as published.

    timm shifts first, and so mixes cells from opposite borders where a map's size is no multiple of the window's.
    """
    height, width = x.shape[1:3]
    filled = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    return attention(filled)[:, :height, :width]


def _create_features(name: str, weights: str | None, **arguments: Any) -> nn.Module:
    features: dict[str, Any] = {"features_only": True, "out_indices": (-4, -3, -2, -1), **arguments}
    if weights is None:
        return timm.create_model(name, pretrained=False, **features)
    if weights != "imagenet":
        path = SMALL_BACKBONE / f"{name}.safetensors" if weights == "shipped" else Path(weights)
        overlay = {"state_dict": read_weights(name, path)}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **features)
    name = IMAGENET.get(name, name)
    try:
        return timm.create_model(name, pretrained=True, **features)
    except Exception as error:
        # without a network timm and its hub client raise a dozen unrelated types
        config = timm.get_pretrained_cfg(name)
        source = (config and (config.hf_hub_id or config.url)) or "none published"
        raise ModelError(
            f"backbone_weights 'imagenet' of {name!r} ({source}) could not be loaded ({type(error).__name__}); fetch "
            f"them on a connected machine and set backbone_weights to that local .safetensors or .pth file"
        ) from error
