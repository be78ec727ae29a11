"""Stage "text": the teacher's text embeddings of the class names, used in place of a classifier's weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.benchmarks import Benchmark
from pipeline.runtime import Runtime
from pipeline.teacher.config import TeacherConfig, TextConfig
from pipeline.teacher.prompts import Prompts, alike, brief
from pipeline.teacher.text_bank import embed_names, encoded_alike
from storage.errors import UserError, counted
from storage.keys import Recipe, sha256_file
from storage.store import Build

if TYPE_CHECKING:
    from torch import Tensor

    from models.teacher import Tokenizer

STAGE, VERSION = "text", 2
log = logging.getLogger(__name__)


def recipe(config: TextConfig, *, teacher: TeacherConfig, benchmark: Benchmark) -> Recipe:
    """Raises UserError for class names that are not distinct, and for files that are missing or list other classes.

    Names that differ in spelling alone are compared by the teacher's tokenizer, before anything is built; `build`
    compares all of them.
    """
    if config.embeddings:
        _require_names(config, benchmark)
        text: Any = {"embeddings": sha256_file(_file(config.embeddings, "embeddings"))}
    else:
        if alike(benchmark.names, clean_names=config.clean_names):
            _prompts(config, teacher.load_tokenizer()).classes(benchmark.names)
        text = {"templates": config.templates, "clean_names": config.clean_names}
    content = {
        "text": text,
        "teacher": teacher.identity,
        "categories": benchmark.categories,
        "unseen_ids": benchmark.unseen_ids,
    }
    return Recipe(kind="text", stage=STAGE, version=VERSION, config=content, inputs={})


def build(build: Build, config: TextConfig, runtime: Runtime, *, teacher: TeacherConfig, benchmark: Benchmark) -> None:
    """Encode the benchmark's class names, seen and unseen, or import their rows; the manifest lists the names of which
    the tokenizer cuts the end, and, where there are any, pairs that encode almost alike, with their cosine.

    Raises UserError for names that are one class to the teacher (see `Prompts`), and for rows that do not fit.
    """
    from storage.checkpoints import FILES, save_checkpoint

    clip = teacher.load(runtime)
    if config.embeddings:
        embedding, cut = import_rows(config, benchmark, dim=clip.dim), []
    else:
        embedding = embed_names(clip, benchmark.names, config.templates, clean_names=config.clean_names)
        cut = _prompts(config, clip.tokenizer).cut(benchmark.names)
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
    build.add(*(build.path / name for name in FILES))
    build.counts |= {"classes": len(embedding), "seen": sum(benchmark.seen), "templates": len(templates)}
    build.counts["cut_names"] = cut
    if near := encoded_alike(embedding, benchmark.names):
        build.counts["alike_names"] = [[one, other, round(cosine, 4)] for one, other, cosine in near]
        one, other, cosine = near[0]
        log.warning(
            "%s encode almost alike, the nearest %s and %s (cosine %.3f), and are hard to tell apart; rename or merge them",
            counted(len(near), "pair") + " of classes", brief(one), brief(other), cosine,
        )  # fmt: skip


def _prompts(config: TextConfig, tokenizer: Tokenizer) -> Prompts:
    return Prompts(tokenizer=tokenizer, templates=config.templates, clean_names=config.clean_names)


def import_rows(config: TextConfig, benchmark: Benchmark, *, dim: int) -> Tensor:
    """The rows of the file `config.embeddings`, normalised to unit length: (K, D) float32.

    Raises UserError for a file that is no float array, is not of shape (K, dim), or has a row that is zero, not finite,
    or that of another class.
    """
    import numpy as np
    import torch

    path = _file(config.embeddings, "embeddings")
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a .npy array ({error}); write it with numpy.save") from error
    if not isinstance(rows, np.ndarray) or rows.dtype.kind != "f":
        raise UserError(f"{path} holds no floating-point array; write it with numpy.save")
    if rows.shape != (len(benchmark.names), dim):
        raise UserError(
            f"{path} has shape {rows.shape}, but {len(benchmark.names)} classes of width {dim} are wanted; "
            "embed the benchmark's names with this teacher's text encoder"
        )
    rows = rows.astype(np.float64)
    length = np.linalg.norm(rows, axis=1)
    for name, value in zip(benchmark.names, length, strict=True):
        if not np.isfinite(value) or value == 0:
            raise UserError(f"{path}: the row of class {name!r} is zero or not finite; embed it again")
    unit = (rows / length[:, None]).astype(np.float32)
    owner: dict[bytes, str] = {}
    for name, row in zip(benchmark.names, unit, strict=True):
        if (other := owner.setdefault(row.tobytes(), name)) != name:
            raise UserError(
                f"{path}: classes {brief(other)} and {brief(name)} have the same row, so no image can tell them apart; "
                "embed different names"
            )
    return torch.from_numpy(unit)


def _require_names(config: TextConfig, benchmark: Benchmark) -> None:
    """Raise UserError unless the file `config.names` lists the benchmark's class names in order."""
    import json

    path = _file(config.names, "names")
    try:
        content = path.read_text(encoding="utf-8")
        names = json.loads(content) if path.suffix == ".json" else content.splitlines()
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{path} is no list of names ({error}); write a JSON list, or one name a line") from error
    if not isinstance(names, list):
        raise UserError(f"{path} holds no list; write the class names as a JSON list, or one a line")
    for place, wanted in enumerate(benchmark.names):
        found = names[place] if place < len(names) else None
        if found != wanted:
            raise UserError(
                f"{path}: name {place + 1} is {found!r}, "
                f"but class {place + 1} of benchmark {benchmark.name} is {wanted!r}; "
                "bring names and rows into the benchmark's order"
            )
    if len(names) > len(benchmark.names):
        extra = names[len(benchmark.names)]
        raise UserError(f"{path}: {extra!r} is no class of benchmark {benchmark.name}; leave it and its row out")


def _file(name: str, field: str) -> Path:
    if not Path(name).is_file():
        raise UserError(f"{field} file {name} not found; correct --text.{field}")
    return Path(name)
