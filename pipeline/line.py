"""The straight line: which stages there are, what each one reads, and the key of everything, known before anything
runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from pipeline import cache_clip, cpa, evaluate, g2s, mask_tokens, queries, scenes, shard, text, v2c
from pipeline.data import benchmarks, label_maps
from pipeline.data.coco import coco_source
from pipeline.data.config import CocoConfig, ShardConfig
from pipeline.runtime import Runtime, torchrun_rank
from pipeline.scoring.config import EvaluateConfig
from pipeline.scoring.published import Beyond
from pipeline.teacher.config import TeacherConfig, TextConfig, TokensConfig
from pipeline.training.config import CPAConfig, G2SConfig, QueriesConfig, V2CConfig
from pipeline.world.config import ScenesConfig
from storage.errors import UserError
from storage.keys import Recipe, Ref
from storage.store import Build, Store

log = logging.getLogger(__name__)

# Networks on views of at most so many pixels a side, and the multilayer perceptrons of stages 2 and 3, gain little from a
# second thread and take about twice as long with it beside any other process: they compute with one.
SMALL_VIEW = 128
STAGES = ("scenes", "shard", "text", "cache-clip", "v2c", "queries", "g2s", "cpa", "mask-tokens", "evaluate")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is made of, one field a stage. Presets (flows/presets.py) return it; flags override single
    fields.
    """

    preset: str
    """Name of the preset that this is, with or without fields replaced."""

    data: ScenesConfig | CocoConfig
    """Training and validation images: generated scenes, or a folder in COCO's layout."""

    shard: ShardConfig = field(default_factory=ShardConfig)
    """Images and annotations, checked and packed into tars."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The frozen CLIP, which stages text, cache-clip and mask-tokens read."""

    text: TextConfig = field(default_factory=TextConfig)
    """Text embeddings of the class names."""

    tokens: TokensConfig = field(default_factory=TokensConfig)
    """Stages cache-clip and mask-tokens: the teacher's embeddings of images, masked instances and masks that were
    found."""

    v2c: V2CConfig = field(default_factory=V2CConfig)
    """Training stage 1: segmenter and projector (vision-to-CLIP alignment, paper Eq. 1 to 5)."""

    queries: QueriesConfig = field(default_factory=QueriesConfig)
    """The frozen segmenter's query features of every training image, which stages 2 and 3 learn from."""

    g2s: G2SConfig = field(default_factory=G2SConfig)
    """Training stage 2: the generator (generation-to-semantic alignment, paper Eq. 6 to 8)."""

    cpa: CPAConfig = field(default_factory=CPAConfig)
    """Training stage 3: the projector, on real and generated features (class projector adaptation, paper Eq. 9)."""

    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Scores of both checkpoints, and the report."""


class StageModule(Protocol):
    """What the module of a stage exports.

    `STAGE` is its name, `VERSION` is raised when the meaning of its output changes. `recipe(config, **given)` computes
    the key and reads no artefact. `build(build, config, runtime, **given)` does the work: it opens the recipe's inputs
    by name from `build` (a `storage.store.Build`), writes into `build.path`, names its files with `build.add` and counts
    in `build.counts`; before it saves what a later attempt may go on with, it calls `storage.inputs.vouch`. Of `given`
    it receives what is no input.
    """

    @property
    def STAGE(self) -> str: ...

    @property
    def VERSION(self) -> int: ...

    @property
    def recipe(self) -> Callable[..., Recipe]: ...

    @property
    def build(self) -> Callable[..., None]: ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run: its recipe, and the work that builds its artefact from cached inputs.

    `threads` is the number of CPU threads that serves its work best, 0 = all cores; it is in no key.
    """

    name: str
    recipe: Recipe
    work: Callable[..., None]
    threads: int = 0

    @classmethod
    def of(cls, module: StageModule, config: Any, *, threads: int = 0, **given: Any) -> Stage:
        """The stage of a module with its config, its inputs (`Ref`) and what else it reads, by name."""
        recipe = module.recipe(config, **given)
        rest = {name: value for name, value in given.items() if name not in recipe.inputs}
        return cls(name=module.STAGE, recipe=recipe, work=partial(module.build, config=config, **rest), threads=threads)

    def run(self, store: Store, runtime: Runtime) -> Ref:
        """Build the artefact, unless it is complete, with the stage's own number of threads unless `runtime` names one.

        Of the processes that torchrun started the first one builds, and the others compute along; with `runtime.remote`
        each machine has a store of its own.

        Raises UserError as `Store.build`, and for what the stage refuses.
        """
        ref, runtime = self.recipe.ref, replace(runtime, threads=runtime.threads or self.threads)
        if not torchrun_rank():
            return store.build(self.recipe, partial(self._build, runtime=runtime))
        if runtime.remote:
            store.compute_along(self.recipe, partial(self.work, runtime=runtime))
        else:
            self.work(store.under_way(self.recipe), runtime=runtime)
        return ref

    def _build(self, build: Build, runtime: Runtime) -> None:
        build.provenance["threads"] = runtime.workers
        log.info("%s: %d CPU thread%s", self.name, runtime.workers, "s" * (runtime.workers > 1))
        self.work(build, runtime=runtime)


