"""Pushes, pulls and builds of one artefact that meet: what is complete stays, and each ends as it would alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from remote_processes import FILES, make, recipe

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


def test_a_push_whose_artefact_another_push_completes_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its other artefacts, and with what the same remote sends later."""
    store, remote = Store(tmp_path / "store"), Remote(address(tmp_path / "remote"), threads=1)
    first, second, third = (make(store, number) for number in range(3))
    begun, send_file, sent_files = threading.Event(), Remote.send, list[str]()

    def overtaken(self: Remote, source: Path, path: str, **options: Any) -> str:
        if self is remote:
            sent_files.append(path)
            if first.key in path and not begun.is_set():
                begun.set()
                assert send(store, remote.url, first) == [first]
        return send_file(self, source, path, **options)

    monkeypatch.setattr(Remote, "send", overtaken)
    pushed = transfer.push(store, remote, [store.open(ref).manifest for ref in (first, second)], advance=abs)
    assert pushed == [first, second] and begun.is_set()
    assert sum(first.key in path for path in sent_files) < len(FILES)  # not all are tried when the folder is gone
    assert transfer.push(store, remote, [store.open(third).manifest], advance=abs) == [third]
    there = Store(tmp_path / "remote")
    assert [there.verify(ref) for ref in (first, second, third)] == [[]] * 3
    assert remote.sizes("tokens").keys() == {
        f"{ref.key}/{name}" for ref in (first, second, third) for name in (MANIFEST, *FILES)
    }
