"""What the command line and the flow share: selecting and building the stages of a run, and publishing its report."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.presets import GPU_PRESETS
from flows.request import Request
from flows.tables import roughly
from pipeline import v2c
from pipeline.line import Config, Stage
from pipeline.runtime import Runtime, duration, torchrun_rank
from storage.errors import UserError, counted, did_you_mean
from storage.keys import Ref
from storage.lineage import Lineage
from storage.runs import RunRecord, Runs
from storage.store import Manifest, Store

log = logging.getLogger(__name__)

# Their work, beside that of the CPU, is a device's; the few sentences of stage text are encoded in seconds anywhere.
ON_DEVICE = ("cache-clip", "v2c", "queries", "g2s", "cpa", "mask-tokens", "evaluate")


def select(stages: Sequence[Stage], *, first: str = "", last: str = "") -> list[Stage]:
    """The stages from `first` to stage `last`, both included; "" = from the beginning, to the end.

    Raises UserError for a stage that is not in this line, or when `last` comes before `first`.
    """
    start = find(stages, first) if first else 0
    stop = find(stages, last) if last else len(stages) - 1
    if stop < start:
        raise UserError(f"stage {last} comes before {first}; swap --from and --until")
    return list(stages[start : stop + 1])


def find(stages: Sequence[Stage], name: str) -> int:
    """The position of a stage. Raises UserError when it is not in this line."""
    names = [stage.name for stage in stages]
    if name not in names:
        close = did_you_mean(name, names)
        raise UserError(f"there is no stage {name!r} here{close}; the stages are {', '.join(names)}")
    return names.index(name)


def forced(selected: Sequence[Stage], names: Collection[str]) -> list[Stage]:
    """The named stages and all selected ones that depend on them. Their keys do not change, so `remove` must make them
    missing for them to be built again.

    Raises UserError for a stage that is not selected.
    """
    named = {selected[find(selected, name)].recipe.ref for name in names}
    again: dict[Ref, Stage] = {}
    for stage in selected:
        ref = stage.recipe.ref
        if ref in named or again.keys() & set(stage.recipe.inputs.values()):
            again[ref] = stage
    return list(again.values())


def remove(store: Store, stages: Sequence[Stage]) -> None:
    """Remove the stages' artefacts, whole or partial, so that they are built again; the last goes first, so that
    nothing made from an artefact outlives it."""
    for stage in reversed(stages):
        store.remove(stage.recipe.ref)


def require_inputs(
    request: Request,
    store: Store,
    stages: Sequence[Stage],
    selected: Sequence[Stage],
    again: Sequence[Stage] = (),
    elsewhere: Container[Ref] = (),
) -> None:
    """Check that every input that the selected stages do not make themselves is complete, in the store or `elsewhere`.
    Those of `again` are built even if complete.

    Raises UserError that names the first missing stage and the command that makes it.
    """
    stage_of = {stage.recipe.ref: stage.name for stage in stages}
    made = {stage.recipe.ref for stage in selected}
    for stage in selected:
        if stage not in due(store, [stage], again, elsewhere):
            continue
        for ref in stage.recipe.inputs.values():
            if ref not in made and ref not in elsewhere and (state := store.state(ref)) != "fresh":
                name = stage_of[ref]
                raise UserError(
                    f"stage {stage.name} reads what stage {name} makes, and {ref} is {state} in {store.root}; "
                    f"make it with `{request.command('run', '--until', name)}`"
                )


def require_shares(config: Config, selected: Sequence[Stage], devices: int) -> None:
    """Check before anything is built that stage 1, if it is selected, can split its batches over `devices` devices.

    Raises UserError where it cannot.
    """
    if any(stage.name == v2c.STAGE for stage in selected):
        config.v2c.share(devices)


def show_work(
    config: Config,
    store: Store,
    stages: Sequence[Stage],
    selected: Sequence[Stage],
    again: Sequence[Stage] = (),
    elsewhere: Container[Ref] = (),
) -> None:
    """Log how many of several selected stages are to be built, and about how long that takes, by `zs-seg plan`."""
    if len(selected) == 1:
        return
    todo = due(store, selected, again, elsewhere)
    log.info("%s, %s", counted(len(selected), "stage"), _work(config, store, stages, todo) if todo else "none to build")


def due(store: Store, selected: Sequence[Stage], again: Sequence[Stage], elsewhere: Container[Ref]) -> list[Stage]:
    """The stages that are to be built: those of `again`, and what is complete neither in the store nor elsewhere."""

    def complete(ref: Ref) -> bool:
        return ref in elsewhere or store.state(ref) == "fresh"

    return [stage for stage in selected if stage in again or not complete(stage.recipe.ref)]


def _work(config: Config, store: Store, stages: Sequence[Stage], todo: Sequence[Stage]) -> str:
    from pipeline.planning.counts import count
    from pipeline.planning.estimates import Estimator

    text = f"{len(todo)} to build"
    try:
        counts = count(config, list(stages), store)
    except UserError:
        # the stage that reads these images stops at the same fault in a moment, with the artefact's name and the cure
        return f"{text}; no time, as the images cannot be counted"
    estimator = Estimator(config, list(stages), Lineage(store), counts)
    guesses = {stage.name: estimator.estimate(stage) for stage in todo}
    known = [guess.seconds for guess in guesses.values() if guess.seconds is not None]
    unknown = [name for name, guess in guesses.items() if guess.seconds is None]
    if known:
        text += f", about {roughly(max(sum(known), 1))}"
    if unknown:
        text += f" without {', '.join(unknown)}, of which nothing is known"
    if assumed := [name for name, guess in guesses.items() if guess.assumed]:
        text += f" (assumed of {', '.join(assumed) if len(assumed) < len(todo) else 'all'}, see `zs-seg plan`)"
    return text


def show_device(
    request: Request,
    store: Store,
    selected: Sequence[Stage],
    runtime: Runtime,
    again: Sequence[Stage] = (),
    elsewhere: Container[Ref] = (),
) -> None:
    """Log the device that the stages to be built compute on, if any does; not where workers elsewhere do it.

    Raises UserError where the preset is made for a GPU, there is none, and the CPU was not asked for by name.
    """
    names = {stage.name for stage in due(store, selected, again, elsewhere)}
    if not runtime.local:
        names -= {"cache-clip"}
    if names.isdisjoint(ON_DEVICE):
        return
    if request.preset in GPU_PRESETS:
        runtime.require_gpu(f"preset {request.preset}")
    if not torchrun_rank():
        log.info("%s", runtime.device_line())


def noted(request: Request, stages: Sequence[Stage], store: Store) -> contextlib.AbstractContextManager[None]:
    """Records the whole line under the run's name before anything is built; inside, it is under way, and `zs-seg gc`
    keeps its artefacts.

    Raises UserError for a name that is no file name.
    """
    if torchrun_rank():  # the first process does
        return contextlib.nullcontext()
    refs = {stage.name: stage.recipe.ref for stage in stages}
    return Runs(store).running(RunRecord.now(name=request.run_name, command=request.command("run"), refs=refs))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one stage: built now, in `seconds`, or complete before; `note` where that was elsewhere."""

    stage: str
    ref: Ref
    built: bool
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        done = self.note or (f"built in {duration(self.seconds)}" if self.built else "fresh, nothing to do")
        return f"{self.stage:<11} {self.ref!s:<28} {done}"


