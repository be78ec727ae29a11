"""The processes that train together, one a device: started by torchrun's own launcher, or by torchrun itself.

Gradients are summed after the backward pass, in one buffer: 44 million weights are 176 MB, some milliseconds between the GPUs of one
machine, and no wrapper stands between the network and its losses.
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
from pipeline.runtime import Runtime, under_torchrun
from storage.atomic import write_text
from storage.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
PATIENCE = timedelta(minutes=30)  # for the slowest rank, before a run counts as hanging


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among `world` processes; `rank` 0 writes files and shows progress. Alone, every sum is the value itself."""

    rank: int = 0
    world: int = 1

    def sum(self, value: Tensor) -> Tensor:
        """The sum of every process's `value`, of one shape; no gradient."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def others(self, rows: Tensor) -> list[Tensor]:
        """The rows (n, ...) of every other process, by rank; n may differ."""
        if self.world == 1:
            return []
        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        sizes = [int(count) for count in counts]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(gathered, padded)
        pairs = zip(gathered, sizes, strict=True)
        return [part[:size] for rank, (part, size) in enumerate(pairs) if rank != self.rank]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every process's gradients become the sum over all; a parameter without one counts as 0."""
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
    """Call `function(ranks, runtime, *arguments)` once a device, and come back when all have ended.

    With `runtime.devices` 1 that is a plain call. Under torchrun (several machines) it is this process's own part. A mistake of the user's in one
    process (`UserError`, `ModelError`, OSError) ends the others, and is raised here.
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

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=runtime.devices, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
        run_id=f"zs-seg-{os.getpid()}", max_restarts=0, monitor_interval=0.5,
    )  # fmt: skip
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what ended them is told below
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with TemporaryDirectory() as folder:
        try:
            elastic_launch(config, _teller)(Path(folder), function, runtime, *arguments)
        except SignalException as stopped:  # the processes have saved their state and ended
            raise KeyboardInterrupt from stopped
        except ChildFailedError as error:
            # any will do: a process that fails only because another has gone leaves none
            for message in sorted(Path(folder).iterdir()):
                kind, what = json.loads(message.read_text())
                raise (OSError if kind == "OSError" else UserError)(*what) from error
            raise
        finally:  # the launcher leaves its own behind
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    signal.signal(number, handler)


def _teller(folder: Path, function: Callable[..., None], runtime: Runtime, *arguments: Any) -> None:
    """A process of ours: what its user can mend goes to the parent before the process ends."""
    try:
        _member(function, runtime, *arguments)
    except (UserError, ModelError, OSError) as error:
        what = (
            ["OSError", [error.errno, error.strerror, error.filename]]
            if isinstance(error, OSError)
            else ["", [str(error)]]
        )
        write_text(folder / f"{os.environ['RANK']}.json", json.dumps(what))
        raise


def _member(function: Callable[..., None], runtime: Runtime, *arguments: Any) -> None:
    """One process of several: joins the group, takes its own device and its share of the threads."""
    rank, world, local, local_world = (
        int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    cuda = runtime.torch_device().type == "cuda"
    if cuda:
        torch.cuda.set_device(local)
    runtime = replace(
        runtime,
        device=f"cuda:{local}" if cuda else "cpu",
        threads=max(runtime.workers // local_world, 1),
        progress=runtime.progress and rank == 0,
        devices=1,
    )
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    function(Ranks(rank=rank, world=world), runtime, *arguments)
    dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    """The sum over all processes; every one of them uses it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient[0])  # pyright: ignore[reportReturnType]


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose batch is that of all processes. torch's SyncBatchNorm knows GPUs only."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        count: Any = _Sum.apply(x.new_tensor([x.numel() // x.shape[1]]))
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
    """Have every BatchNorm that learns, in place, count the batch of all processes.

    Raises UserError for a kind of BatchNorm other than nn.BatchNorm2d.
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
