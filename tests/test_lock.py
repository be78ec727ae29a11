"""The lock: one holder, seen by all; what a dead holder leaves behind does not block."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from children import ENVIRONMENT, command
from store_processes import TOKENS, build_two_files

from storage import lease
from storage.atomic import ASIDE
from storage.errors import UserError
from storage.lock import LEASES, Lock, _File, one_machine
from storage.store import Build, Store


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


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


# Locks that do not hold: leases


@pytest.fixture
def leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a lock in a store of leases, with short times."""
    for name, value in (("BEAT", 0.05), ("DEAD", 1.5), ("SETTLE", 0.4)):
        monkeypatch.setattr(lease, name, value)
    (tmp_path / "text").mkdir()
    (tmp_path / LEASES).touch()
    return tmp_path / "text" / "x.lock"


def test_a_lease_is_held_while_it_is_renewed(leases: Path) -> None:
    with Lock(leases, what="x", note={"inputs": []}) as lock:
        first = leases.read_bytes()
        wait_until(lambda: leases.read_bytes() != first)
        assert Lock(leases, what="x").held()
        assert Lock(leases, what="x").holder().startswith(f"process {os.getpid()} on ")
        assert lock.owner()["inputs"] == []
        with pytest.raises(BlockingIOError), Lock(leases, what="x", wait=False):
            pass
        lock.require()
    assert not leases.exists() and not Lock(leases, what="x").held()
    assert [path.name for path in leases.parent.iterdir()] == []


def test_who_waits_for_a_lease_gets_it_when_it_ends(leases: Path, caplog: pytest.LogCaptureFixture) -> None:
    got = threading.Event()

    def second() -> None:
        with Lock(leases, what="text/1"):
            got.set()

    with caplog.at_level(logging.INFO), Lock(leases, what="text/1"):
        thread = threading.Thread(target=second)
        thread.start()
        wait_until(lambda: "waiting for text/1" in caplog.text)
        assert not got.wait(1.5 * lease.DEAD)  # it is renewed for all this time
    assert got.wait(20)
    thread.join()


