"""What each command of `zs-seg` does with its parsed options; returns the exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from flows import runs
from flows.request import Request, configure, open_request, open_runtime, open_store
from flows.tables import print_table, size
from pipeline import v2c
from pipeline.line import Config, Stage, benchmark_of, line
from pipeline.runtime import Runtime, duration, torchrun_rank, under_torchrun
from storage.differences import Explainer
from storage.errors import UserError
from storage.lineage import Lineage
from storage.store import State, Store


def plan(options: argparse.Namespace) -> int:
    from pipeline.planning.counts import count
    from pipeline.planning.estimates import Estimator

    for flag, value in (("--tflops", options.tflops), ("--step-seconds", options.step_seconds)):
        if value < 0 or (value == 0 and flag == "--tflops"):
            raise UserError(f"{flag} must be above 0, not {value:g}")
    request = open_request(options)
    config = configure(request)
    stages, store = line(config), request.open_store()
    counts, lineage = count(config, stages, store), Lineage(store)
    estimator = Estimator(config, stages, lineage, counts, tflops=options.tflops, step_seconds=options.step_seconds)
    explainer = Explainer((stage.recipe for stage in stages), lineage)
    rows, notes = [], []
    for stage in stages:
        ref, state = stage.recipe.ref, store.state(stage.recipe.ref)
        if state == "fresh":
            built = store.open(ref).manifest
            rows.append((stage.name, str(ref), state, size(built.bytes), duration(built.provenance["seconds"]), ""))
            continue
        guess = estimator.estimate(stage)
        takes = (
            "-" if guess.bytes is None else f"~{size(guess.bytes)}",
            "-" if guess.seconds is None else f"~{duration(guess.seconds)}",
        )
        rows.append((stage.name, str(ref), state, *takes, _why(stage, state, store, explainer)))
        if guess.seconds is not None:
            notes.append(f"{stage.name} {guess.source}")
            if stage.name == "v2c":
                notes[-1] += f"; {duration(guess.seconds / 8)} on 8 such devices, if they are 8 times as fast"
    print_table(("stage", "artefact", "state", "bytes", "time", "why"), rows)
    missing = sum(row[2] != "fresh" for row in rows)
    print(f"\n{missing} of {len(rows)} stages to build in {store.root}")
    for note in notes:
        print(f"~ {note}")
    if any(row[4] == "-" for row in rows):
        print(
            "- has no estimate: there is one as soon as a stage like it was built in this store, "
            "of v2c also with --step-seconds"
        )
    print(counts)
    if counts.left:
        batch, length = config.v2c.batch, config.v2c.steps
        print(
            f"v2c: {length:,} steps of {batch} images are {length * batch / counts.left:.1f} epochs of the images left"
        )
    if options.memory:
        print(_memory(config))
    return 0


def _memory(config: Config) -> str:
    """The GPU memory of stage 1 in words."""
    from pipeline.planning.estimates import teacher_dim
    from pipeline.planning.memory import SEGMENTS, peak_bytes

    v2c = config.v2c
    classes = sum(benchmark_of(config).seen)
    # some MB at most depend on the width, where the teacher's is not known
    peak = peak_bytes(v2c, classes=classes, text_dim=teacher_dim(config.teacher.name) or 512)
    return (
        f"v2c: {size(peak)} of one GPU's memory, computed for {v2c.batch} images of {v2c.augment.size} pixels with "
        f"{SEGMENTS} segments each, in {v2c.precision}, --v2c.accumulate {v2c.accumulate}; libraries take some GB more"
    )


def _why(stage: Stage, state: State, store: Store, explainer: Explainer) -> str:
    ref = stage.recipe.ref
    if state == "locked":
        return f"by {store.holder(ref)}"
    return f"a run goes on with it; {explainer.why(ref)}" if state == "partial" else explainer.why(ref)


def run(options: argparse.Namespace) -> int:
    return _walk(open_request(options), open_runtime(options), options.first, options.last, options.force)


def stage(options: argparse.Namespace) -> int:
    return _walk(open_request(options), open_runtime(options), options.stage, options.stage, ())


def _walk(request: Request, runtime: Runtime, first: str, last: str, force: Sequence[str]) -> int:
    if under_torchrun() and not (first == last == v2c.STAGE and not force):
        raise UserError(
            f"under torchrun only `{request.command('stage', v2c.STAGE)}` runs; start the others without it"
        )
    config, store = configure(request), request.open_store()
    stages = line(config)
    selected = runs.select(stages, first=first, last=last)
    again = runs.forced(selected, force)
    runs.require_shares(config, selected, runtime.devices)
    runs.require_inputs(request, store, stages, selected, again)
    runs.show_device(request, store, selected, runtime, again)
    with runs.noted(request, stages, store):
        runs.remove(store, again)
        for number, stage in enumerate(stages, 1):
            if stage in selected:
                outcome = runs.build(stage, store, runtime)
                if not torchrun_rank():
                    print(f"[{number}/{len(stages)}] {outcome}", flush=True)
        if selected[-1] is stages[-1]:
            _print_report(request.run_name, runs.publish(request.preset, stages, store, name=request.run_name))
    return 0


def _print_report(name: str, folder: Any) -> None:
    from rich.console import Console

    from pipeline.report.write import console_table
    from pipeline.scoring.records import read_report

    Console().print(console_table(read_report(folder / "report.json")))
    print(f"report of {name}: {folder / 'report.html'}")


def predict_images(options: argparse.Namespace) -> int:
    from pipeline import predict

    index = predict.run(
        checkpoint=options.checkpoint,
        images=options.images,
        out=options.out,
        names=[name.strip() for name in options.names.split(",") if name.strip()],
        skip_bad=options.skip_bad,
        teacher_weights=options.teacher,
        store=open_store(options),
        runtime=open_runtime(options),
    )
    print(f"predictions: {index}, pictures: {index.parent / 'overlay'}")
    return 0


def evaluate_checkpoint(options: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from rich.console import Console

    from pipeline import evaluate_checkpoint
    from storage.atomic import write_text

    if options.json and not Path(options.json).parent.is_dir():
        raise UserError(f"--json {options.json}: folder {Path(options.json).parent} not found; make it first")
    result = evaluate_checkpoint.run(
        checkpoint=options.checkpoint,
        benchmark=options.benchmark,
        data=options.data,
        split=options.split,
        seen_offset=options.seen_offset,
        match_names=options.match_names,
        out=options.out,
        teacher_weights=options.teacher,
        store=open_store(options),
        runtime=open_runtime(options),
    )
    Console().print(evaluate_checkpoint.table(result))
    print(evaluate_checkpoint.about(result))
    if options.json:
        write_text(Path(options.json), json.dumps(result, indent=1, allow_nan=False))
    return 0


def panoptic_quality(options: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from rich.console import Console

    from pipeline.scoring import pq
    from storage.atomic import write_text

    for flag, file in (("--json", options.json), ("--csv", options.csv)):
        if file and not Path(file).parent.is_dir():
            raise UserError(f"{flag} {file}: folder {Path(file).parent} not found; make it first")
    if (unseen := _numbers(options.unseen)) is None:
        raise UserError(f"--unseen {options.unseen!r} is no list of category ids; write it as 5,24,93")
    files = (options.gt_json, options.gt_folder, options.pred_json, options.pred_folder)
    scores = pq.evaluate(*map(Path, files), unseen=unseen, check_ground_truth=options.check_ground_truth)
    Console().print(pq.table(scores))
    if options.json:
        write_text(Path(options.json), json.dumps(scores, indent=1, allow_nan=False))
    if options.csv:
        write_text(Path(options.csv), pq.csv_text(scores))
    return 0


def _numbers(text: str) -> list[int] | None:
    """The integers of "1,2,3"; None when there is anything else in it."""
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    return [int(word) for word in words] if all(word.isdecimal() for word in words) else None


def bench(options: argparse.Namespace) -> int:
    from importlib import import_module
    from pathlib import Path

    from rich.console import Console

    from pipeline.bench import harness

    rows: list[harness.Row] = []
    try:
        for row in import_module(f"pipeline.bench.{options.name}").rows(open_runtime(options), full=options.full):
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
            if options.json:  # whole after every row: a long run may be cut off
                harness.write_rows(Path(options.json), rows)
    except ModuleNotFoundError as error:
        raise UserError(f"the reference {error.name} is not installed; `make install-dev` brings it") from error
    Console().print(harness.table(rows))
    return 0
