from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.linear import FEW, feed_forward, linear


@pytest.mark.parametrize("tokens", [3, FEW, FEW + 5])
@pytest.mark.parametrize("images", [1, 2])
def test_linear_layers_and_ffns_are_torchs_own(images: int, tokens: int) -> None:
    """On both sides of the switch: values, layout and gradients."""
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(6, 10), nn.ReLU(inplace=True), nn.Linear(10, 4)).double()
    layer = ffn[0]
    assert isinstance(layer, nn.Linear)
    x = torch.randn(images, tokens, 6, dtype=torch.float64, requires_grad=True)
    for found, expected in (
        (linear(x, layer.weight, layer.bias), F.linear(x, layer.weight, layer.bias)),
        (linear(x, layer.weight, None), F.linear(x, layer.weight)),
        (feed_forward(x, ffn), ffn(x)),
    ):
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous()
        pull = torch.randn_like(expected)
        leaves = [x, *ffn.parameters()]
        for ours, theirs in zip(
            torch.autograd.grad(found, leaves, pull, allow_unused=True),
            torch.autograd.grad(expected, leaves, pull, allow_unused=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
