"""The commands that look after a store: list, show, verify, diff, gc; each returns the exit status."""

from __future__ import annotations

import argparse
import json
import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flows import remote_commands
from flows.history import print_scores
from flows.request import open_runtime, open_store
from flows.tables import age, print_table, print_tree, size
from pipeline.line import STAGES
from storage import names, remote_care
from storage.collect import Survey, collect, survey
from storage.differences import differences
from storage.errors import UserError, anew, counted
from storage.keys import Ref
from storage.lineage import Lineage, Node
from storage.remote import Remote, Remotes
from storage.runs import Runs
from storage.store import MANIFEST, Artefact, Store

SHOWN = 20  # files, and artefacts of a lineage, that `show` prints before it only counts


def list_artefacts(options: argparse.Namespace) -> int:
    store = open_store(options)
    lineage, runs, refs = Lineage(store), Runs(store), store.refs()
    kinds = sorted({ref.kind for ref in refs})
    if options.kind not in ("", *kinds):
        raise UserError(f"no artefact of kind {options.kind!r} in {store.root}; there are {', '.join(kinds) or 'none'}")
    refs = [ref for ref in refs if options.kind in ("", ref.kind)]
    reached: dict[Ref, list[str]] = {}
    for name in runs.names():
        for ref in lineage.reach(runs.lines(name)[-1].refs.values()):
            reached.setdefault(ref, []).append(name)
    known = [node for ref in refs if (node := lineage.node(ref))]
    known.sort(key=lambda node: node.provenance["created"], reverse=True)
    known.sort(key=lambda node: _place(node.stage))
    damaged = [ref for ref in refs if not lineage.node(ref)]
    if options.json:
        print(
            json.dumps(
                [_entry(node, lineage, reached) for node in known] + [_damaged(ref) for ref in damaged], indent=1
            )
        )
        return 0
    rows = [
        (
            node.stage,
            str(node.ref),
            size(node.bytes),
            age(node.provenance["created"]),
            str(len(lineage.users(node.ref)) or "-"),
            _few(reached.get(node.ref, [])) or "-",
        )
        for node in known
    ]
    rows += [("?", str(ref), "damaged", "-", "-", "see `zs-seg verify`") for ref in damaged]
    if rows:
        print_table(("stage", "artefact", "size", "age", "used by", "runs"), rows)
    print(f"{counted(len(rows), 'artefact')}, {size(sum(node.bytes for node in known))}, in {store.root}")
    return 0


