"""Pushes, pulls and builds of one artefact that meet: what is complete stays, and each ends as it would alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from remote_processes import make, recipe

from storage import transfer
from storage.keys import Ref
from storage.remote import Remote
from storage.store import ASIDE, MANIFEST, Build, Store


def address(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    return f"file://{folder}"


def send(store: Store, url: str, *refs: Ref) -> list[Ref]:
    return transfer.push(store, Remote(url), [store.open(ref).manifest for ref in refs], advance=abs)


@pytest.mark.parametrize("way", ["build", "pull"])
def test_a_push_into_a_store_that_makes_the_same_artefact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    """What came whole is kept, with its bytes; what the store itself was making is set aside."""
    here, other, third = (Store(tmp_path / name) for name in ("here", "other", "third"))
    ref = make(other, 1, other=True)
    assert make(third, 1) == ref

    def work(build: Build) -> None:
        (build.path / "ours").write_text("x")
        build.add(build.path / "ours")
        assert send(other, address(here.root), ref) == [ref]
        assert here.state(ref) == "fresh"

    def fetch(folder: Path) -> None:
        (folder / "index.json").write_bytes((third.path(ref) / "index.json").read_bytes())
        assert send(other, address(here.root), ref) == [ref]

    if way == "build":
        here.build(recipe(1), work)
    else:
        assert not here.receive(third.open(ref).manifest, fetch)
    assert here.open(ref).manifest == other.open(ref).manifest
    assert here.verify(ref) == [] and here.strays(ref) == []
    (aside,) = (path for path in (here.root / ref.kind).iterdir() if path.name.endswith(ASIDE))
    ours = {"build": "ours", "pull": "index.json"}[way]
    assert {MANIFEST, ours} <= {path.name for path in aside.iterdir()}
    assert "had lost its" not in caplog.text and f"ours is set aside as {aside}" in caplog.text
