"""Cache-clip on Dask: real worker processes, killed at will; wherever the tars were encoded, the artefact has the same
bytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from children import PATH, Child, zs_seg
from cluster_jobs import die, fail_first
from distributed import Client
from s3_server import s3_server
from tiny import QUIET, build, copy_artefacts, tiny_regions

from pipeline import cache_clip
from pipeline.line import line
from pipeline.runtime import Runtime
from pipeline.scenes import benchmark
from pipeline.teacher import cluster
from pipeline.teacher.cluster import device_of_worker, run_tasks, split_cores
from pipeline.teacher.pieces import TarJob
from pipeline.world.config import ScenesConfig
from storage import pieces, transfer
from storage.errors import UserError
from storage.keys import Ref, sha256_file
from storage.remote import Remote
from storage.shards import Shards
from storage.store import Artefact, Manifest, Store

# With regions, so that these have no less to withstand than the other rows.
CONFIG = tiny_regions()


@pytest.fixture(scope="module")
def shards(shared_store: Store) -> tuple[Store, Ref]:
    return shared_store, build(shared_store, CONFIG, until="shard")["shard"].recipe.ref


def linked(shards: tuple[Store, Ref], root: Path) -> Store:
    """A store of its own with the same shards."""
    store = Store(root)
    path = store.path(shards[1])
    path.parent.mkdir(parents=True)
    path.symlink_to(shards[0].path(shards[1]))
    return store


def encode(shards: tuple[Store, Ref], root: Path, dask: str, **runtime: Any) -> Artefact:
    store = linked(shards, root) if not root.exists() else Store(root)
    (stage,) = (stage for stage in line(CONFIG) if stage.name == "cache-clip")
    return store.open(stage.run(store, replace(QUIET, dask=dask, threads=1, **runtime)))


@pytest.fixture(scope="module")
def calm(shared_store: Store) -> Artefact:
    """Encoded in a loop, undisturbed."""
    return shared_store.open(build(shared_store, CONFIG, until="cache-clip")["cache-clip"].recipe.ref)


@pytest.fixture(scope="module")
def existing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file of a scheduler with a worker, started as a user would."""
    folder = tmp_path_factory.mktemp("cluster")
    file, environment = folder / "scheduler.json", {**os.environ, "PYTHONPATH": PATH}
    words = [["scheduler", "--port", "0"], ["worker", "--nthreads", "1"]]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "dask", *word, "--no-dashboard", "--scheduler-file", str(file)],
            cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for word in words
    ]  # fmt: skip
    try:
        while not file.exists():
            assert not any(process.poll() for process in started)
            time.sleep(0.05)
        yield file
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGINT)
            process.wait(20)


