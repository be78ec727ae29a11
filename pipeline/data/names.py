"""Class names: as words, and found by what people call them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from storage.errors import UserError, did_you_mean

_FILLER = re.compile(r"-(merged|other|stuff)\b")


def clean(name: str) -> str:
    """A COCO class name as words: "-merged", "-other", "-stuff" removed, other hyphens and underscores made spaces.

    "sky-other-merged" -> "sky", "door-stuff" -> "door", "wall-brick" -> "wall brick".
    """
    return " ".join(re.sub(r"[-_]", " ", _FILLER.sub("", name)).split())


def listed(words: Sequence[str]) -> list[str]:
    """The names in words that separate them by commas: ("person,traffic light", "sky") has three."""
    return [name.strip() for word in words for name in word.split(",") if name.strip()]


def positions(wanted: Sequence[str], names: Sequence[str], flag: str) -> list[int]:
    """The positions in the class names `names` of the classes that `wanted` names, in the order of `names`.

    A class is named by its whole name, one of its synonyms ("person" of "person, human") or that as words ("sky" of
    "sky-other-merged"), in any case; the first of these three that fits counts.

    Raises UserError that begins with `flag` for a name that no class has, with the closest, and for one that several
    have.
    """
    called = [_calls(name) for name in names]
    found: set[int] = set()
    for word in wanted:
        fitting = next(
            (
                some
                for way in range(3)
                if (some := [i for i, ways in enumerate(called) if word.casefold() in ways[way]])
            ),
            [],
        )
        if not fitting:
            known = [call for ways in called for call in sorted(ways[1] | ways[2])]
            close = did_you_mean(word.casefold(), known)
            few = f"; the classes are {', '.join(names)}" if len(names) <= 20 and not close else ""
            raise UserError(f"{flag}: no class is called {word!r}{close}{few}")
        if len(fitting) > 1:
            several = " and ".join(repr(names[i]) for i in fitting)
            raise UserError(f"{flag}: {word!r} may be {several}; write the whole name of one")
        found.add(fitting[0])
    return sorted(found)


def _calls(name: str) -> tuple[set[str], set[str], set[str]]:
    """The whole name, its synonyms, and these as words; without case."""
    synonyms = {part.strip().casefold() for part in name.split(",")}
    return {name.casefold()}, synonyms, {clean(part) for part in synonyms}
