"""What test_memory.py computes in processes of their own, as they run no backward pass afterwards."""

from __future__ import annotations

import json
from pathlib import Path

PRESETS = ("coco-zps-r50", "coco-zps-maskformer-r50", "coco-zss-r50", "coco-zss-r101c")


def by_hand(out: str) -> None:
    """The peak of a few operations on tensors of 4 MB, each beginning with nothing."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pipeline.planning.memory import GPU, Alive

    def tensor() -> torch.Tensor:
        return torch.empty(2**20, device=GPU)

    tried = {
        "two": lambda: (tensor(), tensor()),
        "one after the other": lambda: [tensor().shape for _ in range(2)],
        "view": lambda: tensor().view(2, -1)[1:],
        "in place": lambda: tensor().add_(1),
        "rounded up": lambda: torch.empty(3, device=GPU),
        "bfloat16": lambda: tensor().bfloat16(),
        "on the CPU": lambda: torch.ones(2**20),
    }
    found = {}
    for name, operation in tried.items():
        with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive:
            operation()
        found[name] = alive.peak
        assert alive.bytes == 0, name
    Path(out).write_text(json.dumps(found))


def presets(out: str) -> None:
    """The peak of every COCO preset, and of the first in two parts."""
    from dataclasses import replace

    from flows.presets import preset
    from pipeline.planning.memory import peak_bytes

    found = {name: peak_bytes(preset(name).v2c, classes=119, text_dim=512) for name in PRESETS}
    halves = replace(preset(PRESETS[0]).v2c, accumulate=2)
    Path(out).write_text(json.dumps(found | {"in two parts": peak_bytes(halves, classes=119, text_dim=512)}))
