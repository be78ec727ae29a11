"""Finds artefacts of a store that no run needs, and removes them while other processes read and build."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from storage.atomic import ASIDE, delete
from storage.errors import UserError
from storage.keys import KEY_LENGTH, Ref
from storage.lineage import Lineage
from storage.runs import RunRecord, Runs
from storage.store import MANIFEST, PIECES, PULLING, PUSHING, REMOVED, UNPARSABLE, Manifest, Store
from storage.transfer import NOTE


@dataclass(frozen=True, kw_only=True)
class Waste:
    """A folder to remove: `name` to print, its size in `bytes`, and the reason. `ref`: its artefact, None for what an
    earlier removal left."""

    path: Path
    ref: Ref | None
    name: str
    bytes: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Survey:
    """`waste`; `kept`: the artefacts that stay; `kept_bytes`: their size; `locked`: those being built, left alone."""

    waste: list[Waste]
    kept: list[Ref]
    kept_bytes: int
    locked: list[Ref]

    @property
    def bytes(self) -> int:
        """What removal frees."""
        return sum(one.bytes for one in self.waste)


def survey(store: Store, *, keep: int = 1, forget: Collection[str] = (), partial_age: float = 7 * 86400) -> Survey:
    """The folders that no named run reaches. Changes nothing.

    Of every name the last `keep` lines count, names in `forget` do not; runs under way and builds under way always do.
    What a killed build left goes when nothing in it was written for `partial_age` seconds; if a named run needs it,
    never. What was set aside goes after that time in any case.

    Raises UserError when no run is recorded, when a name to forget is not, or when a record is damaged.
    """
    if keep < 1:
        raise UserError(f"keep must be 1 or more lines of every run, not {keep}")
    runs, lineage, locked = Runs(store), Lineage(store), store.locked()
    lines = {name: runs.lines(name) for name in runs.names()}
    if unknown := sorted(set(forget) - lines.keys()):
        raise UserError(f"no run {unknown[0]!r} in {store.root}; there are {', '.join(lines) or 'none'}")
    under_way = runs.under_way()
    if not lines and not under_way:
        raise UserError(
            f"no run is recorded in {store.root}, so everything would go; `zs-seg run` again what you want to keep ("
            "what is complete is not built again), then try again"
        )
    last = [line for name, those in lines.items() if name not in forget for line in those[-keep:]]
    roots = [ref for line in (*last, *under_way) for ref in line.refs.values()]
    read = [*(source for sources in locked.values() for source in sources), *_pushed(store, partial_age)]
    reached = lineage.reach([*roots, *locked, *read])
    complete, waste = store.refs(), []
    reasons = _earlier(lineage, [line for those in lines.values() for line in those])
    for ref in complete:
        if ref not in reached:
            node, path, reason = lineage.node(ref), store.path(ref), reasons.get(ref, "no run reaches it")
            size = node.bytes if node else _size(path)
            waste.append(Waste(path=path, ref=ref, name=str(ref), bytes=size, reason=reason))
    waste += _broken(store, reached | set(complete))
    waste += _partials(store, reached, partial_age)
    waste += _asides(store, partial_age)
    for path in sorted(store.root.glob(f"*/.*{REMOVED}")):
        waste.append(
            Waste(
                path=path,
                ref=None,
                name=f"{path.parent.name}/{path.name}",
                bytes=_size(path),
                reason="an interrupted removal",
            )
        )
    kept = [ref for ref in complete if ref in reached]
    kept_bytes = sum(node.bytes for ref in kept if (node := lineage.node(ref)))
    return Survey(waste=waste, kept=kept, kept_bytes=kept_bytes, locked=sorted(locked, key=str))


def collect(store: Store, *, keep: int = 1, forget: Collection[str] = (), partial_age: float = 7 * 86400) -> Survey:
    """Remove what `survey` finds; returns what went.

    No run begins between survey and removal. Each folder is renamed under its artefact's lock before it is deleted, so
    that a reader finds all of it or nothing; an artefact whose build has begun since stays.

    Raises UserError as `survey`, and when the store cannot be written.
    """
    runs, gone, aside = Runs(store), [], []
    with runs.exclusive():
        found = survey(store, keep=keep, forget=forget, partial_age=partial_age)
        for name in forget:
            runs.forget(name)
        runs.sweep()
        for one in found.waste:
            try:
                aside += store.set_aside(one.ref, one.path, suffix=REMOVED) if one.ref else [one.path]
                gone.append(one)
            except BlockingIOError:  # its build has begun since
                continue
    with store.mistakes_as_user_errors("gc"):
        for path in aside:
            delete(path)
    return Survey(waste=gone, kept=found.kept, kept_bytes=found.kept_bytes, locked=found.locked)


def _earlier(lineage: Lineage, lines: Iterable[RunRecord]) -> dict[Ref, str]:
    """Artefacts that recorded lines reach -> which line, as text; the latest where there are several."""
    found: dict[Ref, str] = {}
    for line in sorted(lines, key=lambda line: line.date, reverse=True):
        for ref in lineage.reach(line.refs.values()):
            found.setdefault(ref, f"of an earlier run {line.name} ({line.user}, {line.date[:16]})")
    return found


def _broken(store: Store, known: Collection[Ref]) -> list[Waste]:
    """Folders in an artefact's place that have no manifest; nothing opens them."""
    refs = [Ref(kind=path.parent.name, key=path.name) for path in store.root.glob(f"*/{'[0-9a-f]' * KEY_LENGTH}")]
    return [
        Waste(path=store.path(ref), ref=ref, name=str(ref), bytes=_size(store.path(ref)), reason="has no manifest")
        for ref in refs
        if ref not in known and not (store.path(ref) / MANIFEST).is_file()
    ]


