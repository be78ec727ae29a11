"""The text encoder's input for a class: its name and synonyms, cleaned on request, in template sentences; and the one
rule for when two names are one class."""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.names import clean
from storage.errors import UserError

if TYPE_CHECKING:
    from models.teacher import Tokenizer

TEMPLATES = Path(__file__).parent / "templates.json"


def template_sets() -> dict[str, tuple[str, ...]]:
    """The named template sets: "plain", "short", and "published", the eight templates of earlier zero-shot methods."""
    return {name: tuple(lines) for name, lines in json.loads(TEMPLATES.read_text(encoding="utf-8")).items()}


def synonyms(names: Sequence[str], *, clean_names: bool = False) -> list[tuple[str, ...]]:
    """The synonyms of each class, in the order listed: "person, human" -> ("person", "human").

    Raises UserError when a part of a name is empty, for an invisible character, and when two classes share a name,
    letter by letter.
    """
    result = []
    for name in names:
        # Tokenizers take some of them for letters. Scripts and emoji need the joiners.
        for sign in sorted(set(name) - {"\u200c", "\u200d"}):
            if unicodedata.category(sign) == "Cf":
                raise UserError(f"class name {name!r} holds the invisible character U+{ord(sign):04X}; remove it")
        parts = [clean(part) if clean_names else part.strip() for part in name.split(",")]
        if not all(parts):
            raise UserError(f"class name {name!r} has an empty part; separate its synonyms with single commas")
        result.append(tuple(dict.fromkeys(parts)))
    if shared := _shared(names, result, str):
        (one, _), (other, part) = shared
        cure = "rename one of them, or leave clean_names off" if clean_names else "rename one of them"
        raise UserError(f"classes {brief(one)} and {brief(other)} would both be called {brief(part)}; {cure}")
    return result


def alike(names: Sequence[str], *, clean_names: bool = False) -> bool:
    """Whether two classes have names that differ in case, blanks, punctuation, Unicode form or HTML entities alone.

    Whether they are one class is the tokenizer's to decide (`Prompts`); this tells, without torch, when to ask it.
    """

    def letters(part: str) -> str:
        plain = unicodedata.normalize("NFKC", html.unescape(html.unescape(part))).casefold()
        return "".join(filter(str.isalnum, plain)) or part

    return _shared(names, synonyms(names, clean_names=clean_names), letters) is not None


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """How a teacher reads class names: each synonym in every sentence of `templates` (`()` for imported embeddings: the
    bare name), cut into tokens by its `tokenizer`.

    The rule for when two names are one class: where the tokens of all their sentences are the same. The text encoder
    then gives both one embedding, so no image can tell them apart, and training on one is training on the other. CLIP's
    own tokenizer, for one, ignores case, runs of blanks, Unicode forms and HTML entities.
    """

    tokenizer: Tokenizer
    templates: Sequence[str]
    clean_names: bool

    def tokens(self, part: str) -> bytes:
        """The token ids of all sentences of one synonym."""
        return self.tokenizer(self._sentences(part)).numpy().tobytes()

    def classes(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """The synonyms of each class, as `synonyms`.

        Raises UserError as `synonyms`, for a synonym without any token, and, naming both, for two classes that share
        one by the rule above.
        """
        parts_of_class, none = synonyms(names, clean_names=self.clean_names), self.tokens("")
        for name, parts in zip(names, parts_of_class, strict=True):
            for part in parts:
                if self.tokens(part) == none:
                    raise UserError(
                        f"class name {brief(name)}: the teacher's tokenizer makes no token of {brief(part)}; rename it"
                    )
        if shared := _shared(names, parts_of_class, self.tokens):
            (one, word), (other, part) = shared
            cut = f", for it takes only {self.length}" if self.is_cut(word) or self.is_cut(part) else ""
            raise UserError(
                f"classes {brief(one)} and {brief(other)} are one to the teacher: its tokenizer makes the same tokens "
                f"of {brief(word)} and {brief(part)}{cut}; rename one of them, or leave it out"
            )
        return parts_of_class

    @property
    def length(self) -> int:
        """L, the tokens of a sentence that the text encoder takes, start and end included."""
        return self.tokenizer(["a"]).shape[1]

    def is_cut(self, part: str) -> bool:
        """Whether a sentence of this synonym has more tokens than the text encoder takes, which drops its end."""
        # With room for one token more, one word more changes the tokens, unless that room, too, is full.
        sentences, room = self._sentences(part), self.length + 1
        longer = self.tokenizer([f"{sentence} a" for sentence in sentences], context_length=room)
        return bool((self.tokenizer(sentences, context_length=room) == longer).all(1).any())

    def cut(self, names: Sequence[str]) -> list[str]:
        """The class names of which the tokenizer cuts a synonym (`is_cut`)."""
        parts_of_class = synonyms(names, clean_names=self.clean_names)
        return [name for name, parts in zip(names, parts_of_class, strict=True) if any(map(self.is_cut, parts))]

    def _sentences(self, part: str) -> list[str]:
        return [template.replace("{}", part) for template in self.templates or ("{}",)]


Place = tuple[str, str]  # a class, and one of its synonyms


def _shared(
    names: Sequence[str], parts_of_class: Sequence[Sequence[str]], identity: Callable[[str], Hashable]
) -> tuple[Place, Place] | None:
    """The first two classes with synonyms of one `identity`, and these; None if there are none."""
    owner: dict[Hashable, Place] = {}
    for name, parts in zip(names, parts_of_class, strict=True):
        for part in parts:
            other = owner.setdefault(identity(part), (name, part))
            if other[0] != name:
                return other, (name, part)
    return None


def brief(name: str) -> str:
    """The name in quotes, the middle of a long one left out, runs of blanks and decomposed letters as escapes."""

    def quoted(part: str) -> str:
        written = repr(part) if unicodedata.is_normalized("NFC", part) else ascii(part)
        return written.replace("  ", " \\x20")

    return quoted(name) if len(name) <= 80 else f"{quoted(name[:40])}...{quoted(name[-20:])} ({len(name)} characters)"
