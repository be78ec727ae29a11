"""What the fault suite works on: one small undisturbed store, copies of it, and what is right."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from fault_injection import DAMAGES, Child, Ending, files_of, link_tree
from tiny import tiny_config

from flows import runs
from pipeline.line import STAGES, Config, Stage, line
from pipeline.runtime import Runtime
from storage.atomic import ASIDE
from storage.checkpoints import STATE
from storage.keys import Ref, sha256_file
from storage.provenance import provenance
from storage.store import MANIFEST, Store

RUNTIME = Runtime(device="cpu", threads=1, progress=False, dask="none", checkpoint_every=1)
MEASURED = re.compile(r"(.*/)?(curves\.jsonl|events\.out\.tfevents\..*)")  # hold seconds: no two runs agree
WARM = (  # what stages import when they run
    "open_clip", "timm", "zarr", "webdataset", "matplotlib.pyplot", "scipy.optimize", "torch.utils.tensorboard", "pipeline.world.draw",
    "pipeline.teacher.encode", "pipeline.training.loop", "pipeline.training.criteria", "pipeline.inference.model", "pipeline.scoring.evaluator", "pipeline.report.write",
    "pipeline.report.plots", "pipeline.training.query_loader", "models.teacher", "models.generator", "storage.queries", "storage.tokens",
)  # fmt: skip


def small_config() -> Config:
    tiny = tiny_config()
    return replace(
        tiny,
        data=replace(tiny.data, train_images=16, val_images=4),
        shard=replace(tiny.shard, samples_per_tar=4),
        v2c=replace(tiny.v2c, steps=4, batch=2, calibration_images=2, points=32),
        queries=replace(tiny.queries, views=1),
        g2s=replace(tiny.g2s, steps=8),
        cpa=replace(tiny.cpa, steps=8),
    )


@dataclass(kw_only=True)
class Trial:
    """One fault. `told`: it was said in one line that names artefact and cure; `repaired`: in the end the bytes were
    those of an undisturbed run; `wrong`: something was complete, and not what it should be; `lost`: a finished training
    or a saved state that is gone; `problem`: what else was not as it should be."""

    kind: str
    place: str
    detail: str = ""
    message: str = ""
    repaired: bool = False
    wrong: str = ""
    lost: str = ""
    problem: str = ""
    seconds: float = 0.0


@dataclass
class Suite:
    """The undisturbed store, and how long each of its stages took."""

    folder: Path
    steps: list[Stage] = field(default_factory=lambda: line(small_config()))
    seconds: dict[str, float] = field(default_factory=dict)

    def prepare(self) -> None:
        for module in WARM:
            importlib.import_module(module)
        torch.set_num_threads(1)
        provenance()  # asks git, once
        self.calm = Store(self.folder / "calm")
        for step in self.steps:  # a process each, as in the trials, so that the times are those of the trials
            started = time.monotonic()
            ending = self.child(self.calm, [step]).wait()
            assert ending.kind == "ok", ending
            self.seconds[step.name] = time.monotonic() - started
        self.bytes = {step.recipe.ref: content(self.calm, step.recipe.ref) for step in self.steps}

    def child(self, store: Store, steps: Sequence[Stage], before: Callable[[], object] = lambda: None) -> Child:
        """A process that builds these stages."""

        def work() -> None:
            sys.addaudithook(_refuse_pickle)
            before()
            for step in steps:
                runs.build(step, store, RUNTIME)

        return Child(work)

    def copy(self, name: str, *, without: Stage | None = None) -> Store:
        """The undisturbed store's artefacts, hard links, up to but without that of a stage."""
        store = Store(self.folder / name)
        shutil.rmtree(store.root, ignore_errors=True)
        store.root.mkdir(parents=True)
        for step in self.steps[: self.steps.index(without) if without else None]:
            ref = step.recipe.ref
            store.path(ref).parent.mkdir(parents=True, exist_ok=True)
            link_tree(self.calm.path(ref), store.path(ref))
        self.note_trainings(store)
        return store

    def note_trainings(self, store: Store) -> None:
        """Remember the folders of finished trainings, which `lost` looks for."""
        refs = [step.recipe.ref for step in self.steps if step.recipe.kind in ("checkpoint", "generator")]
        self.finished = {ref: store.path(ref).stat().st_ino for ref in refs if store.path(ref).is_dir()}

    def lost(self, store: Store) -> str:
        """A training that was finished when the trial began, and is neither in its place nor set aside; "" for none."""
        for ref, inode in self.finished.items():
            if inode not in {path.stat().st_ino for path in store.path(ref).parent.glob(f"*{ref.key}*")}:
                return f"{ref}, a finished training"
        return ""

    def saved(self, store: Store, step: Stage) -> list[Path]:
        """States of a training under way, in the place of a build or set aside."""
        ref = step.recipe.ref
        return sorted((store.root / ref.kind).glob(f".{ref.key}*/{STATE}"))

    def wrong(self, store: Store, step: Stage) -> str:
        """Which file of a stage's complete artefact is not the undisturbed run's; "" when none, or when it is not
        complete.
        """
        ref = step.recipe.ref
        if store.state(ref) != "fresh":
            return ""
        found, calm = content(store, ref), self.bytes[ref]
        different = sorted(name for name in found.keys() | calm.keys() if found.get(name) != calm.get(name))
        return f"{ref}: {different[0]} differs" if different else ""

    def ref(self, stage: str) -> Ref:
        return self.steps[runs.find(self.steps, stage)].recipe.ref

    def until(self, step: Stage) -> list[Stage]:
        return self.steps[: self.steps.index(step) + 1]

    def repair(self, trial: Trial, store: Store, last: Stage, *damaged: Ref) -> None:
        """Do what `trial.told` says, if anything, then run again; is everything right then?"""
        selected = self.until(last)
        trial.lost = trial.lost or self.lost(store)
        if damaged_one := re.search(r"`zs-seg verify (\w+) --set-aside`", trial.message):
            ref = next(step.recipe.ref for step in self.steps if step.recipe.key == damaged_one[1])
            store.set_aside(ref, store.path(ref))
        elif delete := re.search(r"(/\S+) is damaged.*; delete it to", trial.message):
            Path(delete[1]).unlink()
        ending = self.child(store, selected).wait()
        if ending.kind != "ok":
            trial.problem = f"after the cure: {ending}"
            return
        trial.lost = trial.lost or self.lost(store)
        if "then goes on where it was" in trial.message and not self._went_on(store, last, damaged):
            trial.lost = f"{last.recipe.ref}, whose saved state was not used"
        again = [step for step in selected if step is last or step.recipe.ref in damaged]
        trial.repaired = all(store.state(step.recipe.ref) == "fresh" for step in again)
        for step in again:
            trial.wrong = trial.wrong or self.wrong(store, step)
            if problems := store.verify(step.recipe.ref):
                trial.problem = f"after the cure: {step.recipe.ref}: {problems[0]}"

    def _went_on(self, store: Store, step: Stage, rebuilt: Sequence[Ref]) -> bool:
        """Whether a stage has used what it had made before its input was built again. Trainings note seconds, so that
        theirs come back with other bytes: what was made of the earlier ones is then set aside."""
        if store.open(step.recipe.ref).manifest.provenance["resumed"]:
            return True
        aside = list((store.root / step.recipe.kind).glob(f".{step.recipe.key}.*{ASIDE}"))
        return bool(aside) and all(ref.kind in ("checkpoint", "generator") for ref in rebuilt)

    def draw_step(self, trial: Trial, rng: np.random.Generator, among: Sequence[str] = STAGES) -> Stage:
        trial.place = among[int(rng.integers(len(among)))]
        return self.steps[runs.find(self.steps, trial.place)]

    def draw_input(self, trial: Trial, rng: np.random.Generator) -> tuple[Stage, Ref]:
        """An artefact that is read, and a stage that reads it."""
        pairs = [(step, ref) for step in self.steps for ref in step.recipe.inputs.values()]
        kinds = sorted({ref.kind for _, ref in pairs})
        kind = kinds[int(rng.integers(len(kinds)))]  # each kind as often, however many stages read it
        pairs = [pair for pair in pairs if pair[1].kind == kind]
        step, victim = pairs[int(rng.integers(len(pairs)))]
        trial.place, trial.detail = kind, f"then {step.name}"
        return step, victim

    def expect_told(self, trial: Trial, ending: Ending, name: str, *, or_right: bool) -> None:
        """It was said, in one line that names the artefact and a command or a deed; or else all went well."""
        if ending.kind == "message" and name in ending.text and re.search("`zs-seg |delete ", ending.text):
            trial.message = ending.text
        elif not (or_right and ending.kind == "ok"):
            trial.problem = str(ending)

    def expect_right(self, trial: Trial, ending: Ending) -> None:
        if ending.kind not in ("ok", "killed"):
            trial.problem = str(ending)

    def _kill(self, trial: Trial, store: Store, step: Stage, rng: np.random.Generator) -> None:
        after = float(rng.uniform(0, self.seconds[step.name]))
        child = self.child(store, [step])
        time.sleep(after)
        child.kill()
        self.expect_right(trial, child.wait())
        trial.detail += f"{', ' * bool(trial.detail)}after {after:.2f} s"

    def _damage(self, trial: Trial, artefact: Path, damage: str, rng: np.random.Generator) -> None:
        files = [file for file in files_of(artefact) if file.name != MANIFEST]
        file = artefact / MANIFEST if rng.random() < 0.15 else files[int(rng.integers(len(files)))]
        trial.detail += (
            f"{', ' * bool(trial.detail)}{file.relative_to(artefact)} {damage}: {DAMAGES[damage](file, rng)}"
        )

    def _disk_trial(self, trial: Trial, ending: Ending, detail: str) -> None:
        trial.detail = detail
        if ending.kind != "ok":
            trial.problem = str(ending)
            return
        kind, text, wrong, trial.wrong = ending.value
        trial.wrong = wrong or trial.wrong
        trial.message = text if kind == "message" else ""
        trial.repaired = not trial.wrong
        named = f"store {self.folder}" in text and str(self.ref(trial.place)) in text
        if kind != "ok" and not (trial.message and named):
            trial.problem = f"{kind}: {text}"


def _refuse_pickle(event: str, arguments: object) -> None:
    assert event != "pickle.find_class", f"something unpickles {arguments}"


def content(store: Store, ref: Ref) -> dict[str, str]:
    """File that the manifest lists -> hash of its bytes as they are, without the files that hold times."""
    names = (name for name in store.file_names(ref) if not MEASURED.fullmatch(name))
    return {name: sha256_file(store.path(ref) / name) for name in names}
