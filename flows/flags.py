"""The flags of the config tree, such as `--v2c.lr 2e-4`: one for every field, made from its name and its type."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pipeline.line import Config
from storage.errors import UserError, did_you_mean

WORDS = {int: "INT", float: "NUMBER", str: "TEXT"}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One field of a config tree: the names on the way to it, its type, and its value."""

    path: tuple[str, ...]
    hint: Any
    value: Any

    @property
    def names(self) -> tuple[str, ...]:
        """How it is written: ("--v2c.lr",), or of a switch ("--v2c.augment.flip", "--v2c.augment.no-flip")."""
        *parents, field = self.path
        written = (field, f"no_{field}") if self.hint is bool else (field,)
        return tuple("--" + ".".join((*parents, name)).replace("_", "-") for name in written)

    @property
    def takes(self) -> str:
        """Which words it takes: "NUMBER", "INT INT", "TEXT ...", "{image,batch}"; "" for a switch, which takes none."""
        return "" if self.hint is bool else _takes(self.hint)

    @property
    def shown(self) -> str:
        """Its value as it is written on the command line."""
        if self.hint is bool:
            return "on" if self.value else "off"
        return shlex.join(map(str, self.value if isinstance(self.value, tuple) else (self.value,)))

    def read(self, name: str, words: Sequence[str]) -> Any:
        """The value that `words` stand for behind `name`, one of its names. Raises UserError where they do not fit its
        type."""
        if self.hint is bool:
            if words:
                on, off = self.names
                raise UserError(f"{name} takes no value, not {' '.join(words)!r}; {on} switches it on, {off} off")
            return name == self.names[0]
        try:
            return _read(self.hint, words)
        except ValueError as error:
            such = f", such as {self.shown}" if self.value not in ("", None) else ""
            given = f", not {' '.join(words)!r}" if words else ""
            raise UserError(f"{name} takes {self.takes}{such}{given}") from error


def flags_of(config: Any, *path: str) -> Iterator[Flag]:
    """Every flag of a config tree; those of a config come before those of the configs inside it."""
    hints = get_type_hints(type(config))
    inside = []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            inside.append((value, field.name))
        elif (*path, field.name) != ("preset",):
            yield Flag(path=(*path, field.name), hint=hints[field.name], value=value)
    for value, name in inside:
        yield from flags_of(value, *path, name)


def override(config: Config, words: Sequence[str]) -> Config:
    """`config` with single fields replaced by flags such as "--v2c.lr", "2e-4"; the last one counts of a flag given
    twice.

    Raises UserError for a flag that the config does not have, and for a value that does not fit.
    """
    flags = {name: flag for flag in flags_of(config) for name in flag.names}
    changes: dict[tuple[str, ...], Any] = {}
    for written, values in _grouped(words):
        name = written.replace("_", "-")
        if name not in flags:
            raise UserError(
                f"{written!r} is not a flag of preset {config.preset}{did_you_mean(name, flags)}; "
                f"`zs-seg run --preset {config.preset} --help-all` lists them"
            )
        changes[flags[name].path] = flags[name].read(name, values)
    return _replaced(config, changes)


def _grouped(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the words up to the next one; "--flag=word" is a flag with a word."""
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") or not groups:
            name, equals, value = word.partition("=")
            groups.append((name, [value] if equals else []))
        else:
            groups[-1][1].append(word)
    return groups


def _replaced(config: Any, changes: Mapping[tuple[str, ...], Any]) -> Any:
    """`config` with the values at these paths; all changes of one config at once, for it checks them together."""
    own: dict[str, Any] = {}
    inside: dict[str, dict[tuple[str, ...], Any]] = {}
    for (name, *rest), value in changes.items():
        if rest:
            inside.setdefault(name, {})[tuple(rest)] = value
        else:
            own[name] = value
    return replace(config, **own, **{name: _replaced(getattr(config, name), part) for name, part in inside.items()})


def _takes(hint: Any) -> str:
    parts = get_args(hint)
    if get_origin(hint) is tuple:
        return f"{_takes(parts[0])} ..." if parts[-1] is Ellipsis else " ".join(map(_takes, parts))
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    return f"{_takes(parts[0])}|None" if NoneType in parts else WORDS[hint]


def _read(hint: Any, words: Sequence[str]) -> Any:
    """The value of a type that words stand for; a Literal's own choices are compared where the config is built.

    Raises ValueError where they do not fit.
    """
    parts = get_args(hint)
    if get_origin(hint) is tuple:
        kinds = parts[:1] * len(words) if parts[-1] is Ellipsis else parts
        return tuple(_read(kind, [word]) for kind, word in zip(kinds, words, strict=True))
    if NoneType in parts:
        return None if list(words) == ["None"] else _read(parts[0], words)
    (word,) = words
    return type(parts[0])(word) if get_origin(hint) is Literal else hint(word)
