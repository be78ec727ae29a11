"""Linear layers and FFNs that are faster on a CPU for many tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.portable import is_portable

FEW = 256  # tokens; with fewer F.linear is the faster of the two


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` on tokens: (B, S, in), (out, in), (out,) -> (B, S, out).

    On a CPU it is computed as a 1 x 1 convolution, forward and backward: its kernels (oneDNN) come nearer to the
    processor's peak than those of `F.linear` (MKL), above all on processors that are not Intel's.
    """
    if is_portable() or x.device.type != "cpu" or x.shape[1] < FEW:
        return F.linear(x, weight, bias)
    return _from_maps(_convolve(_to_maps(x), weight, bias))


def make_feed_forward(dim: int, hidden: int) -> nn.Sequential:
    """Linear (dim -> hidden), ReLU, Linear (hidden -> dim), initialised as in the published networks."""
    ffn = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))
    for parameter in ffn.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return ffn


def feed_forward(x: Tensor, ffn: nn.Sequential) -> Tensor:
    """`ffn`, from `make_feed_forward`, on tokens (B, S, C) -> (B, S, C)."""
    first, _, second = ffn
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    if is_portable() or x.device.type != "cpu" or x.shape[1] < FEW:
        return ffn(x)
    # in place on the convolution's result: on a view of it autograd would copy the whole tensor three times
    hidden = F.relu(_convolve(_to_maps(x), first.weight, first.bias), inplace=True)
    return _from_maps(_convolve(hidden, second.weight, second.bias))


def _to_maps(x: Tensor) -> Tensor:
    """(B, S, C) -> (B, C, 1, S), a view, channels last in memory."""
    return x.transpose(1, 2).unsqueeze(2)


def _from_maps(x: Tensor) -> Tensor:
    """(B, C, 1, S) -> (B, S, C), a view."""
    return x.squeeze(2).transpose(1, 2)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None], bias)
