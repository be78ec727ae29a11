"""What each command of `zs-seg` does with its parsed options; returns the exit status."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from flows import runs, track
from flows.elsewhere import Elsewhere, size_of
from flows.request import configure, open_request, open_runtime, open_store
from flows.tables import print_table, size
from pipeline import v2c
from pipeline.line import Config, Stage, benchmark_of, line
from pipeline.runtime import Runtime, duration, torchrun_rank, under_torchrun
from storage.differences import Explainer
from storage.errors import UserError, counted
from storage.keys import Ref
from storage.lineage import Lineage
from storage.store import State, Store

if TYPE_CHECKING:
    from pipeline.planning.estimates import Estimator


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
    elsewhere = Elsewhere.look(store, stages, remote=options.remote, push=False)
    rows = [_planned(stage, store, estimator, explainer, elsewhere) for stage in stages]
    missing, fetched = sum(row.state not in ("fresh", "remote") for row in rows), elsewhere.needed(stages)
    if options.json:
        content = {"store": str(store.root), "to_build": missing, "stages": [row.plain() for row in rows]}
        if elsewhere.remote:
            to_fetch = {"to_fetch": [str(manifest.ref) for manifest in fetched]}
            content |= {"remote": elsewhere.remote.url, **to_fetch, "fetched_bytes": sum(one.bytes for one in fetched)}
        memory = {"memory": _peak(config)} if options.memory else {}
        print(json.dumps({**content, "counts": asdict(counts), **memory}, indent=1))
        return 0
    print_table(("stage", "artefact", "state", "bytes", "time", "why"), [row.cells() for row in rows])
    print(f"\n{missing} of {counted(len(rows), 'stage')} to build in {store.root}")
    if elsewhere.remote:
        found = f"{len(elsewhere.have)} more in {elsewhere.remote}"
        print(f"{found}, of which a run fetches {len(fetched)}: {size_of(fetched)}")
    for row in rows:
        if row.source and row.seconds is not None:
            eight = f"; {duration(row.seconds / 8)} on 8 such devices, if they are 8 times as fast"
            print(f"~ {row.stage} {row.source}{eight if row.stage == 'v2c' else ''}")
    if any(row.seconds is None for row in rows):
        print(
            "- has no time: there is one as soon as a stage like it was built in this store, "
            "of v2c also with --step-seconds"
        )
    print(counts)
    if counts.left:
        batch, length = config.v2c.batch, config.v2c.steps
        print(
            f"v2c: {counted(length, 'step')} of {counted(batch, 'image')}: "
            f"{length * batch / counts.left:.1f} epochs of the images left"
        )
    if options.memory:
        print(_memory(config))
    return 0


def _peak(config: Config) -> int:
    """The GPU memory of stage 1 in bytes."""
    from pipeline.planning.estimates import teacher_dim
    from pipeline.planning.memory import peak_bytes

    classes = sum(benchmark_of(config).seen)
    # some MB at most depend on the width, where the teacher's is not known
    return peak_bytes(config.v2c, classes=classes, text_dim=teacher_dim(config.teacher.name) or 512)


def _memory(config: Config) -> str:
    """The GPU memory of stage 1 in words."""
    from pipeline.planning.memory import SEGMENTS

    v2c = config.v2c
    return (
        f"v2c: {size(_peak(config))} of one GPU's memory, computed for {v2c.batch} images of {v2c.augment.size} pixels "
        f"with {SEGMENTS} segments each, in {v2c.precision}, --v2c.accumulate {v2c.accumulate}; libraries take some GB more"
    )


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A stage as `plan` shows it. `state`: that in the store, or "remote" where only the remote has it. `bytes` and `seconds` are measured of one that is there, else estimated, None = unknown;
    `source`: the basis of estimated seconds; `why`: why it is not fresh, or who builds it."""

    stage: str
    ref: Ref
    state: State | Literal["remote"]
    bytes: float | None
    seconds: float | None
    source: str = ""
    why: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"stage": self.stage, "kind": self.ref.kind, "key": self.ref.key} | {
            name: value for name, value in asdict(self).items() if name not in ("stage", "ref")
        }

    def cells(self) -> tuple[str, ...]:
        """Its row of the table."""
        about = "" if self.state in ("fresh", "remote") else "~"
        takes = (
            "-" if self.bytes is None else f"{about}{size(self.bytes)}",
            "-" if self.seconds is None else f"{about}{duration(self.seconds)}",
        )
        return (self.stage, str(self.ref), self.state, *takes, self.why)


