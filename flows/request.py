"""From a request, made of flags or of a flow's parameters, to a Config, a Store and a Runtime."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from flows.flags import override
from flows.presets import preset
from pipeline.data.config import CocoConfig
from pipeline.line import Config
from pipeline.runtime import Runtime
from storage.errors import UserError
from storage.store import Store


@dataclass(frozen=True, kw_only=True)
class Request:
    """A preset, and what differs from it."""

    preset: str
    """Name of the preset."""

    coco: str = ""
    """Folder of real images; "" takes the environment's COCO_ROOT."""

    store: str = ""
    """Folder of the artefacts; "" takes the environment's ZS_SEG_STORE, else ./artifacts."""

    overrides: tuple[str, ...] = ()
    """Flags of the config tree, as on the command line."""

    max_steps: int = 0
    """Largest number of steps of every training stage; 0 leaves the preset's."""

    name: str = ""
    """Name of the run in the store and in runs/; "" takes the preset's."""

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

    @classmethod
    def parse(cls, command: str) -> Request:
        """The request of a command line that `command` made of one word, such as "run".

        Raises UserError for any other.
        """
        rest, given = iter(shlex.split(command)[2:]), dict[str, str]()
        overrides: list[str] = []
        for word in rest:
            if word in ("--preset", "--coco", "--store", "--name", "--max-steps"):
                given[word] = next(rest, "")
            else:
                overrides.append(word)
        steps = given.get("--max-steps", "0")
        if not given.get("--preset") or not steps.isdecimal():
            raise UserError(f"{command!r} is no command of a run")
        names = ("preset", "coco", "store", "name")
        return cls(
            **{name: given.get(f"--{name}", "") for name in names}, max_steps=int(steps), overrides=tuple(overrides)
        )


def open_request(options: argparse.Namespace) -> Request:
    """The request that a command's flags make."""
    return Request(
        preset=options.preset,
        coco=options.coco,
        store=options.store,
        overrides=options.overrides,
        max_steps=options.max_steps,
        name=getattr(options, "name", ""),
    )


def open_runtime(options: argparse.Namespace) -> Runtime:
    """The runtime that a command's flags make; what it has no flag for is as by default."""
    names = ("device", "threads", "devices", "compile", "checkpoint_every", "dask")
    return Runtime(**{name: getattr(options, name) for name in names if hasattr(options, name)})


def configure(request: Request) -> Config:
    """The preset with the overrides in place. Raises UserError for an unknown preset or flag and for a wrong value."""
    config = preset(request.preset)
    if request.overrides:
        config = override(config, request.overrides)
    if request.max_steps:
        config = shorten(config, request.max_steps)
    if isinstance(config.data, CocoConfig):
        root = request.coco or config.data.root or os.environ.get("COCO_ROOT", "")
        if not root:
            raise UserError(f"preset {request.preset} reads real images; pass --coco FOLDER or set COCO_ROOT")
        return replace(config, data=replace(config.data, root=root))
    if request.coco:
        raise UserError(
            f"preset {request.preset} draws its own scenes and reads no COCO folder; "
            "leave --coco out, or use --preset coco-sample"
        )
    return config


def shorten(config: Config, steps: int) -> Config:
    """`config` with at most `steps` steps in every training stage, for trials. Raises UserError for a negative
    number."""
    if steps < 0:
        raise UserError(f"--max-steps must be 1 or more, or 0 for all, not {steps}")
    return replace(
        config,
        v2c=replace(config.v2c, steps=min(config.v2c.steps, steps)),
        g2s=replace(config.g2s, steps=min(config.g2s.steps, steps)),
        cpa=replace(config.cpa, steps=min(config.cpa.steps, steps)),
    )


def open_store(options: argparse.Namespace) -> Store:
    """The store that a command's flags name."""
    return Request(preset="", store=options.store).open_store()
