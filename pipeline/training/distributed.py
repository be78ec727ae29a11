"""Distributed training, one process per device: started by torchrun's launcher from here, or by torchrun itself.

Gradients are summed after the backward pass in one buffer: 44 million weights are 176 MB, some milliseconds between the
GPUs of one machine, and no wrapper around the network is needed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.errors import ModelError
from pipeline.runtime import OUT_OF_MEMORY, Runtime, under_torchrun
from storage.atomic import write_text
from storage.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
PATIENCE = timedelta(minutes=30)  # for the slowest rank, before a run counts as hanging


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process, `rank`, among `world` processes; rank 0 writes files and shows progress. With `world` 1, sums are
    the values themselves."""

    rank: int = 0
    world: int = 1

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes, which must have one shape; without gradient."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def others(self, rows: Tensor) -> list[Tensor]:
        """The rows (n, ...) of every other process, in order of rank; n may differ between processes."""
        if self.world == 1:
            return []
        counts = list(rows.new_zeros(self.world, dtype=torch.int64).split(1))
        dist.all_gather(counts, rows.new_full((1,), len(rows), dtype=torch.int64))
        sizes = torch.cat(counts).tolist()
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(gathered, padded)
        pairs = zip(gathered, sizes, strict=True)
        return [part[:size] for rank, (part, size) in enumerate(pairs) if rank != self.rank]

    def of_first(self, data: bytes) -> bytes:
        """Rank 0's `data`, in every process."""
        if self.world == 1:
            return data
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        size = torch.tensor([len(data)], device=device)
        dist.broadcast(size, 0)
        if not size.item():
            return b""
        first = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.rank == 0 else None
        value = torch.empty(int(size), dtype=torch.uint8, device=device) if first is None else first.to(device)
        dist.broadcast(value, 0)
        return value.cpu().numpy().tobytes()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradients by their sum over all processes; a missing gradient counts as 0."""
        if self.world == 1:
            return
        grads = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))  # in place: a gradient must keep its parameter's memory format


ALONE = Ranks()


def launch(function: Callable[..., None], *arguments: Any, runtime: Runtime) -> None:
    """Call `function(ranks, runtime, *arguments)` in one process per device, and return when all have ended.

    With `runtime.devices` 1 this is a plain call. Under torchrun (several machines) it runs this process's part. A
    UserError, ModelError or OSError in one process, or too little memory of its device, ends the others: the OSError is
    raised here as it is, else UserError.
    """
    if under_torchrun():
        return _member(function, runtime, *arguments)
    if runtime.devices == 1:
        return function(ALONE, runtime, *arguments)
    if runtime.torch_device().type == "cuda" and runtime.devices > torch.cuda.device_count():
        raise UserError(f"there are {torch.cuda.device_count()} GPUs here, not {runtime.devices}; correct --devices")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    runtime = replace(runtime, remote="")  # these processes share this machine's disk
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=runtime.devices,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id=f"zs-seg-{os.getpid()}",
        max_restarts=0,
        monitor_interval=0.5,
    )
    # The error that ended the processes is raised below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with TemporaryDirectory() as folder:
        try:
            elastic_launch(config, _reporting_member)(Path(folder), function, runtime, *arguments)
        except SignalException as stopped:  # the processes have saved their state and ended
            raise KeyboardInterrupt from stopped
        except ChildFailedError as error:
            # Any file will do: a process that fails only because another one has ended leaves none.
            for message in sorted(Path(folder).iterdir()):
                kind, what = json.loads(message.read_text())
                raise (OSError if kind == "OSError" else UserError)(*what) from error
            raise
        finally:  # the launcher does not restore the handlers
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    signal.signal(number, handler)


def _reporting_member(folder: Path, function: Callable[..., None], runtime: Runtime, *arguments: Any) -> None:
    """`_member` in a launched process, which writes a user's error to a file in `folder` for the parent."""
    try:
        _member(function, runtime, *arguments)
    except (UserError, ModelError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, OSError):
            what = ["OSError", [error.errno, error.strerror, error.filename]]
        else:
            what = ["", [OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else str(error)]]
        write_text(folder / f"{os.environ['RANK']}.json", json.dumps(what))
        raise


def agree(value: bool, runtime: Runtime) -> bool:
    """Rank 0's value in each of the processes that torchrun started. They join their process group here; where the value
    is False they leave it again, else `launch` does at its end."""
    _join(runtime)
    found = bool(_ranks().of_first(b"1" if value else b""))
    if not found:
        dist.destroy_process_group()
    return found


def _ranks() -> Ranks:
    return Ranks(rank=int(os.environ["RANK"]), world=int(os.environ["WORLD_SIZE"]))


def _join(runtime: Runtime) -> str:
    """Join the process group, unless this process is in it; returns this process's device."""
    cuda, local = runtime.torch_device().type == "cuda", int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    return f"cuda:{local}" if cuda else "cpu"


def _member(function: Callable[..., None], runtime: Runtime, *arguments: Any) -> None:
    """Call `function` as one of the process group, on this process's device with its share of the threads."""
    ranks = _ranks()
    runtime = replace(
        runtime,
        device=_join(runtime),
        threads=max(runtime.workers // int(os.environ["LOCAL_WORLD_SIZE"]), 1),
        progress=runtime.progress and ranks.rank == 0,
        devices=1,
    )
    function(ranks, runtime, *arguments)
    dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    """The sum over all processes; every process uses it, so the gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient[0])  # pyright: ignore[reportReturnType]


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with the batch statistics of all processes; torch's SyncBatchNorm supports GPUs only."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        count: Any = _Sum.apply(x.new_full((1,), x.numel() // x.shape[1]))
        mean: Any = _Sum.apply(x.sum((0, 2, 3))) / count
        x = x - mean[:, None, None]
        variance: Any = _Sum.apply(x.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert (
                self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
            )
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (x * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def share_batch_statistics(network: nn.Module, ranks: Ranks) -> None:
    """Replace every BatchNorm in training mode, in place, by one with the batch statistics of all processes.

    Raises UserError for BatchNorm types other than nn.BatchNorm2d.
    """
    if ranks.world == 1:
        return
    for owner in list(network.modules()):
        for name, norm in owner.named_children():
            if isinstance(norm, _BatchNorm) and norm.training:
                if type(norm) is not nn.BatchNorm2d:
                    raise UserError(
                        f"this backbone's {type(norm).__name__} cannot count the batch of several processes; "
                        "pass --v2c.segmenter.frozen-batchnorm or --devices 1"
                    )
                shared = GlobalBatchNorm2d(norm.num_features, eps=norm.eps, momentum=norm.momentum).to(norm.weight)
                shared.load_state_dict(norm.state_dict())
                setattr(owner, name, shared)
