"""The one training loop. A stage is a value: what learns, what a step's losses are, and a schedule.

Every random draw of step s comes from a generator seeded by (seed, s) and every batch is a function of s, so the state to resume from
is weights, optimiser and step number, and a killed run ends with the weights of an undisturbed one, byte for byte on a CPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.runtime import Runtime
from pipeline.schedule import Schedule
from storage.atomic import write_text
from storage.checkpoints import load_training_state, save_training_state

CURVES = "curves.jsonl"
UNDECAYED = (nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
LOG_EVERY = 10  # steps between two rows of the curves, each the mean over them


def batch_rng(seed: int, step: int) -> np.random.Generator:
    """The source of what step `step` draws with numpy: which images, which classes."""
    return np.random.default_rng([seed, step, 1])


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of what step `step` draws with torch; on the CPU, so that every device gets the same numbers."""
    return torch.Generator().manual_seed(int(np.random.default_rng([seed, step]).integers(2**62)))


def parameter_groups(
    modules: Mapping[str, nn.Module], schedule: Schedule, *, own_lr: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """AdamW's groups by Mask2Former's recipe: no decay on norms and embeddings, nor on scalars such as the logit scale (D1).

    `own_lr`: factors on the learning rate of all parameters whose name holds the given text, the first that fits.
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
    losses: Callable[[Any, torch.Generator], dict[str, Tensor]],
    runtime: Runtime,
) -> None:
    """Minimise the sum of `losses` (already weighted, by name) over `schedule.steps` steps.

    `modules` are what is saved: everything that learns, buffers included. `batches(start)` yields the batches from number `start` on,
    each with the `image_ids` it holds. `folder` is where the resumable state lies while the stage is under way, and where the curves
    go at its end: every `LOG_EVERY` steps the mean of each loss, their "total", and the "lr".

    Raises ValueError when a loss is not finite; the last saved state stays.
    """
    optimiser = torch.optim.AdamW(groups, lr=schedule.lr, fused=True)
    curves: list[dict[str, float]] = []
    recent: list[dict[str, float]] = []
    start = 0
    if state := load_training_state(folder):
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        optimiser.load_state_dict(state["optimiser"])
        start, curves, recent = state["step"], state["curves"], state["recent"]
    parameters = [p for group in groups for p in group["params"]]
    with runtime.bar(schedule.steps, f"training {name}", "step") as bar:
        bar.update(start)
        source = batches(start)
        for step in range(start, schedule.steps):
            batch = next(source)
            for group in optimiser.param_groups:
                group["lr"] = group["full_lr"] * schedule.factor(step)
            terms = losses(batch, step_generator(schedule.seed, step))
            total = torch.stack(list(terms.values())).sum()
            values = {key: term.item() for key, term in terms.items()}
            if wrong := [key for key, value in values.items() if not math.isfinite(value)]:
                raise ValueError(
                    f"{name}: loss {wrong[0]} is {values[wrong[0]]} at step {step} (images {batch.image_ids}); "
                    f"the last saved state is kept; lower --{name}.lr or look at these images"
                )
            optimiser.zero_grad()
            total.backward()
            if schedule.clip:
                nn.utils.clip_grad_norm_(parameters, schedule.clip)
            optimiser.step()
            recent.append({**values, "total": sum(values.values()), "lr": schedule.lr * schedule.factor(step)})
            done = step + 1
            if done % LOG_EVERY == 0 or done == schedule.steps:
                curves.append({"step": done, **{key: sum(r[key] for r in recent) / len(recent) for key in recent[0]}})
                recent = []
                bar.set_postfix(
                    {key: f"{value:.3g}" for key, value in curves[-1].items() if key != "step"}, refresh=False
                )
            if done % runtime.checkpoint_every == 0 and done < schedule.steps:
                weights = {key: module.state_dict() for key, module in modules.items()}
                now = {
                    "modules": weights,
                    "optimiser": optimiser.state_dict(),
                    "step": done,
                    "curves": curves,
                    "recent": recent,
                }
                save_training_state(folder, now)
            bar.update()
    write_text(folder / CURVES, "".join(json.dumps(row) + "\n" for row in curves))


def read_curves(folder: Path) -> list[dict[str, float]]:
    """The curves of a finished training stage."""
    return [json.loads(line) for line in (folder / CURVES).read_text().splitlines()]
