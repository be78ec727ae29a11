"""Two processes (gloo) and one, and a batch in parts and in one piece, train the same network."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import PATH, zs_seg
from tiny import build, copy_artefacts, tiny_config, tiny_regions
from torch import Tensor, nn

from flows.cli import main
from models.projector import Projector
from pipeline import v2c
from pipeline.inference.model import build_model, save_model
from pipeline.line import Stage, line
from pipeline.runtime import Runtime
from pipeline.teacher.text_bank import open_text
from pipeline.training.config import V2CConfig
from pipeline.training.criteria import V2CCriterion
from pipeline.training.curves import MEASURED, read_curves
from pipeline.training.distributed import ALONE, GlobalBatchNorm2d, Ranks, launch, share_batch_statistics
from pipeline.training.loader import CPU, Batch, TrainingData
from pipeline.training.loop import begin_as_the_first, parameter_groups, train
from storage.checkpoints import STATE, load_checkpoint
from storage.errors import UserError
from storage.inputs import Inputs
from storage.remote import Remote
from storage.store import Store

TWO = Runtime(progress=False, devices=2, threads=2)
ONE = Runtime(progress=False, threads=1)


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()


def _small(ranks: Ranks, runtime: Runtime, folder: Path, images: Tensor) -> None:
    """Save what the processes exchanged and the batch statistics they shared; then one of them fails."""
    torch.save(_exchange(ranks, runtime), folder / f"exchange {ranks.rank}.pt")
    torch.save(_normalise(ranks, images), folder / f"statistics {ranks.rank}.pt")
    torch.save(_apart(ranks, folder / f"machine {ranks.rank}"), folder / f"apart {ranks.rank}.pt")
    if ranks.rank == 1:
        raise UserError("v2c: loss dice is nan at step 3 (images [7]); look at it")
    ranks.sum(torch.zeros(1))


def _exchange(ranks: Ranks, runtime: Runtime) -> dict[str, Tensor]:
    rows = torch.arange(3.0 * (ranks.rank + 1)).view(-1, 3) + 100 * ranks.rank
    weight = nn.Parameter(torch.ones(2))
    idle = nn.Parameter(torch.ones(3))
    (weight * (ranks.rank + 1.0)).sum().backward()
    ranks.sum_gradients([weight, idle])
    assert weight.grad is not None and idle.grad is not None
    return {
        "sum": ranks.sum(torch.tensor([1.0, 10.0 * ranks.rank])), "others": torch.cat(ranks.others(rows)), "grad": weight.grad,
        "idle": idle.grad, "threads": torch.tensor(runtime.threads),
    }  # fmt: skip


def _apart(ranks: Ranks, store: Path) -> dict[str, object]:
    """Each process has a store of its own; rank 0 has a training state in it, the other one no longer. Then their inputs
    differ."""
    folder, found = store / "checkpoint/0", dict[str, object]()
    folder.mkdir(parents=True)
    (folder / STATE).write_bytes(b"state" if ranks.rank == 0 else b"of an earlier attempt")
    for case, sha256 in (("same", "a"), ("other", "ab"[ranks.rank])):
        Inputs(hashes={"tokens/1/x": "c", "tokens/1/y": sha256}).write(folder)
        try:
            begin_as_the_first(folder, ranks)
        except UserError as error:
            found[case] = str(error)
        found[f"{case} state"] = (folder / STATE).read_bytes()
    (folder / STATE).unlink()
    Inputs().write(folder)
    begin_as_the_first(folder, ranks)  # where there is none
    return {**found, "none": (folder / STATE).exists()}


def _normalise(ranks: Ranks, images: Tensor) -> dict[str, Tensor | None]:
    network = net()
    share_batch_statistics(network, ranks)
    assert isinstance(network[1], GlobalBatchNorm2d)
    own = images[:3] if ranks.rank == 0 else images[3:]  # of unequal size
    network(own).square().sum().backward()
    ranks.sum_gradients(network.parameters())
    return {**network.state_dict(), **{f"grad {name}": p.grad for name, p in network.named_parameters()}}


def _too_large(ranks: Ranks, runtime: Runtime) -> None:
    """The second process finds its device's memory full, and the first waits for it."""
    if ranks.rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    ranks.sum(torch.zeros(1))


@pytest.mark.slow
def test_too_little_memory_in_one_process_is_told_with_its_cure() -> None:
    with pytest.raises(UserError, match=r"too little memory; stage 1 takes less, .* by --v2c.accumulate 2"):
        launch(_too_large, runtime=TWO)


