"""Class names as a user writes them: `zebra`, `grass:stuff`, `sofa|couch`. Imports no torch, so that mistakes show at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from storage.errors import UserError, did_you_mean

MARKS = {"thing": True, "stuff": False}


@dataclass(frozen=True, kw_only=True)
class Word:
    """A class name; synonyms are joined by ", " as benchmarks write them. `isthing` is None where no mark says it."""

    name: str
    isthing: bool | None = None


def read_words(texts: Iterable[str], *, isthing: bool | None = None) -> list[Word]:
    """Each text as a word; blank ones are left out. `isthing` holds for those without a mark.

    A text is a name, or several with | between them, which are synonyms of one class; then a mark, :thing or :stuff, or
    none. Raises UserError for another mark and for an empty name.
    """
    return [_read(text, isthing) for text in texts if text.strip()]


def _read(text: str, isthing: bool | None) -> Word:
    names, colon, mark = (part.strip() for part in text.rpartition(":")) if ":" in text else (text.strip(), "", "")
    if colon and (":" in names or mark.lower() not in MARKS):
        mark = names.rpartition(":")[2].strip() if ":" in names else mark
        close = did_you_mean(mark.lower(), MARKS)
        raise UserError(
            f"class name {text.strip()!r} ends in the mark {mark!r}{close}; use :thing, :stuff, or no colon"
        )
    parts = [part.strip() for part in names.split("|")]
    if not all(parts):
        raise UserError(f"class name {text.strip()!r} has an empty part; separate synonyms with single |")
    return Word(name=", ".join(parts), isthing=MARKS[mark.lower()] if colon else isthing)
