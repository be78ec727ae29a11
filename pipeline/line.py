"""The straight line: which stages there are, what each one reads, and the key of everything, known before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline import cache_clip, cpa, evaluate, g2s, queries, scenes, shard, text, v2c
from pipeline.data import benchmarks, label_maps
from pipeline.data.config import CocoConfig
from pipeline.teacher.config import TeacherConfig
from storage.errors import UserError
from storage.keys import Recipe, Ref

STAGES = ("scenes", "shard", "text", "cache-clip", "v2c", "queries", "g2s", "cpa", "evaluate")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is made of, one field a stage. Presets (flows/presets.py) return it; flags override single fields."""

    preset: str
    data: scenes.ScenesConfig | CocoConfig
    shard: shard.ShardConfig = field(default_factory=shard.ShardConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    text: text.TextConfig = field(default_factory=text.TextConfig)
    tokens: cache_clip.TokensConfig = field(default_factory=cache_clip.TokensConfig)
    v2c: v2c.V2CConfig = field(default_factory=v2c.V2CConfig)
    queries: queries.QueriesConfig = field(default_factory=queries.QueriesConfig)
    g2s: g2s.G2SConfig = field(default_factory=g2s.G2SConfig)
    cpa: cpa.CPAConfig = field(default_factory=cpa.CPAConfig)
    evaluate: evaluate.EvaluateConfig = field(default_factory=evaluate.EvaluateConfig)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run: its recipe, and the call that builds it from its cached inputs."""

    stage: str
    recipe: Recipe
    run: Callable[..., Ref]  # (store=..., runtime=...)


def line(config: Config) -> list[Stage]:
    """The stages of a run in order. Reads no artefact; of real images it takes the fingerprint.

    Raises UserError where the data folder, the benchmark or the teacher's weights file cannot be found.
    """
    steps: list[Stage] = []

    def add(module: Any, stage_config: Any, **inputs: Any) -> Ref:
        recipe = module.recipe(stage_config, **inputs)
        steps.append(Stage(stage=module.STAGE, recipe=recipe, run=partial(module.run, stage_config, **inputs)))
        return recipe.ref

    benchmark = benchmark_of(config)
    if isinstance(config.data, scenes.ScenesConfig):
        source = add(scenes, config.data)
    else:
        root = config.data.root
        source = label_maps.label_source(root, benchmark) if benchmark.files else shard.coco_source(root)
    teacher = config.teacher
    shards = add(shard, config.shard, source=source, benchmark=benchmark)
    bank = add(text, config.text, teacher=teacher, benchmark=benchmark)
    tokens = add(cache_clip, config.tokens, teacher=teacher, benchmark=benchmark, shards=shards)
    stage_1 = add(v2c, config.v2c, shards=shards, tokens=tokens, text=bank)
    cached = add(queries, config.queries, shards=shards, tokens=tokens, text=bank, checkpoint=stage_1)
    generator = add(g2s, config.g2s, queries=cached, text=bank, checkpoint=stage_1)
    stage_3 = add(cpa, config.cpa, queries=cached, text=bank, checkpoint=stage_1, generator=generator)
    add(
        evaluate, config.evaluate, benchmark=benchmark, shards=shards, tokens=tokens, text=bank,
        inductive=stage_1, generator=generator, transductive=stage_3,
    )  # fmt: skip
    return steps


def benchmark_of(config: Config) -> benchmarks.Benchmark:
    """The classes of a run and their split. Raises UserError for a benchmark that cannot be read or has but seen or unseen classes."""
    if isinstance(config.data, scenes.ScenesConfig):
        return scenes.benchmark(config.data)
    return _for_training(benchmarks.load_benchmark(config.data.benchmark))


def _for_training(benchmark: benchmarks.Benchmark) -> benchmarks.Benchmark:
    if all(benchmark.seen) or not any(benchmark.seen):
        none = "unseen" if all(benchmark.seen) else "seen"
        raise UserError(
            f"benchmark {benchmark.name} has no {none} class and is for `zs-seg evaluate`; train on one that has both, or "
            "correct its unseen_ids"
        )
    return benchmark
