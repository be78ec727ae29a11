"""The training loop of all stages, which differ in modules, losses and schedule.

Every random draw of step s comes from a generator seeded by (seed, s), or by (seed, s, the image's place in the batch),
and every batch is a function of s. So the state to resume from is weights, optimiser and step number, and a resumed run
ends with the weights of an uninterrupted one, byte for byte on a CPU.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.runtime import Runtime
from pipeline.training.config import Schedule
from pipeline.training.curves import Record
from pipeline.training.distributed import ALONE, Ranks
from storage.checkpoints import STATE, load_training_state, save_training_state
from storage.errors import UserError
from storage.inputs import Inputs, vouch

UNDECAYED = (nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
Precision = Literal["float32", "bfloat16", "float16"]


def batch_rng(seed: int, step: int) -> np.random.Generator:
    """The numpy generator of step `step`, which draws images and classes."""
    return np.random.default_rng([seed, step, 1])


def step_generator(seed: int, step: int) -> torch.Generator:
    """The torch generator of step `step`; on the CPU, so that every device gets the same numbers."""
    return torch.Generator().manual_seed(int(np.random.default_rng([seed, step]).integers(2**62)))


def image_generator(seed: int, step: int, place: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The torch generator on `device` of step `step` for the image at `place` of the global batch, in any process."""
    return torch.Generator(device).manual_seed(int(np.random.default_rng([seed, step, 2, place]).integers(2**62)))


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Mixed precision for the network; the losses switch it off for themselves."""
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


def parameter_groups(
    modules: Mapping[str, nn.Module], schedule: Schedule, *, own_lr: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """AdamW's groups by Mask2Former's recipe: no decay on norms and embeddings, nor on scalars such as the logit scale
    (D1).

    `own_lr`: substring of a parameter's name -> factor on its learning rate; the first that matches applies.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for prefix, module in modules.items():
        for owner_name, owner in module.named_modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if not parameter.requires_grad:
                    continue
                full = ".".join(filter(None, (prefix, owner_name, name)))
                factor = next((f for part, f in (own_lr or {}).items() if part in full), 1.0)
                plain = parameter.ndim == 0 or isinstance(owner, UNDECAYED)
                groups.setdefault((factor, 0.0 if plain else schedule.weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr": schedule.lr * factor, "full_lr": schedule.lr * factor, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]


def train(
    name: str,
    *,
    folder: Path,
    schedule: Schedule,
    modules: Mapping[str, nn.Module],
    groups: list[dict[str, Any]],
    batches: Callable[[int], Iterator[Any]],
    losses: Callable[[Any, int], Iterable[dict[str, Tensor]]],
    runtime: Runtime,
    ranks: Ranks = ALONE,
    precision: Precision = "float32",
) -> None:
    """Minimise the sum of `losses` (already weighted, by name) over `schedule.steps` steps.

    `modules` are saved: everything that learns, buffers included; at the end they hold the averaged weights if
    `schedule.ema` is set. `batches(start)` yields this process's batches from number `start` on, each with its
    `image_ids`; `losses(batch, step)` yields the losses of each part of the batch, sums over this process's share that
    add up over all of `ranks`. `folder` holds the resumable state during the stage, and its curves (see `Record`).
    `precision` "float16" scales the losses; steps that overflow count, but change no weights. SIGTERM saves the state
    before it takes effect.

    Raises UserError when a loss or the gradient is not finite, and as `vouch`; the last saved state stays.
    """
    parameters = [p for group in groups for p in group["params"]]
    device = parameters[0].device
    optimiser = torch.optim.AdamW(groups, lr=schedule.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    average = [p.detach().clone() for p in parameters] if schedule.ema else []
    state: dict[str, Any] = load_training_state(folder) or {"step": 0, "record": {}}
    if start := state["step"]:
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        optimiser.load_state_dict(state["optimiser"])
        # The fused kernel needs the moments in the parameter's memory format.
        for parameter, moments in optimiser.state.items():
            for key in ("exp_avg", "exp_avg_sq"):
                moments[key] = torch.empty_like(parameter).copy_(moments[key])
        scaler.load_state_dict(state["scaler"])
        average = [value.to(device) for value in state["average"]]

    record = Record(name, folder, schedule, start=start, state=state["record"], runtime=runtime, writes=ranks.rank == 0)

    def save(done: int) -> None:
        _vouch(folder, ranks, runtime, device, last=done == schedule.steps)
        if ranks.rank == 0:
            weights = {key: module.state_dict() for key, module in modules.items()}
            save_training_state(
                folder,
                {
                    "step": done,
                    "modules": weights,
                    "optimiser": optimiser.state_dict(),
                    "scaler": scaler.state_dict(),
                    "average": average,
                    "record": record.state(),
                },
            )

    source = batches(start)
    with record, Terminated() as terminated:
        for step in range(start, schedule.steps):
            began = time.perf_counter()
            batch = next(source)
            waited = time.perf_counter() - began
            for group in optimiser.param_groups:
                group["lr"] = group["full_lr"] * schedule.factor(step)
            optimiser.zero_grad()
            own: dict[str, Tensor] = {}  # this process's sums
            for terms in losses(batch, step):
                scaler.scale(torch.stack(list(terms.values())).sum()).backward()
                own = {key: own.get(key, 0.0) + term.detach() for key, term in terms.items()}
            mine = torch.stack(list(own.values()))
            stop = mine.new_full((1,), float(terminated.asked))
            ranks.sum_gradients(parameters)
            scaler.unscale_(optimiser)
            norm = nn.utils.clip_grad_norm_(parameters, schedule.clip or math.inf)
            # The host waits for the device here, after all of the step's work is queued; before, only stage 1's match
            # waits, once a part of the batch. The flag that asks every process to stop is part of the same reduction.
            numbers = torch.cat((mine, ranks.sum(torch.cat((mine, stop))), norm.view(1))).tolist()
            terms, (*sums, stopped, length) = numbers[: len(own)], numbers[len(own) :]
            _require_finite(name, step, batch.image_ids, list(own), terms, sums, length, scaled=scaler.is_enabled())
            scaler.step(optimiser)
            scaler.update()
            if average:
                latest = [parameter.detach() for parameter in parameters]
                torch._foreach_lerp_(average, latest, 1.0 - schedule.ema)  # pyright: ignore[reportPrivateImportUsage]
            values = dict(zip(own, sums, strict=True))
            record.add(values, norm=length, waited=waited, seconds=time.perf_counter() - began)
            if stopped or (step + 1) % runtime.checkpoint_every == 0 or step + 1 == schedule.steps:
                save(step + 1)
            if stopped:
                terminated.proceed()
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=False):
            parameter.copy_(value)


def _vouch(folder: Path, ranks: Ranks, runtime: Runtime, device: torch.device, *, last: bool) -> None:
    """Vouch for a state: rank 0, and where they have disks of their own every process, before any comes back."""
    if ranks.rank == 0 or runtime.remote:
        # At the end rank 0's store hashes again what rank 0 has read, so the others do, too.
        vouch(folder, again=ranks.rank > 0 and last)
    ranks.sum(torch.zeros(1, device=device))


def begin_as_the_first(folder: Path, ranks: Ranks) -> None:
    """On machines with disks of their own, bring rank 0's training state into each process's `folder`, for `train`.

    Raises UserError where this machine's inputs have other bytes than rank 0's, as two builds with one key may have.
    """
    path, own = folder / STATE, Inputs.read(folder)
    assert own is not None, folder
    first = json.loads(ranks.of_first(json.dumps(own.hashes).encode()))
    state = ranks.of_first(path.read_bytes() if ranks.rank == 0 and path.exists() else b"")
    if other := sorted(name for name in own.hashes.keys() | first.keys() if own.hashes.get(name) != first.get(name)):
        raise UserError(
            f"{folder.parents[1] / other[0]} has other bytes than on the machine of rank 0; push that artefact from there, "
            "delete it here, and run again, which fetches it"
        )
    if ranks.rank and state:
        path.write_bytes(state)


def _require_finite(
    name: str,
    step: int,
    image_ids: list[int],
    names: list[str],
    mine: list[float],
    sums: list[float],
    norm: float,
    *,
    scaled: bool,
) -> None:
    """Raise UserError for a loss or gradient that is not finite, except a gradient that was `scaled` (float16).

    `mine`: this process's losses, in the order of `names`; `sums`: over all processes; `norm`: the gradient's.
    """
    for term, value in zip(names, mine, strict=True):
        if not math.isfinite(value):
            raise UserError(
                f"{name}: loss {term} is {value} at step {step} (images {image_ids}); "
                f"the last saved state is kept; lower --{name}.lr or look at these images"
            )
    if not all(map(math.isfinite, sums)):
        # Another process has such a loss, raises, and the launcher ends this one.
        torch.distributed.barrier()
    if not scaled and not math.isfinite(norm):
        raise UserError(
            f"{name}: the gradient is {norm} at step {step}, every loss finite (images {image_ids}); "
            f"the last saved state is kept; lower --{name}.lr or set --{name}.clip"
        )


class Terminated:
    """Records a SIGTERM in `asked` instead of ending the process; `proceed` sends it again, with full effect."""

    def __init__(self) -> None:
        self.asked = False
        # Only the main thread may set a handler.
        self.main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Terminated:
        if self.main:
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.main:
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self.asked = True

    def proceed(self) -> None:
        self.__exit__()
        os.kill(os.getpid(), signal.SIGTERM)
        # Until the signal arrives: the flag may have come from another process, before any signal to this one.
        time.sleep(60)
