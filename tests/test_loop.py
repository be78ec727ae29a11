"""The loop: an interrupted stage ends with the weights of an undisturbed one; groups, schedule and errors as
documented.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from children import start
from stage_processes import train_until_saved, train_until_terminated
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import build, copy_artefacts, tiny_config
from torch import Tensor, nn

from pipeline.runtime import Runtime
from pipeline.training.config import Schedule
from pipeline.training.curves import MEASURED, read_curves
from pipeline.training.loop import autocast, parameter_groups, step_generator, train
from storage.checkpoints import load_training_state
from storage.store import Store

QUIET = Runtime(progress=False, checkpoint_every=3)


@dataclass
class Halves:
    image_ids: list[int]


def fit(
    folder: Path, schedule: Schedule, *, stop_at: int | None = None, poison: int | None = None
) -> dict[str, Tensor]:
    """Regress a line with drawn noise; optionally stop in the middle, or let a loss become NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def batches(start: int) -> Iterator[Halves]:
        for step in range(start, 10**6):
            if step == stop_at:
                raise KeyboardInterrupt
            yield Halves(image_ids=[step])

    def losses(batch: Halves, step: int) -> Iterator[dict[str, Tensor]]:
        x = torch.randn(16, 3, generator=step_generator(0, step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        yield {"fit": loss, "noise": loss * (math.nan if batch.image_ids[0] == poison else 0.1)}

    folder.mkdir(exist_ok=True)
    modules = {"model": model}
    train("v2c", folder=folder, schedule=schedule, modules=modules, groups=parameter_groups(modules, schedule),
          batches=batches, losses=losses, runtime=QUIET)  # fmt: skip
    return model.state_dict()


@pytest.mark.parametrize("stop_at", [1, 3, 7, 10])
def test_an_interrupted_run_ends_where_an_undisturbed_one_does(tmp_path: Path, stop_at: int) -> None:
    schedule = Schedule(steps=11, lr=1e-2, warmup=3)
    undisturbed = fit(tmp_path / "one", schedule)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "two", schedule, stop_at=stop_at)
    resumed = fit(tmp_path / "two", schedule)
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())
    one, two = (
        [{key: row[key] for key in row if key not in MEASURED} for row in read_curves(tmp_path / name)]
        for name in ("one", "two")
    )
    assert one == two


def test_a_loss_that_is_not_finite_stops_the_run_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"v2c: loss noise is nan at step 5 \(images \[5\]\)"):
        fit(tmp_path, Schedule(steps=9, lr=1e-2), poison=5)
    assert list(tmp_path.iterdir())  # the state of step 3 is still there


def test_the_loss_falls(tmp_path: Path) -> None:
    fit(tmp_path, Schedule(steps=200, lr=1e-2))
    curves = read_curves(tmp_path)
    assert [row["step"] for row in curves] == list(range(10, 201, 10))
    assert curves[-1]["total"] < 0.5 * curves[0]["total"]
    assert math.isclose(curves[-1]["total"], curves[-1]["fit"] + curves[-1]["noise"], rel_tol=1e-6)


def test_schedules_by_hand() -> None:
    step = Schedule(steps=270, decay="step", warmup=10)
    assert [round(step.factor(s), 4) for s in (0, 9, 10, 239, 240, 259, 260, 269)] == [
        0.1,
        1,
        1,
        1,
        0.1,
        0.1,
        0.01,
        0.01,
    ]
    cosine = Schedule(steps=100)
    assert cosine.factor(0) == 1 and math.isclose(cosine.factor(50), 0.5) and cosine.factor(99) < 0.001


def test_groups_follow_the_published_recipe() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(2, 2)
            self.norm = nn.LayerNorm(2)
            self.query = nn.Embedding(3, 2)
            self.head = nn.Linear(2, 2)
            self.log_scale = nn.Parameter(torch.zeros(()))

    net = Net()
    schedule = Schedule(lr=1.0, weight_decay=0.05)
    groups = parameter_groups({"net": net}, schedule, own_lr={"net.backbone.": 0.1, "net.log_scale": 10.0})
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == sum(1 for _ in net.parameters())
    assert found[id(net.backbone.weight)] == (0.1, 0.05) and found[id(net.backbone.bias)] == (0.1, 0.05)
    assert found[id(net.head.weight)] == (1.0, 0.05) and found[id(net.query.weight)] == (1.0, 0.0)
    assert found[id(net.norm.weight)] == (1.0, 0.0) and found[id(net.log_scale)] == (10.0, 0.0)


def test_the_running_average_is_what_is_left_at_the_end(tmp_path: Path) -> None:
    """By hand: w_0 averaged with the weights after every step; a resumed run ends with the same."""
    plain, averaged = Schedule(steps=7, lr=1e-2), Schedule(steps=7, lr=1e-2, ema=0.8)
    torch.manual_seed(0)
    expected = nn.Linear(3, 8).weight.detach()  # what `fit` starts from
    for steps in range(1, 8):
        weights = fit(tmp_path / f"plain {steps}", replace(plain, steps=steps, decay="constant"))["0.weight"]
        expected = 0.8 * expected + 0.2 * weights
    found = fit(tmp_path / "averaged", replace(averaged, decay="constant"))["0.weight"]
    torch.testing.assert_close(found, expected)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", replace(averaged, decay="constant"), stop_at=5)
    assert torch.equal(fit(tmp_path / "cut", replace(averaged, decay="constant"))["0.weight"], found)


