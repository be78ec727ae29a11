"""The process that `children.py` forks children from: it has imported what takes seconds to import, and computed
nothing.

    python tests/helpers/fork_server.py SOCKET

It serves until its standard input ends. A connection to SOCKET is one child: the client sends the file descriptors of
its standard input, output and error and of a JSON file that says what to run; it gets the child's process id and, when
the child has ended, its exit status, each as a native int. None of the project's modules is imported here, so that a
child imports them as a new process does.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

PRELOAD = (
    "torch", "torch.distributed.run", "torch.utils.tensorboard", "torchvision", "open_clip", "timm", "zarr", "webdataset",
    "distributed", "scipy.optimize", "matplotlib.pyplot", "PIL.Image", "tyro", "rich.table", "tqdm",
)  # fmt: skip
NUMBER = struct.Struct("i")


def serve(path: str) -> dict[str, Any] | None:
    """Fork a child for every connection. Returns in each child what it is to run, and None in the server at its end."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)  # who comes before the imports are done waits here
    for module in PRELOAD:
        importlib.import_module(module)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads; a fork copies one of them, and the locks that the others hold"
    gc.freeze()  # children need not look through it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            Path(path).unlink()
            return None
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return keep(connection)
        connection.close()


def keep(connection: socket.socket) -> dict[str, Any]:
    """Fork the child itself, in which this returns, and stay until it has ended: only its parent learns how."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(connection, 1, 4)
    pid = os.fork()
    if pid:
        for file in files:
            os.close(file)
        connection.sendall(NUMBER.pack(pid))
        _, status = os.waitpid(pid, 0)
        connection.sendall(NUMBER.pack(os.waitstatus_to_exitcode(status)))
        os._exit(0)
    connection.close()
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
        os.close(file)
    with os.fdopen(files[3]) as file:
        file.seek(0)
        return json.load(file)


def run(target: str, words: list[Any], environment: dict[str, str], folder: str, *, session: bool) -> int:
    """Be a new process: call "module:function" with the words, or run "module" as `python -m` does."""
    if session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # OpenMP has read the server's
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    module, _, function = target.partition(":")
    sys.argv[:] = [module, *map(str, words)]
    if function:
        getattr(importlib.import_module(module), function)(*words)
        return 0
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def be(request: dict[str, Any]) -> NoReturn:
    """Run, and end as a process does, but for taking every module down again: with torch's that takes seconds."""
    status: Any = 1
    try:
        status = run(**request)
    except SystemExit as error:
        status = error.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]  # waits for threads
    atexit._run_exitfuncs()  # pyright: ignore[reportAttributeAccessIssue]
    sys.stdout.flush()
    sys.stderr.flush()
    if (status or 0) < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    os._exit(status or 0)


if __name__ == "__main__":
    if request := serve(sys.argv[1]):
        be(request)
    os._exit(0)
