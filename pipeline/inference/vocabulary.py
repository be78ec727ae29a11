"""The class names a checkpoint is asked to choose from: its own, its own and further ones, or those of another
benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.data.benchmarks import Benchmark, Category
from pipeline.inference.model import Model
from pipeline.inference.words import Word
from pipeline.runtime import Runtime
from pipeline.teacher.config import teacher_of
from pipeline.teacher.prompts import Prompts, brief, synonyms
from pipeline.teacher.text_bank import ClassList, embed_names
from storage.errors import UserError

if TYPE_CHECKING:
    from models.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The classes to choose from, and their unit rows (K, D) or (K, S, D), see `TextBank`."""

    embedding: Tensor
    classes: ClassList

    @property
    def categories(self) -> tuple[Category, ...]:
        columns = zip(self.classes.ids, self.classes.names, self.classes.isthing, strict=True)
        return tuple(Category(id=i, name=name, isthing=isthing) for i, name, isthing in columns)


class Lexicon:
    """What words are to a checkpoint: its own classes, or further ones with rows by its own teacher, each embedded once.

    `teacher_weights` is the teacher's weights file where it was a local one.
    """

    def __init__(self, model: Model, teacher_weights: str, runtime: Runtime) -> None:
        self.model, self.teacher_weights, self.runtime = model, teacher_weights, runtime
        self.ours = synonyms(model.meta.classes.names, clean_names=model.meta.classes.clean_names)
        self._rows: dict[str, Tensor] = {}

    def vocabulary(self, words: Sequence[Word] = (), *, only: bool = False) -> Vocabulary:
        """The checkpoint's classes and, behind them, those of `words` that it lacks; with `only` those of `words`, in
        their order.

        A word that shares a name with a class of the checkpoint, by the rule of `Prompts`, is that class; names that the
        class lacks are further synonyms of it. Any other word is a new class with a new id, unseen in training. A word's
        mark makes its class a thing or stuff; without one a new class is a thing.

        Raises UserError for no word at all with `only`, for two that are one class, for one that is two classes, and
        where further names cannot be embedded as the checkpoint's were.
        """
        if only and not words:
            raise UserError("there is nothing to choose from; give at least one class name")
        found = self._found(words)
        if any(one.further for one in found):
            _require_embeddable(self.model)
        classes = self.model.meta.classes
        if not only:
            of_row = {one.row: one for one in found}
            ours = [of_row.get(row, _Found(row=row)) for row in range(len(classes.names))]
            found = [*ours, *(one for one in found if one.row is None)]
        new_id = count(max(classes.ids) + 1)
        entries = []
        for one in found:
            if one.row is None:
                entries.append((next(new_id), one.name, one.isthing is not False, False))
            else:
                isthing = classes.isthing[one.row] if one.isthing is None else one.isthing
                entries.append((classes.ids[one.row], classes.names[one.row], isthing, classes.seen[one.row]))
        columns = zip(("ids", "names", "isthing", "seen"), map(list, zip(*entries, strict=True)), strict=True)
        return Vocabulary(
            embedding=_stacked([self._rows_of(one) for one in found]), classes=replace(classes, **dict(columns))
        )

    def _found(self, words: Sequence[Word]) -> list[_Found]:
        """Each word's class of the checkpoint. Asks the tokenizer only where a name differs from the checkpoint's in its
        letters."""
        for place, word in enumerate(words):
            if word.name in [other.name for other in words[:place]]:
                raise UserError(f"class name {brief(word.name)} is given twice; leave one out")
        texts = [word.name for word in words]
        parts_of_word = synonyms(texts, clean_names=self.model.meta.classes.clean_names)
        owner: Callable[[str], int | None] = self._by_letters.get
        if any(owner(part) is None for parts in parts_of_word for part in parts):
            parts_of_word = self.prompts.classes(texts)
            owner = self._owner_by_tokens
        found: list[_Found] = []
        names = self.model.meta.classes.names
        for word, parts in zip(words, parts_of_word, strict=True):
            rows = list(dict.fromkeys(row for part in parts if (row := owner(part)) is not None))
            if len(rows) > 1:
                pair = " and ".join(brief(names[row]) for row in rows[:2])
                raise UserError(f"class name {brief(word.name)} is both {pair} to the checkpoint; split it")
            row = rows[0] if rows else None
            if other := next((one for one in found if row is not None and one.row == row), None):
                pair = f"{brief(other.name)} and {brief(word.name)}"
                raise UserError(f"class names {pair} are both {brief(names[rows[0]])} to the checkpoint; leave one out")
            further = [part for part in parts if owner(part) is None]
            found.append(_Found(row=row, name=word.name, isthing=word.isthing, further=further))
        return found

    def _rows_of(self, one: _Found) -> Tensor:
        """The rows (S, D) of a class, those of its further names last."""
        own: list[Tensor] = []
        if one.row is not None:
            rows = self.model.text[one.row].cpu()
            own.append(rows if rows.ndim == 2 else rows[None])
        return torch.cat([*own, *(self._embedded(part) for part in one.further)])

    @cached_property
    def prompts(self) -> Prompts:
        return _prompts(self.model, self.teacher_weights)

    @cached_property
    def _by_letters(self) -> dict[str, int]:
        return {part: row for row, parts in enumerate(self.ours) for part in parts}

    @cached_property
    def _by_tokens(self) -> dict[bytes, int]:
        return {self.prompts.tokens(part): row for row, parts in enumerate(self.ours) for part in parts}

    def _owner_by_tokens(self, part: str) -> int | None:
        return self._by_tokens.get(self.prompts.tokens(part))

    def _embedded(self, part: str) -> Tensor:
        """The row (1, D) of one name."""
        if part not in self._rows:
            # cleaned already, where names are
            self._rows[part] = embed_names(self.teacher, [part], self.model.meta.templates).cpu()
        return self._rows[part]

    @cached_property
    def teacher(self) -> Teacher:
        """The checkpoint's own teacher. Raises UserError when its weights are not at hand."""
        return teacher_of(self.model.meta.classes.teacher, self.teacher_weights).load(self.runtime)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The class of a word: `row` in the checkpoint, None = a new one; the word's name and mark; `further` are its names
    that the checkpoint lacks."""

    row: int | None
    name: str = ""
    isthing: bool | None = None
    further: Sequence[str] = ()


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Rows (S, D) of each class -> (K, D), or (K, S, D) where one has several (see `TextBank`)."""
    most = max(map(len, parts))
    if most == 1:
        return torch.cat(list(parts))
    return torch.stack([torch.cat([rows, rows[:1].expand(most - len(rows), -1)]) for rows in parts])


