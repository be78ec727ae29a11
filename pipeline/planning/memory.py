"""Peak memory of a training step of stage 1 on a GPU, computed without one.

It is the real step up to its losses: network, matching, losses. What lies on the GPU are torch's fake tensors, which
have shapes and no numbers; what lies on the CPU is real, so the matching finds pairs, arbitrary ones. A block of memory
counts from the operation that makes it until nothing refers to it. torch runs no backward pass on fake tensors of a GPU
that is not there: counted are what the losses keep for it and the gradients of the weights, not what it holds in
between. That, what an operation needs for itself, such as cuDNN's workspace, and what the allocator loses between
blocks come on top: coco-zps-r50 with 11 segments an image is computed as 41.3 GB, and took 44.6 GB on a GPU (NVIDIA
H200, 2026-11-26).

A process that has computed this runs no backward pass any more where there is no GPU: torch then takes the fake one for
a device.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.projector import Projector
from models.segmenter import build_segmenter
from pipeline.teacher.text_bank import TextBank
from pipeline.training.config import V2CConfig
from pipeline.training.criteria import V2CCriterion
from pipeline.training.loader import Batch

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
SEGMENTS = 20  # an image, about twice the mean of COCO's panoptic annotations
REGIONS = 5  # an image, of a training with candidate regions
BLOCK = 512  # bytes; CUDA's allocator rounds up to multiples of it


def peak_bytes(config: V2CConfig, *, classes: int, text_dim: int, segments: int = SEGMENTS) -> int:
    """The peak on one GPU that computes the whole batch, in bytes, of a step after the first.

    Args:
        classes: seen classes. text_dim: width D of the text bank. segments: targets of every image.
    """
    images, regions = config.batch, REGIONS if config.candidates else 0
    with torch.device("meta"):
        network = build_segmenter(**asdict(replace(config.segmenter, backbone_weights=None)))
        projector = Projector(dim=config.segmenter.dim, text_dim=text_dim, **asdict(config.projector))
    bank = TextBank(
        key="", embedding=torch.ones(classes, text_dim), ids=[*range(classes)], names=[""] * classes,
        isthing=[True] * classes, seen=[True] * classes, teacher={}, templates=[],
    )  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive:
        modules = [module.to_empty(device=GPU).train() for module in (network, projector)]
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        moments = [torch.empty_like(p) for p in parameters for _ in range(2)]
        side = config.augment.size
        batch = Batch(
            image_ids=[*range(images)],
            images=torch.empty(images, 3, side, side, device=GPU),
            global_rows=torch.arange(images),
            labels=[torch.arange(segments) % classes] * images,
            masks=[torch.empty(segments + regions, side, side, dtype=torch.bool, device=GPU) for _ in range(images)],
            instance_tokens=[torch.ones(segments, text_dim)] * images,
            region_tokens=[torch.ones(regions, text_dim)] * images,
        )
        tokens = torch.empty(images + 1, text_dim, device=GPU)
        criterion = V2CCriterion(network, projector, bank, tokens, config)
        part = batch.split(config.accumulate)[0]
        with _autocast(config.precision):
            terms = criterion.terms(part, [_Draws()] * len(part.image_ids), totals=criterion.totals(batch))
        # From the second part on they lie there during the forward pass as well.
        gradients = sum(p.numel() * p.element_size() for p in parameters)
        during = alive.peak + gradients * (config.accumulate > 1)
        after = alive.bytes + gradients
        del moments, terms
    return max(during, after)


class _Draws(torch.Generator):
    """A generator that passes for one of the GPU's."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return GPU


class Alive(TorchDispatchMode):
    """Above a FakeTensorMode: leaves it the GPU's tensors alone, and `peak` is the most bytes of them at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.blocks: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        if func is aten.is_pinned.default:
            return True  # pinning needs a GPU
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device) and leaf == GPU) for leaf in leaves):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten._to_copy.default and kwargs.get("device") == CPU:
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten._to_copy.default and not isinstance(args[0], FakeTensor):
            result = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=GPU)
        else:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if place not in self.blocks:
            self.blocks.add(place)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._remove, place, size).atexit = False

    def _remove(self, place: int, size: int) -> None:
        self.blocks.remove(place)
        self.bytes -= size


@contextmanager
def _autocast(precision: str) -> Iterator[None]:
    """Autocast on CUDA, which `torch.autocast` leaves off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", precision != "float32")
    torch.set_autocast_dtype("cuda", getattr(torch, precision))
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
