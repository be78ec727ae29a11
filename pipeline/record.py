"""What a training stage tells while it runs: a progress bar, curves as JSON lines, and the same for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.runtime import Runtime
from pipeline.schedule import Schedule
from storage.atomic import write_text

CURVES, TENSORBOARD = "curves.jsonl", "tensorboard"
EVERY = 10  # steps between two rows, each the mean over them
MEASURED = ("seconds", "waiting")  # of a row's values these differ between two runs


class Record:
    """Rows of "step", the mean of each loss over the steps since the last row, their "total", the gradient's "norm" before clipping,
    "lr", "seconds" a step, and "waiting", the share of them that went into waiting for data.

    `state()` belongs to the training state; a run that goes on from it forgets the rows written after it.
    """

    def __init__(
        self, name: str, folder: Path, schedule: Schedule, *, start: int, state: dict[str, Any], runtime: Runtime, writes: bool
    ) -> None:  # fmt: skip
        self.name, self.folder, self.schedule, self.runtime, self.writes = name, folder, schedule, runtime, writes
        self.step, self.recent, self.rows = start, state.get("recent", []), state.get("rows", 0)

    def __enter__(self) -> Record:
        self.bar = self.runtime.bar(self.schedule.steps, f"training {self.name}", "step")
        self.bar.update(self.step)
        if self.writes:
            from torch.utils.tensorboard import SummaryWriter

            path = self.folder / CURVES
            lines = path.read_text().splitlines()[: self.rows] if self.rows else []
            write_text(path, "".join(line + "\n" for line in lines))
            self.file = path.open("a", encoding="utf-8")
            self.board = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=self.step + 1)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.writes:
            self.file.close()
            self.board.close()

    def state(self) -> dict[str, Any]:
        return {"recent": self.recent, "rows": self.rows}

    def add(self, losses: dict[str, float], *, norm: float, waited: float, seconds: float) -> None:
        """One step is done."""
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
                self.file.write(json.dumps({"step": self.step, **row}) + "\n")
                self.file.flush()
                for key, value in row.items():
                    self.board.add_scalar(f"{self.name}/{key}", value, self.step)
        self.bar.update()


def read_curves(folder: Path) -> list[dict[str, float]]:
    """The curves of a finished training stage."""
    return [json.loads(line) for line in (folder / CURVES).read_text().splitlines()]
