"""Copies to a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor.to(device)`, of a tensor on the CPU, queued behind what the device has to do.

    A plain `to` copies from pageable memory, and CUDA first waits until the device has done all that is queued. From
    pinned memory, which torch keeps until the copy is done, it does not wait.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
