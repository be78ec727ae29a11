"""The store: complete or not there, one writer, killed builds go on, damage is found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from children import ENVIRONMENT, command
from examples import examples
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from store_processes import TOKENS as RECIPE
from store_processes import build_two_files

from storage.inputs import NOTE
from storage.keys import Recipe, Ref
from storage.store import LARGE, Build, Store

REF = RECIPE.ref


def work(build: Build) -> None:
    (build.path / "a.txt").write_text("first")
    (build.path / "b").mkdir(exist_ok=True)
    (build.path / "b" / "c.txt").write_text("second")
    build.add(build.path / "a.txt", build.path / "b" / "c.txt")
    build.counts["samples"] = 2
    build.provenance["device"] = "cpu"


def builder(store: Path, begun: Path, go: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(build_two_files, store, begun, go), env=ENVIRONMENT)


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_build_open_and_manifest(store: Store) -> None:
    assert store.state(REF) == "missing"
    assert store.build(RECIPE, work) == REF
    assert store.state(REF) == "fresh"
    artefact = store.open(REF)
    assert (artefact.path / "b" / "c.txt").read_text() == "second"
    manifest = artefact.manifest
    assert (manifest.ref, manifest.stage, manifest.version, manifest.config) == (REF, "cache-clip", 3, {"size": 4})
    assert manifest.counts == {"samples": 2}
    assert {name: file["bytes"] for name, file in manifest.files.items()} == {"a.txt": 5, "b/c.txt": 6}
    assert manifest.bytes == 11
    assert manifest.provenance["device"] == "cpu"
    assert "numpy" in manifest.provenance["packages"]
    assert store.verify(REF) == []
    assert store.refs() == [REF]
    assert [path.name for path in (store.root / "tokens").iterdir()] == [REF.key]  # neither lock nor partial stay


def test_inputs_stand_in_the_manifest_with_their_kind(store: Store) -> None:
    store.build(RECIPE, work)
    recipe = Recipe(kind="queries", stage="queries", version=1, config=None, inputs={"tokens": REF})
    assert store.open(store.build(recipe, work)).manifest.inputs == {"tokens": str(REF)}


def test_a_complete_artefact_is_not_built_again(store: Store) -> None:
    store.build(RECIPE, work)
    store.build(RECIPE, lambda build: pytest.fail("built again"))


def test_a_failed_build_leaves_its_work_and_nothing_complete(store: Store) -> None:
    def fail(build: Build) -> None:
        (build.path / "a.txt").write_text("half")
        (build.path / ".b.txt.writing").write_text("torn")
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        store.build(RECIPE, fail)
    assert store.state(REF) == "partial"
    assert store.refs() == []
    with pytest.raises(ValueError, match=f"{REF} is partial.*zs-seg run"):
        store.open(REF)

    def go_on(build: Build) -> None:
        assert {path.name for path in build.path.iterdir()} == {
            "a.txt",
            NOTE,
        }  # a torn write is gone, whole files are there
        work(build)

    store.build(RECIPE, go_on)
    assert store.verify(REF) == []
    assert store.open(REF).manifest.provenance["resumed"] is True


def test_a_killed_build_is_not_complete_and_does_not_block(store: Store, tmp_path: Path) -> None:
    begun, never = tmp_path / "begun", tmp_path / "never"
    process = builder(store.root, begun, never)
    wait_for(begun.exists)
    assert store.state(REF) == "locked"
    with pytest.raises(ValueError, match="locked"):
        store.open(REF)
    with pytest.raises(ValueError, match="being built"):
        store.remove(REF)
    process.send_signal(signal.SIGKILL)
    process.wait()

    lock = store.root / "tokens" / f".{REF.key}.lock"
    assert json.loads(lock.read_text())["pid"] == process.pid  # the dead owner's lock file is still there
    assert store.state(REF) == "partial"
    never.touch()
    assert builder(store.root, begun, never).wait(20) == 0
    assert store.state(REF) == "fresh"
    assert store.verify(REF) == []
    assert begun.read_text() == "xx"


def test_processes_that_build_the_same_work_once(store: Store, tmp_path: Path) -> None:
    begun, go = tmp_path / "begun", tmp_path / "go"
    processes = [builder(store.root, begun, go) for _ in range(3)]
    wait_for(begun.exists)
    go.touch()
    assert [process.wait(30) for process in processes] == [0, 0, 0]
    assert begun.read_text() == "x"
    assert store.verify(REF) == []
    assert [path.name for path in (store.root / "tokens").iterdir()] == [REF.key]


def test_threads_that_build_the_same_work_one_at_a_time(store: Store) -> None:
    """A failing owner hands over: each thread works alone, until one succeeds."""
    inside, most, calls, guard = 0, 0, 0, threading.Lock()

    def flaky(build: Build) -> None:
        nonlocal inside, most, calls
        with guard:
            inside, calls = inside + 1, calls + 1
            most, mine = max(most, inside), calls
        time.sleep(0.02)
        with guard:
            inside -= 1
        if mine < 4:
            raise RuntimeError("no luck")
        work(build)

    def attempt() -> None:
        try:
            store.build(RECIPE, flaky)
        except RuntimeError:
            return

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, calls) == (1, 4)
    assert store.verify(REF) == []


def test_nothing_is_seen_before_the_rename(store: Store) -> None:
    def look(build: Build) -> None:
        work(build)
        assert Store(store.root).state(REF) == "locked"
        assert not store.path(REF).exists()
        assert Store(store.root).refs() == []

    store.build(RECIPE, look)


@examples(30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_verify_finds_any_changed_byte(store: Store, data: st.DataObject) -> None:
    store.build(RECIPE, work)
    name = data.draw(st.sampled_from(["a.txt", "b/c.txt", "manifest.json"]))
    file = store.path(REF) / name
    intact = file.read_bytes()
    at, flip = data.draw(st.integers(0, len(intact) - 1)), data.draw(st.integers(1, 255))
    damaged = bytearray(intact)
    damaged[at] ^= flip
    file.write_bytes(damaged)
    assert store.verify(REF)
    file.write_bytes(intact)
    assert store.verify(REF) == []


def test_missing_extra_and_cut_files(store: Store) -> None:
    store.build(RECIPE, work)
    folder = store.path(REF)
    (folder / "extra.txt").write_text("x")
    assert (store.verify(REF), store.strays(REF)) == ([], ["extra.txt"])
    (folder / "a.txt").write_text("fir")
    assert store.verify(REF) == ["a.txt has 3 bytes instead of 5"]
    with pytest.raises(ValueError, match=f"a.txt has 3 bytes.*`zs-seg verify {REF.key} --set-aside`"):
        store.open(REF)
    (folder / "a.txt").unlink()
    assert store.verify(REF) == ["a.txt is missing"]
    with pytest.raises(ValueError, match="a.txt is missing"):
        store.open(REF)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\xff", '{"kind": "tokens"}'])
def test_an_unreadable_manifest(store: Store, text: str) -> None:
    store.build(RECIPE, work)
    (store.path(REF) / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{REF} is damaged.*--set-aside") as caught:
        store.open(REF)
    assert "\n" not in str(caught.value)
    assert store.verify(REF) == [str(caught.value)]


def test_an_artefact_under_a_wrong_name_is_refused(store: Store) -> None:
    store.build(RECIPE, work)
    other = Ref(kind="tokens", key="f" * 16)
    store.path(REF).rename(store.path(other))
    with pytest.raises(ValueError, match="damaged"):
        store.open(other)


def test_a_folder_without_manifest_is_built_anew(store: Store) -> None:
    store.build(RECIPE, work)
    (store.path(REF) / "manifest.json").unlink()
    (store.path(REF) / "old.txt").write_text("x")
    assert store.state(REF) == "missing"
    store.build(RECIPE, work)
    assert store.verify(REF) == []


def test_find(store: Store) -> None:
    recipes = [
        Recipe(kind=kind, stage="s", version=1, config=i, inputs={}) for kind in ("text", "shards") for i in range(9)
    ]
    refs = [store.build(recipe, work) for recipe in recipes]
    for ref in refs:
        assert store.find(str(ref)) == ref
    with pytest.raises(ValueError, match="more digits"):
        store.find("text/")
    for absent in ("zz", "", "text/zz"):
        with pytest.raises(ValueError, match="zs-seg list"):
            store.find(absent)
    unique = Store(store.root / "other")
    unique.build(RECIPE, work)
    assert unique.find(REF.key[:3]) == REF


def test_remove(store: Store) -> None:
    store.remove(REF)  # nothing there is fine
    store.build(RECIPE, work)
    cut_off = Recipe(kind="text", stage="s", version=1, config=None, inputs={})
    with pytest.raises(RuntimeError):
        store.build(cut_off, lambda build: fail())
    store.remove(REF)
    assert store.state(REF) == "missing"
    assert store.state(cut_off.ref) == "partial"
    store.remove(cut_off.ref)
    assert store.state(cut_off.ref) == "missing"
    assert sorted(path for path in store.root.rglob("*") if path.is_file()) == []


def fail() -> None:
    raise RuntimeError("no luck")


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("x")
    for root in (tmp_path / "store", tmp_path / "store" / "below"):
        assert Store(root).state(REF) == "missing"
        with pytest.raises(ValueError, match=f"store {root} .*--store"):
            Store(root).build(RECIPE, work)


def test_a_full_disk_is_told_and_work_goes_on_afterwards(store: Store) -> None:
    """/dev/full answers every write as a full disk does."""

    def fill(build: Build) -> None:
        (build.path / "a.txt").write_text("first")
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(ValueError, match=f"store {store.root} has no space left") as caught:
        store.build(RECIPE, fill)
    assert "\n" not in str(caught.value)
    assert store.state(REF) == "partial"
    store.build(RECIPE, work)
    assert store.verify(REF) == []


def test_hashing_a_large_artefact_is_said(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    def write(size: int, build: Build) -> None:
        with (build.path / "large").open("wb") as file:
            file.truncate(size)  # a hole, quickly read
        build.add(build.path / "large")

    caplog.set_level("INFO", logger="storage")
    for size, message in ((1000, False), (LARGE + 10**8, True)):
        caplog.clear()
        recipe = Recipe(kind="tokens", stage="cache-clip", version=3, config={"size": size}, inputs={})
        store.build(recipe, partial(write, size))
        assert ("cache-clip: hashing 1.1 GB" in caplog.messages) == message


def test_an_unreadable_file_elsewhere_is_not_blamed_on_the_store(store: Store, tmp_path: Path) -> None:
    def read(build: Build) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "photo.jpg"))

    with pytest.raises(PermissionError, match="photo.jpg"):
        store.build(RECIPE, read)


def test_a_read_only_store(store: Store) -> None:
    def write(build: Build) -> None:
        raise OSError(30, "Read-only file system", str(build.path / "a.txt"))

    with pytest.raises(ValueError, match=f"store {store.root} cannot be used"):
        store.build(RECIPE, write)


def test_state_and_plan_write_nothing(store: Store) -> None:
    store.state(REF)
    assert store.refs() == []
    assert not os.path.exists(store.root)
