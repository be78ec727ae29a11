"""Stage "text": the class names as the teacher's text embeddings, the bank that takes the place of a classifier's weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.benchmarks import Benchmark
from pipeline.runtime import Runtime
from pipeline.teaching import TeacherConfig
from storage.keys import Recipe, Ref
from storage.store import Build, Store

if TYPE_CHECKING:
    from torch import Tensor

    from models.teacher import Teacher

STAGE, VERSION = "text", 1


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How a class name becomes a row: every sentence is encoded, the unit rows are averaged, the mean is made unit length."""

    templates: tuple[str, ...] = ("{}", "a {}", "a photo of a {}", "a picture of {}")

    def __post_init__(self) -> None:
        if not self.templates or any(t.count("{}") != 1 for t in self.templates):
            raise ValueError("text: every template needs exactly one {} for the class name")


@dataclass(frozen=True, kw_only=True)
class TextBank:
    """The classes in their fixed order: `embedding` (K, D) unit rows, and per class its id, name, kind, and whether it is seen."""

    key: str
    embedding: Tensor
    ids: list[int]
    names: list[str]
    isthing: list[bool]
    seen: list[bool]
    teacher: dict[str, Any]
    templates: list[str]

    def classes(self) -> dict[str, Any]:
        """Which classes these are and who embedded them, as checkpoints record it."""
        return {
            "text": self.key, "ids": self.ids, "names": self.names, "isthing": self.isthing, "seen": self.seen, "teacher": self.teacher,
        }  # fmt: skip


def recipe(config: TextConfig, *, teacher: TeacherConfig, benchmark: Benchmark) -> Recipe:
    content = {
        "text": config, "teacher": teacher.identity, "categories": benchmark.categories, "unseen_ids": benchmark.unseen_ids,
    }  # fmt: skip
    return Recipe(kind="text", stage=STAGE, version=VERSION, config=content, inputs={})


def run(config: TextConfig, *, teacher: TeacherConfig, benchmark: Benchmark, store: Store, runtime: Runtime) -> Ref:
    """Encode the benchmark's class names, seen and unseen."""

    def work(build: Build) -> None:
        from storage.checkpoints import save_checkpoint

        embedding = embed_names(teacher.load(runtime), benchmark.names, config.templates)
        meta = {
            "ids": [c.id for c in benchmark.categories],
            "names": benchmark.names,
            "isthing": [c.isthing for c in benchmark.categories],
            "seen": benchmark.seen,
            "teacher": teacher.identity,
            "templates": list(config.templates),
        }
        save_checkpoint(build.path, {"embedding": embedding.cpu()}, meta)
        build.counts |= {"classes": len(embedding), "seen": sum(benchmark.seen), "templates": len(config.templates)}

    return store.build(recipe(config, teacher=teacher, benchmark=benchmark), work)


def embed_names(teacher: Teacher, names: list[str], templates: tuple[str, ...]) -> Tensor:
    """Class names -> unit rows (K, D): mean over templates of unit sentence embeddings, made unit length again."""
    import torch
    from torch.nn.functional import normalize

    means = [teacher.encode_texts([template.replace("{}", name) for template in templates]).mean(0) for name in names]
    return normalize(torch.stack(means), dim=-1)


def open_text(folder: Path, key: str) -> TextBank:
    """Read a text artefact."""
    from storage.checkpoints import load_checkpoint

    tensors, meta = load_checkpoint(folder)
    return TextBank(key=key, embedding=tensors["embedding"], **meta)
