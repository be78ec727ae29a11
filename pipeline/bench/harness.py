"""Shared by all benchmarks: a row of the table, the alternation of ours and the reference, and the output of rows."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.atomic import write_text

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from pipeline.teacher.text_bank import TextBank

PACKAGES = ("torch", "transformers", "timm", "hotcoco", "numpy")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement of ours and of the reference, in `unit` ("s", "MB": less is better)."""

    name: str
    ours: float
    reference: float
    unit: str
    device: str
    dtype: str

    @property
    def ratio(self) -> float:
        """ours / reference."""
        return self.ours / self.reference

    def __str__(self) -> str:
        return f"{self.name}: {self.ours:.4g} against {self.reference:.4g} {self.unit}, {self.ratio:.3f}"


def alternate(
    ours: Callable[[], Any],
    reference: Callable[[], Any],
    *,
    repeat: int,
    warmup: int = 1,
    device: torch.device | None = None,
) -> tuple[float, float]:
    """Median wall seconds of both, called in turn `repeat` times after `warmup` unmeasured turns, so that other load on
    the machine affects both alike. If `device` is a GPU, it is synchronised before each reading of the clock."""
    import torch

    sync = torch.cuda.synchronize if device and device.type == "cuda" else lambda: None
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(warmup + repeat):
        for call, taken in zip((ours, reference), seconds, strict=True):
            sync()
            start = time.perf_counter()
            call()
            sync()
            if turn >= warmup:
                taken.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def machine(device: torch.device) -> str:
    """The device in words: the GPU's name, or the CPU's with the number of threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {torch.get_num_threads()} threads"


def numbered_bank(rows: torch.Tensor, *, seen: int) -> TextBank:
    """A text bank of the rows (K, D), whose classes are things named by their number, the first `seen` of them seen."""
    from pipeline.teacher.text_bank import TextBank

    classes = len(rows)
    return TextBank(
        key="",
        embedding=rows,
        ids=list(range(classes)),
        names=[str(k) for k in range(classes)],
        isthing=[True] * classes,
        seen=[k < seen for k in range(classes)],
        teacher={},
        templates=[],
    )


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows as a JSON list, each with its ratio and the versions of the installed packages of `PACKAGES`."""
    versions = {name: version(name) for name in PACKAGES if find_spec(name)}
    write_text(path, json.dumps([asdict(row) | {"ratio": row.ratio, "versions": versions} for row in rows], indent=1))


def table(rows: Iterable[Row]) -> Table:
    """The rows for the terminal."""
    from rich.table import Table

    shown = Table("name", "ours", "reference", "ratio", "unit", "dtype")
    for row in rows:
        shown.add_row(row.name, f"{row.ours:.4g}", f"{row.reference:.4g}", f"{row.ratio:.3f}", row.unit, row.dtype)
    return shown
