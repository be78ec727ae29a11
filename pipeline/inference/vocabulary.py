"""The class names a checkpoint is asked to choose from: its own, its own and further ones, or those of another
benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pipeline.data.benchmarks import Benchmark, Category
from pipeline.inference.model import Model
from pipeline.runtime import Runtime
from pipeline.teacher.config import teacher_of
from pipeline.teacher.prompts import Prompts, brief, synonyms
from pipeline.teacher.text_bank import ClassList, embed_names, join
from storage.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The classes to choose from, and their unit rows (K, D) or (K, S, D), see `TextBank`."""

    embedding: Tensor
    classes: ClassList

    @property
    def categories(self) -> tuple[Category, ...]:
        columns = zip(self.classes.ids, self.classes.names, self.classes.isthing, strict=True)
        return tuple(Category(id=i, name=name, isthing=isthing) for i, name, isthing in columns)


def extend(model: Model, names: Sequence[str], teacher_weights: str, runtime: Runtime) -> Vocabulary:
    """A checkpoint's classes and, behind them, `names`, encoded with the same sentences by the same teacher.

    Raises UserError for a name that is there already or twice, by the rule of `Prompts`, and when the teacher's weights
    are not those.
    """
    classes, embedding = model.meta.classes, model.text.cpu()
    columns: dict[str, list[Any]] = {name: list(getattr(classes, name)) for name in ("ids", "names", "isthing", "seen")}
    for name in names:
        if name in columns["names"]:
            raise UserError(f"--names: the checkpoint knows {name!r} already, or it is given twice; leave it out")
        for column, value in (("ids", max(columns["ids"]) + 1), ("names", name), ("isthing", True), ("seen", False)):
            columns[column].append(value)
    if names:
        rows = _embed(model, list(names), teacher_weights, runtime)
        _prompts(model, teacher_weights).classes(columns["names"])
        embedding = join(embedding, rows)
    return Vocabulary(embedding=embedding, classes=replace(classes, **columns))


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
    classes, templates = model.meta.classes, model.meta.templates
    if model.meta.linear:
        raise UserError(
            "the checkpoint's classifier is linear and knows no other classes than its own; use one with a projector"
        )
    if not templates:
        raise UserError(
            "the checkpoint's class embeddings were imported, so no other name can be embedded alike; "
            "train it without --text.embeddings to use other names"
        )
    teacher = teacher_of(classes.teacher, teacher_weights).load(runtime)
    return embed_names(teacher, names, templates, clean_names=classes.clean_names).cpu()
