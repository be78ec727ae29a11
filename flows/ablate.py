"""`zs-seg ablate`: every row of the paper's ablations over several seeds, on artefacts that the rows share wherever keys allow."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.request import configure, open_request
from flows.runs import build, select
from pipeline.ablation.page import page, picture
from pipeline.ablation.tables import TABLES, Table, cells, html, markdown, seeded, summary, sweep
from pipeline.line import Config, Stage, benchmark_of, line
from pipeline.runtime import Runtime, duration
from pipeline.scoring.records import Report, read_report
from pipeline.world.config import ScenesConfig
from storage.atomic import write_text
from storage.errors import UserError
from storage.keys import Ref
from storage.runs import RunRecord, Runs
from storage.store import Store

NAMES = *TABLES, "sweep"
SHARED = "cache-clip"  # the last stage that all rows have in common


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row of a table with one seed: its stages."""

    table: str
    variant: str
    seed: int
    steps: tuple[Stage, ...]

    def name(self, preset: str) -> str:
        """Its name in the store."""
        return f"ablate-{preset}.{self.table}.{re.sub('[^a-z0-9]+', '-', self.variant.lower()).strip('-')}.{self.seed}"

    def ref(self, stage: str) -> Ref:
        return next(step.recipe.ref for step in self.steps if step.stage == stage)


def ablate(options: argparse.Namespace) -> int:
    """Plan, build what is missing, and write the tables; a run that was stopped goes on where it was."""
    if options.seeds < 1 or options.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    request = open_request(options)
    config = configure(request)
    tables = _tables(options.tables or list(TABLES), config)
    store = request.open_store()
    runs = [run for table in tables for run in _runs(table, config, options.seeds)]
    print(_plan(runs, store, options.jobs), flush=True)
    if options.plan:
        return 0
    threads = max(1, Runtime(threads=options.threads).workers // options.jobs)
    with ExitStack() as under_way:  # noted in the store by name, so that `zs-seg gc` keeps what the tables are made of
        for run in runs:
            refs = {step.stage: step.recipe.ref for step in run.steps}
            noted = RunRecord.now(
                name=run.name(options.preset), command=request.command("ablate", run.table), refs=refs
            )
            under_way.enter_context(Runs(store).running(noted))
        _build(runs, store, Runtime(device=options.device, threads=threads, dask="none"), options.jobs)
    folder = Path("runs") / f"ablate-{options.preset}"
    sections = {}
    for table in tables:
        lines = write_table(folder, table, [run for run in runs if run.table == table.name], store)
        sections[f"{table.name}: {table.title}"] = html(lines)
        print(f"\n{table.name}: {table.title}\n\n{markdown(lines)}")
    if any(table.name == "table4" for table in tables):
        rows = [next(r for r in runs if (r.table, r.variant) == ("table4", v.name)) for v in TABLES["table4"].variants]
        sections |= draw_figures(
            folder, config, *rows, store=store, runtime=Runtime(device=options.device, threads=options.threads)
        )
    write_text(folder / "report.html", page(f"{options.preset}, {options.seeds} seeds", sections))
    print(f"every run's numbers, the figures and a page of all: {folder}")
    return 0


def _tables(names: Sequence[str], config: Config) -> list[Table]:
    """The tables by name. Raises UserError for one that there is not."""
    for name in names:
        if name not in NAMES:
            raise UserError(f"table {name!r} is unknown; use some of {', '.join(NAMES)}")
    return [sweep(config) if name == "sweep" else TABLES[name] for name in dict.fromkeys(names)]


def _runs(table: Table, config: Config, seeds: int) -> list[Run]:
    """Seed by seed, so that a run that is cut off leaves whole tables of fewer seeds. Settings are chosen on the validation split."""
    if table.name == "sweep" and isinstance(config.data, ScenesConfig):
        config = replace(config, data=replace(config.data, split="validation"))
    return [
        Run(table=table.name, variant=variant.name, seed=seed, steps=tuple(line(variant.change(seeded(config, seed)))))
        for seed in range(seeds)
        for variant in table.variants
    ]


def _plan(runs: Sequence[Run], store: Store, jobs: int) -> str:
    """How many artefacts of each stage there are and are to be built, and how long that takes by those that were built here."""
    by_stage: dict[str, dict[Ref, bool]] = {}
    for run in runs:
        for step in run.steps:
            ref = step.recipe.ref
            by_stage.setdefault(step.stage, {}).setdefault(ref, store.state(ref) == "fresh")
    message, total, unknown = [], 0.0, []
    for stage, refs in by_stage.items():
        fresh, missing = [ref for ref, there in refs.items() if there], sum(not there for there in refs.values())
        seconds = [store.open(ref).manifest.provenance["seconds"] for ref in fresh]
        if missing and not seconds:
            unknown.append(stage)
        total += missing * (sum(seconds) / len(seconds) if seconds else 0.0)
        message.append(f"{stage:<10} {len(refs):>3} artefacts, {missing:>3} to build")
    cells = len({(run.table, run.variant, run.seed) for run in runs})
    estimate = f"about {duration(total / jobs)} to go" + (f", without {', '.join(unknown)}" if unknown else "")
    return "\n".join((*message, f"{cells} rows times seeds; {estimate}"))


def _build(runs: Sequence[Run], store: Store, runtime: Runtime, jobs: int) -> None:
    """What all have in common first; then the runs of one stage 1 together, `jobs` such groups at a time."""
    for run in runs:
        for step in select(run.steps, last=SHARED):
            build(step, store, runtime)
    groups: dict[Ref, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.ref("v2c"), []).append(run)
    if jobs == 1:
        for group in groups.values():
            build_group(group, store.root, runtime)
        return
    import multiprocessing

    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(build_group, group, store.root, runtime) for group in groups.values()]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def build_group(runs: Sequence[Run], root: Path, runtime: Runtime) -> None:
    """Every stage of runs that share their stage 1."""
    store = Store(root)
    for run in runs:
        started = time.monotonic()
        built = [outcome.stage for step in run.steps if (outcome := build(step, store, runtime)).built]
        if built:
            spent = duration(time.monotonic() - started)
            print(f"{run.table} {run.variant}, seed {run.seed}: {', '.join(built)} in {spent}", flush=True)


