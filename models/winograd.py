"""A 3 x 3 convolution with a quarter of the multiplications (Lavin and Gray 2016, F(4 x 4, 3 x 3)), for CPU inference.

Four by four outputs are computed from a tile of six by six inputs: tile and kernel are transformed, multiplied
elementwise, and transformed back. Over all channels and tiles that is 36 matrix products: 36 multiplications a tile in
place of 144.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# and infinity; half of the rounding error of the usual 0, 1, -1, 2, -2
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
# numbers at each of a tile's 36 places in one block of work, which so stays in the processor's cache
CHUNK = 16384


def transforms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrices that transform outputs (4, 6), kernels (6, 3) and inputs (6, 6) along one axis.

    Toom and Cook: a product of polynomials is determined by its values at `POINTS`.
    """
    points = np.array(POINTS)
    others = [np.delete(points, i) for i in range(5)]
    outputs = np.zeros((4, 6))
    outputs[:, :5] = points ** np.arange(4)[:, None]
    outputs[3, 5] = 1.0
    kernels = np.zeros((6, 3))
    kernels[:5] = points[:, None] ** np.arange(3) / [
        [np.prod(p - rest)] for p, rest in zip(points, others, strict=True)
    ]
    kernels[5, 2] = 1.0
    inputs = np.zeros((6, 6))
    inputs[:5, :5] = [np.poly(rest)[::-1] for rest in others]
    inputs[5] = np.poly(points)[::-1]
    return outputs, kernels, inputs


class WinogradConv(nn.Module):
    """Equal to `conv` with its present weights, but for rounding. It cannot be trained."""

    weight: Tensor
    inputs: Tensor
    outputs: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert self.fits(conv)
        outputs, kernels, inputs = (torch.from_numpy(np.kron(matrix, matrix)) for matrix in transforms())
        weight = (kernels @ conv.weight.detach().double().flatten(2).flatten(0, 1).T).unflatten(
            1, conv.weight.shape[:2]
        )
        self.register_buffer("weight", weight.transpose(1, 2).contiguous().to(conv.weight.dtype))  # (36, in, out)
        self.register_buffer("inputs", inputs.to(conv.weight.dtype))  # (36, 36)
        self.register_buffer("outputs", outputs.to(conv.weight.dtype))  # (16, 36)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Whether it can replace `conv`, and `conv` has enough channels for it to be faster."""
        shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and min(conv.in_channels, conv.out_channels) >= 128

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W), channels last in memory."""
        images, channels, height, width = x.shape
        across, down = -(-width // 4), -(-height // 4)  # tiles
        wide = 4 * across + 2
        framed = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, wide - width - 1, 1, 4 * down + 1 - height))
        found = x.new_empty(images, 4 * down, 4 * across, self.weight.shape[2])
        rows = min(max(CHUNK // (across * channels), 1), down)
        strides = (wide * channels, channels, 4 * wide * channels, 4 * channels, 1)
        for image in range(images):
            for first in range(0, down, rows):
                count = min(rows, down - first)
                part = framed[image, 4 * first : 4 * (first + count) + 2]
                tiles = part.as_strided((6, 6, count, across, channels), strides).reshape(36, -1)
                values = torch.bmm((self.inputs @ tiles).unflatten(1, (-1, channels)), self.weight)
                outputs = (self.outputs @ values.flatten(1)).view(4, 4, count, across, -1)
                place = found[image, 4 * first : 4 * (first + count)].view(count, 4, across, 4, -1)
                place.copy_(outputs.permute(2, 0, 3, 1, 4))
        if self.bias is not None:
            found += self.bias
        return found[:, :height, :width].permute(0, 3, 1, 2)
