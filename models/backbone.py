"""Backbone: a timm network whose four stages are read at strides 4, 8, 16 and 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STRIDES = (4, 8, 16, 32)
SHIPPED = Path(__file__).parent / "small_backbone"  # <timm name>.safetensors, made by pipeline/train_backbone.py


class Backbone(nn.Module):
    """The four feature maps of a timm network, strides 4, 8, 16, 32.

    `weights` is None (random), "imagenet" (timm's default pretrained weights, downloaded from its hub and cached),
    "shipped" (the package's own, of the small network that generated scenes are for) or the path of a local file that holds `timm.create_model(name).state_dict()`, as .safetensors or as a torch file of
    plain tensors. A classifier in the file is ignored.

    With `frozen_batchnorm` the affine parameters and running statistics of every BatchNorm stay as loaded, also after
    `.train()`, as in the published ResNet settings; on a network without BatchNorm it changes nothing.

    Raises ValueError for a name that timm does not know, a network without these strides, weights that cannot be
    downloaded, and a file that is missing, unreadable, or made for another network.
    """

    def __init__(self, name: str, *, weights: str | None = None, frozen_batchnorm: bool = False) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise ValueError(f"backbone {name!r} is not a timm model; timm.list_models() prints their names")
        self.net = _create(name, weights)
        info: Any = self.net.feature_info
        strides = tuple(info.reduction())
        if strides != STRIDES:
            raise ValueError(
                f"backbone {name!r} has feature strides {strides}, not {STRIDES}; "
                f"choose a timm model with four stages, such as resnet50"
            )
        self.net.to(memory_format=torch.channels_last)  # a third faster on CPU, and what tensor cores want
        self.channels: tuple[int, ...] = tuple(info.channels())
        self.frozen_batchnorm = frozen_batchnorm
        if frozen_batchnorm:
            for norm in self._batchnorms():
                norm.requires_grad_(False)
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
        return self.net(images.contiguous(memory_format=torch.channels_last))


def _create(name: str, weights: str | None) -> nn.Module:
    features: dict[str, Any] = {"features_only": True, "out_indices": (-4, -3, -2, -1)}
    if weights is None:
        return timm.create_model(name, pretrained=False, **features)
    if weights != "imagenet":
        path = SHIPPED / f"{name}.safetensors" if weights == "shipped" else Path(weights)
        overlay = {"state_dict": _read_weights(name, path)}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **features)
    try:
        return timm.create_model(name, pretrained=True, **features)
    except Exception as error:  # offline, timm and its hub client raise a dozen unrelated types
        config = timm.get_pretrained_cfg(name)
        source = (config and (config.hf_hub_id or config.url)) or "none published"
        raise ValueError(
            f"backbone_weights 'imagenet' of {name!r} ({source}) could not be loaded ({type(error).__name__}); fetch "
            f"them on a connected machine and set backbone_weights to that local .safetensors or .pth file"
        ) from error


def _read_weights(name: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a local weights file, checked against the network they are for."""
    if not path.is_file():
        raise ValueError(f"backbone_weights {path}: no such file; use 'imagenet', none, or the path of a weights file")
    try:
        weights = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # safetensors, zip, pickle and key errors alike: the file is not what it should be
        raise ValueError(
            f"backbone_weights {path}: not readable as .safetensors or a torch file of plain tensors "
            f"({type(error).__name__}); save timm.create_model({name!r}).state_dict() there"
        ) from error
    with torch.device("meta"):
        expected = timm.create_model(name, num_classes=0).state_dict()
    wrong = [
        key
        for key, tensor in expected.items()
        if not key.endswith("num_batches_tracked") and (key not in weights or weights[key].shape != tensor.shape)
    ]
    if wrong:
        raise ValueError(
            f"backbone_weights {path}: {len(wrong)} of {len(expected)} tensors of {name!r} are missing or of another "
            f"shape, the first is {wrong[0]!r}; save timm.create_model({name!r}).state_dict() there"
        )
    return weights
