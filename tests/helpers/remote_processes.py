"""Pushes and pulls in processes of their own, which tests kill; light, so that many fit into a test."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from storage import transfer
from storage.errors import UserError
from storage.keys import Recipe, Ref
from storage.remote import Remote
from storage.store import Build, Store

FILES = {"index.json": 300, "train-000000.tar": 3_000_000, "train-000001.tar": 40_000, "a.zarr/zarr.json": 0}
FILES |= {f"a.zarr/c/{number}": 1000 + number for number in range(8)}


def recipe(number: int, inputs: Mapping[str, Ref] | None = None) -> Recipe:
    return Recipe(kind="tokens", stage="cache-clip", version=1, config=number, inputs=inputs or {})


def make(store: Store, number: int, other: bool = False, inputs: Mapping[str, Ref] | None = None) -> Ref:
    """Build an artefact of several files; with `other` one of the same key with other bytes."""

    def work(build: Build) -> None:
        for place, (name, size) in enumerate(FILES.items()):
            path = build.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                bytes((number + 7 * other + 13 * place + i) % 251 for i in range(min(size, 1000))) * (size // 1000 or 1)
            )
            build.add(path)

    return store.build(recipe(number, inputs), work)


def push(store: str, url: str, *refs: str) -> None:
    """Push artefacts, and print which are there."""
    opened = Store(Path(store))
    _say(
        lambda: transfer.push(
            opened, Remote(url), [opened.open(Ref.parse(ref)).manifest for ref in refs], advance=_none
        )
    )


def pull(store: str, url: str, *refs: str) -> None:
    """Pull artefacts, and print which came."""
    opened, remote = Store(Path(store)), Remote(url)
    _say(
        lambda: transfer.pull(
            opened, remote, [m for ref in refs if (m := remote.manifest(Ref.parse(ref)))], advance=_none
        )
    )


def _say(work: object) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(*work(), flush=True)  # type: ignore[operator]
    except UserError as error:
        sys.exit(f"refused: {error}")


def _none(_: int) -> None:
    pass
