"""A Prefect server that is killed while the flow runs: what is complete is right, and the next run, with a new server,
goes on.

    python tests/faults/fault_prefect.py --count 2

Also looks where the server listens. Each trial starts a real server and the real flow, and takes about a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from flows.request import Request, configure
from pipeline.line import STAGES, Stage, line
from storage.keys import sha256_file
from storage.store import Store

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--data.train-images", "24", "--data.val-images", "6", "--v2c.steps", "2", "--v2c.calibration-images", "4",
    "--g2s.steps", "2", "--cpa.steps", "2",
)  # fmt: skip
FLOW = "import sys; from flows.flow import zs_seg; zs_seg(preset='demo', store=sys.argv[1], overrides=sys.argv[2:], dask='none')"
PATIENCE = 240


@contextmanager
def server(home: Path, port: int) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """A real server, and the environment of its clients; killed at the end if it still lives."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {
        "PREFECT_HOME": str(home), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PYTHONPATH": str(ROOT),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
    }  # fmt: skip
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(lambda: _healthy(port), 180)
        yield psutil.Process(process.pid), environment
    finally:
        _kill(psutil.Process(process.pid))
        process.wait()


def trial(folder: Path, stage: str, calm: Store, steps: list[Stage]) -> None:
    """Kill the server as soon as `stage` is complete, and see what becomes of the flow, of the store, and of the next
    run.
    """
    store, port = Store(folder / "store"), _free_port()
    ref = next(step.recipe.ref for step in steps if step.name == stage)
    with server(folder / "home", port) as (process, environment):
        heard = {
            c.laddr.ip for p in _tree(process) for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN
        }
        assert heard == {"127.0.0.1"}, heard
        flow = _flow(folder, store, environment)
        _wait(lambda: store.state(ref) == "fresh", PATIENCE, flow)
        _kill(process)
        killed = time.monotonic()
    end = killed + PATIENCE
    while flow.poll() is None and time.monotonic() < end and any(store.state(s.recipe.ref) != "fresh" for s in steps):
        time.sleep(0.2)
    with contextlib.suppress(
        subprocess.TimeoutExpired
    ):  # Prefect has not given up hope yet; a person would press Ctrl-C
        flow.wait(10)
    code = flow.poll()
    flow.kill()
    flow.wait()
    complete = [step for step in steps if store.state(step.recipe.ref) == "fresh"]
    print(f"server killed after {stage}: flow ended with {code} after {time.monotonic() - killed:.0f} s, {len(complete)} of "
          f"{len(STAGES)} stages complete", flush=True)  # fmt: skip
    _require_right(store, calm, complete)
    with server(folder / "home", port) as (_, environment):
        flow = _flow(folder, store, environment)
        assert flow.wait(PATIENCE) == 0, (folder / "log").read_text()[-3000:]
    _require_right(store, calm, steps)
    print("the next run completed the rest, with the bytes of an undisturbed one", flush=True)


def _require_right(store: Store, calm: Store, steps: list[Stage]) -> None:
    for step in steps:
        ref = step.recipe.ref
        assert store.verify(ref) == [], ref
        for name in store.open(ref).manifest.files:
            if not name.startswith(("curves", "tensorboard")):  # they hold seconds
                assert sha256_file(store.path(ref) / name) == sha256_file(calm.path(ref) / name), f"{ref}: {name}"


def _flow(folder: Path, store: Store, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", FLOW, str(store.root), *FLAGS], cwd=folder, env=environment, stdout=log, stderr=log
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _wait(condition: Callable[[], bool], seconds: float, process: subprocess.Popen[bytes] | None = None) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and (process is None or process.poll() is None), "waited in vain"
        time.sleep(0.05)


def _tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def _kill(process: psutil.Process) -> None:
    if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        for one in _tree(process):
            one.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2)
    options = parser.parse_args()
    steps = line(configure(Request(preset="demo", overrides=FLAGS)))
    with tempfile.TemporaryDirectory() as folder:
        calm, root = Store(Path(folder) / "calm"), Path(folder)
        command = [
            sys.executable,
            "-m",
            "flows.cli",
            "run",
            "--preset",
            "demo",
            "--store",
            str(calm.root),
            "--dask",
            "none",
        ]
        subprocess.run(
            [*command, *FLAGS], cwd=root, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True
        )
        for number in range(options.count):
            place = root / str(number)
            place.mkdir()
            trial(place, ("shard", "v2c", "queries", "g2s", "text")[number % 5], calm, steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