def _planned(stage: Stage, store: Store, estimator: Estimator, explainer: Explainer, elsewhere: Elsewhere) -> _Planned:
    ref, state = stage.recipe.ref, store.state(stage.recipe.ref)
    if far := elsewhere.have.get(ref):
        known: Any = {"bytes": far.bytes, "seconds": far.provenance["seconds"]}
        return _Planned(stage=stage.name, ref=ref, state="remote", **known, why=f"in {elsewhere.remote}")
    if state == "fresh":
        built = store.open(ref).manifest
        return _Planned(stage=stage.name, ref=ref, state=state, bytes=built.bytes, seconds=built.provenance["seconds"])
    guess, why = estimator.estimate(stage), _why(stage, state, store, explainer)
    known = {"bytes": guess.bytes, "seconds": guess.seconds, "source": guess.source}
    return _Planned(stage=stage.name, ref=ref, state=state, **known, why=why)


def _why(stage: Stage, state: State, store: Store, explainer: Explainer) -> str:
    ref = stage.recipe.ref
    if state == "locked":
        return f"by {store.holder(ref)}"
    return f"a run goes on with it; {explainer.why(ref)}" if state == "partial" else explainer.why(ref)


def run(options: argparse.Namespace) -> int:
    if options.track:
        track.require(options.track)
        if options.last:
            raise UserError("--track sends runs that have a report; leave --until or --track out")
    return _walk(options, options.first, options.last, options.force, tracked=bool(options.track))


def stage(options: argparse.Namespace) -> int:
    return _walk(options, options.stage, options.stage, ())


def _walk(options: argparse.Namespace, first: str, last: str, force: Sequence[str], *, tracked: bool = False) -> int:
    request, runtime = open_request(options), open_runtime(options)
    if under_torchrun() and not (first == last == v2c.STAGE and not force):
        raise UserError(
            f"under torchrun only `{request.command('stage', v2c.STAGE)}` runs; start the others without it"
        )
    config, store = configure(request), request.open_store()
    stages = line(config)
    selected = runs.select(stages, first=first, last=last)
    again = runs.forced(selected, force)
    runs.require_shares(config, selected, runtime.devices)
    first_process = not torchrun_rank()
    if not first_process:
        if not _agree(False, runtime):
            return 0
        again = selected
    elsewhere = Elsewhere.look(
        store, stages, remote=options.remote, push=options.push and first_process, cache=int(options.cache * 1e9)
    )
    if elsewhere.remote and (options.remote if under_torchrun() else not runtime.local):
        runtime = replace(runtime, remote=elsewhere.remote.url)
    runs.require_inputs(request, store, stages, selected, again, elsewhere.have)
    runs.show_device(request, store, selected, runtime, again, elsewhere.have)
    runs.show_work(config, store, stages, selected, again, elsewhere.have)
    if under_torchrun() and first_process:
        _agree(bool(runs.due(store, selected, again, elsewhere.have)), runtime)
    with runs.noted(request, stages, store):
        elsewhere.note(request.run_name)
        if first_process:
            runs.remove(store, again)
        elsewhere.fetch(elsewhere.needed(selected, again))
        for number, stage in enumerate(stages, 1):
            if stage in selected:
                outcome = elsewhere.outcome(stage, again) or runs.build(stage, store, runtime)
                if first_process:
                    print(f"[{number}/{len(stages)}] {outcome}", flush=True)
                elsewhere.leave(outcome.ref)
        if selected[-1] is stages[-1]:
            folder = runs.publish(request.preset, stages, store, name=request.run_name, elsewhere=elsewhere.have)
            _print_report(request.run_name, folder)
            if tracked:
                refs = {stage.name: stage.recipe.ref for stage in stages}
                track.track(request.run_name, config, refs, store, folder)
        elsewhere.finish()
    return 0


def _agree(builds: bool, runtime: Runtime) -> bool:
    """Whether the first of torchrun's processes builds, as it finds and the others wait to learn."""
    from pipeline.training.distributed import agree

    return agree(builds, runtime)


def _print_report(name: str, folder: Any) -> None:
    from rich.console import Console

    from pipeline.report.write import console_table
    from pipeline.scoring.records import read_report

    Console().print(console_table(read_report(folder / "report.json")))
    print(f"report of {name}: {folder / 'report.html'}")


