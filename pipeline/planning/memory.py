"""Peak memory of a training step of stage 1 on a GPU, computed without one.

It is the real step: network, matching, losses and backward pass. What lies on the GPU are torch's fake tensors, which
have shapes and no numbers; what lies on the CPU is real, so the matching finds pairs, arbitrary ones. A block of memory
counts from the operation that makes it until nothing refers to it. What an operation needs for itself, such as cuDNN's
workspace, CUDA's own memory and what the allocator loses between blocks come on top.
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
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from models.projector import Projector
from models.segmenter import build_segmenter
from pipeline.teacher.text_bank import TextBank
from pipeline.training.config import V2CConfig
from pipeline.training.criteria import V2CCriterion
from pipeline.training.loader import Batch

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
SEGMENTS = 20  # an image, about twice the mean of COCO's panoptic annotations
BLOCK = 512  # bytes; CUDA's allocator rounds up to multiples of it


def peak_bytes(config: V2CConfig, *, classes: int, text_dim: int, segments: int = SEGMENTS, devices: int = 1) -> int:
    """The peak on one of `devices` GPUs, in bytes, of a step after the first.

    Args:
        classes: seen classes. text_dim: width D of the text bank. segments: targets of every image.
    """
    images = config.batch // devices
    with torch.device("meta"):
        network = build_segmenter(**asdict(replace(config.segmenter, backbone_weights=None)))
        projector = Projector(dim=config.segmenter.dim, text_dim=text_dim, **asdict(config.projector))
    bank = TextBank(
        key="", embedding=torch.ones(classes, text_dim), ids=[*range(classes)], names=[""] * classes,
        isthing=[True] * classes, seen=[True] * classes, teacher={}, templates=[],
    )  # fmt: skip
    with gpu_memory() as alive:
        modules = [module.to_empty(device=GPU).train() for module in (network, projector)]
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        moments = [torch.empty_like(p) for p in parameters for _ in range(2)]
        side = config.augment.size
        batch = Batch(
            image_ids=[*range(images)],
            images=torch.empty(images, 3, side, side, device=GPU),
            global_rows=torch.arange(images),
            labels=[torch.arange(segments) % classes] * images,
            masks=[torch.empty(segments, side, side, dtype=torch.bool, device=GPU) for _ in range(images)],
            instance_tokens=[torch.ones(segments, text_dim)] * images,
        )
        tokens = torch.empty(images + 1, text_dim, device=GPU)
        criterion = V2CCriterion(network, projector, bank, tokens, config)
        # From the second part on the gradients lie there as well, and every further part is like it.
        for part in batch.split(config.accumulate)[:2]:
            with _autocast(config.precision):
                terms = criterion.terms(part, [_Draws()] * len(part.image_ids), totals=criterion.totals(batch))
            torch.stack(list(terms.values())).sum().backward()
        del moments
    return alive.peak


class _Absent(_DummyBackendModule):
    """A kind of device of which this machine has none."""

    def is_available(self) -> bool:
        return False


@contextmanager
def gpu_memory() -> Iterator[_Alive]:
    """Inside, tensors on `GPU` are fake ones, and counted. Where there is no GPU, no backward pass may have run before:
    torch looks for devices at a process's first."""
    if not torch.cuda.is_available() and torch._C._get_privateuse1_backend_name() != "absent":
        # A backward pass asks the machine's accelerator for its streams, and CUDA without a driver fails to answer.
        _setup_privateuseone_for_python_backend("absent", backend_module=_Absent())
    with FakeTensorMode(allow_non_fake_inputs=True), _Alive() as alive:
        yield alive


class _Draws(torch.Generator):
    """A generator that passes for one of the GPU's."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return GPU


class _Alive(TorchDispatchMode):
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
