"""What the command line and the flow share: from what is asked for to a Config, to built stages, to the report in runs/."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import shlex
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from flows.presets import preset
from pipeline.line import CocoConfig, Config, Step
from pipeline.runtime import Runtime, torchrun_rank
from storage.keys import Ref
from storage.runs import Line, Runs
from storage.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for: a preset and what differs from it.

    `coco`: folder of real images ("" = the environment's COCO_ROOT). `store`: folder of the artefacts ("" = the
    environment's ZS_SEG_STORE, else ./artifacts). `overrides`: flags of the config tree, as on the command line.
    `max_steps`: at most so many steps of every training stage, 0 = as the preset says. `name`: what the run is called in the
    store and in runs/ ("" = as the preset).
    """

    preset: str
    coco: str = ""
    store: str = ""
    overrides: tuple[str, ...] = ()
    max_steps: int = 0
    name: str = ""

    @property
    def run_name(self) -> str:
        return self.name or self.preset

    def open_store(self) -> Store:
        return Store(Path(self.store or os.environ.get("ZS_SEG_STORE") or "artifacts"))

    def arguments(self, *words: str) -> list[str]:
        """What follows `zs-seg` on the command line that does `words` for the same request."""
        options = [
            word
            for name in ("coco", "store", "name")
            if (value := getattr(self, name))
            for word in (f"--{name}", value)
        ]
        cut = ["--max-steps", str(self.max_steps)] if self.max_steps else []
        return [*words, "--preset", self.preset, *options, *cut, *self.overrides]

    def command(self, *words: str) -> str:
        """The command line that does `words` for the same request."""
        return shlex.join(["zs-seg", *self.arguments(*words)])


def open_request(options: argparse.Namespace) -> Request:
    """From those of a command's flags that say what is asked for."""
    return Request(
        preset=options.preset,
        coco=options.coco,
        store=options.store,
        overrides=options.overrides,
        max_steps=options.max_steps,
        name=getattr(options, "name", ""),
    )


def open_runtime(options: argparse.Namespace) -> Runtime:
    """From those of a command's flags that say where and how to compute."""
    names = ("device", "threads", "devices", "compile", "checkpoint_every", "dask")
    return Runtime(**{name: getattr(options, name) for name in names if hasattr(options, name)})


def configure(request: Request) -> Config:
    """The preset with the overrides in place. Raises ValueError for an unknown preset or flag and for a wrong value."""
    config = preset(request.preset)
    if request.overrides:
        config = override(config, request.overrides)
    if request.max_steps:
        config = shorten(config, request.max_steps)
    if isinstance(config.data, CocoConfig):
        root = request.coco or config.data.root or os.environ.get("COCO_ROOT", "")
        if not root:
            raise ValueError(f"preset {request.preset} reads real images; pass --coco FOLDER or set COCO_ROOT")
        return replace(config, data=replace(config.data, root=root))
    if request.coco:
        raise ValueError(
            f"preset {request.preset} draws its own scenes and reads no COCO folder; "
            "leave --coco out, or use --preset coco-sample"
        )
    return config


def shorten(config: Config, steps: int) -> Config:
    """`config` with at most so many steps in every training stage, for trials. Raises ValueError for a negative number."""
    if steps < 0:
        raise ValueError(f"--max-steps must be 1 or more, or 0 for all, not {steps}")
    return replace(
        config,
        v2c=replace(config.v2c, steps=min(config.v2c.steps, steps)),
        g2s=replace(config.g2s, steps=min(config.g2s.steps, steps)),
        cpa=replace(config.cpa, steps=min(config.cpa.steps, steps)),
    )


def override(config: Config, flags: Sequence[str]) -> Config:
    """`config` with single fields replaced by flags such as "--v2c.lr", "2e-4"; tyro derives them from the fields.

    Raises ValueError, in one line, where tyro would print a box of its own and exit.
    """
    import tyro

    complaint = io.StringIO()  # for stdout too, by which tyro decides about colours and box characters
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            changed, unknown = tyro.cli(
                tyro.conf.AvoidSubcommands[Config], default=config, args=list(flags), add_help=False, return_unknown_args=True
            )  # fmt: skip
    except SystemExit as error:
        _title, _rule, *lines = complaint.getvalue().splitlines()
        reason = " ".join(line.strip() for line in takewhile(lambda line: set(line) - set(" -"), lines))
        reason = reason.rstrip(". ").removeprefix("Error parsing ")
        reason = re.sub(r"^(\S+: )\1", r"\1", reason)  # tyro names the part of the tree, and so do we
        raise ValueError(f"{reason}; `zs-seg run --preset {config.preset} --help` lists the flags") from error
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is not a flag of preset {config.preset}; "
            f"`zs-seg run --preset {config.preset} --help` lists them"
        )
    if changed.preset != config.preset:
        raise ValueError("the preset cannot be overridden; choose another with --preset")
    return changed


def print_override_help(config: Config, *, prog: str) -> None:
    """Every flag of the config tree, with the preset's values."""
    import tyro

    with contextlib.suppress(SystemExit):
        tyro.cli(
            tyro.conf.AvoidSubcommands[Config], default=config, args=["--help"], prog=prog,
            description="Flags that change single fields of the preset; `zs-seg plan` shows which stages that rebuilds.",
        )  # fmt: skip


