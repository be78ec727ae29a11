"""The text bank: embeddings of the class names, used in place of a classifier's weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.teacher.prompts import Prompts, brief
from storage.errors import UserError, anew

if TYPE_CHECKING:
    from torch import Tensor

    from models.teacher import Teacher

log = logging.getLogger(__name__)

# A rule of thumb, not tuned: of the shipped CLIP the nearest two of the demo's 56 classes have 0.78.
ALIKE = 0.98


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """A network's classes in their fixed order, as checkpoints record them.

    `text` is the key of the text artefact; `ids`, `names`, `isthing` and `seen` have one entry per class; `teacher` is
    the identity of the CLIP that embedded the names, `clean_names` whether the names were cleaned first.
    """

    text: str
    ids: list[int]
    names: list[str]
    isthing: list[bool]
    seen: list[bool]
    teacher: dict[str, Any]
    clean_names: bool


@dataclass(frozen=True, kw_only=True)
class TextBank:
    """The classes in their fixed order: `embedding` of unit rows, and per class its id, name, kind, and whether seen.

    `embedding` is (K, D), or (K, S, D) where classes have up to S synonyms; a class with fewer repeats its first row,
    which leaves the maximum over synonyms unchanged. `templates` is empty for imported rows.
    """

    key: str
    embedding: Tensor
    ids: list[int]
    names: list[str]
    isthing: list[bool]
    seen: list[bool]
    teacher: dict[str, Any]
    templates: list[str]
    clean_names: bool = False

    @property
    def first(self) -> Tensor:
        """(K, D): the row of each class's first name, for uses that need one row per class."""
        return self.embedding if self.embedding.ndim == 2 else self.embedding[:, 0]

    def classes(self) -> ClassList:
        """The classes as checkpoints record them."""
        return ClassList(
            text=self.key,
            ids=self.ids,
            names=self.names,
            isthing=self.isthing,
            seen=self.seen,
            teacher=self.teacher,
            clean_names=self.clean_names,
        )


def open_text(folder: Path, key: str) -> TextBank:
    """Read a text artefact. Raises UserError when it is damaged."""
    from storage.checkpoints import load_checkpoint

    tensors, meta = load_checkpoint(folder)
    try:
        return TextBank(key=key, embedding=tensors["embedding"], **meta)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no text bank ({error}); {anew()}") from error


def embed_names(
    teacher: Teacher, names: Sequence[str], templates: Sequence[str], *, clean_names: bool = False
) -> Tensor:
    """Class names -> unit rows (K, D), or (K, S, D) where a name lists synonyms (see `TextBank`).

    A row is the mean over templates of unit sentence embeddings, normalised to unit length. Names of which the
    tokenizer cuts the end are warned of. Raises UserError as `Prompts.classes` does.
    """
    import torch
    from torch.nn.functional import normalize

    prompts = Prompts(tokenizer=teacher.tokenizer, templates=templates, clean_names=clean_names)
    parts_of_class = prompts.classes(names)
    if cut := prompts.cut(names):
        log.warning(
            "the text encoder takes %d tokens, and the end of %s is cut off; shorten it", prompts.length,
            " and of ".join(map(brief, cut)),
        )  # fmt: skip
    rows = [
        torch.stack([teacher.encode_texts([t.replace("{}", part) for t in templates]).mean(0) for part in parts])
        for parts in parts_of_class
    ]
    width = max(map(len, rows))
    padded = torch.stack([torch.cat([row, row[:1].expand(width - len(row), -1)]) for row in rows])
    return normalize(padded if width > 1 else padded[:, 0], dim=-1)


def encoded_alike(rows: Tensor, names: Sequence[str]) -> list[tuple[str, str, float]]:
    """The pairs of classes of whose unit rows, (K, D) or (K, S, D), two have a cosine of at least `ALIKE`, and the
    largest, nearest first: a logit of one is a logit of the other."""
    rows = rows if rows.ndim == 3 else rows[:, None]
    cosines = (rows.flatten(0, 1) @ rows.flatten(0, 1).T).unflatten(0, rows.shape[:2]).unflatten(2, rows.shape[:2])
    nearest = cosines.amax((1, 3)).triu(1)
    places: list[list[int]] = (nearest >= ALIKE).nonzero().tolist()
    pairs = [(names[i], names[j], float(nearest[i, j])) for i, j in places]
    return sorted(pairs, key=lambda pair: -pair[2])


def join(first: Tensor, second: Tensor) -> Tensor:
    """Two sets of class rows, each (K, D) or (K, S, D), concatenated; shorter synonym lists repeat their first row."""
    import torch

    if first.ndim == second.ndim == 2:
        return torch.cat([first, second])
    parts = [rows if rows.ndim == 3 else rows[:, None] for rows in (first, second)]
    width = max(rows.shape[1] for rows in parts)
    return torch.cat([torch.cat([rows, rows[:, :1].expand(-1, width - rows.shape[1], -1)], dim=1) for rows in parts])
