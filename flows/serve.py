"""`make serve` and `make stop`: a local Prefect server, the deployments of prefect.yaml, and a worker that runs them.

Everything Prefect keeps lies in PREFECT_HOME (./.prefect). Works offline; nothing is reported to anybody.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import psutil

from storage.errors import UserError

POOL = "zs-seg"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 10  # seconds between a polite and a firm end


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description=__doc__)
    parser.add_argument("command", choices=("start", "stop"))
    parser.add_argument("--port", type=int, default=4200)
    parser.add_argument("--runs", type=int, default=1, help="how many runs at a time; the others wait")
    options = parser.parse_args()
    home = Path(os.environ.setdefault("PREFECT_HOME", str(Path(".prefect").absolute())))
    if options.command == "stop":
        return stop(home)
    try:
        return serve(home, options.port, options.runs)
    except (UserError, subprocess.CalledProcessError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2


def serve(home: Path, port: int, runs: int) -> int:
    """Start everything, stay until a signal comes or a part dies, then stop everything.

    The worker takes `runs` flow runs at a time, so that no two share a GPU by accident; the others wait for their turn.
    """
    if runs < 1:
        raise UserError(f"--runs must be 1 or more, not {runs}")
    home.mkdir(parents=True, exist_ok=True)
    if running := _recorded(home):
        raise UserError(f"already running ({', '.join(running)}); stop it with `make stop`")
    os.environ |= {
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        # A run that waits for its turn is not late; and to mark several at the same moment can leave SQLite locked for
        # minutes.
        "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "DO_NOT_TRACK": "1",
    }
    for number in SIGNALS:  # SIGINT too: started with `&` we would ignore it, and so would the worker, which ends by it
        signal.signal(number, _interrupt)
    _record(home, "serve", os.getpid())
    parts: list[subprocess.Popen[bytes]] = []
    try:
        parts.append(_start(home, "server", "server", "start", "--host", "127.0.0.1", "--port", str(port)))
        _wait_until_healthy(parts[0], port)
        _prefect("work-pool", "create", POOL, "--type", "process", "--overwrite")
        worker = ("worker", "start", "--pool", POOL, "--type", "process", "--limit", str(runs))
        parts.append(_start(home, "worker", *worker))
        _prefect("deploy", "--all", "--no-prompt")
        print(f"serving at http://127.0.0.1:{port}; stop with Ctrl-C or `make stop`", flush=True)
        while all(part.poll() is None for part in parts):
            time.sleep(0.5)
        print("serve: a part of it ended by itself; stopping the rest", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second one must not leave half of it running
        _end([psutil.Process(part.pid) for part in reversed(parts) if psutil.pid_exists(part.pid)])
        for file in home.glob("*.pid"):
            file.unlink(missing_ok=True)


def stop(home: Path) -> int:
    """End what `serve` started, also when `serve` itself was killed."""
    running = _recorded(home)
    if "serve" in running:  # it ends its parts itself
        running["serve"].terminate()
        _wait([running["serve"]], 4 * PATIENCE)
    _end(running.values())
    for file in home.glob("*.pid"):
        file.unlink(missing_ok=True)
    print(f"stopped {len(running)} process{'es' * (len(running) != 1)}" if running else "nothing is running")
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _prefect(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "prefect", *words], check=True, stdin=subprocess.DEVNULL)


def _start(home: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    """A part in a session of its own, so that Ctrl-C reaches it through us and in order."""
    command = [sys.executable, "-m", "prefect", *words]
    part = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    _record(home, name, part.pid)
    return part


def _wait_until_healthy(server: subprocess.Popen[bytes], port: int, patience: float = 120) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(
                f"the server did not start; is port {port} taken? Pass another: make serve PREFECT_PORT=4201"
            )
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise UserError(f"the server does not answer on port {port} after {patience:.0f} s")


def _record(home: Path, name: str, pid: int) -> None:
    """A pid alone may have a new owner by the time it is read; with its start time it is certain."""
    (home / f"{name}.pid").write_text(f"{pid} {psutil.Process(pid).create_time()}\n")


def _recorded(home: Path) -> dict[str, psutil.Process]:
    """The recorded processes that still run: serve, then worker, then server."""
    found: dict[str, psutil.Process] = {}
    for name in ("serve", "worker", "server"):
        try:
            pid, started = (home / f"{name}.pid").read_text().split()
            process = psutil.Process(int(pid))
            if process.create_time() == float(started) and _alive(process):
                found[name] = process
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
            continue
    return found


def _end(processes: Iterable[psutil.Process]) -> None:
    """Ask each to end, one after the other, and see to it that it and all it started are gone.

    The worker's flow runs live in sessions of their own, and outlive a worker that is killed: so the whole tree counts.
    """
    for process in processes:
        try:
            tree = [process, *process.children(recursive=True)]
            process.terminate()  # a zombie does not mind
        except psutil.NoSuchProcess:
            continue
        _wait([process], PATIENCE)
        for survivor in _wait(tree, 0.5):
            survivor.kill()
        _wait(tree, PATIENCE)


def _wait(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run after so many seconds, or none of them as soon as all have ended."""
    deadline = time.monotonic() + seconds
    while (alive := [process for process in processes if _alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


def _alive(process: psutil.Process) -> bool:
    """An ended process that its parent has not asked about yet (a zombie) is not alive, though it still has its pid."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    sys.exit(main())