def _place(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _entry(node: Node, lineage: Lineage, reached: Mapping[Ref, list[str]]) -> dict[str, object]:
    return {
        "kind": node.ref.kind,
        "key": node.ref.key,
        "stage": node.stage,
        "bytes": node.bytes,
        "files": node.files,
        "created": node.provenance["created"],
        "used_by": list(map(str, lineage.users(node.ref))),
        "runs": reached.get(node.ref, []),
    }


def _damaged(ref: Ref) -> dict[str, object]:
    return {"kind": ref.kind, "key": ref.key, "damaged": True}


def show_artefact(options: argparse.Namespace) -> int:
    store = open_store(options)
    artefact = store.open(names.find(store, options.key))
    manifest, lineage, runs = artefact.manifest, Lineage(store), Runs(store)
    users = _users(lineage, manifest.ref)
    reached = [n for n in runs.names() if manifest.ref in lineage.reach(runs.lines(n)[-1].refs.values())]
    if options.json:
        print(json.dumps(_shown(artefact, users, reached), indent=1))
        return 0
    print(f"{manifest.ref}, made by stage {manifest.stage} (version {manifest.version})\n{artefact.path}")
    print("\ninputs")
    _print_inputs(lineage, manifest.ref, "  ", {manifest.ref})
    print("\nused by")
    _print_users(lineage, users)
    print(f"\nruns: {', '.join(reached) or 'none'}")
    for title, content in (
        ("config", manifest.config),
        ("counts", manifest.counts),
        ("provenance", manifest.provenance),
    ):
        print(f"\n{title}")
        print_tree(content, "  ")
    print(f"\nfiles: {len(manifest.files)}, {size(manifest.bytes)}")
    shown = dict(list(manifest.files.items())[:SHOWN])
    for name, entry in shown.items():
        print(f"  {size(entry['bytes']):>9}  {entry['sha256'][:16]}  {name}")
    if len(shown) < len(manifest.files):
        print(f"  and {len(manifest.files) - len(shown)} more in {artefact.path / MANIFEST}")
    if manifest.kind == "tokens":
        print("\nrows")
        print_tree(_rows(artefact), "  ")
    return 0


def _shown(artefact: Artefact, users: Mapping[Ref, int], runs: Sequence[str]) -> dict[str, Any]:
    """What `show` prints, as JSON has it: all of the manifest, and what is around it."""
    around = {"path": str(artefact.path), "used_by": list(map(str, users)), "runs": list(runs)}
    rows = {"rows": _rows(artefact)} if artefact.ref.kind == "tokens" else {}
    return {**asdict(artefact.manifest), "bytes": artefact.manifest.bytes, **around, **rows}


def _rows(artefact: Artefact) -> dict[str, dict[str, Any]]:
    from pipeline.teacher.checks import summary

    return summary(artefact.folders(".zarr"))


def _print_inputs(lineage: Lineage, ref: Ref, indent: str, printed: set[Ref]) -> None:
    """The inputs, each with its own below it; one that is in `printed` is not expanded again."""
    node = lineage.node(ref)
    for name, source in (node.inputs if node else {}).items():
        made = lineage.node(source)
        state = "as above" if source in printed and made and made.inputs else made.stage if made else "not there"
        print(f"{indent}{name}: {source} ({state})")
        if source not in printed:
            printed.add(source)
            _print_inputs(lineage, source, indent + "  ", printed)


def _users(lineage: Lineage, ref: Ref) -> dict[Ref, int]:
    """What was made from it, the nearest first, each with its number of steps from there."""
    found, waiting = {ref: 0}, [ref]
    for one in waiting:
        new = [user for user in lineage.users(one) if user not in found]
        found |= dict.fromkeys(new, found[one] + 1)
        waiting += new
    del found[ref]
    return found


def _print_users(lineage: Lineage, users: Mapping[Ref, int]) -> None:
    for user, steps in list(users.items())[:SHOWN]:
        node = lineage.node(user)
        print(f"  {user} ({node.stage if node else '?'}){'' if steps == 1 else ', through others'}")
    if len(users) > SHOWN:
        print(f"  and {len(users) - SHOWN} more")
    if not users:
        print("  nothing")


def verify_artefacts(options: argparse.Namespace) -> int:
    for flag, value in (("--rows", options.rows), ("--sample", options.sample)):
        if value < 0:
            raise UserError(f"{flag} must be 0 or more, not {value}")
    if options.remote:
        return remote_commands.verify(options)
    store = open_store(options)
    refs = _named(store, options.key) if options.key else store.refs()
    drawn = _draw(store, refs, options) if options.sample else None
    damaged = []
    for ref in refs:
        problems, message = store.verify(ref, files=None if drawn is None else drawn.get(ref, [])), ""
        if options.rows and ref.kind == "tokens" and not problems:
            from pipeline.teacher.checks import encode_again

            problems, message = encode_again(
                store,
                ref,
                rows=options.rows,
                seed=options.seed or 0,
                teacher_weights=options.teacher,
                runtime=open_runtime(options),
            )
        if strays := store.strays(ref):
            message = "; ".join(filter(None, (message, f"not part of it, and never read: {', '.join(strays)}")))
        if problems or message or drawn is None:
            print(f"{ref!s:<28} {'; '.join(problems) or 'intact'}{message and f'; {message}'}", flush=True)
        if problems:
            damaged.append(ref)
    if damaged:
        if options.set_aside:
            return _set_aside(store, damaged)
        listed, verb = ", ".join(map(str, damaged)), "is" if len(damaged) == 1 else "are"
        raise UserError(f"{len(damaged)} of {counted(len(refs), 'artefact')} {verb} damaged ({listed}); {anew()}")
    artefacts = f"{counted(len(refs), 'artefact')} in {store.root}"
    if drawn is None:
        print(f"{artefacts} {'is' if len(refs) == 1 else 'are'} intact")
    else:
        print(f"{artefacts} with all files, in their sizes; the drawn ones are intact")
    return 0


def _named(store: Store, text: str) -> list[Ref]:
    """The artefact that `text` is for, or those of a run that are complete; the others of the run are printed.

    Raises UserError as `names.named`, and for a run of which nothing is complete.
    """
    found = names.named(store, text)
    if isinstance(found, Ref):
        return [found]
    states = {ref: store.state(ref) for ref in found.refs.values()}
    if "fresh" not in states.values():
        raise _unbuilt(text, store)
    for ref, state in states.items():
        if state != "fresh":
            print(f"{ref!s:<28} {state}, nothing to compare")
    return [ref for ref, state in states.items() if state == "fresh"]


def _unbuilt(run: str, store: Store) -> UserError:
    return UserError(f"nothing of run {run} is built in {store.root}; run it, or give keys")


def _set_aside(store: Store, damaged: Sequence[Ref]) -> int:
    """Raises UserError for an artefact that is being built."""
    for ref in damaged:
        try:
            for folder in store.set_aside(ref, store.path(ref)):
                print(f"{ref} is set aside as {folder}; the next run makes it anew")
        except BlockingIOError:
            raise UserError(f"{ref} is being built by {store.holder(ref)}; wait for that, then try again") from None
    return 0


def _draw(store: Store, refs: Sequence[Ref], options: argparse.Namespace) -> dict[Ref, list[str]]:
    """Files to read: `--sample` of all, drawn from `--seed`, else from a seed that is drawn; it is printed."""
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    files = [(ref, name) for ref in refs for name in store.file_names(ref)]
    number = min(options.sample, len(files))
    print(f"{number} of {counted(len(files), 'file')}, drawn with --seed {seed}")
    drawn: dict[Ref, list[str]] = {}
    for ref, name in random.Random(seed).sample(files, number):
        drawn.setdefault(ref, []).append(name)
    return drawn


def diff(options: argparse.Namespace) -> int:
    store = open_store(options)
    lineage = Lineage(store)
    (before, one_name), (after, other_name) = (_line(name, store, lineage) for name in (options.one, options.other))
    rows = [(difference.field, *difference.values) for difference in differences(before, after)]
    if rows:
        print_table(("field", one_name, other_name), rows)
    count = f"{counted(len(rows), 'field')} differ{'s' * (len(rows) == 1)}"
    print(count if rows else f"{one_name} and {other_name} differ in no field")
    print_scores((one_name, other_name), (before, after))
    return 0


def _line(name: str, store: Store, lineage: Lineage) -> tuple[dict[str, Node], str]:
    """A run's stages, as far as they are built, or an artefact and what it was made from; and what to call it."""
    found = names.named(store, name)
    if isinstance(found, Ref):
        if not lineage.node(found):
            raise UserError(f"{found} is damaged; `zs-seg verify {found.key}` says how")
        return lineage.line(found), str(found)
    line = {stage: node for stage, ref in found.refs.items() if (node := lineage.node(ref))}
    if not line:
        raise _unbuilt(name, store)
    return line, name


def gc(options: argparse.Namespace) -> int:
    store = open_store(options)
    if options.partial_age < 0:
        raise UserError(f"--partial-age must be 0 days or more, not {options.partial_age:g}")
    where: Store | Remote = Remotes(store).open(options.remote) if options.remote else store
    if isinstance(where, Remote):
        work: Callable[..., Survey] = remote_care.collect if options.delete else remote_care.survey
    else:
        work = collect if options.delete else survey
    place = where.url if isinstance(where, Remote) else str(store.root)
    found = work(where, keep=options.keep, forget=options.forget, partial_age=options.partial_age * 86400)
    if options.json:
        print(json.dumps({"store": place, "deleted": options.delete, **_survey(found)}, indent=1))
        return 0
    if found.waste:
        rows = [(one.name, size(one.bytes), one.reason) for one in found.waste]
        print_table(("removed" if options.delete else "to remove", "size", "reason"), rows)
    for ref in found.locked:
        how = "sent" if isinstance(where, Remote) else f"built by {store.holder(ref)}"
        print(f"{ref} is being {how}: left alone")
    stay = "stays" if len(found.kept) == 1 else "stay"
    kept = f"{counted(len(found.kept), 'artefact')} with {size(found.kept_bytes)} {stay} in {place}"
    folders = f"{counted(len(found.waste), 'folder')} with {size(found.bytes)}"
    if options.delete:
        print(f"{folders} removed; {kept}")
    else:
        cure = "; `--delete` removes what is listed" if found.waste else ""
        print(f"{folders} that no run reaches{cure}; {kept}")
    return 0


def _survey(found: Survey) -> dict[str, Any]:
    """What `gc` prints, as JSON has it."""
    folders = [
        {"name": one.name, "path": str(one.path), "bytes": one.bytes, "reason": one.reason} for one in found.waste
    ]
    return {
        "folders": folders,
        "bytes": found.bytes,
        "kept": list(map(str, found.kept)),
        "kept_bytes": found.kept_bytes,
        "locked": list(map(str, found.locked)),
    }
