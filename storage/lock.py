"""One writer at a time: a file lock that the system drops when its owner dies, so none is ever stale."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from storage.errors import UserError

log = logging.getLogger(__name__)

# What flock answers where there are no locks: an NFS without its lock service, Lustre without -o flock, FUSE.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """An exclusive lock on the file `path`, as a context manager; `what` names it in the log.

    The file holds its owner as JSON, for people to read: host, pid, since when, and `note`. The lock itself is the
    system's (flock). With `wait` false, entering raises BlockingIOError while another process holds it.

    `path` lies in a folder of the store. Entering and `held` raise UserError where the store's file system has no
    working locks.
    """

    def __init__(self, path: Path, *, what: str, note: Mapping[str, Any] | None = None, wait: bool = True) -> None:
        self.path, self.what, self.note, self.wait = path, what, note or {}, wait
        self._descriptor = -1

    def held(self) -> bool:
        """Whether a process holds it now."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            self._flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def owner(self) -> dict[str, Any]:
        """The file's JSON on the process that holds it, or died holding it; {} when the file is empty or missing."""
        try:
            return json.loads(self.path.read_bytes())
        except (OSError, ValueError):  # its owner has just begun, or just finished
            return {}

    def holder(self) -> str:
        """ "process 12 on host since ...", the process that holds it."""
        owner = self.owner()
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}" if owner else "another process"

    def __enter__(self) -> Self:
        """Take the lock; waiting for it is logged."""
        logged = False
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)  # less the umask
            try:
                try:
                    self._flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not self.wait:
                        raise
                    if not logged:
                        log.info("waiting for %s, held by %s", self.what, self.holder())
                        logged = True
                    self._flock(descriptor, fcntl.LOCK_EX)
                if self._is_current(descriptor):
                    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%FT%T%z")}
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps({**owner, **self.note}).encode(), 0)
                    self._descriptor = descriptor
                    return self
            except UserError:
                self.path.unlink(missing_ok=True)  # nobody can hold it
                os.close(descriptor)
                raise
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its owner removed the file while we waited: begin again with the new one

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # closing is not enough while a forked worker still has it open
        os.close(self._descriptor)

    def _flock(self, descriptor: int, operation: int) -> None:
        try:
            fcntl.flock(descriptor, operation)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise UserError(
                f"store {self.path.parents[1]} lies on a file system without working locks ({error.strerror}), and two "
                "runs would write the same files; mount it with locks (Lustre: -o flock, NFS: with its lock service, "
                "no nolock), or pass another --store"
            ) from error

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False
