"""A stage in a process of its own, so that what ends it (a fault in CUDA, lack of memory) ends nothing else.

`python -m flows.child ARGUMENTS` is that process: `zs-seg ARGUMENTS` that ends when the process that started it does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO

from flows import cli
from storage.errors import UserError

GRACE = 25  # seconds to save a state; Prefect kills a cancelled run's processes after 30
CAUSES = {
    signal.SIGKILL: "killed by somebody, or by the kernel for want of memory",
    signal.SIGSEGV: "a fault in native code, such as a GPU's driver",
    signal.SIGABRT: "native code gave up, such as a CUDA assertion",
    signal.SIGBUS: "memory that is not there, such as a full /dev/shm",
    signal.SIGTERM: "somebody stopped it",
}


class Died(RuntimeError):
    """The process ended by a fault that its user cannot mend; another try may succeed."""


def run(name: str, arguments: Sequence[str], emit: Callable[[str], None]) -> None:
    """Run `zs-seg ARGUMENTS` and pass each line that it prints to `emit`, from another thread.

    `name` stands for the process in error messages. When this call is interrupted, the process is asked to end, and
    killed after `GRACE` seconds; a training stage saves its state in between.

    Raises UserError, with the process's own line, for a mistake of the user's, and `Died` when it failed in any other
    way.
    """
    command = [sys.executable, "-X", "faulthandler", "-m", "flows.child", *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdin and process.stdout
    last: deque[str] = deque(maxlen=1)
    reader = threading.Thread(target=_pass_on, args=(process.stdout, emit, last), daemon=True)
    reader.start()
    try:
        process.wait()
    finally:
        process.stdin.close()  # which asks it to end
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(5)
    if not process.returncode:
        return
    message = last[0] if last else "it printed nothing"
    if process.returncode == 2:
        raise UserError(message.removeprefix("zs-seg: "))
    if process.returncode > 0:
        raise Died(f"the process of {name} ended with status {process.returncode}: {message}")
    number = signal.Signals(-process.returncode)
    cause = f" ({CAUSES[number]})" if number in CAUSES else ""
    raise Died(
        f"the process of {name} was ended by {number.name}{cause}; "
        "what it saved stays, and the next try goes on from there"
    )


def _pass_on(output: IO[str], emit: Callable[[str], None], last: deque[str]) -> None:
    for line in output:  # a progress bar's carriage return ends a line, too
        if line := line.rstrip():
            last.append(line)
            emit(line)


def _end_with_parent() -> None:
    """End this process as SIGTERM does, as soon as the other end of its standard input is closed or gone."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(cli.main())
