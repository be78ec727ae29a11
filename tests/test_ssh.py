"""A remote over ssh, on a server of the test's own: what it does otherwise than a folder and S3."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest
from remote_processes import FILES, make
from sftp_server import Drop, sftp_server

from storage import remote_care, remote_files, transfer
from storage.atomic import ASIDE
from storage.keys import Ref
from storage.remote import Remote
from storage.runs import RunRecord, Runs
from storage.store import MANIFEST, Store


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Drop, Path]]:
    home = tmp_path_factory.mktemp("home")
    with sftp_server(home) as (address, drop):
        yield address, drop, home


@pytest.fixture
def url(server: tuple[str, Drop, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", str(server[2]))
    monkeypatch.setattr(remote_files, "WAITS", (0.01, 0.01))
    (tmp_path / "remote").mkdir()
    return f"{server[0]}{tmp_path}/remote"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def push(store: Store, url: str, *refs: Ref) -> list[Ref]:
    return transfer.push(store, Remote(url), [store.open(ref).manifest for ref in refs], advance=abs)


def test_there_and_back(store: Store, url: str, tmp_path: Path) -> None:
    refs, there, other = [make(store, number) for number in range(3)], Store(tmp_path / "remote"), Store(tmp_path / "o")
    assert push(store, url, *refs) == refs and push(store, url, *refs) == refs
    assert there.refs() == sorted(refs, key=str) and all(there.verify(ref) == [] for ref in refs)
    assert sorted(path.name for path in (there.root / "tokens").iterdir()) == sorted(ref.key for ref in refs)
    remote = Remote(url)
    assert all(remote_care.verify(remote, ref, files=["index.json"]) == [] for ref in refs)
    assert transfer.pull(other, remote, [remote.manifest(ref) for ref in refs], advance=abs) == refs  # type: ignore[list-item]
    assert all(other.verify(ref) == [] for ref in refs)
    remote.delete(str(refs[0]))
    assert there.refs() == sorted(refs[1:], key=str)


def test_what_was_set_aside_is_sent_anew(store: Store, url: str, tmp_path: Path) -> None:
    ref, remote = make(store, 1), Remote(url)
    push(store, url, ref)
    remote.write(f"{ref}/index.json", b"damaged")
    remote_care.set_aside(remote, ref)
    assert push(store, url, ref) == [ref] and Store(tmp_path / "remote").verify(ref) == []
    (aside,) = (name for name in remote.names("tokens") if name.endswith(ASIDE))
    assert remote.read(f"tokens/{aside}/index.json") == b"damaged"


def test_gc_removes_what_a_killed_sender_left(store: Store, url: str, tmp_path: Path) -> None:
    ref, remote = make(store, 1), Remote(url)
    with Runs(store).running(RunRecord.now(name="demo", command="x", refs={"cache-clip": ref})):
        push(store, url, ref)
    transfer.push_run(store, remote, "demo")
    file, folder = (tmp_path / "remote" / "tokens" / f".{name}{ASIDE}" for name in ("file", "folder"))
    file.write_bytes(b"xyz")
    folder.mkdir()
    for path in (file, folder):
        os.utime(path, (0, 0))
    assert remote.sizes(f"tokens/{file.name}") == {"": 3}
    found = remote_care.collect(remote)
    assert {waste.path.name: waste.bytes for waste in found.waste} == {file.name: 3, folder.name: 0}
    assert remote.names("tokens") == [ref.key]


def test_a_note_is_there_as_a_whole_or_not_at_all(store: Store, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ref, remote = make(store, 1), Remote(url)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(paramiko.SFTPFile, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            push(store, url, ref)
    assert remote.sizes("") == {}
    assert push(store, url, ref) == [ref]
    assert remote.create("tokens/x", b"x") and not remote.create("tokens/x", b"y") and remote.create("tokens/x", b"x")
    assert remote.read("tokens/x") == b"x"
    assert remote.sizes("tokens").keys() == {"x", *(f"{ref.key}/{name}" for name in (MANIFEST, *FILES))}


def test_a_connection_that_is_gone_is_made_anew(
    store: Store, url: str, server: tuple[str, Drop, Path], caplog: pytest.LogCaptureFixture
) -> None:
    ref, remote = make(store, 1), Remote(url)
    push(store, url, ref)
    sizes = remote.sizes("")
    for look in (
        lambda: remote.sizes("") == sizes,
        lambda: remote.manifest(ref),
        lambda: remote.delete(str(ref)) is None,
    ):
        caplog.clear()
        server[1]()
        time.sleep(0.1)
        assert look() and "trying again in" in caplog.text
    assert remote.sizes("") == {}
