"""One store for several runs and several users, with real processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import ENVIRONMENT, command
from store_processes import SHARED, build_as
from tiny import build as build_line
from tiny import tiny_config

from storage.checkpoints import STATE
from storage.store import Store

REF = SHARED.ref
GROUP = 64001


def build(store: Path, then: str = "", *rights: int) -> subprocess.Popen[str]:
    """A process that builds; `rights`: user, group and umask."""
    words = command(build_as, store, then, *map(str, rights))
    return subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def test_who_comes_second_waits_and_says_for_whom(tmp_path: Path) -> None:
    go = tmp_path / "go"
    first = build(tmp_path / "store", str(go))
    while not list(tmp_path.glob("store/tokens/.*.partial/log.txt")):
        time.sleep(0.01)
    second = build(tmp_path / "store", str(go))
    assert second.stderr
    message = second.stderr.readline()
    assert re.fullmatch(rf"waiting for {REF}, held by process {first.pid} on \S+ since 20\S+\n", message)
    go.touch()
    _, rest = second.communicate(timeout=20)
    assert f"{REF} is complete now, somebody else built it" in rest and "building" not in rest
    assert (first.wait(20), second.returncode) == (0, 0)
    assert (Store(tmp_path / "store").open(REF).path / "log.txt").read_text() == "x"
    first.communicate()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that two users of one group may write, outside of pytest's own, which is closed to all but one."""
    if os.geteuid():
        pytest.skip("only root can be two users; the locks between processes of one user are tested above")
    folder = Path(tempfile.mkdtemp())
    os.chown(folder, 0, GROUP)
    folder.chmod(0o2775)
    yield folder
    shutil.rmtree(folder)


def as_user(store: Path, number: int, then: str = "", *, umask: int = 0o002) -> tuple[int, str]:
    """Exit status and stderr of a user's build."""
    process = build(store, then, number, GROUP, umask)
    _, message = process.communicate(timeout=30)
    return process.returncode, message


def test_a_user_goes_on_with_the_partial_build_of_another_of_the_group(shared: Path) -> None:
    assert as_user(shared / "store", 64001, "die")[0] == 9
    partial = Store(shared / "store").partial(REF)
    assert oct((partial / STATE).stat().st_mode & 0o777) == "0o664"
    assert (partial.stat().st_uid, (partial / "log.txt").read_text()) == (64001, "x")
    assert as_user(shared / "store", 64002) == (0, f"cache-clip: going on with {REF}\n" + as_told(shared / "store"))
    assert Store(shared / "store").verify(REF) == []
    files = [path for path in (shared / "store").rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o664"} and len(files) > 8
    assert not (Store(shared / "store").path(REF) / STATE).exists()
    assert (Store(shared / "store").path(REF) / "log.txt").read_text() == "xx"
    assert as_user(shared / "store", 64003) == (0, "")


def as_told(store: Path) -> str:
    manifest = Store(store).open(REF).manifest
    return f"cache-clip: {REF} complete, {len(manifest.files)} files, 0.0 MB\n"


def test_a_user_whom_the_other_keeps_out_is_told_who_and_where(shared: Path) -> None:
    assert as_user(shared / "store", 64001, "die", umask=0o022)[0] == 9
    status, message = as_user(shared / "store", 64002)
    *warned, last = message.splitlines()
    assert status == 1 and last.startswith(f"refused: store {shared}/store cannot be used: {shared}/store")
    assert "belongs to user 64001, who must let the group read and write" in last and "--store" in last
    assert len(warned) == 1 and "this run is not noted" in warned[0]


def test_who_may_only_read_uses_what_is_complete(shared: Path) -> None:
    assert as_user(shared / "store", 64001, umask=0o022)[0] == 0
    status, message = as_user(shared / "store", 64002)
    assert status == 0 and message.startswith("this run is not noted, so that `zs-seg gc` does not know of it")


def test_a_file_that_its_owner_keeps_to_himself_is_named_and_a_stray_one_is_nobodys_business(shared: Path) -> None:
    """A listed file of mode 600 stops the reader in one line; a stray one of mode 0 is not even opened."""
    assert as_user(shared / "store", 64001)[0] == 0
    store = Store(shared / "store")
    stray = store.path(REF) / ".DS_Store"
    stray.write_text("x")
    stray.chmod(0)
    assert as_user(shared / "store", 64002, "read")[0] == 0
    kept = store.path(REF) / "meta.json"
    kept.chmod(0o600)
    os.chown(kept, 64001, GROUP)
    status, message = as_user(shared / "store", 64002, "read again")
    assert status == 1 and message.startswith(
        f"refused: store {shared}/store cannot be used: {kept} belongs to user 64001"
    )
    assert message.count("\n") == 1


@pytest.mark.slow
def test_every_file_of_a_whole_line_follows_the_umask(shared_store: Store) -> None:
    build_line(shared_store, tiny_config())
    os.umask(mask := os.umask(0o022))
    odd = {str(path.relative_to(shared_store.root)): oct(path.stat().st_mode & 0o777) for path in
           shared_store.root.rglob("*") if path.is_file() and path.stat().st_mode & 0o777 != 0o666 & ~mask}  # fmt: skip
    assert odd == {}
