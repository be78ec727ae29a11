"""The class names a checkpoint is asked to choose from: its own, its own and further ones, or those of another
benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pipeline.data.benchmarks import Benchmark, Category
from pipeline.inference.model import Model
from pipeline.runtime import Runtime
from pipeline.teacher.config import teacher_of
from pipeline.teacher.prompts import synonyms
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

    Raises UserError for a name that is there already or twice, and when the teacher's weights are not those.
    """
    classes, embedding = model.meta.classes, model.text.cpu()
    columns: dict[str, list[Any]] = {name: list(getattr(classes, name)) for name in ("ids", "names", "isthing", "seen")}
    for name in names:
        if name in columns["names"]:
            raise UserError(f"--names: the checkpoint knows {name!r} already, or it is given twice; leave it out")
        for column, value in (("ids", max(columns["ids"]) + 1), ("names", name), ("isthing", True), ("seen", False)):
            columns[column].append(value)
    if names:
        synonyms(columns["names"], clean_names=classes.clean_names)
        embedding = join(embedding, _embed(model, list(names), teacher_weights, runtime))
    return Vocabulary(embedding=embedding, classes=replace(classes, **columns))


def vocabulary_of(model: Model, benchmark: Benchmark, teacher_weights: str, runtime: Runtime) -> Vocabulary:
    """The benchmark's classes for this checkpoint: its own rows where these are its classes, else encoded as it was
    trained.

    Raises UserError when the teacher's weights are not those of the checkpoint.
    """
    classes = model.meta.classes
    own = benchmark.names == classes.names
    return Vocabulary(
        embedding=model.text.cpu() if own else _embed(model, benchmark.names, teacher_weights, runtime),
        classes=replace(
            classes,
            ids=[c.id for c in benchmark.categories],
            names=benchmark.names,
            isthing=[c.isthing for c in benchmark.categories],
            seen=benchmark.seen,
        ),
    )


def as_trained(benchmark: Benchmark, classes: ClassList) -> Benchmark:
    """The benchmark with the classes as unseen that a checkpoint with `classes` was not trained on.

    A class is seen if the checkpoint has seen its name. Where the classes are the checkpoint's own, and the benchmark
    names unseen ones, the benchmark decides.

    Raises UserError when the benchmark has exactly the checkpoint's names in another order or with other ids.
    """
    ids = [category.id for category in benchmark.categories]
    if set(benchmark.names) == set(classes.names):
        _require_same_order(
            benchmark.name,
            list(zip(classes.names, classes.ids, strict=True)),
            list(zip(benchmark.names, ids, strict=True)),
        )
        if benchmark.unseen_ids:
            return benchmark
    seen = {name for name, known in zip(classes.names, classes.seen, strict=True) if known}
    return replace(benchmark, unseen_ids=tuple(c.id for c in benchmark.categories if c.name not in seen))


def _require_same_order(name: str, ours: list[tuple[str, int]], theirs: list[tuple[str, int]]) -> None:
    for place, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our != their:
            raise UserError(
                f"the checkpoint and benchmark {name} list the same class names differently, "
                f"first at position {place}: "
                f"{our[0]!r} (id {our[1]}) in the checkpoint, {their[0]!r} (id {their[1]}) in the benchmark; "
                "give the benchmark the checkpoint's order and ids"
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