def test_what_is_written_while_it_runs(tmp_path: Path) -> None:
    """Rows appear during the run, for people and for TensorBoard; those after the last saved state are forgotten when
    it goes on.
    """
    schedule = Schedule(steps=40, lr=1e-2)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, schedule, stop_at=31)
    assert [row["step"] for row in read_curves(tmp_path)] == [10, 20, 30]
    fit(tmp_path, schedule)
    assert [row["step"] for row in read_curves(tmp_path)] == [10, 20, 30, 40]
    assert read_curves(tmp_path)[0].keys() == {"step", "fit", "noise", "total", "norm", "lr", "seconds", "waiting"}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("v2c/total")] == [10, 20, 30, 40]
    assert events.Scalars("v2c/total")[3].value == pytest.approx(read_curves(tmp_path)[3]["total"])


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.zeros(2))

    def losses(batch: Halves, step: int) -> Iterator[dict[str, Tensor]]:
        yield {"root": weight.abs().sqrt().sum()}  # 0, with an infinite slope

    with pytest.raises(
        ValueError, match=r"v2c: the gradient is (nan|inf) at step 0, every loss finite \(images \[0\]\)"
    ):
        train("v2c", folder=tmp_path, schedule=Schedule(steps=3), modules={}, groups=[{"params": [weight], "full_lr": 1e-3}],
              batches=lambda start: iter([Halves([step]) for step in range(3)]), losses=losses, runtime=QUIET)  # fmt: skip


@pytest.mark.slow
def test_a_terminated_stage_saves_its_state_and_dies_of_the_signal(shared_store: Store, tmp_path: Path) -> None:
    shaken = cut_before(shared_store, "v2c", tmp_path)
    assert start(train_until_terminated, shaken.root).wait() == -signal.SIGTERM
    (state,) = shaken.root.glob("checkpoint/.*.partial")
    saved = load_training_state(state)
    assert saved is not None and saved["step"] == 4
    assert weights_of(shaken, "v2c") == weights_of(shared_store, "v2c")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains_and_resumes(tmp_path: Path, precision: Literal["bfloat16", "float16"]) -> None:
    """float16's scale is part of the state."""
    model = nn.Linear(3, 1)

    def losses(batch: Halves, step: int) -> Iterator[dict[str, Tensor]]:
        x = torch.randn(16, 3, generator=step_generator(0, step))
        with autocast(torch.device("cpu"), precision):
            out = model(x)
        assert out.dtype == getattr(torch, precision)
        yield {"fit": (out.float() - x.sum(1, keepdim=True)).square().mean()}

    def run(folder: Path, *, until: int) -> dict[str, Tensor]:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model.reset_parameters()
        schedule = Schedule(steps=30, lr=1e-1, clip=1.0)

        def batches(start: int) -> Iterator[Halves]:
            for step in range(start, until):
                yield Halves([step])
            raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            train("v2c", folder=folder, schedule=schedule, modules={"model": model}, groups=parameter_groups({"model": model}, schedule),
                  batches=batches, losses=losses, runtime=QUIET, precision=precision)  # fmt: skip
        return {name: value.clone() for name, value in model.state_dict().items()}

    whole = run(tmp_path / "whole", until=30)
    curves = read_curves(tmp_path / "whole")
    assert curves[-1]["fit"] < 0.3 * curves[0]["fit"]
    run(tmp_path / "cut", until=14)
    assert all(torch.equal(value, whole[name]) for name, value in run(tmp_path / "cut", until=30).items())


def weights_of(store: Store, stage: str) -> str:
    """Run the tiny line up to `stage` and hash its weights."""
    steps = build(store, tiny_config(), until=stage)
    return hashlib.sha256((store.path(steps[stage].recipe.ref) / "weights.safetensors").read_bytes()).hexdigest()


def cut_before(store: Store, stage: str, root: Path) -> Store:
    """A store with what the tiny line's stages before `stage` made."""
    stages, cut = build(store, tiny_config(), until=stage), Store(root)
    copy_artefacts(store, cut, [made.recipe.ref for name, made in stages.items() if name != stage])
    return cut


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["v2c", "g2s", "cpa"])
def test_a_stage_killed_in_the_middle_ends_with_the_same_bytes(stage: str, shared_store: Store, tmp_path: Path) -> None:
    """SIGKILL right after a state was saved; then the same command again."""
    shaken = cut_before(shared_store, stage, tmp_path)
    child = start(train_until_saved, shaken.root, stage)
    child.until(lambda: child.out.startswith("saved"))
    child.kill()
    (partial,) = shaken.root.glob("*/.*.partial")
    assert weights_of(shaken, stage) == weights_of(shared_store, stage)
    assert not partial.exists()