def predict_images(options: argparse.Namespace) -> int:
    from pathlib import Path

    from pipeline import predict
    from pipeline.inference.words import read_words
    from storage.atomic import write_text

    if not options.out and not options.json:
        raise UserError("predictions go nowhere; pass --out DIR, or --json FILE (- is standard output)")
    to_file = options.json not in ("", "-")
    if to_file:
        _require_folder("--json", options.json)
    words = read_words(options.names.split(",")) + read_words(options.stuff.split(","), isthing=False)
    given = (
        "only", "object_threshold", "overlap_threshold", "seen_offset", "min_score", "with_teacher", "alpha", "beta",
        "every",
    )  # fmt: skip
    done = predict.run(
        checkpoint=options.checkpoint,
        images=options.images,
        out=options.out,
        skip_bad=options.skip_bad,
        teacher_weights=options.teacher,
        store=open_store(options),
        runtime=open_runtime(options),
        settings=predict.Settings(words=words, **{name: getattr(options, name) for name in given}),
    )
    text = json.dumps(done.content, indent=1, allow_nan=False)
    if to_file:
        write_text(Path(options.json), text)
    # the table goes where the JSON does not
    with contextlib.redirect_stdout(sys.stderr if options.json == "-" else sys.stdout):
        _print_predictions(done.entries)
        if done.folder:
            print(f"predictions: {done.folder / 'panoptic.json'}, pictures: {done.folder / 'index.html'}")
    if options.json == "-":
        print(text)
    return 0


def export(options: argparse.Namespace) -> int:
    from flows import export

    return export.export(options)


def app(options: argparse.Namespace) -> int:
    from flows import app

    return app.app(options)


LONGEST_TABLE = 30  # images


def _print_predictions(entries: Sequence[dict[str, Any]]) -> None:
    """A line for each image, and one for each video, with classes, best scores first, and milliseconds."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        rows.setdefault(entry.get("video", entry["file_name"]), []).append(entry)
    cells = []
    for name, group in rows.items():
        best: dict[tuple[str, bool], list[float]] = {}
        for segment in (segment for entry in group for segment in entry["segments"]):
            best.setdefault((segment["name"], segment["seen"]), []).append(segment["score"])
        order = sorted(best.items(), key=lambda item: -max(item[1]))
        classes = ", ".join(
            f"{'' if seen else '*'}{name}{f' x {len(scores)}' * (len(scores) > 1)} {max(scores):.2f}"
            for (name, seen), scores in order
        )
        ms = sum(entry["ms"] for entry in group) / len(group)
        cells.append((name, f"{group[0]['width']} x {group[0]['height']}", f"{ms:.0f}", classes or "nothing"))
    if cells:
        print_table(("image", "pixels", "ms", "classes, best score (* unseen in training)"), cells[:LONGEST_TABLE])
    if len(cells) > LONGEST_TABLE:
        print(f"and {len(cells) - LONGEST_TABLE} more")


def _require_folder(flag: str, file: str) -> None:
    """Raises UserError when the folder that `file`, if it is given, is to be written into does not exist."""
    from pathlib import Path

    if file and not (folder := Path(file).parent).is_dir():
        raise UserError(f"{flag} {file}: folder {folder} not found; make it first")


def evaluate_checkpoint(options: argparse.Namespace) -> int:
    from pathlib import Path

    from rich.console import Console

    from pipeline.scoring import evaluate_checkpoint
    from storage.atomic import write_text

    _require_folder("--json", options.json)
    result = evaluate_checkpoint.run(
        checkpoint=options.checkpoint,
        benchmark=options.benchmark,
        data=options.data,
        split=options.split,
        seen_offset=options.seen_offset,
        with_teacher=options.with_teacher,
        alpha=options.alpha,
        beta=options.beta,
        object_threshold=options.object_threshold,
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


def sweep(options: argparse.Namespace) -> int:
    from pathlib import Path

    from rich.console import Console

    from pipeline.scoring import exponents
    from storage.atomic import write_text

    _require_folder("--json", options.json)
    found = exponents.run(
        report=options.run_name,
        alphas=options.alpha,
        betas=options.beta,
        images=options.images,
        store=open_store(options),
        runtime=open_runtime(options),
    )
    Console().print(exponents.table(found))
    if options.json:
        write_text(Path(options.json), json.dumps([asdict(point) for point in found], indent=1, allow_nan=False))
    return 0


def panoptic_quality(options: argparse.Namespace) -> int:
    from pathlib import Path

    from rich.console import Console

    from pipeline.scoring import pq
    from storage.atomic import write_text

    for flag, file in (("--json", options.json), ("--csv", options.csv)):
        _require_folder(flag, file)
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
