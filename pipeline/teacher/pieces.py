"""What a worker does around the group of one tar: the same job may run twice, even at the same time, on any machine."""

from __future__ import annotations

import ctypes
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

from storage.atomic import delete
from storage.errors import UserError
from storage.inputs import vouch
from storage.through import there


def require_here(*paths: Path) -> None:
    """Raises UserError, with the cure, for a path that a worker does not find."""
    for path in paths:
        if not there(path):
            raise UserError(
                f"a worker on {socket.gethostname()} does not find {path}; pass --store FOLDER with a folder that all "
                "machines share under the same path"
            )


def write_once(group: Path, write: Callable[[Path], object]) -> None:
    """Make the folder `group` by `write(path)`, which writes under a name of its own; the first of several to end
    renames its folder to `group`, and the others delete theirs."""
    own = group.with_name(f".{group.name}.{uuid.uuid4().hex}.writing")
    write(own)
    _return_freed_memory()
    vouch(group.parent)
    try:
        own.rename(group)
    except OSError:
        if not group.exists():
            raise
        delete(own)


def _return_freed_memory() -> None:
    """Make glibc return freed memory to the system, as other C libraries do by themselves.

    Buffers of many sizes fragment its heap, by which a worker grew 5 to 10 MB per tar. Once per tar the call costs next
    to nothing; Dask's setting, which returns memory all the time, is expensive.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
