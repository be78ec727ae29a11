"""Processes of tests: forked from one that has imported torch and open_clip, in some 0.02 s where a new one needs
seconds.

A child's environment, folder, signals and exit are those of a new process; what it does not show is what a program does
before torch is imported. It ends as any process does, and may be killed.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fork_server import NUMBER

TESTS = Path(__file__).parents[1]
PATH = os.pathsep.join(map(str, (TESTS.parent, TESTS / "helpers", TESTS / "faults")))
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATH}  # of processes that import helpers
SOCKET = "ZS_SEG_TESTS_FORK_SERVER"  # where the server that this run of the tests shares listens


def start_server() -> None:
    """Start the server, which imports in the background and ends with this process; `SOCKET` tells it to our
    children.
    """
    folder = tempfile.TemporaryDirectory(prefix="zs-seg-")
    path = Path(folder.name) / "socket"
    environment = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, TESTS / "helpers" / "fork_server.py", path],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, env=environment,
    )  # fmt: skip
    while not path.exists():
        assert server.poll() is None, "the fork server did not start"
        time.sleep(0.01)
    os.environ[SOCKET] = str(path)

    @atexit.register
    def stop() -> None:
        assert server.stdin
        server.stdin.close()
        server.wait(20)
        folder.cleanup()


class Child:
    """A running child, much as subprocess.Popen shows one; what it prints goes into files, so that it never waits for
    us.
    """

    def __init__(
        self,
        target: str,
        *words: Any,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        session: bool = False,
    ) -> None:
        if SOCKET not in os.environ:
            start_server()
        request = {
            "target": target, "words": words, "environment": {**os.environ, **(env or {})}, "folder": str(cwd or Path.cwd()),
            "session": session,
        }  # fmt: skip
        self._out, self._err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(os.environ[SOCKET])
        with open(os.devnull) as nothing, tempfile.TemporaryFile("w+") as file:
            json.dump(request, file)
            file.flush()
            files = [nothing.fileno(), self._out.fileno(), self._err.fileno(), file.fileno()]
            socket.send_fds(self._connection, [b"."], files)
        pid = self._receive(60)
        assert pid, "the fork server did not answer"
        self.pid = pid
        self.returncode: int | None = None

    def _receive(self, timeout: float) -> int | None:
        """The server's next number, or None when there is none yet."""
        if not select.select([self._connection], [], [], timeout)[0]:
            return None
        data = self._connection.recv(NUMBER.size)
        assert data, "the fork server has ended"
        return NUMBER.unpack(data)[0]

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return _read(self._out)

    @property
    def err(self) -> str:
        return _read(self._err)

    def poll(self) -> int | None:
        """Its exit status, negative for a signal, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._receive(0)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """Wait for its end; one that takes longer is killed, and the test has failed."""
        if self.returncode is None:
            self.returncode = self._receive(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s: {self.out[-2000:]}{self.err[-2000:]}")
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.send_signal(signal.SIGKILL)
        self.wait(20)

    def until(self, condition: Callable[[], object], timeout: float = 120) -> None:
        """Wait for something that it does; it may not end before."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.poll() is None, f"it ended with {self.returncode}: {self.out[-2000:]}{self.err[-2000:]}"
            assert time.monotonic() < end, f"waited in vain: {self.out[-2000:]}{self.err[-2000:]}"
            time.sleep(0.005)


def _read(file: Any) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def command(function: Callable[..., object], *words: str | Path) -> list[str]:
    """The words that call a function of a light module in a new interpreter, which takes no longer than a fork
    there.
    """
    module, name = function.__module__, function.__qualname__
    return [sys.executable, "-c", f"import sys; from {module} import {name}; {name}(*sys.argv[1:])", *map(str, words)]


def start(function: Callable[..., object], *words: Any, **options: Any) -> Child:
    """A child that calls a function of a module that imports little (it is imported here, too); words are JSON or
    paths.
    """
    return Child(f"{function.__module__}:{function.__qualname__}", *_plain(words), **options)


def zs_seg(*words: str | Path, **options: Any) -> Child:
    """A child that runs `zs-seg WORDS`."""
    return Child("flows.cli", *_plain(words), **options)


def _plain(words: tuple[Any, ...]) -> list[Any]:
    return [str(word) if isinstance(word, Path) else word for word in words]
