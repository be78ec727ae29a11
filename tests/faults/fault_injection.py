"""What can go wrong, done for real: damaged files, processes that are killed, a disk that is full, a clock that goes
back.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flows.cli import _mistake

# ---------------------------------------------------------------------------------------------------------------------
# Files


def flip(file: Path, rng: np.random.Generator) -> str:
    """One bit of the file, anywhere in it; its size and times stay."""
    data, before = bytearray(file.read_bytes()), file.stat()
    at, bit = int(rng.integers(len(data))), int(rng.integers(8))
    data[at] ^= 1 << bit
    replace(file, bytes(data))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return f"bit {bit} of byte {at} of {len(data)}"


def cut(file: Path, rng: np.random.Generator) -> str:
    data = file.read_bytes()
    length = int(rng.integers(len(data)))
    replace(file, data[:length])
    return f"{length} of {len(data)} bytes left"


def lose(file: Path, rng: np.random.Generator) -> str:
    file.unlink()
    return "gone"


def swap(file: Path, rng: np.random.Generator) -> str:
    """Two files of one kind (the name's ending) in the artefact change places: of the same size, where there are
    such.
    """
    folder = next(parent for parent in file.parents if (parent / "manifest.json").exists() or ".partial" in parent.name)
    data = file.read_bytes()
    others = [f for f in files_of(folder) if f.suffix == file.suffix and f.read_bytes() != data]
    others = [f for f in others if f.stat().st_size == len(data)] or others
    if not others:
        replace(file, data[::-1])
        return "its own bytes in reverse"
    other = others[int(rng.integers(len(others)))]
    replace(file, other.read_bytes())
    replace(other, data)
    return f"with {other.relative_to(folder)}"


STRAYS = (".DS_Store", "._index.json", ".index.json.swp", "Thumbs.db", ".nfs000000000034f1", "notes.txt", "index.json~")


def litter(folder: Path, rng: np.random.Generator, *, mode: int = 0o644) -> list[str]:
    """Files that editors, desktops and people leave, somewhere in the folder; also a copy of a file or of a whole group
    beside it. Their paths below the folder."""
    folders = sorted({folder, *(file.parent for file in files_of(folder))})
    left = []
    for name in rng.choice(STRAYS, 2, replace=False):
        left.append(folders[int(rng.integers(len(folders)))] / str(name))
        left[-1].write_bytes(b"stray")
        left[-1].chmod(mode)
    if there := [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]:
        one = there[int(rng.integers(len(there)))]
        copy = one.with_name(f"{one.stem} copy{one.suffix}")
        (shutil.copytree if one.is_dir() else shutil.copy)(one, copy)
        left += files_of(copy) if copy.is_dir() else [copy]
    return [path.relative_to(folder).as_posix() for path in left]


def rename(file: Path, rng: np.random.Generator) -> str:
    """The file gets another name in its folder, as a copying program or a person gives it."""
    names = (f"{file.name} (1)", f"{file.name}.bak", f"Copy of {file.name}", f"{file.stem}-000009{file.suffix}")
    other = names[int(rng.integers(4))]
    os.rename(file, file.with_name(other))
    return f"now {other}"


DAMAGES: dict[str, Callable[[Path, np.random.Generator], str]] = {"flipped": flip, "cut": cut, "missing": lose, "swapped": swap}  # fmt: skip


def replace(file: Path, data: bytes) -> None:
    """New content in a new file: the old one may be a hard link to the undisturbed store's."""
    beside = file.with_name(f"{file.name}.new")
    beside.write_bytes(data)
    os.replace(beside, file)


def files_of(folder: Path) -> list[Path]:
    """Every file that holds something, in order."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)


def link_tree(source: Path, target: Path) -> None:
    """A copy whose files are hard links: nothing here may write into a file, and `replace` does not."""
    shutil.copytree(source, target, copy_function=os.link)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class Ending:
    """How a child ended: "ok", "told" (a mistake of the user's, one line), "bug" (anything else), "killed" or
    "hung".
    """

    kind: str
    text: str = ""
    value: Any = None


class Child:
    """A forked process that calls `work()`. The parent has imported everything and computed nothing, so it starts at
    once.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what it logs
            with os.fdopen(write, "w") as pipe:
                pipe.write(json.dumps(asdict(attempt(work))))
            os._exit(0)
        os.close(write)
        self._read = read
        self.ended = False

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def alive(self) -> bool:
        return not self.ended and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self, seconds: float = 120) -> Ending:
        end = time.monotonic() + seconds
        hung = False
        while self.alive():  # what it says fits into the pipe
            if time.monotonic() > end:
                hung = True
                self.kill()
            time.sleep(0.002)
        with os.fdopen(self._read) as pipe:
            message = pipe.read()
        os.waitpid(self.pid, 0)
        self.ended = True
        if hung:
            return Ending("hung")
        return Ending(**json.loads(message)) if message else Ending("killed")


def attempt(work: Callable[[], Any]) -> Ending:
    """Call it, and say how that ended."""
    try:
        return Ending("ok", value=work())
    except BaseException as error:
        message = _mistake(error) if isinstance(error, Exception) else ""
        if message and "\n" not in message:
            return Ending("message", message)
        return Ending("bug", traceback.format_exc()[-1500:])


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def become(user: int, group: int) -> None:
    """From now on this process is another user's, with the umask that the store's README asks for."""
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)
    os.umask(0o002)


def small_disk(folder: Path) -> Callable[[int], None]:
    """Put a disk of its own (tmpfs) under `folder`, for this process alone; gives what sets its size in bytes.

    Raises OSError where the system does not let users do that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()

    def call(name: str, *arguments: Any) -> None:
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), f"{name} is not allowed")

    call("unshare", 0x10000000 | 0x00020000)  # user and mount namespaces
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    call("mount", b"tmpfs", bytes(folder), b"tmpfs", ctypes.c_ulong(0), b"size=1g")

    def resize(size: int) -> None:
        remount = 32
        call("mount", b"tmpfs", bytes(folder), b"tmpfs", ctypes.c_ulong(remount), f"size={size}".encode())

    return resize


def used(folder: Path) -> int:
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A quota: the system lets no file of this process grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def turn_clock_back(store: Path, rng: np.random.Generator) -> None:
    """From now on this process's clock jumps, mostly back, at every look; and all files there are from tomorrow."""
    real, tomorrow = time.time, time.time() + 86400
    for path in store.rglob("*"):
        os.utime(path, (tomorrow, tomorrow))

    def jumping() -> float:
        return real() - float(rng.uniform(0, 7200))

    time.time = jumping
    time.time_ns = lambda: int(jumping() * 1e9)
