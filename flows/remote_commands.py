"""The commands about remotes: remote, push, pull, status; each returns the exit status."""

from __future__ import annotations

import argparse
import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flows.request import open_store
from flows.tables import print_table, size
from pipeline.runtime import Runtime
from storage import names, remote_care, transfer
from storage.errors import UserError, counted, did_you_mean
from storage.keys import Ref
from storage.remote import Remote, Remotes
from storage.runs import RunRecord, Runs
from storage.store import Manifest, Store

log = logging.getLogger(__name__)


def remote(options: argparse.Namespace) -> int:
    remotes = Remotes(open_store(options))
    if options.action == "add":
        if not options.name or not options.url:
            raise UserError(
                "write `zs-seg remote add NAME ADDRESS`, such as `zs-seg remote add lab s3://bucket/folder`"
            )
        remotes.add(options.name, options.url)
        print(f"{options.name} is {options.url}, noted in {remotes.path}")
    elif options.action == "remove":
        remotes.remove(options.name)
        print(f"{options.name} is forgotten; what lies there stays")
    else:
        known = remotes.all()
        if known:
            print_table(("remote", "address"), list(known.items()))
        print(f"{counted(len(known), 'remote')} in {remotes.path}")
    return 0


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What a command is about: artefacts, and the runs that name them."""

    refs: list[Ref]
    runs: list[str]


def push(options: argparse.Namespace) -> int:
    store, there = _open(options, options.to)
    there.require(make=not options.dry_run)
    wanted = _local(store, options.key)
    if not options.dry_run:  # first, so that a `gc` there keeps what is found complete
        for name in wanted.runs:
            transfer.push_run(store, there, name)
    found = transfer.compare(store, there, wanted.refs)
    for ref in found.other:
        log.warning("%s is in %s with other bytes of the same key; left out", ref, there)
    absent = [*found.nowhere, *(manifest.ref for manifest in found.there)]
    skipped = len(found.same) + len(found.other)
    head = f"{counted(len(found.here), 'artefact')} with {size(_bytes(found.here))}"
    if options.dry_run:
        _print_files(found.here)
        print(f"{head} would go to {there}; {_rest(skipped, absent, there='here')}")
        return 0
    sent = send(store, there, found.here, progress=Runtime().progress)
    print(f"{counted(len(sent), 'artefact')} with {size(_bytes(m for m in found.here if m.ref in sent))} sent to {there}; "
          f"{_rest(skipped + len(found.here) - len(sent), absent, there='here')}")  # fmt: skip
    return 0


def pull(options: argparse.Namespace) -> int:
    store, there = _open(options, options.source)
    wanted = _remote(store, there, options.key)
    manifests, absent = transfer.missing(store, there, wanted.refs)
    skipped = len(wanted.refs) - len(manifests) - len(absent)
    if options.dry_run:
        _print_files(manifests)
        print(f"{counted(len(manifests), 'artefact')} with {size(_bytes(manifests))} would come from {there}; "
              f"{_rest(skipped, absent, there='there')}")  # fmt: skip
        return 0
    for name in wanted.runs:
        transfer.pull_run(store, there, name)
    fetch(store, there, manifests)
    print(f"{counted(len(manifests), 'artefact')} with {size(_bytes(manifests))} fetched from {there}; "
          f"{_rest(skipped, absent, there='there')}")  # fmt: skip
    return 0


def _rest(complete: int, absent: Sequence[Ref], *, there: str) -> str:
    text = f"{complete:,} complete already"
    if absent:
        text += f", {len(absent):,} not complete {there}: {', '.join(map(str, absent[:4]))}{' ...' * (len(absent) > 4)}"
    return text


def status(options: argparse.Namespace) -> int:
    store, there = _open(options, options.remote)
    there.require()
    if options.key:
        refs = _remote(store, there, options.key, local=True).refs
    else:
        refs = sorted({*store.refs(), *there.refs()}, key=str)
    found = transfer.compare(store, there, refs)
    rows = [(str(m.ref), m.stage, "here", size(m.bytes)) for m in found.here]
    rows += [(str(m.ref), m.stage, f"in {there}", size(m.bytes)) for m in found.there]
    rows += [(str(ref), "", f"here, and in {there} with other bytes", "") for ref in found.other]
    rows += [(str(ref), "", "nowhere", "") for ref in found.nowhere]
    if options.json:
        content = {
            "store": str(store.root), "remote": there.url, "same": list(map(str, found.same)), "other": list(map(str, found.other)),
            "here": [_plain(m) for m in found.here], "there": [_plain(m) for m in found.there], "nowhere": list(map(str, found.nowhere)),
        }  # fmt: skip
        print(json.dumps(content, indent=1))
        return 0
    if rows:
        print_table(("artefact", "stage", "complete", "size"), rows)
    print(f"{len(found.same):,} on both sides, {len(found.here):,} with {size(_bytes(found.here))} to push, "
          f"{len(found.there):,} with {size(_bytes(found.there))} to pull; {there} is {there.url}")  # fmt: skip
    return 0


def verify(options: argparse.Namespace) -> int:
    """`verify --remote`."""
    if options.rows:
        raise UserError("--rows encodes rows of the store's tokens again; leave it out, or pull them first")
    store = open_store(options)
    there = Remotes(store).open(options.remote)
    there.require()
    refs = _remote(store, there, options.key).refs if options.key else there.refs()
    drawn = None
    if options.sample:
        seed = secrets.randbelow(2**31) if options.seed is None else options.seed
        drawn, number = remote_care.draw(there, refs, options.sample, seed)
        print(f"{min(options.sample, number)} of {counted(number, 'file')}, drawn with --seed {seed}")
    damaged = []
    for ref in refs:
        problems = remote_care.verify(there, ref, files=None if drawn is None else drawn.get(ref, []))
        if problems or drawn is None:
            print(f"{ref!s:<28} {'; '.join(problems) or 'intact'}", flush=True)
        damaged += [ref] if problems else []
    if damaged and not options.set_aside:
        listed = ", ".join(map(str, damaged))
        raise UserError(
            f"{len(damaged)} of {counted(len(refs), 'artefact')} in {there} damaged ({listed}); "
            f"`zs-seg verify --remote {there} --set-aside` sets aside what is damaged, and the next push sends it anew"
        )
    for ref in damaged:
        if there.has_manifest(ref):
            print(f"{ref} is set aside there, its manifest as {remote_care.set_aside(there, ref)}")
    if not damaged:
        print(
            f"{counted(len(refs), 'artefact')} in {there}: {'all files are there, in their sizes; the drawn ones are intact' if drawn is not None else 'intact'}"
        )
    return 0


def _plain(manifest: Manifest) -> dict[str, Any]:
    return {"kind": manifest.kind, "key": manifest.key, "stage": manifest.stage, "bytes": manifest.bytes}


def _print_files(manifests: Sequence[Manifest]) -> None:
    if manifests:
        rows = [(str(m.ref), m.stage, counted(len(m.files), "file"), size(m.bytes)) for m in manifests]
        print_table(("artefact", "stage", "files", "size"), rows)


def _open(options: argparse.Namespace, text: str) -> tuple[Store, Remote]:
    store = open_store(options)
    return store, Remotes(store).open(text, threads=options.jobs)


def _bytes(manifests: Any) -> int:
    return sum(manifest.bytes for manifest in manifests)


def _line(lines: Sequence[RunRecord]) -> list[Ref]:
    return list(lines[-1].refs.values()) if lines else []


def _local(store: Store, text: str) -> _Wanted:
    """What `push` is about: an artefact, a run, or every run."""
    runs = Runs(store)
    if not text:
        if not (known := runs.names()):
            raise UserError(f"no run is recorded in {store.root}; `zs-seg run` one, or name an artefact")
        return _Wanted(refs=list(dict.fromkeys(ref for name in known for ref in _line(runs.lines(name)))), runs=known)
    found = names.named(store, text)
    if isinstance(found, Ref):
        return _Wanted(refs=[found], runs=[])
    return _Wanted(refs=list(found.refs.values()), runs=[found.name])


def _remote(store: Store, there: Remote, text: str, *, local: bool = False) -> _Wanted:
    """What `pull` is about: the same, as it is on the remote; with `local` a name may also be known here alone.

    Raises UserError for what is not there.
    """
    if text and (lines := there.lines(text)):
        return _Wanted(refs=_line(lines), runs=[text])
    if "/" in text and len(text.partition("/")[2]) == 16:
        return _Wanted(refs=[Ref.parse(text)], runs=[])
    there.require()
    if not text:
        known = there.run_names()
        if not known:
            raise UserError(f"no run is in {there}; push one, or name an artefact")
        every = transfer.each(there, there.lines, known)
        return _Wanted(refs=list(dict.fromkeys(ref for lines in every for ref in _line(lines))), runs=known)
    found = [ref for ref in there.refs() if (str(ref) if "/" in text else ref.key).startswith(text)]
    if len(found) == 1:
        return _Wanted(refs=found, runs=[])
    if found:
        raise UserError(f"{text!r} fits {', '.join(map(str, found[:4]))}; give more digits of the key")
    if local:
        return _local(store, text)
    close = did_you_mean(text, there.run_names())
    raise UserError(
        f"no artefact and no run {text!r} in {there}{close}; `zs-seg status --remote {there}` shows what is there"
    )


def send(store: Store, there: Remote, manifests: Sequence[Manifest], *, progress: bool = True) -> list[Ref]:
    """Push with a progress bar."""
    if not manifests:
        return []
    with Runtime(progress=progress).bar(_bytes(manifests), "push", "B", scale=True) as bar:
        return transfer.push(store, there, manifests, advance=bar.update)


def fetch(store: Store, there: Remote, manifests: Sequence[Manifest], *, progress: bool = True) -> list[Ref]:
    """Pull with a progress bar."""
    if not manifests:
        return []
    total, before = _bytes(manifests), transfer.arrived(store, manifests)
    with Runtime(progress=progress).bar(total, "pull", "B", initial=before, scale=True) as bar:
        return transfer.pull(store, there, manifests, advance=bar.update)