def _pushed(store: Store, age: float) -> list[Ref]:
    """What the artefacts were made from that others send here now, or began to send of late."""
    found = []
    for note in store.root.glob(f"*/.{'[0-9a-f]' * KEY_LENGTH}{PUSHING}/{NOTE}"):
        with suppress(OSError, *UNPARSABLE):
            ref = Ref(kind=note.parts[-3], key=note.parts[-2][1 : KEY_LENGTH + 1])
            if _idle(note.parent) <= age:
                found += [Ref.parse(source) for source in Manifest.parse(note.read_bytes(), ref).inputs.values()]
    return found


def _partials(store: Store, reached: Collection[Ref], age: float) -> list[Waste]:
    """What killed builds, pulls and pushes left long ago. Their age is that of the last write."""
    found = []
    names = (f"*/.{'[0-9a-f]' * KEY_LENGTH}{end}" for end in (".partial", PULLING, PUSHING, PIECES))
    for path in sorted(path for name in names for path in store.root.glob(name)):
        ref = Ref(kind=path.parent.name, key=path.name[1 : KEY_LENGTH + 1])
        if ref not in reached and (idle := _idle(path)) > age:
            reason = f"cut off, untouched for {idle / 86400:.0f} days"
            found.append(Waste(path=path, ref=ref, name=f"{ref} (partial)", bytes=_size(path), reason=reason))
    return found


def _asides(store: Store, age: float) -> list[Waste]:
    """What was set aside long ago, and nobody has fetched back."""
    found = []
    for path in sorted(store.root.glob(f"*/.*{ASIDE}")):
        # What a push sends here bears such a name for a moment.
        with suppress(FileNotFoundError):
            # its own st_ctime is that of the rename, when what is in it may have been old
            if (idle := _idle(path, path.stat().st_ctime)) > age:
                name, reason = f"{path.parent.name}/{path.name}", f"set aside, untouched for {idle / 86400:.0f} days"
                found.append(Waste(path=path, ref=None, name=name, bytes=_size(path), reason=reason))
    return found


def _idle(folder: Path, *times: float) -> float:
    """Seconds since the last write in it, or since the last of `times`."""
    return time.time() - max((*times, *(stat.st_mtime for stat in _stats(folder))), default=time.time())


def _size(folder: Path) -> int:
    return sum(stat.st_size for stat in _stats(folder) if S_ISREG(stat.st_mode))


def _stats(folder: Path) -> Iterator[os.stat_result]:
    """Of the folder and all in it; what is deleted meanwhile is left out."""
    for path, _, names in os.walk(folder):
        for one in (path, *(os.path.join(path, name) for name in names)):
            with suppress(FileNotFoundError):
                yield os.lstat(one)
