"""A segmenter for inference: every BatchNorm folded into the convolution before it, and on a CPU the large 3 x 3
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
    """A frozen copy with the same predictions but for rounding, a tenth faster.

    It has weights of its own: later training of the original does not change it, and it cannot be trained. Leave it on
    the device where it was made.
    """
    folded = copy.deepcopy(segmenter).eval().requires_grad_(False)
    if any(isinstance(module, _BatchNorm) for module in folded.backbone.modules()):
        # folding needs a trace, and Swin, which has no BatchNorm, cannot be traced
        folded.backbone.net = _fold(folded.backbone.net)
    if next(folded.parameters()).device.type == "cpu":
        for module in list(folded.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Conv2d) and WinogradConv.fits(child):
                    setattr(module, name, WinogradConv(child))
    return folded


def _fold(net: nn.Module) -> nn.Module:
    traced: Any = fuse(net)
    convolutions = {name for name, module in traced.named_modules() if isinstance(module, nn.Conv2d)}
    # tracing turns `x += shortcut` into a sum with a result of its own: back in place
    for node in traced.graph.nodes:
        if node.target is operator.add and node.args[0].target in convolutions and len(node.args[0].users) == 1:
            node.target = operator.iadd
    traced.recompile()
    return traced.eval()
