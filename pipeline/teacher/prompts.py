"""The text encoder's input for a class: its name and synonyms, cleaned on request, in template sentences."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from storage.errors import UserError

TEMPLATES = Path(__file__).parent / "templates.json"
_FILLER = re.compile(r"-(merged|other|stuff)\b")


def template_sets() -> dict[str, tuple[str, ...]]:
    """The named template sets: "plain", "short", and "published", the eight templates of earlier zero-shot methods."""
    return {name: tuple(lines) for name, lines in json.loads(TEMPLATES.read_text(encoding="utf-8")).items()}


def clean(name: str) -> str:
    """A COCO class name as words: "-merged", "-other", "-stuff" removed, other hyphens and underscores made spaces.

    "sky-other-merged" -> "sky", "door-stuff" -> "door", "wall-brick" -> "wall brick".
    """
    return " ".join(re.sub(r"[-_]", " ", _FILLER.sub("", name)).split())


def synonyms(names: Sequence[str], *, clean_names: bool = False) -> list[tuple[str, ...]]:
    """The synonyms of each class, in the order listed: "person, human" -> ("person", "human").

    Raises UserError when a part of a name is empty, and when two classes share a name.
    """
    owner: dict[str, str] = {}
    result = []
    for name in names:
        parts = [clean(part) if clean_names else part.strip() for part in name.split(",")]
        if not all(parts):
            raise UserError(f"class name {name!r} has an empty part; separate its synonyms with single commas")
        for part in parts:
            other = owner.setdefault(part, name)
            if other != name:
                cure = "rename one of them, or leave clean_names off" if clean_names else "rename one of them"
                raise UserError(f"classes {other!r} and {name!r} would both be called {part!r}; {cure}")
        result.append(tuple(dict.fromkeys(parts)))
    return result
