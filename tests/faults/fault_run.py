"""The fault suite: faults drawn at random (kind, stage, file, byte, moment), and what became of them. `make
test-faults` runs it.

    python tests/faults/fault_run.py --seed 0 --count 300 --json faults.json --markdown faults.md

Each fault is tried on a copy of one small, complete, undisturbed store. Right is: nothing wrong is ever marked
complete; no finished training and no saved state is lost; what is said is one line that names the artefact and the
cure; and after the cure, or just the next run, the bytes are those of the undisturbed run. Everything runs on the CPU,
where every stage is deterministic.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from fault_injection import (
    DAMAGES,
    Child,
    attempt,
    become,
    files_of,
    largest_file,
    litter,
    rename,
    replace,
    small_disk,
    turn_clock_back,
    used,
)
from fault_suite import RUNTIME, Suite, Trial

from flows.runs import build, publish
from pipeline.line import Stage
from storage.inputs import NOTE
from storage.store import MANIFEST, Store

FIRST, SECOND, GROUP = 64001, 64002, 64001


class Faults(Suite):
    """The kinds of faults: each draws the rest, does it, and judges."""

    def killed(self, trial: Trial, rng: np.random.Generator) -> None:
        """SIGKILL, once or twice, at any moment; then the same command again."""
        step = self.draw_step(trial, rng)
        store = self.copy("store", without=step)
        self._kill(trial, store, step, rng)
        if rng.random() < 0.3:
            self._kill(trial, store, step, rng)
        trial.wrong = self.wrong(store, step)
        self.repair(trial, store, step)

    def killed_and_damaged(self, trial: Trial, rng: np.random.Generator) -> None:
        """SIGKILL, and what it left is flipped, cut or lost in part; then the same command again."""
        step = self.draw_step(trial, rng, ("shard", "cache-clip", "v2c", "queries", "g2s", "cpa"))
        store = self.copy("store", without=step)
        partial = store.partial(step.recipe.ref)
        for _ in range(6):  # until there is something to damage
            self._kill(trial, store, step, rng)
            if store.state(step.recipe.ref) == "fresh":
                store.remove(step.recipe.ref)
            if left := files_of(partial):
                break
        else:
            trial.detail += ", nothing was left"
            return self.repair(trial, store, step)
        file = left[int(rng.integers(len(left)))]
        damage = ("flipped", "cut", "missing")[int(rng.integers(3))]
        trial.detail += f", {file.relative_to(partial)} {damage}: {DAMAGES[damage](file, rng)}"
        self.expect_told(trial, self.child(store, [step]).wait(), str(partial), or_right=True)
        trial.wrong = self.wrong(store, step)
        self.repair(trial, store, step)

    def damaged(self, trial: Trial, rng: np.random.Generator) -> None:
        """A file of a complete artefact is flipped, cut, lost or swapped; then a stage that reads it is built."""
        damage = trial.kind.rpartition(" ")[2]
        step, victim = self.draw_input(trial, rng)
        store = self.copy("store", without=step)
        self._damage(trial, store.path(victim), damage, rng)
        self.expect_told(trial, self.child(store, [step]).wait(), str(victim), or_right=True)
        trial.wrong = self.wrong(store, step)
        self.repair(trial, store, step, victim)

    def damaged_while_read(self, trial: Trial, rng: np.random.Generator) -> None:
        """The same in the middle of the build."""
        step, victim = self.draw_input(trial, rng)
        store = self.copy("store", without=step)
        child = self.child(store, [step])
        time.sleep(rng.uniform(0, self.seconds[step.name]))
        self._damage(trial, store.path(victim), ("flipped", "cut", "missing", "swapped")[int(rng.integers(4))], rng)
        self.expect_told(trial, child.wait(), str(victim), or_right=True)
        trial.wrong = self.wrong(store, step)
        if not trial.message and not trial.problem:  # the build had read it: the next reader says so
            self.expect_told(trial, attempt(lambda: store.require_intact(victim)), str(victim), or_right=False)
        self.repair(trial, store, step, victim)

    def damaged_report(self, trial: Trial, rng: np.random.Generator) -> None:
        """A file of the report is damaged; then a run, which finds everything complete, publishes it."""
        last, victim = self.steps[-1], self.steps[-1].recipe.ref
        trial.place = "report"
        store = self.copy("store")
        self._damage(trial, store.path(victim), trial.kind.rpartition(" ")[2], rng)
        runs = self.folder / "runs"
        shutil.rmtree(runs, ignore_errors=True)
        gone = store.state(victim) != "fresh"
        work: Callable[[], object] = lambda: str(publish("demo", self.steps, store, runs))  # noqa: E731
        self.expect_told(trial, Child(work).wait(), str(victim), or_right=False)
        if runs.exists() and any(runs.iterdir()):
            trial.wrong = "a damaged report was published"
        assert gone or trial.message or trial.problem or trial.wrong
        self.repair(trial, store, last, victim)

    def stray(self, trial: Trial, rng: np.random.Generator) -> None:
        """Stray files and copies appear in an input before, or while, a stage reads it: nothing happens."""
        step, victim = self.draw_input(trial, rng)
        store = self.copy("store", without=step)
        early = rng.random() < 0.5
        left = litter(store.path(victim), rng) if early else []
        child = self.child(store, [step])
        if not early:
            time.sleep(rng.uniform(0, self.seconds[step.name]))
            left = litter(store.path(victim), rng)
        trial.detail += f", {', '.join(left)}{' before' * early}"
        self.expect_right(trial, child.wait())
        if store.state(step.recipe.ref) != "fresh" or store.strays(victim) != sorted(left):
            trial.problem = trial.problem or f"strays {store.strays(victim)}"
        trial.wrong = self.wrong(store, step)
        self.repair(trial, store, step, victim)

    def stray_in_what_is_left(self, trial: Trial, rng: np.random.Generator) -> None:
        """SIGKILL, and stray files, copies or renamed files in what it left; then the same command again."""
        step = self.draw_step(trial, rng)
        store = self.copy("store", without=step)
        partial = store.partial(step.recipe.ref)
        self._kill(trial, store, step, rng)
        if store.state(step.recipe.ref) == "fresh":
            store.remove(step.recipe.ref)
            partial.mkdir(parents=True)
        partial.mkdir(parents=True, exist_ok=True)
        pieces = [file for file in files_of(partial) if file.name != NOTE]
        if pieces and rng.random() < 0.5:
            file = pieces[int(rng.integers(len(pieces)))]
            trial.detail += f", {file.relative_to(partial)} {rename(file, rng)}"
        else:
            trial.detail += f", {', '.join(litter(partial, rng))}"
        self.expect_right(trial, self.child(store, [step]).wait())
        trial.wrong = self.wrong(store, step)
        self.repair(trial, store, step)

    def renamed(self, trial: Trial, rng: np.random.Generator) -> None:
        """A file of an input, or the input's whole folder, gets another name."""
        step, victim = self.draw_input(trial, rng)
        store = self.copy("store", without=step)
        folder = store.path(victim)
        files = files_of(folder)
        if rng.random() < 0.2:
            trial.detail += f", the folder {rename(folder, rng)}"
        else:
            file = files[int(rng.integers(len(files)))]
            trial.detail += f", {file.relative_to(folder)} {rename(file, rng)}"
        self.expect_told(trial, self.child(store, [step]).wait(), str(victim), or_right=False)
        trial.wrong = self.wrong(store, step)
        self.repair(trial, store, step, victim)

    def damaged_while_trained(self, trial: Trial, rng: np.random.Generator) -> None:
        """An input is damaged after a training has saved a state, under way, at its end, or killed before: the state
        stays, and the training goes on with the mended input."""
        step = self.draw_step(trial, rng, ("v2c", "g2s", "cpa"))
        victim = list(step.recipe.inputs.values())[int(rng.integers(len(step.recipe.inputs)))]
        store = self.copy("store", without=step)
        child = self.child(store, [step])
        while child.alive() and not self.saved(store, step):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3 * self.seconds[step.name]))
        if rng.random() < 0.5:
            child.kill()
            trial.detail = "killed, "
            self.expect_right(trial, child.wait())
        trial.detail += f"{victim}"
        before = bool(self.saved(store, step))
        self._damage(trial, store.path(victim), READ[int(rng.integers(4))], rng)
        ending = self.child(store, [step]).wait() if child.ended else child.wait()
        self.expect_told(trial, ending, str(victim), or_right=True)
        if before and store.state(step.recipe.ref) != "fresh" and not self.saved(store, step):
            trial.lost = f"{step.recipe.ref}, a saved state"
        trial.wrong = self.wrong(store, step)
        if not trial.message and not trial.problem:
            self.expect_told(trial, attempt(lambda: store.require_intact(victim)), str(victim), or_right=False)
        self.repair(trial, store, step, victim)

    def foreign(self, trial: Trial, rng: np.random.Generator) -> None:
        """Two users of one group: another's cut-off build, another's stray files that may not be read, or a file of an
        input, or a whole cut-off build, that the other keeps to himself."""
        step, victim = self.draw_input(trial, rng)
        kind = ("stray", "build", "closed file", "closed build")[int(rng.integers(4))]
        trial.detail += f", {kind}"
        if os.geteuid():
            trial.detail, trial.repaired = "not tried: only root can be two users", True
            return
        store, ref, shut = self._shared(step), step.recipe.ref, list[Path]()
        if kind.endswith("build"):
            child = self.child(store, [step], before=lambda: become(FIRST, GROUP))
            time.sleep(rng.uniform(0, self.seconds[step.name]))
            child.kill()
            child.wait()
            if store.state(ref) == "fresh":
                store.remove(ref)
        if kind == "closed build" and (partial := store.partial(ref)).is_dir():
            shut = [*partial.rglob("*"), partial]
        elif kind == "closed file":
            files = [file for file in files_of(store.path(victim)) if file.name != MANIFEST]
            shut = [files[int(rng.integers(len(files)))]]
            replace(shut[0], shut[0].read_bytes())  # the undisturbed store's is a link to the same file
            os.chown(shut[0], FIRST, GROUP)
        elif kind == "stray":
            litter(store.path(victim), rng, mode=0)
        _allow(shut, 0o700)
        ending = self.child(store, [step], before=lambda: become(SECOND, GROUP)).wait()
        if ending.kind == "message" and f"belongs to user {FIRST}" in ending.text and str(store.root) in ending.text:
            trial.message = ending.text
        if not (trial.message if shut else ending.kind == "ok"):
            trial.problem = str(ending)
        trial.wrong = self.wrong(store, step)
        _allow(shut, 0o2770)  # as the line says
        if (ending := self.child(store, [step], before=lambda: become(SECOND, GROUP)).wait()).kind != "ok":
            trial.problem = trial.problem or f"after the cure: {ending}"
        files = [file for file in store.path(ref).rglob("*") if file.is_file()]
        if closed := [file for file in files if file.stat().st_mode & 0o060 != 0o060]:
            trial.problem = trial.problem or f"{closed[0]} is closed to the group"
        self.repair(trial, store, step, victim)

    def _shared(self, step: Stage) -> Store:
        """A copy without a stage in which all of a group may write, as the README of the store asks for."""
        self.folder.chmod(0o755)
        store = self.copy("store", without=step)
        (store.root / step.recipe.kind).mkdir(exist_ok=True)
        for folder in (store.root, *(path for path in store.root.rglob("*") if path.is_dir())):
            os.chown(folder, FIRST, GROUP)
            folder.chmod(0o2775)
        return store

    def full_disk(self, trial: Trial, rng: np.random.Generator) -> None:
        """A disk of its own that is full before the artefact is; then there is room again."""
        step = self.draw_step(trial, rng)
        source, root = self.copy("source", without=step), self.folder / "disk"
        need, share = self.calm.open(step.recipe.ref).manifest.bytes, float(rng.uniform(0, 1.2))
        root.mkdir(exist_ok=True)

        def work() -> list[str]:
            resize, store = small_disk(root), Store(root / "store")
            shutil.copytree(source.root, store.root)
            resize(used(root) + max(int(need * share), 4096))
            ending = attempt(lambda: build(step, store, RUNTIME))
            wrong = self.wrong(store, step)
            resize(2**30)
            build(step, store, RUNTIME)
            return [ending.kind, ending.text, wrong, self.wrong(store, step)]

        self._disk_trial(trial, Child(work).wait(), f"room for {share:.0%}")

    def quota(self, trial: Trial, rng: np.random.Generator) -> None:
        """No file may be larger than some size, below that of the artefact's largest; then it may."""
        step = self.draw_step(trial, rng)
        store = self.copy("store", without=step)
        largest = max(entry["bytes"] for entry in self.calm.open(step.recipe.ref).manifest.files.values())
        size = int(rng.integers(100, largest))

        def work() -> list[str]:
            with largest_file(size):
                ending = attempt(lambda: build(step, store, RUNTIME))
            wrong = self.wrong(store, step)
            build(step, store, RUNTIME)
            return [ending.kind, ending.text, wrong, self.wrong(store, step)]

        self._disk_trial(trial, Child(work).wait(), f"{size} of {largest} bytes")

    def clock(self, trial: Trial, rng: np.random.Generator) -> None:
        """The clock jumps back again and again while the stage runs, and is killed, and runs again."""
        step = self.draw_step(trial, rng)
        store = self.copy("store", without=step)
        shutil.rmtree(store.root, ignore_errors=True)
        for earlier in self.until(step)[:-1]:  # real copies: their times are changed
            shutil.copytree(self.calm.path(earlier.recipe.ref), store.path(earlier.recipe.ref))
        self.note_trainings(store)
        child = self.child(store, [step], before=lambda: turn_clock_back(store.root, rng))
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, self.seconds[step.name]))
            child.kill()
            trial.detail = "and killed"
        self.expect_right(trial, child.wait())
        trial.wrong = self.wrong(store, step)
        self.repair(trial, store, step)

    def two_writers(self, trial: Trial, rng: np.random.Generator) -> None:
        """Two processes build the same artefact at the same time; sometimes one of them is killed."""
        step = self.draw_step(trial, rng)
        store = self.copy("store", without=step)
        pair = [self.child(store, [step]) for _ in range(2)]
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, 1.5 * self.seconds[step.name]))
            pair[0].kill()
            trial.detail = "one of them killed"
        for child in pair:
            self.expect_right(trial, child.wait())
        trial.wrong = self.wrong(store, step)
        if store.state(step.recipe.ref) != "fresh":
            trial.problem = "the one that lived did not complete it"
        self.repair(trial, store, step)


