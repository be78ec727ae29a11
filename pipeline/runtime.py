"""How a stage is run: device, threads, progress bar, time. Nothing in this file enters a key."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from storage.errors import UserError

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

OUT_OF_MEMORY = (
    "the device has too little memory; stage 1 takes less, with the same gradient, by --v2c.accumulate 2, 4, ...; "
    "else lower --v2c.batch or --v2c.augment.size, or pass --device cpu"
)
LOG_EVERY = 10.0  # seconds between two lines of a progress bar in a log file


def duration(seconds: float) -> str:
    """ "0.4 s", "12 s", "3 min 20 s" or "2 h 05 min"."""
    if seconds < 9.5:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def torchrun_rank() -> int:
    """This process's rank under torchrun; 0 without torchrun."""
    return int(os.environ["RANK"]) if under_torchrun() else 0


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where a stage runs, and what it shows meanwhile."""

    device: str = "auto"
    """auto (the GPU if there is one), or a torch device such as cpu or cuda:1."""

    threads: int = 0
    """CPU threads; 0 takes what serves the stage best where it has a number of its own, else one per core."""

    progress: bool = True
    """Show progress bars."""

    checkpoint_every: int = 200
    """Training steps between two saved states, at least 1."""

    devices: int = 1
    """GPUs, or on a CPU processes, that train stage 1 together and share the tars of stage queries, at least 1."""

    compile: bool = False
    """Pass stage 1's network through torch.compile."""

    dask: str = "local"
    """Workers of stages cache-clip and mask-tokens: local, local:N, none (this process), or a cluster's address or scheduler file.

    "local" starts worker processes on this machine: one for every four cores, at least one, and on GPUs (of which
    `device` auto and cuda take all) one to four for each, with equal shares of the threads, by which they decode
    images. "local:N" starts N. An address is such as "tcp://10.0.0.1:8786"; the file is the one that the cluster's
    scheduler wrote.
    """

    remote: str = ""
    """Address of a remote for machines that do not share the store's disk. A cluster's workers that do not see the store
    read tars of cache-clip and mask-tokens from there, and leave their tokens there. Each process that torchrun started then has inputs of
    its own, and compares them with those of the first."""

    def __post_init__(self) -> None:
        if self.devices < 1 or self.checkpoint_every < 1:
            raise UserError(
                f"devices and checkpoint_every must be at least 1, not {self.devices} and {self.checkpoint_every}"
            )
        if self.threads < 0:
            raise UserError(f"threads must be 0 (all cores) or more, not {self.threads}")
        known = re.fullmatch(r"none|local(:[1-9]\d*)?|\w+://.+", self.dask)
        if not known and not Path(self.dask).is_file():
            raise UserError(
                f"--dask {self.dask!r} is unknown; give local, local:N, none, an address such as tcp://10.0.0.1:8786, "
                "or the file of a running scheduler"
            )

    @property
    def local(self) -> bool:
        """Whether stages cache-clip and mask-tokens compute on this machine, not on a cluster that is already there."""
        return self.dask == "none" or self.dask.startswith("local")

    @property
    def workers(self) -> int:
        """CPU threads to use, at least 1."""
        return self.threads or os.cpu_count() or 1

    @property
    def decoders(self) -> int:
        """Threads that decode images ahead of the training: half of the CPU, at least 1."""
        return max(self.workers // 2, 1)

    def torch_device(self) -> torch.device:
        """The device to compute on; also makes it CUDA's current one, and sets torch's number of CPU threads when
        `threads` is set.

        Raises UserError when the device is unknown to torch or missing on this machine.
        """
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
            reason = str(error).splitlines()[0]
            raise UserError(f"device {self.device!r} cannot be used ({reason}); pass --device auto or cpu") from error
        if device.type == "cuda" and device.index is not None:
            # what asks for no device, such as a kernel's launch or a stream, takes the current one
            torch.cuda.set_device(device)
        return device

    def device_line(self) -> str:
        """What is computed on: of a GPU its name, the driver and torch's CUDA; of a CPU that `auto` came to also why.

        Raises UserError as `torch_device`.
        """
        import torch

        device = self.torch_device()
        if device.type == "cuda":
            name = f"{self.devices} x {torch.cuda.get_device_name(device)}".removeprefix("1 x ")
            return f"device {device}: {name}, driver {_driver()}, CUDA {torch.version.cuda}"
        return f"device {device}" + (f", as torch finds no GPU: {_no_gpu()}" if self.device == "auto" else "")

    def require_gpu(self, who: str) -> None:
        """Raises UserError, with the cure, where `device` is auto and torch finds no GPU."""
        if self.device == "auto" and self.torch_device().type == "cpu":
            raise UserError(
                f"{who} is made for a GPU, and torch finds none: {_no_gpu()}; mend that, or pass --device cpu to compute "
                "on the CPU, which takes weeks unless the run is cut short"
            )

    def bar(
        self, total: int | None, desc: str, unit: str = "it", *, initial: int = 0, scale: bool = False
    ) -> tqdm[Any]:
        """A progress bar with rate and remaining time; a log file gets a line of its own every `LOG_EVERY` seconds.

        `initial`: what an earlier run has done; it does not count in the rate. `scale`: numbers as 12.3M, for bytes.
        """
        from tqdm import tqdm

        shown: dict[str, Any] = {"total": total, "initial": initial, "desc": desc, "unit": unit, "unit_scale": scale}
        if sys.stderr.isatty():
            return tqdm(**shown, disable=not self.progress, mininterval=0.5, dynamic_ncols=True)
        return tqdm(
            **shown,
            disable=not self.progress,
            file=_Lines(sys.stderr),
            mininterval=LOG_EVERY,
            # looks at the clock in every update: else a stage that becomes slower is silent for longer
            miniters=1,
            bar_format="{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )


class _Lines:
    """Where a progress bar writes whole lines to, each ended by a newline, without carriage returns and padding."""

    def __init__(self, target: TextIO) -> None:
        self.target, self.last = target, ""

    def write(self, text: str) -> None:
        # A bar is written once more when it is closed, also where nothing was done since.
        if (line := text.strip()) and line != self.last:
            self.target.write(f"{line}\n")
            self.target.flush()
            self.last = line


def driver_version(text: str) -> str:
    """The version of NVIDIA's driver, such as 580.95.05, in the text of /proc/driver/nvidia/version; or "unknown"."""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", text)
    return found[1] if found else "unknown"


def _driver() -> str:
    """The version of NVIDIA's driver; only Linux shows it."""
    file = Path("/proc/driver/nvidia/version")
    return driver_version(file.read_text() if file.is_file() else "")


def _no_gpu() -> str:
    """Why torch finds no GPU, in its words: no driver, one that is too old, or none visible; a torch without CUDA."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].partition(". ")[0].rstrip(".")
    raise AssertionError("torch has a GPU")
