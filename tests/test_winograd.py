from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.winograd import WinogradConv, transforms


def test_the_transforms_make_a_correlation_along_one_axis() -> None:
    """outputs ((kernels g) * (inputs d)) = g slid over d, Lavin and Gray's Eq. 5."""
    outputs, kernels, inputs = transforms()
    rng = np.random.default_rng(0)
    g, d = rng.normal(size=3), rng.normal(size=6)
    np.testing.assert_allclose(outputs @ ((kernels @ g) * (inputs @ d)), np.correlate(d, g), rtol=1e-12)


@pytest.mark.parametrize(
    ("height", "width"), [(4, 4), (32, 32), (5, 7), (33, 130)]
)  # whole tiles and not, one chunk and several
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_the_convolution(height: int, width: int, bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 136, 3, padding=1, bias=bias).double()
    fast = WinogradConv(conv)
    x = torch.randn(2, 128, height, width, dtype=torch.float64)
    found = fast(x)
    torch.testing.assert_close(found, conv(x), rtol=1e-10, atol=1e-10)
    assert found.is_contiguous(memory_format=torch.channels_last) or (height % 4 or width % 4)


def test_float32_rounds_little_worse_than_the_convolution() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(256, 256, 3, padding=1)
    x = torch.randn(1, 256, 32, 32).relu()
    with torch.no_grad():
        expected = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)  # pyright: ignore[reportOptionalMemberAccess]
        found = (WinogradConv(conv)(x) - expected).abs().max() / expected.abs().max()
    assert found < 5e-6


@pytest.mark.parametrize(
    "change",
    [
        {"stride": 2},
        {"padding": 0},
        {"dilation": 2, "padding": 2},
        {"groups": 2},
        {"kernel_size": 1},
        {"in_channels": 64},
    ],
)
def test_other_convolutions_are_left_alone(change: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"in_channels": 128, "out_channels": 128, "kernel_size": 3, "padding": 1}
    assert WinogradConv.fits(nn.Conv2d(**sizes))
    assert not WinogradConv.fits(nn.Conv2d(**(sizes | change)))
