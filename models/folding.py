"""A segmenter that only predicts: every BatchNorm folded into the convolution before it, and on a CPU the large 3 x 3
convolutions with fewer multiplications."""

from __future__ import annotations

import copy
import operator
from typing import Any

from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.modules.batchnorm import _BatchNorm

from models.segmenter import Segmenter
from models.winograd import WinogradConv


def for_inference(segmenter: Segmenter) -> Segmenter:
    """A frozen copy with the same predictions but for rounding, a tenth faster. It has its own weights: what the original
    learns later does not reach it, and it cannot learn. Leave it on the device where it was made."""
    folded = copy.deepcopy(segmenter).eval().requires_grad_(False)
    if any(isinstance(module, _BatchNorm) for module in folded.backbone.modules()):
        folded.backbone.net = _fold(folded.backbone.net)  # by its trace, which Swin, without BatchNorm, does not have
    if next(folded.parameters()).device.type == "cpu":
        for module in list(folded.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Conv2d) and WinogradConv.fits(child):
                    setattr(module, name, WinogradConv(child))
    return folded


def _fold(net: nn.Module) -> nn.Module:
    traced: Any = fuse(net)
    convolutions = {name for name, module in traced.named_modules() if isinstance(module, nn.Conv2d)}
    for node in traced.graph.nodes:  # tracing wrote `x += shortcut` as a sum of its own
        if node.target is operator.add and node.args[0].target in convolutions and len(node.args[0].users) == 1:
            node.target = operator.iadd
    traced.recompile()
    return traced.eval()
