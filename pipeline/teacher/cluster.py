"""Independent jobs, one Dask task each: in processes of this machine, on a running cluster, or in a loop without Dask.

A job must be safe to run twice, even at the same time: a lost worker may only be out of reach, and its jobs are run
again elsewhere. Nothing here may change what a job writes.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.runtime import Runtime
from storage.errors import UserError

if TYPE_CHECKING:
    from distributed import Client

Progress = Callable[[int, int], None]  # images and instances that were encoded since the last call
Job = TypeVar("Job")
Result = TypeVar("Result")
TOPIC = "zs-seg-progress"
DEATHS = 5  # the most worker processes of this machine that may die over one job
CORES_A_WORKER, MOST_A_GPU = 4, 4
EVERY_GPU = ("auto", "cuda")  # devices that stand for all GPUs of a machine, which its workers share out
POLL, PATIENCE = 0.05, 30.0  # seconds between two polls of the jobs, and without any worker
log = logging.getLogger(__name__)


def run_tasks(
    function: Callable[[Job, Runtime, Progress], Result], jobs: Sequence[Job], runtime: Runtime, *, progress: Progress
) -> tuple[list[Result], int]:
    """Call `function(job, runtime, progress)` for every job on the workers that `runtime.dask` selects.

    `function` gets the runtime of its worker: its device and number of threads. `progress` is called while jobs run,
    from one thread at a time; repeated work is not counted again. Functions and jobs are pickled, so workers on another
    machine need this package.

    Returns the results in the jobs' order, and the number of workers.

    Raises what a job raises, at once and without waiting for the other jobs; and UserError when the cluster does not
    exist, has no worker or is lost, or when a job (named by its str) keeps killing its workers.
    """
    if not jobs:
        return [], 0
    if runtime.dask == "none":
        return [function(job, runtime, progress) for job in jobs], 1
    import distributed  # noqa: F401  sets the levels of its loggers

    # Errors that matter are raised or logged here instead.
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    results: dict[int, Any] = {}
    tally, workers = _Tally(len(jobs), progress), 0
    while left := {number: job for number, job in enumerate(jobs) if number not in results}:
        with _local(runtime, len(left)) if runtime.local else _existing(runtime) as (client, share):
            threads: Any = client.nthreads()
            count = len(threads)
            log.info("%d Dask worker%s, dashboard %s", count, "s" * (count > 1), client.dashboard_link)
            _run(client, functools.partial(_task, function, share), left, results, tally)
            workers = max(workers, count)
    return [results[number] for number in range(len(jobs))], workers


def gpus_of(runtime: Runtime) -> int:
    """The GPUs of this machine that `runtime.device` stands for: all for "auto" and "cuda", 1 for one by its number, 0
    for another device.

    Raises UserError as `Runtime.torch_device`.
    """
    import torch

    if runtime.torch_device().type != "cuda":
        return 0
    return torch.cuda.device_count() if runtime.device in EVERY_GPU else 1


def split_cores(runtime: Runtime, jobs: int, gpus: int) -> tuple[int, int]:
    """Worker processes on this machine, which has `gpus` GPUs to compute on, and the CPU threads of each, by which it
    decodes images.

    One worker per four cores, at least one; on GPUs one to four for each, since the threads of one process hold each
    other up by Python's lock: on 16 cores one process encoded 247 images/s on an H200, two 384, and the GPU alone
    2,000. "local:N" sets N. There are never more workers than jobs. Workers get equal numbers of threads.
    """
    _, _, asked = runtime.dask.partition(":")
    workers = max(runtime.workers // CORES_A_WORKER, 1)
    if gpus:
        workers = gpus * min(max(workers // gpus, 1), MOST_A_GPU)
    workers = min(int(asked) if asked else workers, jobs)
    return workers, max(runtime.workers // workers, 1)


def device_of_worker(device: str, worker: str, gpus: int) -> str:
    """The device that a worker process computes on: where "auto" and "cuda" stand for several GPUs of its machine, the
    one with the number at the end of its name, counted round; else `device`.

    Dask numbers the workers that one `dask worker --nworkers N --name NAME` starts NAME-0, NAME-1, ..., and a worker
    that is started again keeps its name. Raises UserError for a name without a number.
    """
    if device not in EVERY_GPU or gpus < 2:
        return device
    number = re.search(r"(?:^|-)(\d+)$", worker)
    if not number:
        raise UserError(
            f"Dask worker {worker} has {gpus} GPUs and no number in its name that selects one; start the workers of a "
            f"machine with `dask worker ADDRESS --nworkers {gpus} --name NAME --nthreads 1`, or pass --device cuda:0"
        )
    return f"cuda:{int(number[1]) % gpus}"


@contextmanager
def _local(runtime: Runtime, jobs: int) -> Iterator[tuple[Client, Runtime]]:
    """Worker processes that end with this process, however it ends.

    One Dask thread each, since torch has its own. No memory limit: Dask would pause a worker at 80 % of it for ever.
    MALLOC_TRIM_THRESHOLD_ keeps the C library's default: Dask's value returns freed memory to the system at once, and
    allocating it again for every batch took a third more CPU time with a ViT-B/16.
    """
    workers, threads = split_cores(runtime, jobs, gpus_of(runtime))
    import dask.config
    from distributed import Client, LocalCluster

    settings = {
        "distributed.scheduler.allowed-failures": DEATHS,
        "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
        "distributed.nanny.pre-spawn-environ.DASK_LOGGING__DISTRIBUTED": "critical",
    }
    with (
        dask.config.set(settings),  # pyright: ignore[reportPrivateImportUsage]
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=None,
            # Ctrl-C is handled by this process alone.
            preload=["import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"],
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client, replace(runtime, dask="none", threads=threads)


@contextmanager
def _existing(runtime: Runtime) -> Iterator[tuple[Client, Runtime]]:
    """The cluster at an address, or the one whose scheduler wrote the given file. Its workers keep their own number of
    threads unless `runtime.threads` is set, which then applies to each of them."""
    from distributed import Client

    address = runtime.dask if "://" in runtime.dask else _address(Path(runtime.dask))
    try:
        client = Client(address, timeout=5, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Dask scheduler answers at {address} ({' '.join(str(error).split())}); "
            "start one with `dask scheduler`, correct --dask, or leave it out to use this machine"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=20)
        except TimeoutError as error:
            raise UserError(
                f"the Dask scheduler at {address} has no worker; start some with `dask worker {address} --nthreads 1`"
            ) from error
        yield client, replace(runtime, dask="none")


def _address(file: Path) -> str:
    try:
        return json.loads(file.read_bytes())["address"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no file of a Dask scheduler; `dask scheduler --scheduler-file {file}` writes one"
        ) from error


def _run(
    client: Client, task: Callable[..., Any], jobs: dict[int, Any], results: dict[int, Any], tally: _Tally
) -> None:
    """Run the jobs, by number, and store their results in `results` as they end. Returns early when there has been no
    worker for `PATIENCE` seconds: Dask sometimes fails to restart a worker process that was killed while it started."""
    from distributed import CancelledError, KilledWorker

    run = uuid.uuid4().hex
    client.subscribe_topic(TOPIC, lambda event: tally.hear(run, event[1]))
    keys = [f"job-{run}-{number}" for number in jobs]
    futures = dict(zip(jobs, client.map(functools.partial(task, run), jobs, jobs.values(), key=keys), strict=True))
    looked = alive = time.monotonic()
    try:
        while futures:
            for number in [number for number, future in futures.items() if future.done()]:
                try:
                    results[number], done = futures[number].result()
                except KilledWorker as error:
                    raise UserError(
                        f"{jobs[number]}: {error.allowed_failures + 1} worker processes died over it, "
                        "most likely for want of memory; use fewer workers, or smaller batches"
                    ) from error
                except CancelledError as error:
                    raise UserError(
                        "the Dask scheduler is gone; start it again, and the same command goes on where this one was"
                    ) from error
                tally.add(number, *done)
                # A future that is kept would be run again if the worker that holds its result is lost.
                del futures[number]
            time.sleep(POLL)
            if (now := time.monotonic()) - looked > PATIENCE / 10:
                looked = now
                alive = now if client.nthreads() else alive
            if now - alive > PATIENCE:
                log.warning("no Dask worker for %d s; starting again with what is left", PATIENCE)
                return
    finally:
        client.cancel(list(futures.values()))


class _Tally:
    """Progress so far by job; only increments are passed on, since a job that starts again reports its work twice."""

    def __init__(self, jobs: int, progress: Progress) -> None:
        self._known = [(0, 0)] * jobs
        self._progress = progress
        # Results arrive in the main thread, reports in the client's.
        self._lock = threading.Lock()

    def hear(self, run: str, report: Sequence[Any]) -> None:
        if report[0] == run:
            self.add(*report[1:])

    def add(self, number: int, images: int, instances: int) -> None:
        with self._lock:
            before = self._known[number]
            now = max(before[0], images), max(before[1], instances)
            self._known[number] = now
            self._progress(now[0] - before[0], now[1] - before[1])


def _task(
    function: Callable[[Any, Runtime, Progress], Any], runtime: Runtime, run: str, number: int, job: Any
) -> tuple[Any, tuple[int, int]]:
    """Run one job on a worker, on that worker's device; its progress is sent at most twice a second."""
    from distributed import get_worker

    worker, images, instances, message = get_worker(), 0, 0, time.monotonic()
    if runtime.device in EVERY_GPU:
        runtime = replace(runtime, device=device_of_worker(runtime.device, str(worker.name), gpus_of(runtime)))

    def progress(more_images: int, more_instances: int) -> None:
        nonlocal images, instances, message
        images, instances = images + more_images, instances + more_instances
        if time.monotonic() - message > 0.5:
            message = time.monotonic()
            worker.log_event(TOPIC, [run, number, images, instances])

    return function(job, runtime, progress), (images, instances)