def write_table(folder: Path, table: Table, runs: Sequence[Run], store: Store) -> list[list[str]]:
    """`<table>.json` and `<table>.md` in `folder`; returns the table's cells."""
    reports: dict[str, list[Report]] = {}
    for run in runs:
        report = read_report(store.open(run.ref("evaluate")).path / "report.json")
        reports.setdefault(run.variant, []).append(report)
    rows = summary(table, reports)
    keys = [{"variant": r.variant, "seed": r.seed, **{s.stage: s.recipe.ref.key for s in r.steps}} for r in runs]
    lines = cells(table, rows)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"table": table.name, "title": table.title, "rows": rows, "artefacts": keys}
    write_text(folder / f"{table.name}.json", json.dumps(content, indent=1, allow_nan=False))
    write_text(folder / f"{table.name}.md", markdown(lines))
    return lines


def draw_figures(
    folder: Path, config: Config, baseline: Run, aligned: Run, ours: Run, *, store: Store, runtime: Runtime
) -> dict[str, str]:
    """The paper's figures 4 and 5 from one seed of table 4's rows, as PNG files; returns them as sections of the page.

    The comparison of the generators with V2C shares its segmenter, and so its real features.
    """
    from pipeline.ablation.examples import draw_examples
    from pipeline.ablation.feature_map import draw, generated_features, real_features
    from pipeline.teacher.text_bank import open_text

    common: dict[str, Any] = {
        "store": store, "shards": ours.ref("shard"), "tokens": ours.ref("cache-clip"), "benchmark": benchmark_of(config),
        "runtime": runtime,
    }  # fmt: skip
    bank = open_text(store.open(ours.ref("text")).path, ours.ref("text").key)
    panels = {}
    for title, run in (("baseline", baseline), ("V2C, L_mmd alone", aligned), ("V2C and G2S", ours)):
        real = real_features(checkpoint=run.ref("v2c"), **common)
        generator, counts = store.open(run.ref("g2s")).path, {k: len(rows) for k, rows in real.items()}
        made = generated_features(generator, bank, counts=counts, noise_into=config.cpa.noise_into, seed=0)
        panels[title] = real, made
    compared = draw(folder / "figure4.png", panels, bank.names)
    numbers = {title: c.as_dict([bank.names[k] for k in panels[title][0]]) for title, c in compared.items()}
    write_text(folder / "figure4.json", json.dumps(numbers, indent=1))
    draw_examples(folder / "figure5.png", {"baseline": baseline.ref("cpa"), "ours": ours.ref("cpa")}, count=4, **common)
    return {
        "figure 4: features of unseen classes, real and generated": picture(folder / "figure4.png"),
        "figure 5: transductive predictions; a star marks an unseen class": picture(folder / "figure5.png"),
    }
