"""From what is asked for, as flags or as a flow's parameters, to a Config, a Store and a Runtime."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from flows.presets import preset
from pipeline.data.config import CocoConfig
from pipeline.line import Config
from pipeline.runtime import Runtime
from storage.errors import UserError
from storage.store import Store


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
    """`config` with at most so many steps in every training stage, for trials. Raises UserError for a negative number."""
    if steps < 0:
        raise UserError(f"--max-steps must be 1 or more, or 0 for all, not {steps}")
    return replace(
        config,
        v2c=replace(config.v2c, steps=min(config.v2c.steps, steps)),
        g2s=replace(config.g2s, steps=min(config.g2s.steps, steps)),
        cpa=replace(config.cpa, steps=min(config.cpa.steps, steps)),
    )


def override(config: Config, flags: Sequence[str]) -> Config:
    """`config` with single fields replaced by flags such as "--v2c.lr", "2e-4"; tyro derives them from the fields.

    Raises UserError, in one line, where tyro would print a box of its own and exit.
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
        raise UserError(f"{reason}; `zs-seg run --preset {config.preset} --help` lists the flags") from error
    if unknown:
        raise UserError(
            f"{unknown[0]!r} is not a flag of preset {config.preset}; "
            f"`zs-seg run --preset {config.preset} --help` lists them"
        )
    if changed.preset != config.preset:
        raise UserError("the preset cannot be overridden; choose another with --preset")
    return changed


def print_override_help(config: Config, *, prog: str) -> None:
    """Every flag of the config tree, with the preset's values."""
    import tyro

    with contextlib.suppress(SystemExit):
        tyro.cli(
            tyro.conf.AvoidSubcommands[Config], default=config, args=["--help"], prog=prog,
            description="Flags that change single fields of the preset; `zs-seg plan` shows which stages that rebuilds.",
        )  # fmt: skip


def open_store(options: argparse.Namespace) -> Store:
    return Request(preset="", store=options.store).open_store()