IMAGES = torch.randn(5, 2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pytest.ExceptionInfo[ValueError]]:
    """The folder where two processes left what `_small` says, and what became of the mistake in one of them."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.raises(ValueError) as caught:
        launch(_small, folder, IMAGES, runtime=TWO)
    return folder, caught


def saved(small: tuple[Path, object], name: str) -> list[dict[str, Tensor]]:
    return [torch.load(small[0] / f"{name} {rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_what_processes_tell_each_other(small: tuple[Path, object]) -> None:
    zero, one = saved(small, "exchange")
    for found in (zero, one):
        assert found["sum"].tolist() == [2.0, 10.0] and found["grad"].tolist() == [3.0, 3.0]
        assert found["idle"].tolist() == [0.0] * 3 and found["threads"] == 1
    assert zero["others"].tolist() == [[100.0, 101.0, 102.0], [103.0, 104.0, 105.0]]  # rows of unequal number
    assert one["others"].tolist() == [[0.0, 1.0, 2.0]]
    value = torch.ones(2)
    assert ALONE.sum(value) is value and ALONE.others(value) == []


@pytest.mark.slow
def test_processes_with_disks_of_their_own_begin_with_the_first_ones_inputs_and_state(
    small: tuple[Path, object],
) -> None:
    zero, one = saved(small, "apart")
    assert zero.keys() == {"same state", "other state", "none"}
    for found in (zero, one):
        assert (found["same state"], found["other state"], found["none"]) == (b"state", b"state", False)
    assert f"{small[0]}/machine 1/tokens/1/y has other bytes than on the machine of rank 0" in str(one["other"])


@pytest.mark.slow
def test_a_mistake_in_one_process_is_told_as_if_it_were_here(
    small: tuple[Path, pytest.ExceptionInfo[ValueError]],
) -> None:
    assert str(small[1].value) == "v2c: loss dice is nan at step 3 (images [7]); look at it"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # the launcher's own handler is gone


@pytest.mark.slow
def test_batch_statistics_are_those_of_the_whole_batch(small: tuple[Path, object]) -> None:
    whole = net()
    whole(IMAGES).square().sum().backward()
    expected = {**whole.state_dict(), **{f"grad {name}": p.grad for name, p in whole.named_parameters()}}
    for part in saved(small, "statistics"):
        for name, value in expected.items():
            assert value is not None
            torch.testing.assert_close(part[name], value, rtol=1e-10, atol=1e-12)


class Doubled(TrainingData):
    """In float64 two orders of summation stay together; in float32 AdamW turns gradients of rounding size into steps of
    full size.
    """

    def batches(self, size: int, *, start: int, ranks: Ranks = ALONE, device: torch.device = CPU) -> Iterator[Batch]:
        for batch in super().batches(size, start=start, ranks=ranks, device=device):
            yield replace(
                batch,
                images=batch.images.double(),
                instance_tokens=[t.double() for t in batch.instance_tokens],
                region_tokens=[t.double() for t in batch.region_tokens],
            )


def _train(
    ranks: Ranks, runtime: Runtime, folder: Path, config: V2CConfig, shards: Path, tokens: Path, text: Path
) -> None:
    """Stage 1 as `v2c.train_model` runs it, in float64."""
    runtime.torch_device()
    bank = open_text(text, "")
    bank = replace(bank, embedding=bank.embedding.double())
    data = Doubled(shards, tokens, bank, config.augment, seed=config.seed, workers=1, regions=config.candidates)
    torch.manual_seed(config.seed)
    model = build_model(v2c._meta(config, bank), bank.embedding)
    assert isinstance(model.projector, Projector)
    modules = {"segmenter": model.segmenter.double().train(), "projector": model.projector.double().train()}
    share_batch_statistics(model.segmenter, ranks)
    folder = folder / f"{ranks.world} {config.accumulate}"
    folder.mkdir(exist_ok=True)
    train(
        "v2c", folder=folder, schedule=config, modules=modules, groups=parameter_groups(modules, config),
        batches=lambda start: data.batches(config.batch, start=start, ranks=ranks),
        losses=V2CCriterion(model.segmenter, model.projector, bank, data.global_tokens().double(), config, ranks),
        runtime=runtime, ranks=ranks,
    )  # fmt: skip
    if ranks.rank == 0:
        save_model(folder, model)


def apart(one: Path, other: Path) -> tuple[float, float]:
    """How far two folders' weights are apart, |a - b| / |b| over all of them, and their losses, the largest of all
    rows.
    """
    weights = [
        torch.cat([v.double().flatten() for v in load_checkpoint(folder)[0].values()]) for folder in (one, other)
    ]
    pairs = zip(read_curves(one), read_curves(other), strict=True)
    losses = [abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs for name in a if name not in MEASURED]
    return float((weights[0] - weights[1]).norm() / weights[1].norm()), max(losses)


@pytest.fixture(scope="module")
def cached(shared_store: Store) -> tuple[Store, dict[str, Stage]]:
    return shared_store, build(shared_store, tiny_config(), until="queries", runtime=ONE)


@pytest.mark.slow
def test_two_processes_end_where_one_does_and_parts_where_one_piece_does(tmp_path: Path, shared_store: Store) -> None:
    """10 steps of 4 images; negatives come from the whole batch. Two processes: BatchNorm learns, and so does the
    network from candidate regions; parts: it is frozen.
    """
    steps = build(shared_store, tiny_regions(), until="cache-clip", runtime=ONE)
    inputs = [shared_store.path(steps[stage].recipe.ref) for stage in ("shard", "cache-clip", "text")]
    config = replace(tiny_config().v2c, steps=10, instance_negatives="batch")
    candidates = replace(config, candidate_mask_weight=0.5, candidate_token_weight=1.0)
    learns = replace(candidates, segmenter=replace(config.segmenter, frozen_batchnorm=False))
    for folder, used, runtime in (
        ("learns", learns, ONE), ("learns", learns, TWO), ("frozen", config, ONE), ("frozen", replace(config, accumulate=2), ONE),
    ):  # fmt: skip
        (tmp_path / folder).mkdir(exist_ok=True)
        launch(_train, tmp_path / folder, used, *inputs, runtime=runtime)
    found = [
        apart(tmp_path / "learns/2 1", tmp_path / "learns/1 1"),
        apart(tmp_path / "frozen/1 2", tmp_path / "frozen/1 1"),
    ]
    print(found)
    assert all(weights < 1e-5 and losses < 1e-5 for weights, losses in found)


@pytest.mark.slow
def test_two_processes_write_the_queries_of_one(cached: tuple[Store, dict[str, Stage]], tmp_path: Path) -> None:
    """Each process takes every second tar; what a killed run left is not made again."""
    store, steps = cached
    step, other = steps["queries"], Store(tmp_path)
    copy_artefacts(store, other, [ref for ref in step.recipe.inputs.values()])
    expected = store.path(step.recipe.ref)
    groups = sorted(expected.glob("*.zarr"))
    assert len(groups) > 3
    left = other.partial(step.recipe.ref) / groups[0].name
    shutil.copytree(groups[0], left)
    made = left.stat().st_ino
    found = other.path(step.run(store=other, runtime=TWO))
    assert (found / groups[0].name).stat().st_ino == made
    files = [file.relative_to(expected) for group in groups for file in group.rglob("*") if file.is_file()]
    assert files and all((found / file).read_bytes() == (expected / file).read_bytes() for file in files)
    manifests = (at.open(step.recipe.ref).manifest for at in (store, other))
    one, two = ({"counts": m.counts, "devices": m.provenance["devices"]} for m in manifests)
    assert one == {**two, "devices": 1} and two["devices"] == 2


@pytest.mark.slow
def test_stages_2_and_3_take_one_process_whatever_devices_says(
    cached: tuple[Store, dict[str, Stage]], tmp_path: Path
) -> None:
    store, steps = cached
    other = Store(tmp_path)
    copy_artefacts(store, other, [steps[stage].recipe.ref for stage in ("text", "v2c", "queries")])
    for step in line(tiny_config()):
        if step.name in ("g2s", "cpa"):
            one, two = (
                at.path(step.run(store=at, runtime=rt)) for at, rt in ((store, ONE), (other, replace(TWO, threads=1)))
            )
            assert (one / "weights.safetensors").read_bytes() == (two / "weights.safetensors").read_bytes()


TORCHRUN = """
import os, shutil, sys
from flows.cli import main
from pipeline.training import loop

