"""One writer at a time where the system has no locks: a small file that its owner renews, and that dies with it.

Whoever creates the file has the lease, and writes it anew every `BEAT` seconds. One that did not change while another
process watched it for `DEAD` seconds belongs to a process that died, or that cannot be reached; the other takes it over.
No clocks are compared. An owner that was only suspended finds at its next beat that the lease is lost.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol, Self

from storage.errors import UserError

log = logging.getLogger(__name__)

BEAT = 5.0
DEAD = 30.0
SETTLE = 2.0  # seconds after which what two processes wrote at once has come to rest


class Place(Protocol):
    """Where a lease lies: a file or an object. Each operation is done as a whole or not at all."""

    def create(self, data: bytes) -> bool:
        """False where there is something already."""
        ...

    def read(self) -> bytes | None: ...

    def write(self, data: bytes) -> None: ...

    def delete(self) -> None: ...


def owner_now() -> dict[str, Any]:
    """Who takes a lock, for people to read."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%FT%T%z")}


def holder(owner: Mapping[str, Any]) -> str:
    """ "process 12 on host since ..."."""
    known = {"pid", "host", "since"} <= owner.keys()
    return f"process {owner['pid']} on {owner['host']} since {owner['since']}" if known else "another process"


def parse(data: bytes | None) -> dict[str, Any]:
    """What stands in a lock's file; {} where that cannot be read."""
    try:
        found = json.loads(data or b"")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def alive(data: bytes | None, written: float = 0.0) -> bool:
    """Whether a lease was renewed of late, by the clocks of its owner and of this machine, which may differ by half a
    minute. For one that is still empty the time counts at which its file was `written`."""
    when = written if data == b"" else parse(data).get("time", 0)
    return isinstance(when, float) and time.time() - when < 2 * DEAD


class Lease:
    """The lease at a place, as a context manager; `what` names it in the log, `note` stands in it beside its owner.

    With `wait` false, entering raises BlockingIOError while it is `alive`.
    """

    def __init__(self, place: Place, *, what: str, note: Mapping[str, Any] | None = None, wait: bool = True) -> None:
        self.place, self.what, self.wait = place, what, wait
        self._text: dict[str, Any] = {"token": secrets.token_hex(8), "beat": 0, **(note or {})}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._lost = False

    def __enter__(self) -> Self:
        self._text |= owner_now()
        seen, since = None, time.monotonic()
        while not self.place.create(self._data()):
            if (data := self.place.read()) is None:
                continue
            if not self.wait and alive(data):
                raise BlockingIOError(f"{self.what} is held by {holder(parse(data))}")
            if data != seen:
                if seen is None:
                    log.info("waiting for %s, held by %s", self.what, holder(parse(data)))
                seen, since = data, time.monotonic()
            elif time.monotonic() - since > DEAD:
                log.warning("%s: no sign of life for %.0f s; taking it over", holder(parse(data)), DEAD)
                self.place.write(self._data())
                time.sleep(SETTLE)
                if self._ours():
                    break
            time.sleep(BEAT / 10)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        # A renewal under way would put back what is deleted here, or the next owner's.
        self._thread.join()
        if not self._lost and self._ours():
            self.place.delete()

    def require(self) -> None:
        """Raises UserError where another process has taken the lease over."""
        if self._lost or not self._ours():
            self._lost = True
            raise UserError(
                f"this process stood still for more than {DEAD:.0f} s and another one took over {self.what}; run again"
            )

    def _ours(self) -> bool:
        return parse(self.place.read()).get("token") == self._text["token"]

    def _data(self) -> bytes:
        return json.dumps({**self._text, "time": time.time()}).encode()

    def _renew(self) -> None:
        while not self._end.wait(BEAT):
            try:
                if not self._ours():
                    self._lost = True
                    return
                self._text["beat"] += 1
                self.place.write(self._data())
            except Exception as error:
                # the next beat may come through; if none does, another process takes over and `require` notices
                log.warning("%s: cannot be renewed (%s)", self.what, error)
