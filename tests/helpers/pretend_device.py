"""A GPU that is not there: CPU tensors that lie on device "pretend", so that a machine without one shows what CUDA
would refuse, wait for and copy.

The numbers are real. An operation on tensors of both devices is refused where CUDA refuses it. `TRAFFIC` counts, by the
line of ours that asked, how often the host would wait for the device, and the bytes copied to it.

Importing this registers the device with torch for the rest of the process, so it belongs into a process of its own.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Module(_DummyBackendModule):
    """What torch looks for in `torch.pretend`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("pretend", backend_module=_Module())
DEVICE = torch.device("pretend", 0)
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]

# What CUDA can only answer with values on the host, most of them because the result's shape follows from values.
ANSWERS = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim",
    "unique_consecutive",
}  # fmt: skip
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass
class Traffic:
    """Waits and bytes since the start, or since `take`, by file and line."""

    waits: Counter[str] = field(default_factory=Counter)
    copied: Counter[str] = field(default_factory=Counter)

    def take(self) -> Traffic:
        """What was counted; the counters start again at 0."""
        taken = Traffic(self.waits, self.copied)
        self.waits, self.copied = Counter(), Counter()
        return taken


TRAFFIC = Traffic()


class Pretend(Tensor):
    """A tensor on the device; `held`, on the CPU, has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretend:
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.held = inner
        return made

    def tolist(self) -> Any:
        """torch has none for subclasses."""
        return self.cpu().tolist()

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Pretend({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))


class _Generator(torch.Generator):
    """In place of torch's: one for the device says that it lies there, and draws a CPU's numbers."""

    def __new__(cls, device: Any = CPU) -> Any:
        there = torch.device(device).type == "pretend"
        return super().__new__(cls) if there else type(torch.default_generator)(device)

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return DEVICE


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """One operation that reads or makes tensors on the device, with the numbers of the CPU."""
    schema, name = func._schema, func._schema.name.rpartition("::")[2]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    foreign = [tensor for tensor in tensors if not isinstance(tensor, Pretend)]
    if ours and name not in INDEXING | {"copy_"} and any(tensor.ndim for tensor in foreign):
        raise RuntimeError(f"{func} on {ours} and, on the CPU, {[tuple(t.shape) for t in foreign]} at {_where()}")
    if name in INDEXING and not isinstance(args[0], Pretend):
        raise RuntimeError(f"a tensor on the CPU is indexed by one on the device at {_where()}")
    leaves = "device" in kwargs and torch.device(kwargs["device"]) == CPU
    _count(name, args, kwargs, leaves=leaves)

    def plain(value: Any) -> Any:
        if isinstance(value, torch.device):
            return CPU
        return value.held if isinstance(value, Pretend) else value

    plain_args, plain_kwargs = tree_map(plain, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if torch.Tag.inplace_view in func.tags:  # it changes the shape that the wrapper shows, too
        with no_dispatch():
            func(*args, **kwargs)
    if schema.returns and schema.returns[0].alias_info and schema.returns[0].alias_info.is_write:
        return kwargs.get("out", args[0] if args else None)
    return result if leaves else tree_map(lambda value: Pretend(value) if isinstance(value, Tensor) else value, result)


def _count(name: str, args: Any, kwargs: Any, *, leaves: bool) -> None:
    """A copy waits unless it goes to the device without being waited for; so does an index of bools, whose number of
    True is the number of rows."""
    waits = leaves or name in ANSWERS
    if name == "copy_":
        to, source, queued = args[0], args[1], bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        waits = isinstance(to, Pretend) != isinstance(source, Pretend) and not (isinstance(to, Pretend) and queued)
        if not isinstance(source, Pretend):
            TRAFFIC.copied[_where()] += source.numel() * source.element_size()
    elif name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        foreign = [index for index in indices if not isinstance(index, Pretend)]
        waits = bool(foreign) or any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        TRAFFIC.copied[_where()] += sum(index.numel() * index.element_size() for index in foreign)
    elif name == "repeat_interleave":
        waits = kwargs.get("output_size") is None
    if waits:
        TRAFFIC.waits[_where()] += 1


def _where() -> str:
    """The innermost line of this project on the stack, as "models/matcher.py:88"; a backward pass has none of its own
    and counts where it was called."""
    frame: Any = sys._getframe(1)
    while frame:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and "tests" not in file.parts and ".venv" not in file.parts:
            return f"{file.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "a backward pass"


torch.Generator = _Generator  # pyright: ignore[reportAttributeAccessIssue]
torch._C._set_only_lift_cpu_tensors(True)  # pyright: ignore[reportAttributeAccessIssue]  # in `torch.tensor`
# Operations that make a tensor on the device from none; the libraries unregister when they are forgotten
_FALLBACK, _KERNELS = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_FALLBACK.fallback(_run, "PrivateUse1")
for _name in (
    "arange",
    "arange.start",
    "arange.start_step",
    "eye.m",
    "randperm.generator",
    "linspace",
):  # else they resize an empty one
    _packet, _, _overload = _name.partition(".")
    _operator = getattr(getattr(torch.ops.aten, _packet), _overload or "default")
    _KERNELS.impl(_name, partial(_run, _operator), "PrivateUse1")
