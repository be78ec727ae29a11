"""`make serve` and `make stop`: a local Prefect server, the deployments of prefect.yaml, and a worker that runs them.

Everything Prefect keeps lies in PREFECT_HOME (./.prefect). Works offline; nothing is reported to anybody. The reports
in ./runs are served beside it, so that Prefect's pages can link to them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import psutil

from flows.pages import HOST, require_port, serve_pages
from flows.tables import print_table
from storage.errors import UserError

POOL = "zs-seg"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 10  # seconds between a polite and a firm end


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description=__doc__)
    parser.add_argument("command", choices=("start", "stop"))
    parser.add_argument("--port", type=int, default=4200)
    parser.add_argument("--reports-port", type=int, default=0, help="of the pages in ./runs; default: the next one")
    parser.add_argument("--runs", type=int, default=1, help="how many runs at a time; the others wait")
    options = parser.parse_args()
    home = Path(os.environ.setdefault("PREFECT_HOME", str(Path(".prefect").absolute())))
    if options.command == "stop":
        return stop(home)
    try:
        return serve(home, options.port, options.runs, reports_port=options.reports_port or options.port + 1)
    except UserError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2


def serve(home: Path, port: int, runs: int, *, reports_port: int) -> int:
    """Start everything, stay until a signal comes or a part dies, then stop everything.

    The worker takes `runs` flow runs at a time, so that no two share a GPU by accident; the others wait for their turn.

    Raises UserError, before anything is started or written, where a port is taken.
    """
    if runs < 1:
        raise UserError(f"--runs must be 1 or more, not {runs}")
    if running := _recorded(home):
        raise UserError(f"already running ({', '.join(running)}); stop it with `make stop`")
    _require_free(port)
    reports = serve_pages(
        Path("runs"), reports_port, cure="nothing was started; pass another: make serve REPORTS_PORT=4301"
    )
    threading.Thread(target=reports.serve_forever, daemon=True).start()
    home.mkdir(parents=True, exist_ok=True)
    api, pages = f"http://{HOST}:{port}/api", f"http://{HOST}:{reports_port}"
    os.environ |= {
        "PREFECT_API_URL": api,
        "ZS_SEG_REPORTS": pages,
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
        parts.append(_start(home, "server", "server", "start", "--host", HOST, "--port", str(port)))
        wait_until_healthy(parts[0], port)
        _prefect("work-pool", "create", POOL, "--type", "process", "--overwrite")
        worker = ("worker", "start", "--pool", POOL, "--type", "process", "--limit", str(runs))
        parts.append(_start(home, "worker", *worker))
        _prefect("deploy", "--all", "--no-prompt")
        print_table(("deployment", ""), _deployments(api))
        print(f"reports at {pages}\nserving at http://{HOST}:{port}; stop with Ctrl-C or `make stop`", flush=True)
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


def _require_free(port: int) -> None:
    """Raises UserError where somebody listens at the port, such as another Prefect server, whose work pools and
    deployments are not ours to change."""
    require_port(port)
    with socket.socket() as probe:
        # as the server does: connections that have just ended do not count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"port {port} cannot be used ({error.strerror}); nothing was started; "
                "pass another: make serve PREFECT_PORT=4300"
            ) from error


def _prefect(*words: str) -> None:
    """Run `prefect WORDS`, which prints only where it fails. Raises UserError there."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *words],
        check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise UserError(f"`prefect {' '.join(words)}` ended with status {done.returncode}; its output is above")


def _deployments(api: str) -> list[tuple[str, str]]:
    """The server's deployments as (FLOW/NAME, description), the oldest first."""
    body = json.dumps({"limit": 200}).encode()
    request = urllib.request.Request(f"{api}/deployments/filter", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = sorted(json.load(answer), key=lambda one: one["created"])
    return [(f"{POOL}/{one['name']}", one["description"] or "") for one in found]


def _start(home: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    """A part in a session of its own, so that Ctrl-C reaches it through us and in order."""
    command = [sys.executable, "-m", "prefect", *words]
    part = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    _record(home, name, part.pid)
    return part


def wait_until_healthy(server: subprocess.Popen[bytes], port: int, patience: float = 120) -> None:
    """Wait until the server, and no other process, answers at the port.

    Raises UserError where the server has ended, or does not answer within `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(
                f"the server did not start; is port {port} taken? Pass another: make serve PREFECT_PORT=4300"
            )
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/api/health", timeout=5):
                if _listens(server.pid, port):
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.3)
    raise UserError(f"the server does not answer on port {port} after {patience:.0f} s")


def _listens(pid: int, port: int) -> bool:
    """Whether the process, or one that it started, listens at the port."""
    try:
        top = psutil.Process(pid)
        sockets = [found for process in (top, *top.children(recursive=True)) for found in process.net_connections()]
    except psutil.NoSuchProcess:
        return False
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in sockets)


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