def _allow(paths: Sequence[Path], mode: int) -> None:
    """Change the rights of folders, and of files the same without execution."""
    for path in paths:
        path.chmod(mode if path.is_dir() else mode & 0o666)


READ = ("flipped", "cut", "missing", "swapped")
KINDS: dict[str, tuple[float, Callable[[Faults, Trial, np.random.Generator], None]]] = {  # with how often
    "SIGKILL": (5, Faults.killed),
    "SIGKILL, then damage in what it left": (3, Faults.killed_and_damaged),
    **{f"input {damage}": (weight, Faults.damaged) for damage, weight in zip(READ, (4, 2, 1, 2), strict=True)},
    "input damaged while it is read": (2, Faults.damaged_while_read),
    **{f"report {damage}": (weight, Faults.damaged_report) for damage, weight in zip(READ, (0.6, 0.4, 0.3, 0.3), strict=True)},
    "stray files in an input": (2, Faults.stray),
    "SIGKILL, then stray or renamed files in what it left": (2, Faults.stray_in_what_is_left),
    "input renamed": (1.5, Faults.renamed),
    "input damaged after a training saved a state": (2.5, Faults.damaged_while_trained),
    "two users": (2, Faults.foreign),
    "disk full": (1.5, Faults.full_disk),
    "file too large": (1, Faults.quota),
    "clock goes back": (1, Faults.clock),
    "two writers": (1.5, Faults.two_writers),
}  # fmt: skip


