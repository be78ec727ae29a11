"""Looks after a remote: what no run there needs, and whether its files are those of the manifests."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Collection
from pathlib import Path

from storage import collect as local
from storage.atomic import ASIDE
from storage.collect import Survey, Waste
from storage.errors import UserError
from storage.keys import Ref
from storage.remote import Remote
from storage.runs import RunRecord
from storage.store import MANIFEST, PIECES, PUSHING, Manifest, Store
from storage.transfer import BLOCK, NOTE, REMOVING, each


def survey(remote: Remote, *, keep: int = 1, forget: Collection[str] = (), partial_age: float = 7 * 86400) -> Survey:
    """The folders there that no run there reaches, as `collect.survey` for a store. Changes nothing.

    A push under way counts, with what its artefact was made from, until its note is `partial_age` seconds old.

    Raises UserError as `collect.survey`.
    """
    remote.require()
    if store := _store(remote):
        return local.survey(store, keep=keep, forget=forget, partial_age=partial_age)
    names = remote.run_names()
    lines = dict(zip(names, each(remote, remote.lines, names), strict=True))
    if unknown := sorted(set(forget) - lines.keys()):
        raise UserError(f"no run {unknown[0]!r} in {remote}; there are {', '.join(lines) or 'none'}")
    if keep < 1:
        raise UserError(f"keep must be 1 or more lines of every run, not {keep}")
    if not lines:
        raise UserError(f"no run is recorded in {remote}, so everything would go; push the runs that you want to keep")
    last = [line for name, those in lines.items() if name not in forget for line in those[-keep:]]
    # First what is under way: a push that begins later has its run recorded, or is of what nobody names.
    pushes, asides = _hidden(remote)
    refs = remote.refs()
    found = each(remote, lambda ref: _manifest(remote, ref), refs)
    manifests = {ref: manifest for ref, manifest in zip(refs, found, strict=True) if manifest}
    young = {ref: manifest for ref, (age, manifest) in pushes.items() if age <= partial_age}
    reached = _reach(
        [ref for line in last for ref in line.refs.values()] + list(young),
        manifests | {r: m for r, m in young.items() if m},
    )
    waste = [
        Waste(
            path=Path(str(ref)),
            ref=ref,
            name=str(ref),
            bytes=manifest.bytes,
            reason=_earlier(ref, lines, manifests) or "no run reaches it",
        )
        for ref, manifest in manifests.items()
        if ref not in reached
    ]
    broken = [ref for ref in refs if ref not in manifests and ref not in pushes and ref not in reached]
    waste += [_folder(remote, str(ref), ref, "has no manifest that can be used") for ref in broken]
    old = {ref: age for ref, (age, _) in pushes.items() if age > partial_age}
    # A push that has met a damaged manifest leaves its note, too.
    waste += _cut_off(remote, old, [ref for ref in old if ref in manifests or remote.has_manifest(ref)])
    # A folder that a killed removal has emptied has the age of its own.
    aged = [(path, min(remote.age(f"{path}/{name}") for name in remote.sizes(path) or [""])) for path in asides]
    waste += [
        _folder(remote, path, None, f"untouched for {age / 86400:.0f} days") for path, age in aged if age > partial_age
    ]
    kept = [ref for ref in refs if ref in reached and ref in manifests]
    size = sum(manifests[ref].bytes for ref in kept)
    return Survey(waste=waste, kept=kept, kept_bytes=size, locked=sorted(young, key=str))


def collect(remote: Remote, *, keep: int = 1, forget: Collection[str] = (), partial_age: float = 7 * 86400) -> Survey:
    """Remove what `survey` finds; returns what went. No run is recorded there between survey and removal.

    Of an artefact the manifest goes first: a reader finds all of it, or nothing, or a file is missing, which it reports.
    One whose push has begun since stays.

    Raises UserError as `survey`, and when the remote cannot be written.
    """
    if store := _store(remote):
        return local.collect(store, keep=keep, forget=forget, partial_age=partial_age)
    gone = []
    with remote.exclusive():
        found = survey(remote, keep=keep, forget=forget, partial_age=partial_age)
        for name in forget:
            remote.delete(f"runs/{name}.json")
        for one in found.waste:
            if one.ref is None:
                remote.delete(str(one.path))
            elif not _remove(remote, one.ref, partial_age):
                continue
            gone.append(one)
    return Survey(waste=gone, kept=found.kept, kept_bytes=found.kept_bytes, locked=found.locked)


def _remove(remote: Remote, ref: Ref, partial_age: float) -> bool:
    """Whether the artefact went. Its note is ours meanwhile, so that no push of it begins."""
    hidden = f"{ref.kind}/.{ref.key}{PUSHING}"
    note = f"{hidden}/{NOTE}"
    remote.make_folder(hidden)
    if not remote.create(note, REMOVING):
        if remote.read(note) != REMOVING and remote.age(note) <= partial_age:
            return False
        remote.write(note, REMOVING)
    remote.delete(f"{ref}/{MANIFEST}")
    remote.delete(str(ref))
    remote.delete(hidden)
    return True


def _store(remote: Remote) -> Store | None:
    """The store that a remote in a folder is: its locks and builds count, too."""
    return Store(Path(remote.url.removeprefix("file://"))) if remote.protocol == "file" else None


def _manifest(remote: Remote, ref: Ref) -> Manifest | None:
    """None for a damaged one, too. Raises UserError as `Remote.read`."""
    text = remote.read(f"{ref}/{MANIFEST}")
    try:
        return remote.parsed(text, ref) if text is not None else None
    except UserError:
        return None


def _hidden(remote: Remote) -> tuple[dict[Ref, tuple[float, Manifest | None]], list[str]]:
    """Pushes under way or cut off, by what they send, each with its age in seconds; and what was set aside, or
    left by workers."""
    pushes: dict[Ref, tuple[float, Manifest | None]] = {}
    asides = []
    for kind in remote.kinds():
        for name in remote.names(kind):
            if name.startswith(".") and name.endswith(PUSHING):
                ref = Ref(kind=kind, key=name[1 : -len(PUSHING)])
                note = f"{kind}/{name}/{NOTE}"
                text = remote.read(note)
                try:
                    manifest = remote.parsed(text, ref) if text else None
                except UserError:
                    manifest = None
                pushes[ref] = (remote.age(note), manifest)
            elif name.startswith(".") and name.endswith((ASIDE, PIECES)):
                asides.append(f"{kind}/{name}")
    return pushes, asides


def _cut_off(remote: Remote, ages: dict[Ref, float], complete: Collection[Ref]) -> list[Waste]:
    """What pushes left that began so many seconds ago: the files sent so far, or of a complete artefact only the note."""
    return [
        _folder(remote, f"{ref.kind}/.{ref.key}{PUSHING}", None, "what a push left behind")
        if ref in complete
        else _folder(remote, str(ref), ref, f"a push that was cut off {age / 86400:.0f} days ago")
        for ref, age in ages.items()
    ]


def _reach(roots: Collection[Ref], manifests: dict[Ref, Manifest]) -> set[Ref]:
    found, waiting = set[Ref](), list(roots)
    while waiting:
        if (ref := waiting.pop()) not in found:
            found.add(ref)
            if ref in manifests:
                waiting += [Ref.parse(source) for source in manifests[ref].inputs.values()]
    return found


def _earlier(ref: Ref, lines: dict[str, list[RunRecord]], manifests: dict[Ref, Manifest]) -> str:
    """The last line of a run that reaches it, as text."""
    every = sorted((line for those in lines.values() for line in those), key=lambda line: line.date, reverse=True)
    for line in every:
        if ref in _reach(list(line.refs.values()), manifests):
            return f"of an earlier run {line.name} ({line.user}, {line.date[:16]})"
    return ""


def _folder(remote: Remote, path: str, ref: Ref | None, reason: str) -> Waste:
    size = sum(remote.sizes(path).values())
    return Waste(path=Path(path), ref=ref, name=path, bytes=size, reason=reason)


# ----------------------------------------------------------------------------------------------------------- verify


def verify(remote: Remote, ref: Ref, *, files: Collection[str] | None = None) -> list[str]:
    """Compare an artefact there with its manifest: which of its files are there, their sizes, and every byte of those in
    `files` (None = of all). One line a problem, [] = intact.

    Raises UserError as `Remote.read`.
    """
    if (text := remote.read(f"{ref}/{MANIFEST}")) is None:
        return [f"it has no {MANIFEST}"]
    try:
        manifest = remote.parsed(text, ref)
    except UserError as error:
        return [str(error)]
    sizes, problems = remote.sizes(str(ref)), {}
    for name, entry in manifest.files.items():
        if name not in sizes:
            problems[name] = "is missing"
        elif sizes[name] != entry["bytes"]:
            problems[name] = f"has {sizes[name]} bytes instead of {entry['bytes']}"
    due = [name for name in manifest.files if name not in problems and (files is None or name in files)]
    hashes = each(remote, lambda name: _sha256(remote, f"{ref}/{name}", sizes[name]), due)
    for name, sha256 in zip(due, hashes, strict=True):
        if sha256 != manifest.files[name]["sha256"]:
            problems[name] = "has changed (sha256 differs)"
    return [f"{name} {problem}" for name, problem in problems.items()]


def _sha256(remote: Remote, path: str, size: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, size, BLOCK):
        digest.update(remote.read(path, start, min(start + BLOCK, size)) or b"")
    return digest.hexdigest()


def draw(remote: Remote, refs: Collection[Ref], number: int, seed: int) -> tuple[dict[Ref, list[str]], int]:
    """So many files of all, drawn from a seed, by artefact; and how many files there are."""
    found = each(remote, lambda ref: _manifest(remote, ref), refs)
    files = [(manifest.ref, name) for manifest in found if manifest for name in manifest.files]
    drawn: dict[Ref, list[str]] = {}
    for ref, name in random.Random(seed).sample(files, min(number, len(files))):
        drawn.setdefault(ref, []).append(name)
    return drawn, len(files)


def set_aside(remote: Remote, ref: Ref) -> str:
    """Rename the manifest of a damaged artefact: from then on it is not there, and the next push sends it anew. The new
    name."""
    name = f"{ref}/{MANIFEST}{ASIDE}.{time.strftime('%Y%m%dT%H%M%S')}"
    remote.rename(f"{ref}/{MANIFEST}", name)
    return name