def one_line(caught: pytest.ExceptionInfo[ValueError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]


def groups_in(root: Path) -> list[Path]:
    return [path for path in root.glob("tokens/*/*.zarr") if not path.name.startswith(".")]


@pytest.mark.slow
def test_worker_processes_of_this_machine_change_no_byte(
    shards: tuple[Store, Ref], calm: Artefact, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = encode(shards, tmp_path / "store", "local:2", progress=True)
    assert made.manifest.files == calm.manifest.files
    assert made.manifest.counts == calm.manifest.counts
    assert made.manifest.provenance["workers"] == 2
    assert made.manifest.provenance["device"] == calm.manifest.provenance["device"]
    shown = capfd.readouterr().err
    assert "100%, 50 of 50 [" in shown and re.search(r"(image/s|s/image), \d+ instance/s", shown)
    assert "distributed" not in shown and "Traceback" not in shown
    assert not workers_of(psutil.Process())


@pytest.mark.slow
def test_a_cluster_by_address_and_by_file(
    shards: tuple[Store, Ref], calm: Artefact, existing: Path, tmp_path: Path
) -> None:
    for name, where in {"file": str(existing), "address": json.loads(existing.read_text())["address"]}.items():
        made = encode(shards, tmp_path / name, where)
        assert made.manifest.files == calm.manifest.files
        assert made.manifest.counts == calm.manifest.counts
        assert made.manifest.provenance["workers"] == 1


def test_a_worker_that_does_not_see_the_store(
    shards: tuple[Store, Ref], existing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc/self/cwd is another folder for each process: the store is there for us, and not for the workers."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not find /proc/self/cwd/store/.*all machines share") as caught:
        encode(shards, Path("/proc/self/cwd/store"), str(existing))
    one_line(caught)


@pytest.mark.slow
def test_two_workers_on_other_disks_hand_their_tokens_over_in_a_remote(
    shards: tuple[Store, Ref], calm: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc/self/cwd/store is a store for us, and nothing for the workers. Of two runs the second finds what is left."""
    build(shards[0], CONFIG, until="v2c")
    (masks,) = (stage for stage in line(CONFIG) if stage.name == "mask-tokens")
    masks.run(shards[0], QUIET)
    monkeypatch.chdir(tmp_path)
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        remote = Remote("s3://bucket/shared")
        trained = masks.recipe.inputs["checkpoint"]
        with workers(tmp_path) as file:
            with pytest.raises(UserError, match="is not in s3://bucket/shared, from which a worker"):
                encode(shards, Path("/proc/self/cwd/store"), str(file), remote=remote.url)
            transfer.push(shards[0], remote, [shards[0].open(shards[1]).manifest], advance=abs)
            # What a worker of an earlier run has left is used: here a damaged group, which is found and made again.
            (name, *_) = (path.name for path in groups_in(shards[0].root))
            job = TarJob(
                tar=(tar := shards[0].path(shards[1]) / f"{name.removesuffix('.zarr')}.tar"), sha256=sha256_file(tar),
                group=calm.path / name, images=8, artefact=calm.ref,
            )  # fmt: skip
            pieces.leave(remote, calm.ref, shutil.copytree(job.group, tmp_path / job.part))
            (left,) = (one for one in remote.sizes(pieces.folder_of(calm.ref)) if one.endswith("/global/c/0/0"))
            remote.write(f"{pieces.folder_of(calm.ref)}/{left}", b"x")
            with pytest.raises(UserError, match=f"part {job.part} of {calm.ref} is damaged"):
                encode(shards, Path("/proc/self/cwd/store"), str(file), remote=remote.url)
            made = encode(shards, Path("/proc/self/cwd/store"), str(file), remote=remote.url)
            # The same of mask-tokens, whose workers fetch the checkpoint, too.
            copy_artefacts(shards[0], Store(tmp_path / "store"), [trained])
            elsewhere = replace(QUIET, dask=str(file), threads=1, remote=remote.url)
            with pytest.raises(UserError, match=f"{trained} is not in s3://bucket/shared, from which a worker"):
                masks.run(Store(Path("/proc/self/cwd/store")), elsewhere)
            transfer.push(shards[0], remote, [shards[0].open(trained).manifest], advance=abs)
            masks.run(Store(Path("/proc/self/cwd/store")), elsewhere)
        found = Store(tmp_path / "store").open(masks.recipe.ref).manifest
        assert found.files == shards[0].open(masks.recipe.ref).manifest.files and found.provenance["workers"] == 2
        assert remote.sizes(pieces.folder_of(masks.recipe.ref)) == {}
        assert made.manifest.files == calm.manifest.files and made.manifest.counts == calm.manifest.counts
        assert made.manifest.provenance["workers"] == 2
        assert remote.sizes(pieces.folder_of(calm.ref)) == {}


@contextmanager
def workers(folder: Path) -> Iterator[Path]:
    """A scheduler and two workers, each in an empty folder of its own, with the environment of now."""
    file, environment = folder / "scheduler.json", {**os.environ, "PYTHONPATH": PATH}
    words = [["scheduler", "--port", "0"], *(["worker", "--nthreads", "1", "--name", str(n)] for n in range(2))]
    started = []
    for number, word in enumerate(words):
        (folder / f"machine {number}").mkdir(exist_ok=True)
        started.append(subprocess.Popen(
            [sys.executable, "-m", "dask", *word, "--no-dashboard", "--scheduler-file", str(file)],
            cwd=folder / f"machine {number}", env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ))  # fmt: skip
    try:
        while not file.exists():
            assert not any(process.poll() for process in started)
            time.sleep(0.05)
        with Client(scheduler_file=str(file), set_as_default=False) as client:
            client.wait_for_workers(2, timeout=120)
        yield file
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGINT)
            process.wait(20)
        file.unlink(missing_ok=True)


def damage(shards: tuple[Store, Ref], root: Path, tar: str) -> tuple[Store, Ref]:
    """A copy of the shards with one header of one tar overwritten."""
    store, folder = Store(root), root / shards[1].kind / shards[1].key
    folder.mkdir(parents=True)
    for file in shards[0].path(shards[1]).iterdir():
        content = bytearray(file.read_bytes())
        if file.name == tar:
            content[:100] = b"x" * 100
        (folder / file.name).write_bytes(content)
    return store, shards[1]


def test_a_damaged_tar_is_told_in_one_line(shards: tuple[Store, Ref], existing: Path, tmp_path: Path) -> None:
    damaged = damage(shards, tmp_path / "damaged", "train-000000.tar")
    with pytest.raises(ValueError, match=r"shards/\w+ is damaged \(train-000000.tar .*--set-aside") as caught:
        encode(damaged, tmp_path / "store", str(existing))
    one_line(caught)


def test_a_mistake_stops_the_other_jobs(existing: Path, tmp_path: Path) -> None:
    jobs = [tmp_path / str(number) for number in range(20)]
    with pytest.raises(ValueError, match="the first job is wrong"):
        run_tasks(fail_first, jobs, replace(QUIET, dask=str(existing)), progress=lambda *_: None)
    time.sleep(1.5)
    assert len(list(tmp_path.iterdir())) < 10


@pytest.mark.slow
def test_a_killed_workers_tar_is_encoded_again(
    shards: tuple[Store, Ref], calm: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: before it has encoded anything, and as soon as some groups are there."""
    monkeypatch.setattr(cluster, "PATIENCE", 10.0)  # for a worker that Dask does not bring back, now and then
    killed, ended = list[int](), threading.Event()

    def kill(when_there_are: int) -> None:
        while not ended.wait(0.01):
            if len(groups_in(tmp_path / "store")) >= when_there_are and (found := workers_of(psutil.Process())):
                killed.append(found[0].pid)
                return found[0].kill()

    def kill_twice() -> None:
        kill(0)
        kill(2)

    killer = threading.Thread(target=kill_twice)
    killer.start()
    made = encode(shards, tmp_path / "store", "local:2")
    ended.set()
    killer.join()
    assert len(set(killed)) == 2
    assert made.manifest.files == calm.manifest.files
    assert made.manifest.counts == calm.manifest.counts


@pytest.mark.slow
def test_a_job_that_ends_every_worker_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "DEATHS", 1)
    with pytest.raises(ValueError, match="train-7.tar: 2 worker processes died over it") as caught:
        run_tasks(die, ["train-7.tar"], replace(QUIET, dask="local"), progress=lambda *_: None)
    one_line(caught)


COMMAND = (
    "run", "--preset", "demo", "--until", "cache-clip", "--threads", "1", "--data.train-images", "40", "--data.val-images", "10",
    "--shard.samples-per-tar", "8", "--data.protocol", "pixel-ignore", "--data.unseen-share", "0.7", "--tokens.regions", "components",
)  # fmt: skip
BEFORE = ("scenes", "shard", "text")


def start(root: Path, *flags: str) -> Child:
    """The command line in a session of its own, in an empty folder."""
    (root / "here").mkdir(parents=True, exist_ok=True)
    return zs_seg(*COMMAND, "--store", root / "store", *flags, cwd=root / "here", session=True)


def until_groups(root: Path, count: int, child: Child) -> list[psutil.Process]:
    """Wait for so many groups; the processes that run then."""
    process = psutil.Process(child.pid)
    child.until(lambda: len(groups_in(root / "store")) >= count and workers_of(process))
    return process.children(recursive=True)


def tokens_in(root: Path) -> Manifest:
    store = Store(root / "store")
    (ref,) = (ref for ref in store.refs() if ref.kind == "tokens")
    return store.open(ref).manifest


def survivors(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [p for p in psutil.wait_procs(processes, 30)[1] if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(shared_store: Store, calm: Artefact, tmp_path: Path) -> None:
    """SIGKILL of the first process, by which the others end; the groups that were there are left as they are."""
    root = tmp_path
    copy_artefacts(shared_store, Store(root / "store"), [s.recipe.ref for s in line(CONFIG) if s.name in BEFORE])
    child = start(root)
    workers = until_groups(root, 2, child)
    assert child.err.count("dashboard http://127.0.0.1:") == 1
    assert not re.search("distributed|Traceback|Warning", child.err), child.err
    child.kill()
    assert not survivors(workers)
    before = {p.name: p.stat().st_mtime_ns for p in groups_in(root / "store")}
    assert before
    assert start(root, "--dask", "none").wait() == 0
    shaken = tokens_in(root)
    assert shaken.files == calm.manifest.files and shaken.counts == calm.manifest.counts
    after = {p.name: p.stat().st_mtime_ns for p in groups_in(root / "store")}
    assert before == {name: after[name] for name in before}
    assert not list((root / "here").iterdir())


@pytest.mark.slow
def test_nothing_is_left_running_after_ctrl_c(tmp_path: Path) -> None:
    child = start(tmp_path, "--data.train-images", "200")  # enough that it is still at work
    workers = until_groups(tmp_path, 1, child)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does it
    assert child.wait() == 130, child.err
    assert not survivors(workers)
    assert not re.search("distributed|Traceback|KeyboardInterrupt", child.err), child.err
    assert not list((tmp_path / "here").iterdir())


def test_no_scheduler_there(shards: tuple[Store, Ref], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9 .*--dask") as caught:
        encode(shards, tmp_path / "store", "tcp://127.0.0.1:9")
    one_line(caught)


def test_what_is_no_cluster_is_refused(tmp_path: Path) -> None:
    for wrong in ("", "cluster", "local:0", "local:two", str(tmp_path / "no.json"), str(tmp_path)):
        with pytest.raises(ValueError, match=re.escape(f"--dask {wrong!r} is unknown; give local")) as caught:
            Runtime(dask=wrong)
        one_line(caught)
    for content in ("", "[]", "{}"):
        (tmp_path / "file.json").write_text(content)
        with pytest.raises(ValueError, match=r"file.json is no file of a Dask scheduler") as caught:
            run_tasks(die, ["a"], Runtime(dask=str(tmp_path / "file.json")), progress=lambda *_: None)
        one_line(caught)


@pytest.mark.parametrize(
    ("dask", "threads", "gpus", "jobs", "workers", "each"),
    [("local", 2, 0, 9, 1, 2), ("local", 7, 0, 9, 1, 7), ("local", 8, 0, 9, 2, 4), ("local", 64, 0, 9, 9, 7),
     ("local:3", 2, 0, 9, 3, 1), ("local:3", 6, 0, 2, 2, 3), ("local", 2, 1, 900, 1, 2), ("local", 16, 1, 900, 4, 4),
     ("local", 128, 1, 900, 4, 32), ("local", 128, 8, 900, 32, 4), ("local", 16, 8, 900, 8, 2), ("local", 128, 8, 3, 3, 42), ("local:4", 16, 1, 900, 4, 4)],
)  # fmt: skip
def test_how_cores_are_shared_out(dask: str, threads: int, gpus: int, jobs: int, workers: int, each: int) -> None:
    """At most four workers a GPU, however many cores there are; they decode."""
    assert split_cores(Runtime(threads=threads, dask=dask), jobs, gpus) == (workers, each)


@pytest.mark.parametrize(
    ("device", "worker", "gpus", "expected"),
    [
        ("auto", "0", 4, "cuda:0"), ("auto", "3", 4, "cuda:3"), ("cuda", "5", 4, "cuda:1"), ("auto", "node-7-2", 4, "cuda:2"),
        ("auto", "node", 1, "auto"), ("auto", "tcp://10.0.0.1:4000", 0, "auto"), ("cuda", "tcp://10.0.0.1:4000", 1, "cuda"),
        ("cuda:1", "node-3", 4, "cuda:1"), ("cpu", "node-3", 4, "cpu"),
    ],
)  # fmt: skip
def test_each_worker_of_a_machine_has_its_own_gpu(device: str, worker: str, gpus: int, expected: str) -> None:
    assert device_of_worker(device, worker, gpus) == expected


def test_a_worker_that_could_be_on_any_of_several_gpus_is_refused() -> None:
    for name in ("tcp://10.0.0.1:4000", "node", "node7"):
        with pytest.raises(ValueError, match=f"{name} has 2 GPUs .*`dask worker ADDRESS --nworkers 2 ") as caught:
            device_of_worker("auto", name, 2)
        one_line(caught)


def test_one_tar_encoded_twice_at_the_same_time(shards: tuple[Store, Ref], calm: Artefact, tmp_path: Path) -> None:
    assert isinstance(CONFIG.data, ScenesConfig)
    tar = Shards(shards[0].path(shards[1])).tars("val")[0]
    job = cache_clip.Job(
        tar=tar, sha256="", group=tmp_path / "val-000000.zarr", images=8, hide=False, config=CONFIG.tokens, teacher=CONFIG.teacher,
        benchmark=benchmark(CONFIG.data), artefact=calm.ref,
    )  # fmt: skip
    both = threading.Barrier(2, timeout=60)

    waited: set[int] = set()

    def meet(images: int, instances: int) -> None:
        if threading.get_ident() not in waited:
            waited.add(threading.get_ident())
            both.wait()  # neither ends before the other has begun

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: cache_clip._encode(job, replace(QUIET, threads=1), meet), range(2)))
    assert [path.name for path in tmp_path.iterdir()] == ["val-000000.zarr"]
    for file in job.group.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (calm.path / file.relative_to(tmp_path)).read_bytes()


def test_work_that_is_done_again_is_counted_once() -> None:
    reported: list[tuple[int, int]] = []
    tally = cluster._Tally(2, lambda *new: reported.append(new))
    tally.hear("ours", ["ours", 0, 5, 9])
    tally.hear("ours", ["another run", 1, 100, 100])
    for images, instances in ((2, 3), (8, 12), (8, 12)):  # its worker was lost, another begins again
        tally.hear("ours", ["ours", 0, images, instances])
    tally.add(1, 4, 4)
    assert [sum(column) for column in zip(*reported, strict=True)] == [12, 16]
    assert all(images >= 0 and instances >= 0 for images, instances in reported)