def save_and_copy(folder, state, save=loop.save_training_state):
    save(folder, state)
    if state["step"] == 1:
        shutil.copytree(folder, os.environ["COPY"] + "/" + folder.name)

if __name__ == "__main__":
    os.environ["ZS_SEG_STORE"] += os.environ["RANK"] if "APART" in os.environ else ""
    if "COPY" in os.environ:
        loop.save_training_state = save_and_copy
    sys.exit(main())
"""


@pytest.mark.slow
def test_stage_1_from_the_command_line_under_torchrun(tmp_path: Path) -> None:
    """The artefact is whole; one process tells the user about it. Two processes with stores of their own, of which the
    first goes on from a state after one step, come to the same bytes: what they read comes from a remote."""
    flags = ["--preset", "demo", "--data.train-images", "24", "--data.val-images", "6", "--v2c.steps", "2", "--v2c.batch", "4",
             "--v2c.calibration-images", "4", "--shard.samples-per-tar", "2", "--checkpoint-every", "1"]  # fmt: skip
    environment = {"ZS_SEG_STORE": str(tmp_path / "store"), "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN)
    there = ["--remote", f"file://{tmp_path}/remote", "--push"]
    prepared = zs_seg("run", *flags, "--until", "cache-clip", "--dask", "none", *there, env=environment)
    assert prepared.wait() == 0, prepared.err

    def torchrun(*more: str, **variables: str) -> subprocess.CompletedProcess[str]:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, "stage", "v2c", *flags]
        both = {**os.environ, **environment, **variables}
        return subprocess.run([sys.executable, *words, *more], env=both, capture_output=True, text=True, check=False)

    zero, one = Store(tmp_path / "store0"), Store(tmp_path / "store1")
    done = torchrun(COPY=str(zero.root / "checkpoint"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("built in") == 1
    (artefact,) = (ref for ref in Store(tmp_path / "store").refs() if ref.kind == "checkpoint")
    assert Store(tmp_path / "store").verify(artefact) == []

    assert zero.state(artefact) == "partial"
    done = torchrun(*there, "--cache", "1", APART="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("built in") == 1
    ours, theirs = zero.open(artefact).manifest, Store(tmp_path / "store").open(artefact).manifest
    assert ours.provenance["resumed"]
    assert ours.counts == theirs.counts
    weights = [name for name in ours.files if name.endswith((".safetensors", "meta.json"))]
    assert len(weights) == 2 and all(ours.files[name] == theirs.files[name] for name in weights)
    found = Remote(f"file://{tmp_path}/remote").manifest(artefact)
    assert found and found.files == ours.files
    # The second process has left nothing but its inputs. The tars are in the caches.
    assert [ref.kind for ref in one.refs()] == ["shards", "text", "tokens"] and one.state(artefact) == "missing"
    assert [path.name for path in (one.root / "checkpoint").iterdir()] == []
    for store in (zero, one):
        assert not list(store.root.glob("shards/*/*.tar")) and list((store.root / ".cache").iterdir())
    # Of an artefact that is complete the second process is not asked for anything.
    assert "fresh, nothing to do" in torchrun(*there, APART="").stdout


def test_under_torchrun_only_stage_1_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
    assert main(["run", "--preset", "demo"]) == 2
    assert "under torchrun only `zs-seg stage v2c --preset demo` runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch", "accumulate", "devices", "cure"),
    [
        (
            4,
            1,
            3,
            "batch 4 cannot be split over 3 devices; choose a multiple of it with --v2c.batch, or pass --devices 2",
        ),
        (16, 4, 8, "batch 16 over 8 devices gives each 2 .* into 4 parts; pass --v2c.accumulate 2"),
        (12, 4, 2, "batch 12 over 2 devices gives each 6 .* into 4 parts; pass --v2c.accumulate 3"),
        (16, 16, 16, "batch 16 over 16 devices gives each 1 .* into 16 parts; pass --v2c.accumulate 1"),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused_with_the_cure(
    batch: int, accumulate: int, devices: int, cure: str
) -> None:
    with pytest.raises(UserError, match=f"^v2c: {cure}$"):
        V2CConfig(batch=batch, accumulate=accumulate).share(devices)


def test_every_other_batch_is_split_into_equal_parts() -> None:
    for devices, accumulate, share in ((1, 1, 16), (1, 16, 1), (4, 2, 2), (8, 2, 1), (16, 1, 1)):
        images = V2CConfig(batch=16, accumulate=accumulate).share(devices)
        assert images == share * accumulate and devices * images == 16


def test_a_split_that_fails_is_refused_before_anything_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--preset", "demo", "--store", str(tmp_path / "store"), "--devices", "8", "--v2c.accumulate", "4"]
    for words in (["run", "--until", "v2c"], ["run"], ["stage", "v2c"]):
        assert main([*words, *flags]) == 2
        assert "pass --v2c.accumulate 2" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
    assert main(["stage", "g2s", *flags]) == 2  # which reads queries, trains on one device, and finds no input
    assert "stage g2s reads what stage queries makes" in capsys.readouterr().err
