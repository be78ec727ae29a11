"""One writer at a time: a file lock that the system drops when its owner dies, so none is ever stale.

Where the store's file system has no locks, or locks that other machines do not see, a lease takes their place
(`storage/lease.py`). Which of the two is the store's matter: whoever first finds that its locks do not hold leaves the
file `LEASES` in it, and everybody goes by that.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Self

from storage.atomic import ASIDE
from storage.lease import Lease, alive, holder, owner_now, parse

log = logging.getLogger(__name__)

LEASES = ".leases"
# What flock answers where there are no locks: an NFS without its lock service, Lustre without -o flock, FUSE.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# Type of a file system -> the option under which its locks stay on one machine; "" = always.
ONE_MACHINE = {
    "nfs": r"nolock|local_lock=(flock|all)",
    "nfs4": r"nolock|local_lock=(flock|all)",
    "lustre": "localflock",
    "cifs": "nobrl",
    "fuse.sshfs": "",
}


class Lock:
    """An exclusive lock on the file `path`, as a context manager; `what` names it in the log.

    The file holds its owner as JSON, for people to read: host, pid, since when, and `note`. The lock itself is the
    system's (flock), or a lease. With `wait` false, entering raises BlockingIOError while another process holds it.

    `path` lies in a folder of the store.
    """

    def __init__(self, path: Path, *, what: str, note: Mapping[str, Any] | None = None, wait: bool = True) -> None:
        self.path, self.what, self.note, self.wait = path, what, note or {}, wait
        self._descriptor = -1
        self._lease: Lease | None = None

    def held(self) -> bool:
        """Whether a process holds it now. Of a lease: whether it was renewed of late, by the clocks of both."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            if _leased(self.path.parents[1]):
                return alive(_File(self.path).read(), os.fstat(descriptor).st_mtime)
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def owner(self) -> dict[str, Any]:
        """The file's JSON on the process that holds it, or died holding it; {} when the file is empty or missing."""
        return parse(_File(self.path).read())  # its owner may have just begun, or just finished

    def holder(self) -> str:
        """ "process 12 on host since ...", the process that holds it."""
        return holder(self.owner())

    def require(self) -> None:
        """Inside, before something becomes visible: raises UserError where another process has the lease meanwhile."""
        if self._lease:
            self._lease.require()

    def __enter__(self) -> Self:
        """Take the lock; waiting for it is logged."""
        if _leased(self.path.parents[1]):
            self._lease = Lease(_File(self.path), what=self.what, note=self.note, wait=self.wait)
            self._lease.__enter__()
            return self
        logged = False
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)  # less the umask
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not self.wait:
                        raise
                    if not logged:
                        log.info("waiting for %s, held by %s", self.what, self.holder())
                        logged = True
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                if self._is_current(descriptor):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps({**owner_now(), **self.note}).encode(), 0)
                    self._descriptor = descriptor
                    return self
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its owner removed the file while we waited: begin again with the new one

    def __exit__(self, *_: object) -> None:
        if self._lease:
            self._lease.__exit__()
            return
        self.path.unlink(missing_ok=True)
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # closing is not enough while a forked worker still has it open
        os.close(self._descriptor)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False


class _File:
    """A file of the store, for a lease."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, data: bytes) -> bool:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
        except BaseException:
            self.delete()
            raise
        return True

    def read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, data: bytes) -> None:
        temporary = self.path.with_name(f".{secrets.token_hex(8)}{ASIDE}")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


def _leased(root: Path) -> bool:
    """Whether the locks of this store are leases."""
    if (root / LEASES).exists():
        return True
    if not (reason := _unfit(root)):
        return False
    log.warning(
        "store %s lies on a file system without working locks (%s): leases are used, files that their owner renews. After a "
        "killed process the next one waits for half a minute",
        root,
        reason,
    )
    # Who may only read finds the same again.
    with suppress(OSError):
        (root / LEASES).write_text("Locks do not hold here; delete this file when they do, and nothing runs.\n")
    return True


@cache
def _unfit(root: Path) -> str:
    """Why locks do not hold in this store, "" = they do. Tried out on a file of its own, where one can be written."""
    with suppress(OSError):
        if reason := one_machine(Path("/proc/self/mountinfo").read_text(), os.path.realpath(root)):
            return reason
    path = root / f".probe.{secrets.token_hex(4)}"
    try:
        one = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except OSError:  # whatever is to be locked here will fail with the same
        return ""
    two = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "two have the same lock at once"
    except BlockingIOError:
        return ""
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return error.strerror or str(error)
    finally:
        path.unlink()
        os.close(one)
        os.close(two)


def one_machine(mounts: str, path: str) -> str:
    """Why other machines do not see the locks at this path, by the text of /proc/self/mountinfo; "" = nothing known."""
    found, longest = "", -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        place = before.split()[4].replace("\\040", " ") if len(before.split()) > 5 else ""
        inside = place and (path == place or path.startswith(place.rstrip("/") + "/"))
        if inside and len(place) >= longest:
            kind, options = after.split()[0], f"{before.split()[5]},{after.split()[-1]}"
            option = re.search(rf"(^|,)({ONE_MACHINE[kind]})(,|$)", options) if ONE_MACHINE.get(kind) else None
            longest, found = len(place), f"{kind} {option[2]}" if option else kind * (ONE_MACHINE.get(kind) == "")
    return found and f"{found}: its locks stay on this machine"