def line(config: Config) -> list[Stage]:
    """The stages of a run in order. Reads no artefact; of real images it takes the fingerprint.

    Raises UserError where the data folder, the benchmark or the teacher's weights file cannot be found, and where stage
    1 is to learn from regions that are not looked for.
    """
    if config.v2c.candidates and config.tokens.regions == "none":
        raise UserError(
            "v2c: candidate_mask_weight and candidate_token_weight need regions of what has no label; pass "
            "--tokens.regions components, or set both weights to 0"
        )
    stages: list[Stage] = []
    networks = 1 if max(config.v2c.augment.size, config.v2c.resize.longest) <= SMALL_VIEW else 0

    def add(module: StageModule, stage_config: Any, *, threads: int = 0, **given: Any) -> Ref:
        stages.append(Stage.of(module, stage_config, threads=threads, **given))
        return stages[-1].recipe.ref

    benchmark = benchmark_of(config)
    if isinstance(config.data, ScenesConfig):
        source = add(scenes, config.data)
    else:
        root = config.data.root
        source = (
            label_maps.label_source(root, benchmark) if benchmark.files else coco_source(root, benchmark.annotations)
        )
    teacher = config.teacher
    shards = add(shard, config.shard, source=source, benchmark=benchmark)
    bank = add(text, config.text, teacher=teacher, benchmark=benchmark)
    tokens = add(cache_clip, config.tokens, teacher=teacher, benchmark=benchmark, shards=shards)
    inputs = {"shards": shards, "tokens": tokens, "text": bank}
    stage_1 = add(v2c, config.v2c, threads=networks, **inputs)
    cached = add(queries, config.queries, threads=networks, **inputs, checkpoint=stage_1)
    generator = add(g2s, config.g2s, threads=1, queries=cached, text=bank, checkpoint=stage_1)
    stage_3 = add(cpa, config.cpa, threads=1, queries=cached, text=bank, checkpoint=stage_1, generator=generator)
    masks = add(
        mask_tokens, config.tokens, threads=networks, teacher=teacher, benchmark=benchmark,
        calibration_images=config.v2c.calibration_images, shards=shards, checkpoint=stage_1,
    )  # fmt: skip
    add(
        evaluate, config.evaluate, threads=networks, benchmark=benchmark, threshold_slack=config.v2c.threshold_slack,
        beyond=_beyond_the_paper(config), min_area=config.tokens.min_area, **inputs, inductive=stage_1,
        generator=generator, transductive=stage_3, mask_tokens=masks,
    )  # fmt: skip
    return stages


def _beyond_the_paper(config: Config) -> tuple[Beyond, ...]:
    """What makes the scores of a run incomparable with the paper's, whatever its images."""
    found: list[Beyond] = []
    if config.v2c.candidates:
        found.append("regions")
    if isinstance(config.data, CocoConfig) and config.data.protocol != "own":
        found.append("protocol")
    return tuple(found)


def benchmark_of(config: Config) -> benchmarks.Benchmark:
    """The classes of a run and their split. Raises UserError for a benchmark that cannot be read, or whose
    classes are all seen or all unseen.
    """
    if isinstance(config.data, ScenesConfig):
        return scenes.benchmark(config.data)
    return _for_training(benchmarks.benchmark_of_coco(config.data))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _for_training(benchmark: benchmarks.Benchmark) -> benchmarks.Benchmark:
    if all(benchmark.seen) or not any(benchmark.seen):
        none = "unseen" if all(benchmark.seen) else "seen"
        raise UserError(
            f"benchmark {benchmark.name} has no {none} class and is for `zs-seg evaluate`; "
            f"train on one that has both, or choose with --data.unseen among {_some(benchmark.names)}"
        )
    return benchmark