def run(folder: Path, *, seed: int, count: int, progress: bool = False) -> list[Trial]:
    """Draw and try so many faults. Every kind comes at least once where `count` allows it."""
    suite, trials = Faults(folder), []
    suite.prepare()
    names, weights = list(KINDS), np.array([weight for weight, _ in KINDS.values()])
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        kind = names[number] if number < len(names) else names[int(rng.choice(len(names), p=weights / weights.sum()))]
        trial, started = Trial(kind=kind, place=""), time.monotonic()
        KINDS[kind][1](suite, trial, rng)
        trial.seconds = round(time.monotonic() - started, 2)
        trials.append(trial)
        if progress or failed(trial):
            print(f"{number:4} {asdict(trial)}", file=sys.stderr, flush=True)
    return trials


def verified(folder: Path, *, seed: int) -> tuple[int, int]:
    """One random byte of up to twelve files of each artefact, the manifest among them, is changed: how many, and how
    many of them `zs-seg verify` finds."""
    suite, rng, tried, found = Faults(folder), np.random.default_rng([seed, 10**6]), 0, 0
    store = Store(folder / "calm")
    for step in suite.steps:
        artefact = store.path(step.recipe.ref)
        files = [file for file in files_of(artefact) if file.name != MANIFEST]
        chosen = [files[i] for i in rng.permutation(len(files))[:11]]
        for file in [artefact / MANIFEST, *chosen]:
            whole = file.read_bytes()
            DAMAGES["flipped"](file, rng)
            tried, found = tried + 1, found + bool(store.verify(step.recipe.ref))
            file.write_bytes(whole)
        assert store.verify(step.recipe.ref) == []
    return tried, found