def test_a_dead_owners_lease_is_taken_over_by_one_of_those_who_watch(
    leases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And by no two of them at once, though all find it dead in the same moment."""
    leases.write_text(json.dumps({"host": "gone", "pid": 1, "since": "then", "time": time.time(), "token": "x"}))
    inside, most, mutex = 0, 0, threading.Lock()

    def take() -> None:
        nonlocal inside, most
        with Lock(leases, what="x"):
            with mutex:
                inside += 1
                most = max(most, inside)
            time.sleep(0.1)
            with mutex:
                inside -= 1

    assert Lock(leases, what="x").held()
    threads = [threading.Thread(target=take) for _ in range(4)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert time.monotonic() - began > lease.DEAD and most == 1
    assert "process 1 on gone since then: no sign of life" in caplog.text


def test_of_two_who_take_over_in_the_same_moment_one_has_it(leases: Path) -> None:
    leases.write_text(json.dumps({"host": "gone", "pid": 1, "since": "then", "time": time.time(), "token": "x"}))
    both, inside, most = threading.Barrier(2, timeout=20), list[int](), list[int]()

    class First(_File):
        """Its first write waits for that of the other."""

        waited = False

        def write(self, data: bytes) -> None:
            if not self.waited:
                self.waited = True
                both.wait()
            super().write(data)

    def take() -> None:
        with lease.Lease(First(leases), what="x"):
            inside.append(1)
            time.sleep(0.2)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == [1, 1]


def test_a_lease_that_is_renewed_as_it_ends_does_not_come_back(leases: Path) -> None:
    begun, go = threading.Event(), threading.Event()

    class Slow(_File):
        def write(self, data: bytes) -> None:
            begun.set()
            go.wait(20)
            super().write(data)

    with lease.Lease(Slow(leases), what="x") as held:
        assert begun.wait(20)
        threading.Timer(0.2, go.set).start()
    assert not leases.exists() and list(leases.parent.iterdir()) == []
    with Lock(leases, what="x") as next_one:
        time.sleep(0.3)
        next_one.require()
    assert not held._lost


def test_an_empty_lease_is_held_by_nobody_for_long(leases: Path) -> None:
    """As its owner was killed before it wrote, or the disk was full."""
    leases.touch()
    assert Lock(leases, what="x").held()
    os.utime(leases, (0, 0))
    assert not Lock(leases, what="x").held()
    began = time.monotonic()
    with Lock(leases, what="x", wait=False):
        assert time.monotonic() - began > lease.DEAD and Lock(leases, what="x").held()


@pytest.mark.parametrize("operation", ["create", "write"])
def test_a_lease_that_cannot_be_written_leaves_nothing(leases: Path, operation: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            getattr(_File(leases), operation)(b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(leases.parent.iterdir()) == []


def test_gc_finds_what_a_killed_owner_of_a_lease_leaves(leases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    leases.mkdir()
    with pytest.raises(OSError):
        _File(leases).write(b"x")
    (left,) = (path for path in leases.parent.iterdir() if path.is_file())
    assert left in leases.parents[1].glob(f"*/.*{ASIDE}")


def test_an_owner_that_stood_still_completes_nothing(leases: Path) -> None:
    """Another process took its lease over: what it made does not become visible."""
    with pytest.raises(UserError, match="another one took over tokens/"):
        Store(leases.parents[1]).build(TOKENS, lambda build: lose(build, leases))
    assert Store(leases.parents[1]).state(TOKENS.ref) != "fresh"


def lose(build: Build, leases: Path) -> None:
    (build.path / "a.txt").write_text("x")
    build.add(build.path / "a.txt")
    (lock,) = (leases.parents[1] / "tokens").glob("*.lock")
    other = json.loads(lock.read_text())
    lock.write_text(json.dumps({**other, "token": "another", "time": time.time()}))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("36 35 0:40 / /data rw,relatime shared:1 - nfs4 srv:/x rw,vers=4.2,local_lock=none", ""),
        ("36 35 0:40 / /data rw,relatime shared:1 - nfs srv:/x rw,vers=3,nolock,local_lock=all", "nfs nolock"),
        ("36 35 0:40 / /data rw - nfs srv:/x rw,local_lock=flock,hard", "nfs local_lock=flock"),
        ("36 35 0:40 / /data rw - nfs srv:/x rw,local_lock=posix", ""),
        ("36 35 0:40 / /data rw,relatime - lustre fs:/x rw,localflock", "lustre localflock"),
        ("36 35 0:40 / /data rw,relatime - lustre fs:/x rw,flock", ""),
        ("36 35 0:40 / /data rw,relatime - fuse.sshfs me@host:/x rw,user_id=0", "fuse.sshfs"),
        ("36 35 0:40 / /data/store/deeper rw - fuse.sshfs me@host:/x rw", ""),
        ("36 35 0:40 / /dat rw - fuse.sshfs me@host:/x rw", ""),
        ("36 35 0:40 / /data rw - fuse.sshfs x rw\n37 36 0:41 / /data/store rw - ext4 /dev/x rw", ""),
    ],
)
def test_mounts_whose_locks_stay_on_one_machine(line: str, why: str) -> None:
    mounts = f"21 1 252:1 / / rw,relatime - ext4 /dev/vda rw\n{line}\n"
    assert one_machine(mounts, "/data/store") == (why and f"{why}: its locks stay on this machine")


WITHOUT_LOCKS = """
#include <errno.h>
#include <stdlib.h>
int flock(int file, int operation) { errno = atoi(getenv("FLOCK_ERRNO")); return errno ? -1 : 0; }
"""


@pytest.fixture(scope="module")
def no_locks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library under which every flock fails with FLOCK_ERRNO, or succeeds and holds nothing where that is 0."""
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler to make a file system without locks with")
    source = tmp_path_factory.mktemp("flock") / "flock.c"
    source.write_text(WITHOUT_LOCKS)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", source.with_suffix(".so"), source], check=True)
    return source.with_suffix(".so")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, 0], ids=["none", "unsupported", "of no effect"])
def test_a_file_system_without_locks(no_locks: Path, number: int, tmp_path: Path) -> None:
    """It is said once, leases are used, and the artefacts are complete: of two processes one builds, the other waits."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(no_locks),
        "FLOCK_ERRNO": str(number),
        "PYTHONPATH": ENVIRONMENT["PYTHONPATH"],
    }
    begun, go, root = tmp_path / "begun", tmp_path / "go", tmp_path / "store"
    words = command(build_two_files, root, begun, go)
    first = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until(begun.exists)
    second = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    # One that finds locks that hold goes by the store's word, too.
    assert Store(root).state(TOKENS.ref) == "locked"
    time.sleep(1)
    assert begun.read_text() == "x"
    go.touch()
    assert (first.wait(60), second.wait(60)) == (0, 0)
    assert begun.read_text() == "x" and Store(root).verify(TOKENS.ref) == []
    assert first.stderr and second.stderr
    said, again = first.stderr.read(), second.stderr.read()
    first.stderr.close()
    second.stderr.close()
    assert said.count("lies on a file system without working locks (") == 1 and "leases are used" in said
    assert (os.strerror(number) if number else "two have the same lock at once") in said and not again
    assert sorted(path.name for path in (root / "tokens").iterdir()) == [TOKENS.key]
