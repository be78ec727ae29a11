"""Stores full of small artefacts with true recipes: lines of the demo that differ in one setting.

`python tests/helpers/many_artefacts.py FOLDER [ARTEFACTS]` makes one to measure the commands on, 2,000 by default, with
50 files each.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from flows.presets import preset
from pipeline.line import Stage, line
from storage.runs import RunRecord, Runs
from storage.store import Build, Store

FILES = 50
BOTH = {"images": 50, "encoded": 50, "instances": 200}
COUNTS = {
    "scenes": {"train2017": BOTH, "val2017": BOTH}, "shard": {"train": BOTH, "val": BOTH}, "cache-clip": {"train": BOTH, "val": BOTH},
    "text": {"classes": 56}, "queries": {"views": 50}, "mask-tokens": {"train": BOTH, "val": BOTH}, "evaluate": {"images": 50},
}  # fmt: skip
"""What `plan` reads of a stage's counts."""


def demo_line(number: int = 0) -> list[Stage]:
    """Number 0 is the demo; every other one has its own setting in v2c and shares what comes before."""
    demo = preset("demo")
    return line(replace(demo, v2c=replace(demo.v2c, lr=demo.v2c.lr * (1 + number / 1000))))


def fill(store: Store, steps: list[Stage], *, files: int = 1) -> None:
    """Build every stage of the line with small files instead of its work."""

    def work(stage: str, build: Build) -> None:
        for number in range(files):
            file = build.path / f"train-{number:06d}.tar"
            file.write_bytes(b"%d" % number)
            build.add(file)
        build.counts.update(COUNTS.get(stage, {}))

    for step in steps:
        store.build(step.recipe, partial(work, step.name))


def note(store: Store, name: str, steps: list[Stage]) -> RunRecord:
    """A run of the line that has ended."""
    made = RunRecord.now(
        name=name, command="zs-seg run --preset demo", refs={step.name: step.recipe.ref for step in steps}
    )
    with Runs(store).running(made):
        return made


def many(root: Path, artefacts: int = 2000) -> Store:
    """So many artefacts: the demo's line and others of which v2c and all that follows are their own; every fifth is a
    run.
    """
    store, number = Store(root), 0
    while len(store.refs()) < artefacts:
        steps = demo_line(number)
        fill(store, steps, files=FILES)
        if number % 5 == 0:
            note(store, f"demo-{number}", steps)
        number += 1
    return store


if __name__ == "__main__":
    print(len(many(Path(sys.argv[1]), *map(int, sys.argv[2:])).refs()), "artefacts")
