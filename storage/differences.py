"""In which fields two lines of artefacts differ, and so why one of them has another key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from storage.keys import Recipe, Ref
from storage.lineage import Lineage, Node, ancestry

LONG = 24  # characters of a value that fit in a line


class _Absent:
    """The value of a field that one side does not have."""


ABSENT = _Absent()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A field of a stage, such as "v2c.segmenter.dim", with its value in either line (or `ABSENT`)."""

    stage: str
    field: str
    before: Any
    after: Any

    @property
    def values(self) -> tuple[str, str]:
        """Both values, short enough for a table."""
        before, after = self.before, self.after
        if isinstance(before, list) and isinstance(after, list) and max(len(_json(before)), len(_json(after))) > LONG:
            changed = sum(a != b for a, b in zip(before, after, strict=False)) + abs(len(before) - len(after))
            return f"{len(before)} entries", f"{len(after)} entries, {changed} of them other"
        return _short(before), _short(after)

    def __str__(self) -> str:
        return f"{self.field} {' -> '.join(self.values)}"


def differences(before: Mapping[str, Node], after: Mapping[str, Node]) -> list[Difference]:
    """Between two lines, given by stage: fields of the configurations, versions, and stages that only one of them has.

    In the order of `after`. A stage whose inputs alone differ has none of its own.
    """
    return _differences(before, after, _own)


def _differences(
    before: Mapping[str, Node], after: Mapping[str, Node], own: Callable[[Node, Node], list[Difference]]
) -> list[Difference]:
    found: list[Difference] = []
    for stage in dict.fromkeys((*after, *before)):
        if stage in before and stage in after:
            found += own(before[stage], after[stage])
        else:
            one, other = (str(line[stage].ref) if stage in line else ABSENT for line in (before, after))
            found.append(Difference(stage=stage, field=stage, before=one, after=other))
    return found


def _own(before: Node, after: Node) -> list[Difference]:
    if before.ref == after.ref:
        return []
    old, new = ({"version": node.version, **_fields(node)} for node in (before, after))
    return [
        Difference(
            stage=after.stage, field=f"{after.stage}.{name}", before=old.get(name, ABSENT), after=new.get(name, ABSENT)
        )
        for name in dict.fromkeys((*new, *old))
        if old.get(name, ABSENT) != new.get(name, ABSENT)
    ]


def _fields(node: Node) -> dict[str, Any]:
    """The config's fields by their dotted names. A stage that keeps more than its own settings has these under its own
    name, or its artefact's, which is left out: cache-clip's tokens.crop is "crop"."""
    return {
        ".".join(path[1:] if len(path) > 1 and path[0] in (node.stage, node.ref.kind) else path): value
        for path, value in leaves(node.config)
    }


def leaves(config: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The fields of nested objects, as they are in a manifest: the names on the way to each, and its value."""
    if isinstance(config, dict) and config:
        for name, item in config.items():
            yield from leaves(item, *path, name)
    else:
        yield path, config


class Explainer:
    """Explains why a run's artefacts are missing: how each differs from the most similar one in the store.

    `recipes` are those of the run's stages.
    """

    def __init__(self, recipes: Iterable[Recipe], lineage: Lineage) -> None:
        self.lineage = lineage
        self.planned = {recipe.ref: Node.planned(recipe) for recipe in recipes}
        self._own: dict[tuple[Ref, Ref], list[Difference]] = {}

    def why(self, ref: Ref) -> str:
        """Such as "v2c.lr 0.001 -> 0.0001", or "via tokens: cache-clip.crop full -> box" for a change further up."""
        node, wanted = self.planned[ref], ancestry(ref, self.planned.get)
        closest, least = None, 0
        for other in self.lineage.nodes(ref.kind):
            if other.stage == node.stage and other.ref != ref:
                found = _differences(self.lineage.line(other.ref), wanted, self._remembered)
                newer = closest is None or other.provenance["created"] > closest[0].provenance["created"]
                if closest is None or len(found) < least or (len(found) == least and newer):
                    closest, least = (other, found), len(found)
        if closest is None:
            return f"no {node.stage} in this store yet"
        if not closest[1]:
            return f"{closest[0].ref} is alike in all that is known"
        return self._message(node, closest[1])

    def _remembered(self, before: Node, after: Node) -> list[Difference]:
        pair = (before.ref, after.ref)
        if pair not in self._own:
            self._own[pair] = _own(before, after)
        return self._own[pair]

    def _message(self, node: Node, found: list[Difference]) -> str:
        own = [difference for difference in found if difference.stage == node.stage]
        first = (own or found)[0]
        message = str(first)
        if not own:
            reached = {name: ancestry(source, self.planned.get) for name, source in node.inputs.items()}
            through = [name for name, line in reached.items() if first.stage in line]
            direct = [name for name in through if next(iter(reached[name])) == first.stage]
            message = f"via {(direct or through)[0]}: {message}" if through else message
        return f"{message} and {len(found) - 1} more" if len(found) > 1 else message


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _short(value: Any) -> str:
    if value is ABSENT:
        return "-"
    text = value if isinstance(value, str) and value else _json(value)
    return text if len(text) <= LONG else f"{text[: LONG - 3]}..."
