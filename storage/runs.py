"""Named runs: which artefacts a line of stages consists of, noted in the store before any of them is built.

`<root>/runs/NAME.json` lists the lines that ran under a name, the last one last. A run under way is marked by a locked
file of its own beside it; the lock ends with the run's process.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from storage.atomic import write_text
from storage.errors import UserError
from storage.keys import Ref
from storage.lock import Lock
from storage.provenance import user_name
from storage.store import Store

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One line of stages that ran, or runs, under a name.

    `refs` gives each stage's artefact; `command` is the command line that builds them; `user` and `date` (ISO 8601) say
    who ran it last, and when.
    """

    name: str
    command: str
    refs: Mapping[str, Ref]
    user: str
    date: str

    @classmethod
    def now(cls, *, name: str, command: str, refs: Mapping[str, Ref]) -> RunRecord:
        """Of this user and minute. Raises UserError for a name that is no file name."""
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} cannot name a run; use letters, digits, '.', '-' and '_'")
        return cls(name=name, command=command, refs=refs, user=user_name(os.getuid()), date=time.strftime("%FT%T%z"))

    def plain(self) -> dict[str, Any]:
        """As it stands in a file."""
        return {**asdict(self), "refs": {stage: str(ref) for stage, ref in self.refs.items()}}

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> RunRecord:
        """The inverse of `plain`."""
        words = {name: str(data[name]) for name in ("name", "command", "user", "date")}
        return cls(**words, refs={stage: Ref.parse(ref) for stage, ref in data["refs"].items()})


def dumps(lines: Iterable[RunRecord]) -> str:
    """The text of a run's file."""
    return json.dumps([line.plain() for line in lines], indent=1) + "\n"


def parse(text: bytes) -> list[RunRecord]:
    """The inverse of `dumps`. Raises what `json` and `RunRecord.parse` raise."""
    return [RunRecord.parse(line) for line in json.loads(text)]


def merge(lines: Iterable[RunRecord], others: Iterable[RunRecord]) -> list[RunRecord]:
    """The lines of one name in two places, by date; of those with the same artefacts the last."""
    found: list[RunRecord] = []
    for line in sorted((*lines, *others), key=lambda line: datetime.fromisoformat(line.date)):
        found = [*(old for old in found if old.refs != line.refs), line]
    return found


class Runs:
    """The named runs of a store."""

    def __init__(self, store: Store) -> None:
        self.store, self.folder = store, store.root / "runs"

    def names(self) -> list[str]:
        """Sorted."""
        return sorted(path.stem for path in self.folder.glob("[!.]*.json"))

    def lines(self, name: str) -> list[RunRecord]:
        """The lines that ran under a name, the last one last; [] for no run. Raises UserError for a damaged file."""
        path = self._path(name)
        try:
            return parse(path.read_bytes())
        except FileNotFoundError:
            return []
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged and no list of runs; delete it, and run {name} again") from error

    def under_way(self) -> list[RunRecord]:
        """The lines whose process lives. Exact only inside `exclusive`."""
        alive = [lock for path in self._marks() if (lock := Lock(path, what=path.name)).held()]
        return [RunRecord.parse(owner["line"]) for lock in alive if "line" in (owner := lock.owner())]

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Inside, no run begins and no other process changes the list of runs."""
        with self.store.mistakes_as_user_errors("runs"):
            self.folder.mkdir(parents=True, exist_ok=True)
            with Lock(self.folder / ".lock", what=f"the list of runs in {self.folder}"):
                yield

    @contextmanager
    def running(self, line: RunRecord) -> Iterator[None]:
        """Record the line; inside, it is under way. A store that this user may only read stays as it is: a warning."""
        with ExitStack() as stack:
            try:
                with self.exclusive():
                    mark = self.folder / f".{line.name}.{secrets.token_hex(4)}.running"
                    stack.enter_context(Lock(mark, what=line.name, note={"line": line.plain()}))
                    earlier = [old for old in self.lines(line.name) if old.refs != line.refs]
                    self._write(line.name, [*earlier, line])
            except UserError as error:
                cause = error.__cause__
                if not isinstance(cause, OSError) or cause.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                log.warning("this run is not noted, so that `zs-seg gc` does not know of it: %s", error)
            yield

    def merge(self, name: str, lines: Sequence[RunRecord]) -> None:
        """Add lines that ran elsewhere under a name, in the order of their dates. Call it inside `exclusive`."""
        before = self.lines(name)
        if (merged := merge(before, lines)) != before:
            self._write(name, merged)

    def forget(self, name: str) -> None:
        """Remove a name and its lines; no artefact is removed. Call it inside `exclusive`."""
        with self.store.mistakes_as_user_errors("runs"):
            self._path(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove the marks of runs that died. Call it inside `exclusive`."""
        for path in self._marks():
            if not Lock(path, what=path.name).held():
                path.unlink(missing_ok=True)

    def _write(self, name: str, lines: list[RunRecord]) -> None:
        write_text(self._path(name), dumps(lines))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _marks(self) -> list[Path]:
        return sorted(self.folder.glob(".*.running"))
