"""A segmenter that is quick on a CPU, and BatchNorms that do something."""

from __future__ import annotations

import torch
from torch import nn

from models.segmenter import Segmenter, build_segmenter

SMALL = {
    "backbone": "lcnet_035",
    "backbone_weights": None,
    "frozen_batchnorm": False,
    "queries": 5,
    "dim": 32,
    "heads": 4,
    "encoder_layers": 1,
    "encoder_ffn": 48,
    "encoder_points": 4,
    "decoder_layers": 4,
    "decoder_ffn": 48,
}


def small_segmenter(**changes: object) -> Segmenter:
    torch.manual_seed(0)
    return build_segmenter(**(SMALL | changes))  # pyright: ignore[reportArgumentType]


def randomise_batchnorm(module: nn.Module) -> None:
    """Weights, biases and statistics as after a training: drawn anew, from the global generator."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
            nn.init.normal_(norm.running_mean, std=0.1)  # pyright: ignore[reportArgumentType]
            nn.init.uniform_(norm.running_var, 0.5, 1.5)  # pyright: ignore[reportArgumentType]
