"""Which artefact was made from which, read from the manifests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from storage.errors import NO_FILE
from storage.keys import Recipe, Ref, canonical
from storage.store import MANIFEST, UNPARSABLE, Store


@dataclass(frozen=True, kw_only=True)
class Node:
    """An artefact, complete or planned: its recipe and, if complete, the rest of its manifest.

    `config` is plain JSON. `bytes` and `files` are the size and number of its files.
    """

    ref: Ref
    stage: str
    version: int
    config: Any
    inputs: Mapping[str, Ref]
    counts: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    bytes: int = 0
    files: int = 0

    @classmethod
    def planned(cls, recipe: Recipe) -> Node:
        """What the recipe will make."""
        config = json.loads(canonical(recipe.config))
        return cls(ref=recipe.ref, stage=recipe.stage, version=recipe.version, config=config, inputs=recipe.inputs)


Lookup = Callable[[Ref], Node | None]


class Lineage:
    """The artefacts of a store as a graph.

    Each manifest is read once, when it is first needed, and without the checks of `Store.open`: enough to show and
    compare artefacts, not to read them.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._nodes: dict[Ref, Node | None] = {}
        self._users: dict[Ref, list[Ref]] | None = None
        self._lines: dict[Ref, dict[str, Node]] = {}

    def node(self, ref: Ref) -> Node | None:
        """None when the artefact is not there, or its manifest is damaged or not for this user. Raises OSError where
        that cannot be found out."""
        if ref not in self._nodes:
            self._nodes[ref] = _read(self.store, ref)
        return self._nodes[ref]

    def nodes(self, kind: str = "") -> list[Node]:
        """All of a kind, or all, sorted by kind and key; those with an unreadable manifest are left out."""
        found = (self.node(ref) for ref in self._refs if kind in ("", ref.kind))
        return [node for node in found if node]

    @cached_property
    def _refs(self) -> list[Ref]:
        return self.store.refs()

    def line(self, ref: Ref) -> dict[str, Node]:
        """The `ancestry` of an artefact."""
        if ref not in self._lines:
            self._lines[ref] = ancestry(ref, self.node)
        return self._lines[ref]

    def users(self, ref: Ref) -> list[Ref]:
        """The artefacts that have it as an input, sorted by kind and key. Reads every manifest, once."""
        if self._users is None:
            self._users = {}
            for node in self.nodes():
                for source in dict.fromkeys(node.inputs.values()):
                    self._users.setdefault(source, []).append(node.ref)
        return self._users.get(ref, [])

    def reach(self, refs: Iterable[Ref]) -> set[Ref]:
        """`refs` and everything that they were made from, whether it is there or not."""
        found, waiting = set[Ref](), list(refs)
        while waiting:
            if (ref := waiting.pop()) not in found:
                found.add(ref)
                if node := self.node(ref):
                    waiting += node.inputs.values()
        return found


def ancestry(ref: Ref, lookup: Lookup) -> dict[str, Node]:
    """The artefact and everything that it was made from, by stage, itself first; where `lookup` gives None it is left
    out.

    A line has one artefact a stage; should there be two, the one nearest to `ref` counts.
    """
    found: dict[str, Node] = {}
    seen, waiting = {ref}, [ref]
    for one in waiting:
        if node := lookup(one):
            found.setdefault(node.stage, node)
            fresh = [source for source in node.inputs.values() if source not in seen]
            seen.update(fresh)
            waiting += fresh
    return found


def _read(store: Store, ref: Ref) -> Node | None:
    try:
        data = json.loads((store.path(ref) / MANIFEST).read_bytes())
        return Node(
            ref=ref,
            stage=data["stage"],
            version=data["version"],
            config=data["config"],
            inputs={name: Ref.parse(source) for name, source in data["inputs"].items()},
            counts=data["counts"],
            provenance=data["provenance"],
            bytes=sum(file["bytes"] for file in data["files"].values()),
            files=len(data["files"]),
        )
    except (*NO_FILE, PermissionError, *UNPARSABLE):
        return None
