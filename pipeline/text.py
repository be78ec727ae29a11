"""Stage "text": the class names as the teacher's text embeddings, the bank that takes the place of a classifier's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.benchmarks import Benchmark
from pipeline.class_names import spoken, template_sets
from pipeline.runtime import Runtime
from pipeline.teaching import TeacherConfig
from storage.keys import Recipe, Ref, sha256_file
from storage.store import Build, Store

if TYPE_CHECKING:
    from torch import Tensor

    from models.teacher import Teacher

STAGE, VERSION = "text", 2


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How a class name becomes a row: every sentence is encoded, the unit rows are averaged, the mean is made unit length.

    `templates`: the sentences, or the name of one set of `pipeline/facts/text/templates.json`, which then stands here in full. A class
    name may list synonyms, "person, human": each gets a row of its own, and the class the largest of their logits. `clean_names`: see
    `class_names.clean`. `embeddings`: a .npy file (K, D) of rows made elsewhere, which replaces all that; `names`: its class names in
    order, a JSON list or one a line. The rows count by content, not by path.
    """

    templates: tuple[str, ...] = ("{}", "a {}", "a photo of a {}", "a picture of {}")
    clean_names: bool = False
    embeddings: str = ""
    names: str = ""

    def __post_init__(self) -> None:
        if len(self.templates) == 1 and "{}" not in self.templates[0]:
            sets = template_sets()
            if self.templates[0] not in sets:
                raise ValueError(
                    f"text: template {self.templates[0]!r} needs exactly one {{}} for the class name, "
                    f"or be the name of a set: {', '.join(sets)}"
                )
            object.__setattr__(self, "templates", sets[self.templates[0]])
        if not self.templates or any(t.count("{}") != 1 for t in self.templates):
            raise ValueError("text: every template needs exactly one {} for the class name")
        if bool(self.embeddings) != bool(self.names):
            raise ValueError("text: embeddings and names belong together; pass --text.embeddings and --text.names")


@dataclass(frozen=True, kw_only=True)
class TextBank:
    """The classes in their fixed order: `embedding` unit rows, and per class its id, name, kind, and whether it is seen.

    `embedding` is (K, D), or (K, S, D) where classes have synonyms, up to S names a class; a class with fewer repeats its first, which
    moves no maximum. `templates` is empty for rows that were imported.
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
        """(K, D): of each class the row of its first name, where one row must stand for the class."""
        return self.embedding if self.embedding.ndim == 2 else self.embedding[:, 0]

    def classes(self) -> dict[str, Any]:
        """Which classes these are and who embedded them, as checkpoints record it."""
        return {
            "text": self.key, "ids": self.ids, "names": self.names, "isthing": self.isthing, "seen": self.seen,
            "teacher": self.teacher, "clean_names": self.clean_names,
        }  # fmt: skip


def recipe(config: TextConfig, *, teacher: TeacherConfig, benchmark: Benchmark) -> Recipe:
    """Raises ValueError for class names that cannot be told apart, and for files that are missing or list other classes."""
    if config.embeddings:
        _require_names(config, benchmark)
        text: Any = {"embeddings": sha256_file(_file(config.embeddings, "embeddings"))}
    else:
        spoken(benchmark.names, clean_names=config.clean_names)
        text = {"templates": config.templates, "clean_names": config.clean_names}
    content = {
        "text": text, "teacher": teacher.identity, "categories": benchmark.categories, "unseen_ids": benchmark.unseen_ids,
    }  # fmt: skip
    return Recipe(kind="text", stage=STAGE, version=VERSION, config=content, inputs={})


def run(config: TextConfig, *, teacher: TeacherConfig, benchmark: Benchmark, store: Store, runtime: Runtime) -> Ref:
    """Encode the benchmark's class names, seen and unseen, or import their rows."""

    def work(build: Build) -> None:
        from storage.checkpoints import save_checkpoint

        clip = teacher.load(runtime)
        if config.embeddings:
            embedding = import_rows(config, benchmark, dim=clip.dim)
        else:
            embedding = embed_names(clip, benchmark.names, config.templates, clean_names=config.clean_names)
        templates = [] if config.embeddings else list(config.templates)
        meta = {
            "ids": [c.id for c in benchmark.categories],
            "names": benchmark.names,
            "isthing": [c.isthing for c in benchmark.categories],
            "seen": benchmark.seen,
            "teacher": teacher.identity,
            "templates": templates,
            "clean_names": config.clean_names,
        }
        save_checkpoint(build.path, {"embedding": embedding.cpu()}, meta)
        build.counts |= {"classes": len(embedding), "seen": sum(benchmark.seen), "templates": len(templates)}

    return store.build(recipe(config, teacher=teacher, benchmark=benchmark), work)


