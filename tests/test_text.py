"""The text bank: every row by a slow loop, in the benchmark's order, under a key of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clip_reference import embed_text, small_clip

from pipeline import scenes, text
from pipeline.benchmarks import Benchmark
from pipeline.runtime import Runtime
from pipeline.teaching import TeacherConfig
from pipeline.text import TextBank, TextConfig, open_text
from storage.store import Store

TEACHER = TeacherConfig(name="small", pretrained="shipped", fill="mean")
BENCHMARK = scenes.benchmark(scenes.ScenesConfig())
CONFIG = TextConfig(templates=("{}", "a photo of a {}", "a {}"))


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> TextBank:
    return make(tmp_path_factory.mktemp("store"))


def make(root: Path, config: TextConfig = CONFIG, benchmark: Benchmark = BENCHMARK) -> TextBank:
    store = Store(root)
    ref = text.run(config, teacher=TEACHER, benchmark=benchmark, store=store, runtime=Runtime(progress=False))
    return open_text(store.open(ref).path, ref.key)


def key(config: TextConfig = CONFIG, teacher: TeacherConfig = TEACHER, benchmark: Benchmark = BENCHMARK) -> str:
    return text.recipe(config, teacher=teacher, benchmark=benchmark).key


def test_each_row_is_the_documented_mean(bank: TextBank) -> None:
    """Unit sentence rows, averaged, made unit length: one class and one sentence at a time, in float64."""
    clip, tokenizer = small_clip()
    assert bank.embedding.shape == (len(BENCHMARK.categories), 128)
    for row, category in zip(bank.embedding, BENCHMARK.categories, strict=True):
        total = torch.zeros(128, dtype=torch.float64)
        for template in CONFIG.templates:
            total += embed_text(clip, tokenizer, template.replace("{}", category.name))
        assert torch.allclose(row.double(), total / total.square().sum().sqrt(), atol=1e-5)


def test_an_opened_bank_is_what_was_written(bank: TextBank) -> None:
    categories = BENCHMARK.categories
    assert bank.key == key()
    assert bank.embedding.dtype == torch.float32
    assert bank.ids == [c.id for c in categories]
    assert bank.names == [c.name for c in categories]
    assert bank.isthing == [c.isthing for c in categories]
    assert bank.seen == [c.id not in BENCHMARK.unseen_ids for c in categories]
    assert not all(bank.seen) and any(bank.seen)
    assert bank.teacher == TEACHER.identity
    listed = bank.classes()
    assert listed.pop("text") == bank.key
    assert listed == {name: getattr(bank, name) for name in ("ids", "names", "isthing", "seen", "teacher")}


def test_the_order_is_the_benchmarks(bank: TextBank, tmp_path: Path) -> None:
    backwards = make(tmp_path, benchmark=replace(BENCHMARK, categories=BENCHMARK.categories[::-1]))
    assert backwards.names == bank.names[::-1] and backwards.seen == bank.seen[::-1]
    assert torch.allclose(backwards.embedding, bank.embedding.flip(0), atol=1e-5)
    assert backwards.key != bank.key


def test_keys_follow_everything_that_decides_the_rows() -> None:
    random = TeacherConfig(name="small", pretrained="random", fill="mean")
    first, *others = BENCHMARK.categories
    keys = [
        key(),
        key(replace(CONFIG, templates=CONFIG.templates[:2])),
        key(replace(CONFIG, templates=CONFIG.templates[::-1])),
        key(teacher=random),
        key(teacher=replace(random, seed=1)),
        key(teacher=replace(random, fill="zero")),
        key(benchmark=replace(BENCHMARK, categories=(replace(first, name="crimson circle"), *others))),
        key(benchmark=replace(BENCHMARK, unseen_ids=BENCHMARK.unseen_ids[1:])),
    ]
    assert len(set(keys)) == len(keys)
    again = TeacherConfig(name="small", pretrained="shipped", fill="mean")
    assert key(TextConfig(templates=CONFIG.templates), again) == keys[0]


@pytest.mark.parametrize("templates", [(), ("a photo",), ("{}", "{} and {}")])
def test_a_template_without_exactly_one_place_is_refused(templates: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="exactly one {} for the class name"):
        TextConfig(templates=templates)


def test_the_counts_are_in_the_manifest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ref = text.run(CONFIG, teacher=TEACHER, benchmark=BENCHMARK, store=store, runtime=Runtime(progress=False))
    unseen = len(BENCHMARK.unseen_ids)
    total = len(BENCHMARK.categories)
    assert store.open(ref).manifest.counts == {"classes": total, "seen": total - unseen, "templates": 3}
