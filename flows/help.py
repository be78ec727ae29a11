"""Help for the commands that take flags of the config tree: a screen with the common ones, or all of them with their
sentences."""

from __future__ import annotations

import argparse
import ast
import inspect
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import Any

from flows.flags import Flag, flags_of
from pipeline.line import Config

# fields of the config and flags of a command: those that the screen shows, and those that it leaves out
COMMON = {
    "data.train_images", "data.benchmark", "v2c.steps", "v2c.batch", "v2c.lr", "v2c.augment.size",
    "g2s.steps", "cpa.steps",
}  # fmt: skip
RARE = {
    "--help", "--help-all", "--traceback", "--skip-bad", "--threads", "--compile", "--checkpoint-every", "--dask",
    "--remote", "--push", "--cache", "--track",
}  # fmt: skip
# columns; longer lines are hard to read
WIDEST = 100


def screen(command: argparse.ArgumentParser, options: Sequence[argparse.Action], config: Config) -> str:
    """The command's common flags, and the config's, on one screen of 24 lines."""
    own = _rows(option for option in options if not RARE & set(option.option_strings))
    common = [flag for flag in flags_of(config) if ".".join(flag.path) in COMMON]
    changes = [(_written(flag), f"{sentence(config, flag.path)} {_value(flag)}") for flag in common]
    rows = _aligned([*own, *changes])
    title = f"some fields of the config, with the values of preset {config.preset}; --help-all shows all:"
    return "\n".join((*_head(command), *rows[: len(own)], "", title, *rows[len(own) :]))


def everything(command: argparse.ArgumentParser, options: Sequence[argparse.Action], config: Config) -> str:
    """All flags of the command and of the config, these with their sentences and values."""
    title = f"Every field of the config is a flag; in parentheses its value in preset {config.preset}."
    lines = [*_head(command), *_aligned(_rows(options)), "", *_wrapped(title)]
    for path, flags in groupby(flags_of(config), key=lambda flag: flag.path[:-1]):
        lines += ["", *_wrapped(f"{'.'.join(path)}: {sentence(config, path)}")]
        for flag in flags:
            lines += _wrapped(f"{_written(flag)} {_value(flag)}", indent=2)
            lines += _wrapped(sentence(config, flag.path), indent=6)
    return "\n".join(lines)


def sentence(config: Any, path: Sequence[str]) -> str:
    """What the field at the end of a path from `config` means."""
    *parents, field = path
    for name in parents:
        config = getattr(config, name)
    return sentences(type(config))[field]


@cache
def sentences(kind: type) -> dict[str, str]:
    """Each field of a config's class and its bases with the docstring below it in the source."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def _head(command: argparse.ArgumentParser) -> tuple[str, ...]:
    return *command.format_usage().splitlines(), command.description or "", ""


def _rows(options: Iterable[argparse.Action]) -> list[tuple[str, str]]:
    """A command's own flags as they are written, with their explanation; words without a flag come first."""
    return [
        (f"{', '.join(option.option_strings)} {option.metavar or ''}".strip(), option.help or "")
        for option in sorted(options, key=lambda option: bool(option.option_strings))
    ]


def _written(flag: Flag) -> str:
    return f"{', '.join(flag.names)} {flag.takes}".rstrip()


def _value(flag: Flag) -> str:
    return f"({flag.shown})" if flag.value != "" else ""


def _width() -> int:
    return min(shutil.get_terminal_size().columns, WIDEST)


def _wrapped(text: str, indent: int = 0) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, _width(), initial_indent=space, subsequent_indent=space, break_on_hyphens=False)


def _aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Each row as text, its explanation in a column beside the others', wrapped there."""
    rows = list(rows)
    column = max(len(flag) for flag, _ in rows) + 4
    result = []
    for flag, text in rows:
        first, *rest = textwrap.wrap(text, _width() - column, break_on_hyphens=False) or [""]
        result.append("\n".join((f"  {flag:<{column - 2}}{first}", *(" " * column + line for line in rest))))
    return result
