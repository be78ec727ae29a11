"""Keys: an artefact is named by a hash over everything that decides its bytes, known before anything runs.

An equal recipe has an equal key on every machine; a change anywhere upstream moves every key below it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from storage.errors import UserError

KEY_LENGTH = 16
_OPTION = "an option"
_KIND = re.compile(r"[a-z][a-z0-9-]*")
_KEY = re.compile(rf"[0-9a-f]{{{KEY_LENGTH}}}")
Value = TypeVar("Value")


def option(default: Value) -> Value:
    """A field of a config that came after the first artefacts: at its default it is in no key, so that what was built
    without it keeps its own. Use as `weight: float = option(0.0)`; the default must mean what there was before."""
    field: Any = dataclasses.field(default=default, metadata={_OPTION: True})
    return field


@dataclass(frozen=True, kw_only=True)
class Ref:
    """Names one artefact of the store; the only thing that travels between tasks.

    `kind` is the folder in the store ("scenes", "shards", "text", "tokens", "checkpoint", "queries", "generator",
    "mask-tokens" or "report"), `key` 16 hexadecimal digits.
    """

    kind: str
    key: str

    def __post_init__(self) -> None:
        if not _KIND.fullmatch(self.kind) or not _KEY.fullmatch(self.key):
            raise UserError(f"{self.kind}/{self.key} names no artefact; it must read like checkpoint/0123456789abcdef")

    def __str__(self) -> str:
        return f"{self.kind}/{self.key}"

    @classmethod
    def parse(cls, text: str) -> Ref:
        """From "kind/key". Raises UserError when it does not read like that."""
        kind, _, key = text.partition("/")
        return cls(kind=kind, key=key)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides an artefact's bytes.

    `version` is a constant beside the stage, raised when the meaning of its output changes. `config` is a dataclass, or
    a dict of dataclasses and plain values; it holds no path, device or worker count. `inputs` are the artefacts read.
    """

    kind: str
    stage: str
    version: int
    config: Any
    inputs: Mapping[str, Ref]

    @property
    def key(self) -> str:
        """16 hexadecimal digits."""
        return recipe_key(self.stage, self.version, self.config, {name: ref.key for name, ref in self.inputs.items()})

    @property
    def ref(self) -> Ref:
        return Ref(kind=self.kind, key=self.key)


def recipe_key(stage: str, version: int, config: Any, inputs: Mapping[str, str]) -> str:
    """The key of a recipe whose inputs are given as name -> key."""
    text = canonical({"stage": stage, "version": version, "config": config, "inputs": dict(inputs)})
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, ASCII; equal values give equal text in every process.

    Dataclasses become objects, without options (`option`) at their default, and tuples arrays. Raises UserError for NaN and infinities, TypeError for anything that
    is neither a dataclass, mapping with string keys, list, tuple, str, int, float, bool nor None (a Path, a set).
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f"{value} has no place in a key; use a finite number or None")
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: _plain(item) for field, item in items if not _left_out(field, item)}
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError(f"a mapping in a key needs string keys, not {list(value)[:3]}")
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no place in a key; use plain values or dataclasses of them")


def _left_out(field: dataclasses.Field[Any], value: Any) -> bool:
    return _OPTION in field.metadata and value == field.default


def sha256_file(path: Path) -> str:
    """The sha256 of a file's content, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
