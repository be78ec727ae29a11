"""The lock: one holder, seen by all; what a dead holder leaves behind does not block."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from storage.lock import Lock


def test_held_while_held(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    assert not Lock(path, what="x").held()
    with Lock(path, what="x"):
        assert Lock(path, what="x").held()
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not Lock(path, what="x").held()
    assert not path.exists()


def test_a_left_lock_file_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    path.write_text(json.dumps({"host": "gone", "pid": 1, "since": "long ago"}) + " " * 200)
    assert not Lock(path, what="x").held()
    with Lock(path, what="x"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_who_waited_holds_the_lock_that_others_see(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first holder removes the file that the second waits for: the second must not end up with the removed one."""
    path = tmp_path / "x.lock"
    waiting, got, done = threading.Event(), threading.Event(), threading.Event()

    def second() -> None:
        waiting.set()
        with Lock(path, what="text/1"):
            got.set()
            done.wait(20)

    thread = threading.Thread(target=second)
    with caplog.at_level(logging.INFO), Lock(path, what="text/1"):
        thread.start()
        waiting.wait(20)
        while "waiting for text/1" not in caplog.text:
            assert not got.is_set()
    assert f"process {os.getpid()} on " in caplog.text
    assert got.wait(20)
    assert path.exists() and Lock(path, what="text/1").held()
    done.set()
    thread.join()
    assert not path.exists()


def test_an_exception_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Lock(tmp_path / "x.lock", what="x"):
        raise RuntimeError
    assert not Lock(tmp_path / "x.lock", what="x").held()


WITHOUT_LOCKS = """
#include <errno.h>
#include <stdlib.h>
int flock(int file, int operation) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""


@pytest.fixture(scope="module")
def no_locks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library under which every flock fails, as on a file system that has none."""
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler to make a file system without locks with")
    source = tmp_path_factory.mktemp("flock") / "flock.c"
    source.write_text(WITHOUT_LOCKS)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", source.with_suffix(".so"), source], check=True)
    return source.with_suffix(".so")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize(
    "words", [("run", "--preset", "demo", "--until", "scenes"), ("gc", "--delete")], ids=["run", "gc"]
)
def test_a_file_system_without_locks(no_locks: Path, number: int, words: tuple[str, ...], tmp_path: Path) -> None:
    """One line that names the store and the cure, and no artefact."""
    environment = {**os.environ, "LD_PRELOAD": str(no_locks), "FLOCK_ERRNO": str(number)}
    command = [sys.executable, "-m", "flows.cli", *words, "--store", str(tmp_path / "store")]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"zs-seg: store {tmp_path / 'store'} lies on a file system without working locks (")
    assert os.strerror(number) in done.stderr and "--store" in done.stderr and done.stderr.count("\n") == 1
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
