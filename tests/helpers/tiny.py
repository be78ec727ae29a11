"""A tiny run of the generated world, with the real teacher and real stages: what the tests of the stages share."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace

from flows.presets import preset
from pipeline.line import Config, Stage, line
from pipeline.runtime import Runtime
from storage.keys import Ref
from storage.store import Store

QUIET = Runtime(progress=False, dask="none")


def tiny_config() -> Config:
    """The demo with few images and a handful of steps."""
    demo = preset("demo")
    return replace(
        demo,
        data=replace(demo.data, train_images=40, val_images=10),
        shard=replace(demo.shard, samples_per_tar=8),
        v2c=replace(demo.v2c, steps=6, batch=4, points=64, bank=16, calibration_images=6, warmup=2),
        queries=replace(demo.queries, views=2),
        g2s=replace(demo.g2s, steps=6, hidden=32),
        cpa=replace(demo.cpa, steps=6, lr=1e-1),
        evaluate=replace(demo.evaluate, pictures=2),
    )


def tiny_regions() -> Config:
    """The same under pixel-ignore, with candidate regions of what then has no label."""
    tiny = tiny_config()
    return replace(
        tiny,
        data=replace(tiny.data, protocol="pixel-ignore", unseen_share=0.7),
        tokens=replace(tiny.tokens, regions="components"),
        v2c=replace(tiny.v2c, candidate_mask_weight=0.5, candidate_token_weight=1.0),
    )


def build(store: Store, config: Config, *, until: str = "evaluate", runtime: Runtime = QUIET) -> dict[str, Stage]:
    """Run the line up to and including the stage `until`; its steps by stage."""
    steps: dict[str, Stage] = {}
    for step in line(config):
        step.run(store=store, runtime=runtime)
        steps[step.name] = step
        if step.name == until:
            break
    return steps


def copy_artefacts(source: Store, target: Store, refs: Iterable[Ref]) -> None:
    """Give a store of a test's own what the shared one has, to change and to damage."""
    for ref in refs:
        shutil.copytree(source.path(ref), target.path(ref))
