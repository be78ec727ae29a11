"""What each command of `zs-seg` does with its parsed options; returns the exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from flows import stages
from flows.stages import Request, duration
from pipeline import v2c
from pipeline.line import STAGES, line
from pipeline.runtime import Runtime, torchrun_rank, under_torchrun
from storage.keys import Ref
from storage.store import Manifest, Store


def _request(options: argparse.Namespace) -> Request:
    return Request(
        preset=options.preset,
        coco=options.coco,
        store=options.store,
        overrides=options.overrides,
        max_steps=options.max_steps,
    )


def _store(options: argparse.Namespace) -> Store:
    return Request(preset="", store=options.store).open_store()


def _runtime(options: argparse.Namespace) -> Runtime:
    names = ("device", "threads", "devices", "compile", "checkpoint_every", "dask")
    return Runtime(**{name: getattr(options, name) for name in names if hasattr(options, name)})


def plan(options: argparse.Namespace) -> int:
    from pipeline.counting import count
    from pipeline.estimates import Estimator

    for flag, value in (("--tflops", options.tflops), ("--step-seconds", options.step_seconds)):
        if value < 0 or (value == 0 and flag == "--tflops"):
            raise ValueError(f"{flag} must be above 0, not {value:g}")
    request = _request(options)
    config = stages.configure(request)
    steps, store = line(config), request.open_store()
    counts = count(config, steps, store)
    estimator = Estimator(config, steps, store, counts, tflops=options.tflops, step_seconds=options.step_seconds)
    rows, notes = [], []
    for step in steps:
        ref, state = step.recipe.ref, store.state(step.recipe.ref)
        if state == "fresh":
            built = store.open(ref).manifest
            rows.append((step.stage, str(ref), state, _size(built.bytes), duration(built.provenance["seconds"])))
            continue
        guess = estimator.estimate(step)
        size = "-" if guess.bytes is None else f"~{_size(guess.bytes)}"
        rows.append(
            (step.stage, str(ref), state, size, "-" if guess.seconds is None else f"~{duration(guess.seconds)}")
        )
        if guess.seconds is not None:
            notes.append(f"{step.stage} {guess.source}")
            if step.stage == "v2c":
                notes[-1] += f"; {duration(guess.seconds / 8)} on 8 such devices, if they are 8 times as fast"
    _print_table(("stage", "artefact", "state", "bytes", "time"), rows)
    missing = sum(row[2] != "fresh" for row in rows)
    print(f"\n{missing} of {len(rows)} stages to build in {store.root}")
    for note in notes:
        print(f"~ {note}")
    if any(row[4] == "-" for row in rows):
        print(
            "- has no estimate: there is one as soon as a stage like it was built in this store, of v2c also with --step-seconds"
        )
    print(counts)
    if counts.left:
        batch, length = config.v2c.batch, config.v2c.steps
        print(
            f"v2c: {length:,} steps of {batch} images are {length * batch / counts.left:.1f} epochs of the images left"
        )
    return 0


def run(options: argparse.Namespace) -> int:
    return _walk(_request(options), _runtime(options), options.first, options.last, options.force)


def stage(options: argparse.Namespace) -> int:
    return _walk(_request(options), _runtime(options), options.stage, options.stage, ())


def _walk(request: Request, runtime: Runtime, first: str, last: str, force: Sequence[str]) -> int:
    if under_torchrun() and not (first == last == v2c.STAGE and not force):
        raise ValueError(
            f"under torchrun only `{request.command('stage', v2c.STAGE)}` runs; start the others without it"
        )
    steps, store = line(stages.configure(request)), request.open_store()
    selected = stages.select(steps, first=first, last=last)
    again = stages.forced(selected, force)
    stages.require_inputs(request, store, steps, selected, again)
    stages.remove(store, again)
    for number, step in enumerate(steps, 1):
        if step in selected:
            outcome = stages.build(step, store, runtime)
            if not torchrun_rank():
                print(f"[{number}/{len(steps)}] {outcome}", flush=True)
    if selected[-1] is steps[-1]:
        _print_report(request.preset, stages.publish(request.preset, steps, store))
    return 0


def _print_report(name: str, folder: Any) -> None:
    import json

    from rich.console import Console

    from pipeline.report import console_table

    Console().print(console_table(json.loads((folder / "report.json").read_text(encoding="utf-8"))))
    print(f"report of {name}: {folder / 'report.html'}")


def list_artefacts(options: argparse.Namespace) -> int:
    store = _store(options)
    rows = []
    for ref in store.refs():
        try:
            manifest = store.open(ref).manifest
        except ValueError:
            rows.append(("?", str(ref), "damaged", "see `zs-seg verify`"))
        else:
            rows.append((manifest.stage, str(ref), _size(manifest.bytes), _age(manifest)))
    if rows:
        _print_table(("stage", "artefact", "size", "age"), sorted(rows, key=lambda row: _place(row[0])))
    print(f"{len(rows)} artefacts in {store.root}")
    return 0


def _place(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def show_artefact(options: argparse.Namespace) -> int:
    store = _store(options)
    artefact = store.open(store.find(options.key))
    manifest = artefact.manifest
    print(f"{manifest.ref}, made by stage {manifest.stage} (version {manifest.version})\n{artefact.path}")
    for title, content in (
        ("inputs", manifest.inputs), ("config", manifest.config), ("counts", manifest.counts), ("provenance", manifest.provenance),
    ):  # fmt: skip
        print(f"\n{title}")
        _print_tree(content, "  ")
    print(f"\nfiles: {len(manifest.files)}, {_size(manifest.bytes)}")
    shown = dict(list(manifest.files.items())[:20])
    for name, entry in shown.items():
        print(f"  {_size(entry['bytes']):>9}  {entry['sha256'][:16]}  {name}")
    if len(shown) < len(manifest.files):
        print(f"  and {len(manifest.files) - len(shown)} more in {artefact.path / 'manifest.json'}")
    if manifest.kind == "tokens":
        from pipeline.token_checks import summary

        print("\nrows")
        _print_tree(summary(artefact.path), "  ")
    return 0


def _print_tree(value: Any, indent: str) -> None:
    """Nested settings, one a line; a list of objects keeps one line each."""
    for name, item in value.items():
        if isinstance(item, dict) and item:
            print(f"{indent}{name}")
            _print_tree(item, indent + "  ")
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            print(f"{indent}{name}: {len(item)}")
            for entry in item:
                print(f"{indent}  {', '.join(f'{key} {entry[key]}' for key in entry)}")
        else:
            print(f"{indent}{name}: {', '.join(map(str, item)) if isinstance(item, list) else item}")


def verify_artefacts(options: argparse.Namespace) -> int:
    if options.rows < 0:
        raise ValueError(f"--rows must be 0 (bytes only) or more, not {options.rows}")
    store = _store(options)
    refs: list[Ref] = [store.find(options.key)] if options.key else store.refs()
    damaged = []
    for ref in refs:
        problems, told = store.verify(ref), ""
        if options.rows and ref.kind == "tokens" and not problems:
            from pipeline.token_checks import encode_again

            problems, told = encode_again(
                store,
                ref,
                rows=options.rows,
                seed=options.seed,
                teacher_weights=options.teacher,
                runtime=_runtime(options),
            )
        print(f"{ref!s:<28} {'; '.join(problems) or 'intact'}{told and f'; {told}'}", flush=True)
        if problems:
            damaged.append(ref)
    if damaged:
        named = ", ".join(map(str, damaged))
        raise ValueError(
            f"{len(damaged)} of {len(refs)} artefacts are damaged ({named}); rebuild with `zs-seg run --force STAGE`"
        )
    print(f"{len(refs)} artefacts in {store.root} are intact")
    return 0


def predict_images(options: argparse.Namespace) -> int:
    from pipeline import predict

    index = predict.run(
        checkpoint=options.checkpoint,
        images=options.images,
        out=options.out,
        names=[name.strip() for name in options.names.split(",") if name.strip()],
        teacher_weights=options.teacher,
        store=_store(options),
        runtime=_runtime(options),
    )
    print(f"predictions: {index}, pictures: {index.parent / 'overlay'}")
    return 0


def evaluate_checkpoint(options: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from rich.console import Console

    from pipeline import assess
    from storage.atomic import write_text

    if options.json and not Path(options.json).parent.is_dir():
        raise ValueError(f"--json {options.json}: folder {Path(options.json).parent} not found; make it first")
    result = assess.run(
        checkpoint=options.checkpoint,
        benchmark=options.benchmark,
        data=options.data,
        split=options.split,
        seen_offset=options.seen_offset,
        out=options.out,
        teacher_weights=options.teacher,
        store=_store(options),
        runtime=_runtime(options),
    )
    Console().print(assess.table(result))
    print(assess.about(result))
    if options.json:
        write_text(Path(options.json), json.dumps(result, indent=1, allow_nan=False))
    return 0


def panoptic_quality(options: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from rich.console import Console

    from pipeline import pq
    from storage.atomic import write_text

    for flag, file in (("--json", options.json), ("--csv", options.csv)):
        if file and not Path(file).parent.is_dir():
            raise ValueError(f"{flag} {file}: folder {Path(file).parent} not found; make it first")
    if (unseen := _numbers(options.unseen)) is None:
        raise ValueError(f"--unseen {options.unseen!r} is no list of category ids; write it as 5,24,93")
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
        for row in import_module(f"pipeline.bench.{options.name}").rows(_runtime(options), full=options.full):
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
            if options.json:  # whole after every row: a long run may be cut off
                harness.write_rows(Path(options.json), rows)
    except ModuleNotFoundError as error:
        raise ValueError(f"the reference {error.name} is not installed; `make install` brings it") from error
    Console().print(harness.table(rows))
    return 0


def _print_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _age(manifest: Manifest) -> str:
    then = datetime.fromisoformat(manifest.provenance["created"])
    seconds = max(0.0, (datetime.now(then.tzinfo) - then).total_seconds())
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
