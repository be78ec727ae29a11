"""`zs-seg ablate`: every row of the paper's ablations over several seeds, on artefacts that they share by key."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

from flows.request import Request, configure, open_request
from flows.runs import build, select, show_device
from pipeline.ablation import rows
from pipeline.ablation.page import page
from pipeline.ablation.tables import TABLES, Table, html, markdown, sweep
from pipeline.line import Config
from pipeline.runtime import Runtime, duration
from storage.atomic import write_text
from storage.errors import UserError, counted
from storage.runs import RunRecord, Runs

NAMES = *TABLES, "sweep"
LONGEST = 40  # characters of what a request changes in names


def ablate(options: argparse.Namespace) -> int:
    """Plan, build what is missing, and write the tables; a run that was stopped goes on where it was."""
    if options.seeds < 1 or options.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    request = open_request(options)
    config = configure(request)
    tables = _tables(options.tables or list(TABLES), config)
    if config.tokens.regions != "none":
        raise UserError(
            f"preset {options.preset} has candidate regions, and rows are compared without them; take the preset that it "
            "is made of, whose table `beyond` adds them"
        )
    name = _name(request)
    store = request.open_store()
    runs = rows.runs_of(tables, config, options.seeds)
    _print_plan(rows.plan(runs, store), len(runs), options.jobs)
    if options.plan:
        return 0
    threads = max(1, Runtime(threads=options.threads).workers // options.jobs)
    runtime = Runtime(device=options.device, threads=threads, dask="none")
    show_device(request, store, [stage for run in runs for stage in run.stages], runtime)
    with ExitStack() as under_way:  # noted in the store by name, so that `zs-seg gc` keeps what the tables are made of
        for run in runs:
            command = request.command("ablate", *(table.name for table in tables))
            record = RunRecord.now(name=run.name(name), command=command, refs=run.refs)
            under_way.enter_context(Runs(store).running(record))
        for run in runs:
            # As of any run: images that a stage leaves out are warned of.
            for stage in select(run.stages, last=rows.SHARED):
                build(stage, store, runtime)
        rows.build(runs, store, runtime, jobs=options.jobs)
    folder = Path("runs") / name
    sections = {}
    for table in tables:
        lines = rows.write_table(folder, table, runs, store, of=shlex.join(request.arguments()))
        sections[f"{table.name}: {table.title}"] = html(lines)
        print(f"\n{table.name}: {table.title}\n\n{markdown(lines)}")
    if any(table.name == "table4" for table in tables):
        from pipeline.ablation.figures import draw_figures

        first = {run.variant: run for run in runs if run.seed == 0}
        runtime = Runtime(device=options.device, threads=options.threads)
        sections |= draw_figures(folder, config, first, store=store, runtime=runtime)
    title = ", ".join((options.preset, *request.overrides, counted(options.seeds, "seed")))
    write_text(folder / "report.html", page(title, sections))
    print(f"every run's numbers, the figures and a page of all: {folder}")
    return 0


def _name(request: Request) -> str:
    """The folder of the tables, and the beginning of the runs' names: what differs from the preset has names of its own."""
    changed = re.sub("[^a-z0-9]+", "-", " ".join(request.overrides).lower()).strip("-")
    if request.max_steps:
        changed = f"{changed}-max-steps-{request.max_steps}".strip("-")
    if len(changed) > LONGEST:
        changed = f"{changed[: LONGEST - 9]}-{sha256(' '.join(request.overrides).encode()).hexdigest()[:8]}"
    return f"ablate-{request.preset}" + f"-{changed}" * bool(changed)


def _tables(names: Sequence[str], config: Config) -> list[Table]:
    """The tables by name. Raises UserError for one that there is not."""
    for name in names:
        if name not in NAMES:
            raise UserError(f"table {name!r} is unknown; use some of {', '.join(NAMES)}")
    return [sweep(config) if name == "sweep" else TABLES[name] for name in dict.fromkeys(names)]


def _print_plan(plan: rows.Plan, runs: int, jobs: int) -> None:
    for name, artefacts in plan.artefacts.items():
        print(f"{name:<10} {counted(artefacts, 'artefact'):>13}, {plan.missing[name]:>3} to build")
    unknown = f", without {', '.join(plan.unknown)}" if plan.unknown else ""
    print(f"{runs} rows times seeds; about {duration(plan.seconds / jobs)} to go{unknown}", flush=True)
