"""The output of a training stage while it runs: a progress bar, curves as JSON lines, and the same for TensorBoard."""

from __future__ import annotations

import json
import logging
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runtime import Runtime
from pipeline.training.config import Schedule
from storage.atomic import write_text
from storage.checkpoints import FILES, STATE
from storage.errors import UserError, anew

if TYPE_CHECKING:
    from storage.store import Build

CURVES, TENSORBOARD = "curves.jsonl", "tensorboard"
EVERY = 10  # steps per row; a row is the mean over them
log = logging.getLogger(__name__)
MEASURED = ("seconds", "waiting")  # the values of a row that differ between two equal runs


class Record:
    """Writes rows: "step", the mean of each loss over the steps since the last row, their "total", the gradient's
    "norm" before clipping, "lr", "seconds" per step, and "waiting", the share (0..1) of that time spent waiting for
    data.

    `state()`, with a checksum over the rows, is part of the training state; a resumed run drops rows written after it.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        schedule: Schedule,
        *,
        start: int,
        state: dict[str, Any],
        runtime: Runtime,
        writes: bool,
    ) -> None:
        self.name, self.folder, self.schedule, self.runtime, self.writes = name, folder, schedule, runtime, writes
        self.step, self.recent, self.rows = start, state.get("recent", []), state.get("rows", 0)
        self.crc = state.get("crc", 0)

    def __enter__(self) -> Record:
        self.bar = self.runtime.bar(self.schedule.steps, f"training {self.name}", "step")
        self.bar.update(self.step)
        if self.writes:
            from torch.utils.tensorboard import SummaryWriter

            path = self.folder / CURVES
            if self.rows and not path.exists():
                log.warning("%s is gone; going on without the %d rows in it", path, self.rows)
                self.rows = self.crc = 0
            text = b"".join(path.read_bytes().splitlines(keepends=True)[: self.rows]) if self.rows else b""
            if zlib.crc32(text) != self.crc:
                raise UserError(f"{path} is damaged; delete it to go on without the rows in it")
            write_text(path, text.decode())
            self.file = path.open("a", encoding="utf-8")
            self.board = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=self.step + 1)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.writes:
            self.file.close()
            self.board.close()

    def state(self) -> dict[str, Any]:
        if self.writes:
            # The rows must be on disk before the state that counts them.
            os.fsync(self.file.fileno())
        return {"recent": self.recent, "rows": self.rows, "crc": self.crc}

    def add(self, losses: dict[str, float], *, norm: float, waited: float, seconds: float) -> None:
        """Record one finished step; every `EVERY` steps, write a row. `waited`, `seconds`: of the step."""
        lr = self.schedule.lr * self.schedule.factor(self.step)
        self.recent.append(
            {**losses, "total": sum(losses.values()), "norm": norm, "lr": lr, "seconds": seconds, "waiting": waited}
        )
        self.step += 1
        if self.step % EVERY == 0 or self.step == self.schedule.steps:
            row = {key: sum(one[key] for one in self.recent) / len(self.recent) for key in self.recent[0]}
            row["waiting"] /= row["seconds"]
            self.recent, self.rows = [], self.rows + 1
            shown = {key: f"{value:.3g}" for key, value in row.items() if key not in (*MEASURED, "norm")}
            shown |= {"images/s": f"{self.schedule.batch / row['seconds']:.3g}", "waiting": f"{row['waiting']:.0%}"}
            self.bar.set_postfix(shown, refresh=False)
            if self.writes:
                line = json.dumps({"step": self.step, **row}) + "\n"
                self.crc = zlib.crc32(line.encode(), self.crc)
                self.file.write(line)
                self.file.flush()
                for key, value in row.items():
                    self.board.add_scalar(f"{self.name}/{key}", value, self.step)
        self.bar.update()


def add_training(build: Build) -> None:
    """Name what a training stage leaves, the network and the curves of all its attempts, as the artefact's. The state
    to resume from goes once that is complete."""
    build.add(*(build.path / name for name in (*FILES, CURVES)))
    build.add(*sorted((build.path / TENSORBOARD).glob("events.out.tfevents.*")))
    build.scratch.append(build.path / STATE)


def read_curves(folder: Path) -> list[dict[str, float]]:
    """The curves of a finished training stage. Raises UserError, naming the file, when it is missing or damaged."""
    path = folder / CURVES
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); {anew()}") from error