@dataclass(frozen=True, kw_only=True)
class Known:
    """A benchmark as a checkpoint knows it.

    `benchmark` has the classes as unseen that the checkpoint was not trained on; `vocabulary` is of its classes, in its
    order. `respelled`: the benchmark's name -> the checkpoint's, of each class that both have in different spellings.
    """

    benchmark: Benchmark
    vocabulary: Vocabulary
    respelled: dict[str, str]


def vocabulary_of(
    model: Model, benchmark: Benchmark, teacher_weights: str, runtime: Runtime, *, match_names: bool = False
) -> Known:
    """The benchmark's classes for this checkpoint: its own rows where it has all of them, else all encoded as it was
    trained.

    Names are compared by the rule of `Prompts`. A class is the checkpoint's own where all its synonyms are, in any
    order; it is seen where one of them is a name of a class that the checkpoint was trained on. Where the benchmark has
    just the checkpoint's classes, and names unseen ones, the benchmark decides which are unseen.

    Raises UserError for a benchmark with exactly the checkpoint's classes in another order or with other ids, unless
    `match_names`; for one that calls a class unseen that the checkpoint was trained on; for two classes of one name;
    and when the teacher's weights are not those of the checkpoint.
    """
    classes = model.meta.classes
    spelled_alike = set(benchmark.names) <= set(classes.names)
    if spelled_alike:
        own, seen = _match(synonyms(benchmark.names), classes.seen, synonyms(classes.names), str)
    else:
        prompts = _prompts(model, teacher_weights)
        ours = synonyms(classes.names, clean_names=classes.clean_names)
        own, seen = _match(prompts.classes(benchmark.names), classes.seen, ours, prompts.tokens)
    rows = [row for row in own if row is not None]
    same = len(rows) == len(own) == len(classes.names)
    if same and not match_names:
        _require_same_order(benchmark, classes, rows)
    unseen = [c.id for c, trained in zip(benchmark.categories, seen, strict=True) if not trained]
    if not (same and benchmark.unseen_ids):
        benchmark = replace(benchmark, unseen_ids=tuple(unseen))
    elif claimed := [c for c in benchmark.categories if c.id in set(benchmark.unseen_ids) - set(unseen)]:
        raise UserError(
            f"benchmark {benchmark.name} calls {brief(claimed[0].name)} unseen, but the checkpoint was trained on it; "
            "take it out of unseen_ids, or empty them for the checkpoint's own"
        )
    complete = len(rows) == len(own)
    return Known(
        benchmark=benchmark,
        vocabulary=Vocabulary(
            embedding=model.text.cpu()[rows] if complete else _embed(model, benchmark.names, teacher_weights, runtime),
            classes=replace(
                classes,
                ids=[c.id for c in benchmark.categories],
                names=benchmark.names,
                isthing=[c.isthing for c in benchmark.categories],
                seen=benchmark.seen,
            ),
        ),
        respelled={
            name: classes.names[row]
            for name, row in zip(benchmark.names, own, strict=True)
            if row is not None and classes.names[row] != name
        },
    )


