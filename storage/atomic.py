"""A file or folder is either not there or whole: it is written beside its place and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ASIDE = ".aside"  # the end of a hidden name that nobody uses, until `zs-seg gc` or a person deletes it
_SUFFIX = ".writing"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a free path beside `path` to write a file or folder to; on success it replaces `path`, else it is deleted.

    A file is replaced in one rename. A folder that is already there is removed first.
    """
    temporary = path.with_name(f".{path.name}{_SUFFIX}")
    delete(temporary)
    try:
        yield temporary
        if temporary.is_dir():
            delete(path)
        else:
            fsync(temporary)
        os.replace(temporary, path)
    finally:
        delete(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file, or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def clean(folder: Path) -> None:
    """Remove what killed writers left behind in `folder`, at any depth."""
    for pattern in (f".*{_SUFFIX}", ".tmp??????"):  # the second kind is safetensors'
        for leftover in sorted(folder.rglob(pattern)):
            delete(leftover)


def delete(path: Path) -> None:
    """Remove a file or a whole folder; nothing happens when there is none, or another process deletes it meanwhile."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=_unless_gone)
    else:
        path.unlink(missing_ok=True)


def _unless_gone(_function: Any, _path: Any, caught: Any) -> None:
    if not isinstance(caught[1], FileNotFoundError):
        raise caught[1]


def fsync(path: Path) -> None:
    """Flush a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
