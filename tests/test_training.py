"""The loop: an interrupted stage ends with the weights of an undisturbed one; groups, schedule and errors as documented."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import build, tiny_config
from torch import Tensor, nn

from pipeline.runtime import Runtime
from pipeline.schedule import Schedule
from pipeline.training import parameter_groups, read_curves, train
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

    def losses(batch: Halves, generator: torch.Generator) -> dict[str, Tensor]:
        x = torch.randn(16, 3, generator=generator)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        return {"fit": loss, "noise": loss * (math.nan if batch.image_ids[0] == poison else 0.1)}

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
    assert read_curves(tmp_path / "two") == read_curves(tmp_path / "one")


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


def weights_of(store: Store, stage: str) -> str:
    """Run the tiny line up to `stage` and hash its weights."""
    steps = build(store, tiny_config(), until=stage)
    return hashlib.sha256((store.path(steps[stage].recipe.ref) / "weights.safetensors").read_bytes()).hexdigest()


RUN_AND_HANG = """
import sys, time, torch
from pathlib import Path
torch.set_num_threads(1)  # as the tests around it: another number of threads may round otherwise
from pipeline import training
from pipeline.runtime import Runtime
from storage.store import Store
from tiny import build, tiny_config
real = training.save_training_state
def save_and_tell(folder, state):
    real(folder, state)
    print("saved", state["step"], flush=True)
    time.sleep(60)
if sys.argv[2] == sys.argv[3]:
    training.save_training_state = save_and_tell
build(Store(Path(sys.argv[1])), tiny_config(), until=sys.argv[2], runtime=Runtime(progress=False, checkpoint_every=2, dask="none"))
"""


@pytest.mark.slow
def test_every_stage_killed_in_the_middle_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL right after a state was saved, in each of the three stages; then the same command again."""
    calm, shaken = Store(tmp_path / "calm"), Store(tmp_path / "shaken")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    for stage in ("v2c", "g2s", "cpa"):
        command = [sys.executable, "-c", RUN_AND_HANG, str(shaken.root), stage, stage]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("saved")
            process.send_signal(signal.SIGKILL)
        partial = [path for path in shaken.root.glob("*/.*.partial")]
        assert len(partial) == 1, f"{stage} must have been cut off"
        assert weights_of(shaken, stage) == weights_of(calm, stage)
        assert not list(shaken.root.glob("*/.*.partial"))