def failed(trial: Trial) -> bool:
    return bool(trial.wrong or trial.lost or trial.problem or not trial.repaired)


def table(trials: Sequence[Trial]) -> str:
    """Markdown: a row a kind."""
    rows: list[tuple[str, ...]] = [
        (
            "fault",
            "tried",
            "stopped with artefact and cure",
            "right without a word",
            "right in the end",
            "wrong results",
            "trainings lost",
        )
    ]
    for kind in [
        *dict.fromkeys(trial.kind for trial in sorted(trials, key=lambda t: list(KINDS).index(t.kind))),
        "all",
    ]:
        mine = [trial for trial in trials if kind in (trial.kind, "all")]
        message = sum(bool(trial.message) for trial in mine)
        right = sum(trial.repaired and not trial.wrong for trial in mine)
        silent = sum(not trial.message and not trial.problem for trial in mine)
        bad = (sum(bool(trial.wrong) for trial in mine), sum(bool(trial.lost) for trial in mine))
        rows.append((kind, *map(str, (len(mine), message, silent, right, *bad))))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--json", type=Path, help="every fault, one object each")
    parser.add_argument("--markdown", type=Path, help="the table")
    parser.add_argument("--progress", action="store_true", help="a line a fault")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trials = run(Path(folder), seed=options.seed, count=options.count, progress=options.progress)
        tried, found = verified(Path(folder), seed=options.seed)
    print(table(trials))
    print(f"`zs-seg verify` found {found} of {tried} changed bytes, in files of every kind and in manifests")
    if options.json:
        options.json.write_text(json.dumps([asdict(trial) for trial in trials], indent=1))
    if options.markdown:
        options.markdown.write_text(table(trials))
    return int(any(map(failed, trials)) or found < tried)


if __name__ == "__main__":
    sys.exit(main())
