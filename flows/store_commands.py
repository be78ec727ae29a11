"""The commands that look after a store: list, show, verify, diff, gc; each returns the exit status."""

from __future__ import annotations

import argparse
import json
import random
import secrets
from collections.abc import Mapping, Sequence

from flows.request import open_runtime, open_store
from flows.tables import age, print_table, print_tree, size
from pipeline.line import STAGES
from storage.collect import collect, survey
from storage.differences import differences
from storage.errors import UserError, anew
from storage.keys import Ref
from storage.lineage import Lineage, Node
from storage.runs import Runs
from storage.store import MANIFEST, Store

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
    print(f"{len(rows)} artefacts, {size(sum(node.bytes for node in known))}, in {store.root}")
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
    artefact = store.open(store.find(options.key))
    manifest, lineage, runs = artefact.manifest, Lineage(store), Runs(store)
    print(f"{manifest.ref}, made by stage {manifest.stage} (version {manifest.version})\n{artefact.path}")
    print("\ninputs")
    _print_inputs(lineage, manifest.ref, "  ", {manifest.ref})
    print("\nused by")
    _print_users(lineage, manifest.ref)
    names = [n for n in runs.names() if manifest.ref in lineage.reach(runs.lines(n)[-1].refs.values())]
    print(f"\nruns: {', '.join(names) or 'none'}")
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
        from pipeline.teacher.checks import summary

        print("\nrows")
        print_tree(summary(artefact.folders(".zarr")), "  ")
    return 0


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


def _print_users(lineage: Lineage, ref: Ref) -> None:
    """What was made from it, the nearest first, each with the number of steps in between."""
    found, waiting = {ref: 0}, [ref]
    for one in waiting:
        new = [user for user in lineage.users(one) if user not in found]
        found |= dict.fromkeys(new, found[one] + 1)
        waiting += new
    for user in waiting[1 : 1 + SHOWN]:
        node, steps = lineage.node(user), found[user]
        print(f"  {user} ({node.stage if node else '?'}){'' if steps == 1 else ', through others'}")
    if len(waiting) > 1 + SHOWN:
        print(f"  and {len(waiting) - 1 - SHOWN} more")
    if len(waiting) == 1:
        print("  nothing")


def verify_artefacts(options: argparse.Namespace) -> int:
    for flag, value in (("--rows", options.rows), ("--sample", options.sample)):
        if value < 0:
            raise UserError(f"{flag} must be 0 or more, not {value}")
    store = open_store(options)
    refs: list[Ref] = [store.find(options.key)] if options.key else store.refs()
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
        named = ", ".join(map(str, damaged))
        raise UserError(f"{len(damaged)} of {len(refs)} artefacts are damaged ({named}); {anew()}")
    if drawn is None:
        print(f"{len(refs)} artefacts in {store.root} are intact")
    else:
        print(f"{len(refs)} artefacts in {store.root} have all their files, in their sizes; the drawn ones are intact")
    return 0


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
    print(f"{number} of {len(files)} files, drawn with --seed {seed}")
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
    print(f"{len(rows)} fields differ" if rows else f"{one_name} and {other_name} differ in no field")
    return 0


def _line(name: str, store: Store, lineage: Lineage) -> tuple[dict[str, Node], str]:
    """A run's stages, as far as they are built, or an artefact and what it was made from; and what to call it."""
    runs = Runs(store)
    if name not in runs.names():
        ref = store.find(name)
        if not lineage.node(ref):
            raise UserError(f"{ref} is damaged; `zs-seg verify {ref.key}` says how")
        return lineage.line(ref), str(ref)
    refs = runs.lines(name)[-1].refs
    line = {stage: node for stage, ref in refs.items() if (node := lineage.node(ref))}
    if not line:
        raise UserError(f"nothing of run {name} is built in {store.root}; run it, or give keys")
    return line, name


def gc(options: argparse.Namespace) -> int:
    store = open_store(options)
    if options.partial_age < 0:
        raise UserError(f"--partial-age must be 0 days or more, not {options.partial_age:g}")
    work = collect if options.delete else survey
    found = work(store, keep=options.keep, forget=options.forget, partial_age=options.partial_age * 86400)
    if found.waste:
        rows = [(one.name, size(one.bytes), one.reason) for one in found.waste]
        print_table(("removed" if options.delete else "to remove", "size", "reason"), rows)
    for ref in found.locked:
        print(f"{ref} is being built by {store.holder(ref)}: left alone")
    kept = f"{len(found.kept)} artefacts with {size(found.kept_bytes)} stay in {store.root}"
    if options.delete:
        print(f"{len(found.waste)} folders with {size(found.bytes)} removed; {kept}")
    else:
        cure = "; `--delete` removes them" if found.waste else ""
        print(f"{len(found.waste)} folders with {size(found.bytes)} that no run reaches{cure}; {kept}")
    return 0
