"""The Triton kernels without a GPU, for test_deformable.py: `interpret` compares them with PyTorch's on CPU tensors
(run with TRITON_INTERPRET=1), `compile` takes them down to an H100's machine code. Prints ok for every case."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models import deformable_torch, deformable_triton

CASES = [  # shapes, images, queries, heads, width, points; queries that fill no, one and several programs
    (((2, 3), (4, 6)), 2, 5, 2, 3, 4),
    (((5, 4),), 1, 70, 1, 16, 1),
    (((1, 1), (2, 2), (4, 4)), 2, 21, 3, 8, 2),
]


def interpret() -> None:
    for dtype in (torch.float32, torch.float64):
        for shapes, images, queries, heads, width, points in CASES:
            torch.manual_seed(0)
            size = (images, queries, heads, len(shapes), points)
            height, breadth = torch.tensor(shapes)[:, :, None].unbind(1)
            value = torch.randn(images, sum(h * w for h, w in shapes), heads, width, dtype=dtype)
            x, y = torch.rand(size, dtype=dtype) * (breadth + 4) - 3, torch.rand(size, dtype=dtype) * (height + 4) - 3
            x[0, 0, 0, 0, 0], y[0, 1, 0, 0, 0] = 1e30, -1e30
            weights, grad = torch.rand(size, dtype=dtype), torch.randn(images, queries, heads * width, dtype=dtype)
            inputs = (value, shapes, x, y, weights)
            torch.testing.assert_close(deformable_triton.sample(*inputs), deformable_torch.sample(*inputs))
            for found, expected in zip(
                deformable_triton.sample_backward(grad, *inputs),
                deformable_torch.sample_backward(grad, *inputs),
                strict=True,
            ):
                torch.testing.assert_close(found, expected)
            print("ok")


def compile_() -> None:
    for width in (32, 256):  # of a head, and of the mask features
        sizes = {"WIDTH": width, "LEVELS": 3, "POINTS": 4, "ROWS": deformable_triton.BLOCK // width, "COLUMNS": width}
        for kernel in (deformable_triton._forward, deformable_triton._backward):
            types = dict.fromkeys(("bags", "CELLS", "QUERIES", "HEADS"), "i32") | dict.fromkeys(sizes, "constexpr")
            signature = {name: types.get(name, "*i32" if name == "levels" else "*fp32") for name in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=sizes)
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
            assert made["cubin"] and "acq_rel" not in made["ptx"]
            assert ("relaxed" in made["ptx"]) == (kernel is deformable_triton._backward)
            print("ok")


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_}[sys.argv[1]]()
