"""The runs behind the ablation's tables: one a row and seed, on artefacts that they share wherever keys allow."""

from __future__ import annotations

import json
import logging
import multiprocessing
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from pipeline.ablation.tables import Table, cells, markdown, seeded, summary
from pipeline.line import Config, Stage, line
from pipeline.runtime import Runtime
from pipeline.scoring.records import Report, read_report
from storage.atomic import write_text
from storage.keys import Ref
from storage.store import Store

log = logging.getLogger(__name__)

SHARED = "cache-clip"  # the last stage that all rows have in common


@dataclass(frozen=True, kw_only=True)
class Run:
    """A configuration with one seed: its stages. Every table with a row of that name shows it."""

    variant: str
    seed: int
    stages: tuple[Stage, ...]

    def name(self, tables: str) -> str:
        """Its name in the store, after that of all tables."""
        return f"{tables}.{re.sub('[^a-z0-9]+', '-', self.variant.lower()).strip('-')}.{self.seed}"

    @property
    def refs(self) -> dict[str, Ref]:
        """Stage -> its artefact."""
        return {stage.name: stage.recipe.ref for stage in self.stages}

    def ref(self, name: str) -> Ref:
        return self.refs[name]


def runs_of(tables: Sequence[Table], config: Config, seeds: int) -> list[Run]:
    """The runs of all tables, each once, seed by seed, so that a run that is cut off leaves whole tables of fewer
    seeds."""
    variants = {variant.name: variant for table in tables for variant in table.variants}
    return [
        Run(variant=name, seed=seed, stages=tuple(line(variant.change(seeded(config, seed)))))
        for seed in range(seeds)
        for name, variant in variants.items()
    ]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of each stage how many artefacts the runs have and how many of them are `missing`; the `seconds` that these take
    by the mean of those that were built here, without the stages of which none was (`unknown`)."""

    artefacts: dict[str, int]
    missing: dict[str, int]
    seconds: float
    unknown: list[str]


def plan(runs: Sequence[Run], store: Store) -> Plan:
    """What the runs have and what is to be built."""
    by_stage: dict[str, set[Ref]] = {}
    for run in runs:
        for name, ref in run.refs.items():
            by_stage.setdefault(name, set()).add(ref)
    missing, seconds, unknown = {}, 0.0, []
    for name, refs in by_stage.items():
        fresh = [ref for ref in refs if store.state(ref) == "fresh"]
        missing[name] = len(refs) - len(fresh)
        took = [store.open(ref).manifest.provenance["seconds"] for ref in fresh]
        if took:
            seconds += missing[name] * sum(took) / len(took)
        elif missing[name]:
            unknown.append(name)
    artefacts = {name: len(refs) for name, refs in by_stage.items()}
    return Plan(artefacts=artefacts, missing=missing, seconds=seconds, unknown=unknown)


def build(runs: Sequence[Run], store: Store, runtime: Runtime, *, jobs: int) -> None:
    """The runs of one stage 1 together, `jobs` such groups at a time; what all have in common, up to the stage `SHARED`, is
    built before.
    """
    groups: dict[Ref, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.ref("v2c"), []).append(run)
    if jobs == 1:
        for group in groups.values():
            _log_all(build_group(group, store.root, runtime))
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(build_group, group, store.root, runtime) for group in groups.values()]
        try:
            for future in as_completed(futures):
                _log_all(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def build_group(runs: Sequence[Run], root: Path, runtime: Runtime) -> list[str]:
    """Every stage of runs that share their stage 1, in this process; a line for each run of which something was
    built."""
    store, lines = Store(root), list[str]()
    for run in runs:
        started, built = time.monotonic(), []
        for stage in run.stages:
            if store.state(stage.recipe.ref) != "fresh":
                stage.run(store, runtime)
                built.append(stage.name)
        if built:
            seconds = time.monotonic() - started
            lines.append(f"{run.variant}, seed {run.seed}: {', '.join(built)} in {seconds:.0f} s")
    return lines


def _log_all(lines: Sequence[str]) -> None:
    for text in lines:
        log.info("%s", text)


def write_table(folder: Path, table: Table, runs: Sequence[Run], store: Store, *, of: str) -> list[list[str]]:
    """`<table>.json` and `<table>.md` in `folder`, of the runs that are its rows; `of` names their configuration. Returns
    the table's cells."""
    shown = {variant.name for variant in table.variants}
    runs = [run for run in runs if run.variant in shown]
    reports: dict[str, list[Report]] = {}
    for run in runs:
        report = read_report(store.open(run.ref("evaluate")).path / "report.json")
        reports.setdefault(run.variant, []).append(report)
    rows = summary(table, reports)
    keys = [{"variant": r.variant, "seed": r.seed, **{name: ref.key for name, ref in r.refs.items()}} for r in runs]
    lines = cells(table, rows)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"table": table.name, "title": table.title, "of": of, "rows": rows, "artefacts": keys}
    write_text(folder / f"{table.name}.json", json.dumps(content, indent=1, allow_nan=False))
    write_text(folder / f"{table.name}.md", markdown(lines))
    return lines
