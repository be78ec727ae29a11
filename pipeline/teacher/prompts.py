"""What the text encoder reads for a class: its name with its synonyms, cleaned on request, and the sentences around it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from storage.errors import UserError

TEMPLATES = Path(__file__).parent / "templates.json"
_FILLER = re.compile(r"-(merged|other|stuff)\b")


def template_sets() -> dict[str, tuple[str, ...]]:
    """The named sets of sentences: "plain", "short", and "published", the eight of the method's predecessors."""
    return {name: tuple(lines) for name, lines in json.loads(TEMPLATES.read_text(encoding="utf-8")).items()}


def clean(name: str) -> str:
    """COCO's file-like names as words: "-merged", "-other" and "-stuff" go, remaining hyphens and underscores become spaces.

    "sky-other-merged" -> "sky", "door-stuff" -> "door", "wall-brick" -> "wall brick".
    """
    return " ".join(re.sub(r"[-_]", " ", _FILLER.sub("", name)).split())


def synonyms(names: Sequence[str], *, clean_names: bool = False) -> list[tuple[str, ...]]:
    """For each class the names it is known by, its own first: "person, human" -> ("person", "human").

    Raises UserError when nothing is left of a name, and when two classes would be called the same.
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