def _match(
    asked: Sequence[Sequence[str]],
    trained: Sequence[bool],
    ours: Sequence[Sequence[str]],
    identity: Callable[[str], Hashable],
) -> tuple[list[int | None], list[bool]]:
    """For each class of `asked`, given by its synonyms: the class of `ours` with the same ones, or None; and whether a
    `trained` class of `ours` has one of them."""
    row_of = {frozenset(map(identity, parts)): row for row, parts in enumerate(ours)}
    known = {identity(part) for parts, seen in zip(ours, trained, strict=True) if seen for part in parts}
    found = [frozenset(map(identity, parts)) for parts in asked]
    return [row_of.get(one) for one in found], [not known.isdisjoint(one) for one in found]


def _require_same_order(benchmark: Benchmark, classes: ClassList, rows: Sequence[int]) -> None:
    """`rows`: which class of the checkpoint each of the benchmark's is."""
    for place, (row, category) in enumerate(zip(rows, benchmark.categories, strict=True)):
        if (row, classes.ids[row]) != (place, category.id):
            raise UserError(
                f"the checkpoint and benchmark {benchmark.name} list the same classes differently, "
                f"first at position {place}: {classes.names[place]!r} (id {classes.ids[place]}) in the checkpoint, "
                f"{category.name!r} (id {category.id}) in the benchmark; give the benchmark the checkpoint's order and "
                "ids, or pass --match-names to go by the names"
            )


def _prompts(model: Model, teacher_weights: str) -> Prompts:
    """How the checkpoint's own teacher reads names."""
    classes = model.meta.classes
    return Prompts(
        tokenizer=teacher_of(classes.teacher, teacher_weights).load_tokenizer(),
        templates=model.meta.templates,
        clean_names=classes.clean_names,
    )


def _embed(model: Model, names: list[str], teacher_weights: str, runtime: Runtime) -> Tensor:
    """Unit rows of `names` by the checkpoint's own teacher and templates."""
    _require_embeddable(model)
    classes, templates = model.meta.classes, model.meta.templates
    teacher = teacher_of(classes.teacher, teacher_weights).load(runtime)
    return embed_names(teacher, names, templates, clean_names=classes.clean_names).cpu()


def _require_embeddable(model: Model) -> None:
    """Raises UserError where the checkpoint can take no other classes than its own."""
    if model.meta.linear:
        raise UserError(
            "the checkpoint's classifier is linear and knows no other classes than its own; use one with a projector"
        )
    if not model.meta.templates:
        raise UserError(
            "the checkpoint's class embeddings were imported, so no other name can be embedded alike; "
            "train it without --text.embeddings to use other names"
        )