def embed_names(
    teacher: Teacher, names: Sequence[str], templates: Sequence[str], *, clean_names: bool = False
) -> Tensor:
    """Class names -> unit rows (K, D), or (K, S, D) where a name lists synonyms (see `TextBank`).

    A row is the mean over templates of unit sentence embeddings, made unit length again.
    """
    import torch
    from torch.nn.functional import normalize

    known_as = spoken(names, clean_names=clean_names)
    rows = [
        torch.stack([teacher.encode_texts([t.replace("{}", part) for t in templates]).mean(0) for part in parts])
        for parts in known_as
    ]
    width = max(map(len, rows))
    padded = torch.stack([torch.cat([row, row[:1].expand(width - len(row), -1)]) for row in rows])
    return normalize(padded if width > 1 else padded[:, 0], dim=-1)


def join(first: Tensor, second: Tensor) -> Tensor:
    """Rows of classes (K, D) or (K, S, D), one set behind the other."""
    import torch

    if first.ndim == second.ndim == 2:
        return torch.cat([first, second])
    parts = [rows if rows.ndim == 3 else rows[:, None] for rows in (first, second)]
    width = max(rows.shape[1] for rows in parts)
    return torch.cat([torch.cat([rows, rows[:, :1].expand(-1, width - rows.shape[1], -1)], dim=1) for rows in parts])


def import_rows(config: TextConfig, benchmark: Benchmark, *, dim: int) -> Tensor:
    """The rows of `config.embeddings`, made unit length: (K, D) float32.

    Raises ValueError for a file that is no array of floats, not (classes, dim), or holds a row that is zero or not finite.
    """
    import numpy as np
    import torch

    path = _file(config.embeddings, "embeddings")
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a .npy array ({error}); write it with numpy.save") from error
    if not isinstance(rows, np.ndarray) or rows.dtype.kind != "f":
        raise ValueError(f"{path} holds no floating-point array; write it with numpy.save")
    if rows.shape != (len(benchmark.names), dim):
        raise ValueError(
            f"{path} has shape {rows.shape}, but {len(benchmark.names)} classes of width {dim} are wanted; "
            "embed the benchmark's names with this teacher's text encoder"
        )
    rows = rows.astype(np.float64)
    length = np.linalg.norm(rows, axis=1)
    for name, value in zip(benchmark.names, length, strict=True):
        if not np.isfinite(value) or value == 0:
            raise ValueError(f"{path}: the row of class {name!r} is zero or not finite; embed it again")
    return torch.from_numpy((rows / length[:, None]).astype(np.float32))


def _require_names(config: TextConfig, benchmark: Benchmark) -> None:
    """Is row i of the embeddings that of class i?"""
    import json

    path = _file(config.names, "names")
    try:
        content = path.read_text(encoding="utf-8")
        names = json.loads(content) if path.suffix == ".json" else content.splitlines()
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is no list of names ({error}); write a JSON list, or one name a line") from error
    if not isinstance(names, list):
        raise ValueError(f"{path} holds no list; write the class names as a JSON list, or one a line")
    for place, wanted in enumerate(benchmark.names):
        found = names[place] if place < len(names) else None
        if found != wanted:
            raise ValueError(
                f"{path}: name {place + 1} is {found!r}, but class {place + 1} of benchmark {benchmark.name} is {wanted!r}; "
                "bring names and rows into the benchmark's order"
            )
    if len(names) > len(benchmark.names):
        extra = names[len(benchmark.names)]
        raise ValueError(f"{path}: {extra!r} is no class of benchmark {benchmark.name}; leave it and its row out")


def _file(name: str, field: str) -> Path:
    if not Path(name).is_file():
        raise ValueError(f"{field} file {name} not found; correct --text.{field}")
    return Path(name)


def open_text(folder: Path, key: str) -> TextBank:
    """Read a text artefact. Raises ValueError when it is damaged."""
    from storage.checkpoints import load_checkpoint

    tensors, meta = load_checkpoint(folder)
    try:
        return TextBank(key=key, embedding=tensors["embedding"], **meta)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no text bank ({error}); rebuild it with `zs-seg run --force text`") from error