def select(steps: Sequence[Step], *, first: str = "", last: str = "") -> list[Step]:
    """The steps from stage `first` to stage `last`, both included; "" = from the beginning, to the end.

    Raises ValueError for a stage that is not in this line, or when `last` comes before `first`.
    """
    start = find(steps, first) if first else 0
    stop = find(steps, last) if last else len(steps) - 1
    if stop < start:
        raise ValueError(f"stage {last} comes before {first}; swap --from and --until")
    return list(steps[start : stop + 1])


def find(steps: Sequence[Step], stage: str) -> int:
    """The position of a stage. Raises ValueError when it is not in this line."""
    names = [step.stage for step in steps]
    if stage not in names:
        raise ValueError(f"there is no stage {stage!r} here; the stages are {', '.join(names)}")
    return names.index(stage)


def forced(selected: Sequence[Step], stages: Collection[str]) -> list[Step]:
    """`stages` and all selected steps that read what they make, directly or not; they keep their keys, so only this tells
    that they are out of date.

    Raises ValueError for a stage that is not selected.
    """
    named = {selected[find(selected, stage)].recipe.ref for stage in stages}
    again: dict[Ref, Step] = {}
    for step in selected:
        ref = step.recipe.ref
        if ref in named or again.keys() & set(step.recipe.inputs.values()):
            again[ref] = step
    return list(again.values())


def remove(store: Store, steps: Sequence[Step]) -> None:
    """Remove the steps' artefacts, whole or partial, so that they are built again; the last goes first, so that nothing made
    from an artefact outlives it."""
    for step in reversed(steps):
        store.remove(step.recipe.ref)


def require_inputs(
    request: Request, store: Store, steps: Sequence[Step], selected: Sequence[Step], again: Sequence[Step] = ()
) -> None:
    """Is everything there that the selected steps read and do not make themselves? Those of `again` are built even if complete.

    Raises ValueError that names the first missing stage and the command that makes it.
    """
    maker = {step.recipe.ref: step.stage for step in steps}
    made = {step.recipe.ref for step in selected}
    for step in selected:
        if step not in again and store.state(step.recipe.ref) == "fresh":
            continue
        for ref in step.recipe.inputs.values():
            if ref not in made and (state := store.state(ref)) != "fresh":
                stage = maker[ref]
                raise ValueError(
                    f"stage {step.stage} reads what stage {stage} makes, and {ref} is {state} in {store.root}; "
                    f"make it with `{request.command('run', '--until', stage)}`"
                )


def noted(request: Request, steps: Sequence[Step], store: Store) -> contextlib.AbstractContextManager[None]:
    """Notes the whole line under the run's name before anything is built; inside, it is under way, and `zs-seg gc` spares it.

    Raises ValueError for a name that is no file name.
    """
    if torchrun_rank():  # the first process does
        return contextlib.nullcontext()
    refs = {step.stage: step.recipe.ref for step in steps}
    return Runs(store).running(Line.now(name=request.run_name, command=request.command("run"), refs=refs))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one stage: built now, in `seconds`, or there already."""

    stage: str
    ref: Ref
    built: bool
    seconds: float

    def __str__(self) -> str:
        done = f"built in {duration(self.seconds)}" if self.built else "fresh, nothing to do"
        return f"{self.stage:<11} {self.ref!s:<28} {done}"


def build(step: Step, store: Store, runtime: Runtime) -> Outcome:
    """Build one stage from its cached inputs unless it is complete, and warn of images that it leaves out.

    Raises ValueError for whatever its user can mend.
    """
    ref, started = step.recipe.ref, time.monotonic()
    built = store.state(ref) != "fresh"
    if built:
        step.run(store=store, runtime=runtime)
    if torchrun_rank():  # the first process finishes it
        return Outcome(stage=step.stage, ref=ref, built=built, seconds=time.monotonic() - started)
    if skipped := store.open(ref).manifest.counts.get("skipped"):  # `open` refuses an artefact that is damaged
        count = f"{len(skipped)} bad image{'s' * (len(skipped) > 1)}"
        log.warning("%s: %s left out; `zs-seg show %s` lists them", step.stage, count, ref.key)
    return Outcome(stage=step.stage, ref=ref, built=built, seconds=time.monotonic() - started)


def publish(preset: str, steps: Sequence[Step], store: Store, runs: Path = Path("runs"), *, name: str = "") -> Path:
    """Copy the report to `<runs>/<name, else preset>/`, with the preset's name and where every number came from; returns that
    folder."""
    from pipeline import report

    folder, ref = runs / (name or preset), steps[-1].recipe.ref
    store.require_intact(ref)
    try:
        report.publish(store.path(ref), folder, preset=preset, lineage=lineage(steps, store))
    except OSError as error:
        raise ValueError(f"folder {folder} cannot be written ({error.strerror}); mend that or run elsewhere") from error
    return folder


def lineage(steps: Sequence[Step], store: Store) -> dict[str, dict[str, Any]]:
    """Stage -> its artefact and the seconds it took to build; an artefact that nobody needs any more may be gone."""
    refs = {step.stage: step.recipe.ref for step in steps}
    return {
        stage: {"ref": str(ref), "seconds": store.open(ref).manifest.provenance["seconds"]}
        for stage, ref in refs.items()
        if store.state(ref) == "fresh"
    }


def duration(seconds: float) -> str:
    """ "0.4 s", "12 s", "3 min 20 s" or "2 h 05 min"."""
    if seconds < 9.5:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