def build(stage: Stage, store: Store, runtime: Runtime) -> Outcome:
    """Build one stage from its cached inputs unless it is complete, and warn of images that it leaves out.

    Raises UserError for whatever its user can mend.
    """
    ref, started = stage.recipe.ref, time.monotonic()
    # Of torchrun's processes the first one decides, and the others compute along, whatever their own stores have.
    built = torchrun_rank() > 0 or store.state(ref) != "fresh"
    if built:
        stage.run(store=store, runtime=runtime)
    if torchrun_rank():  # the first process finishes it
        return Outcome(stage=stage.name, ref=ref, built=built, seconds=time.monotonic() - started)
    if skipped := store.open(ref).manifest.counts.get("skipped"):  # `open` refuses an artefact that is damaged
        bad = counted(len(skipped), "bad image")
        log.warning("%s: %s left out; `zs-seg show %s` lists them", stage.name, bad, ref.key)
    return Outcome(stage=stage.name, ref=ref, built=built, seconds=time.monotonic() - started)


def publish(
    preset: str,
    stages: Sequence[Stage],
    store: Store,
    runs: Path = Path("runs"),
    *,
    name: str = "",
    elsewhere: Mapping[Ref, Manifest] | None = None,
) -> Path:
    """Copy the report to `<runs>/<name, else preset>/`, with the preset's name and where every number came from, also of
    stages whose artefacts are elsewhere; returns that folder."""
    from pipeline.report import write

    folder, ref = runs / (name or preset), stages[-1].recipe.ref
    store.require_intact(ref)
    try:
        write.publish(store.path(ref), folder, preset=preset, lineage=lineage(stages, store, elsewhere))
    except OSError as error:
        raise UserError(f"folder {folder} cannot be written ({error.strerror}); mend that or run elsewhere") from error
    return folder


def lineage(
    stages: Sequence[Stage], store: Store, elsewhere: Mapping[Ref, Manifest] | None = None
) -> dict[str, dict[str, Any]]:
    """Stage -> its artefact and the seconds it took to build; an artefact that nobody needs any more may be gone."""
    found = {}
    for stage in stages:
        ref = stage.recipe.ref
        manifest = store.open(ref).manifest if store.state(ref) == "fresh" else (elsewhere or {}).get(ref)
        if manifest:
            found[stage.name] = {"ref": str(ref), "seconds": manifest.provenance["seconds"]}
    return found
