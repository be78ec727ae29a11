"""Removing what nobody needs: never what a named or living run reaches, never what is being built; readers see all or
nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from children import ENVIRONMENT, command
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from many_artefacts import demo_line, fill, note
from store_processes import hold_build, hold_run

from storage.atomic import ASIDE
from storage.collect import collect, survey
from storage.keys import Recipe, Ref
from storage.runs import RunRecord, Runs
from storage.store import REMOVED, Build, Store

DAY = 86400.0


def recipe(number: int, **inputs: Ref) -> Recipe:
    return Recipe(kind=("text", "shards")[number % 2], stage=f"stage-{number}", version=1, config=number, inputs=inputs)


def work(build: Build) -> None:
    (build.path / "a.txt").write_text("first")
    build.add(build.path / "a.txt")


def cut_off(store: Store, one: Recipe, *, age: float) -> Path:
    """What a build killed `age` seconds ago left."""
    partial = store.partial(one.ref)
    partial.mkdir(parents=True)
    (partial / "half.txt").write_text("half")
    for path in (partial / "half.txt", partial):
        os.utime(path, (time.time() - age, time.time() - age))
    return partial


def line(name: str, *refs: Ref) -> RunRecord:
    return RunRecord.now(name=name, command="zs-seg run", refs={f"stage-{i}": ref for i, ref in enumerate(refs)})


def record(store: Store, name: str, *refs: Ref) -> None:
    with Runs(store).running(line(name, *refs)):
        pass


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@examples(40)
@given(data=st.data())
def test_what_a_run_reaches_stays_and_all_else_goes(data: st.DataObject) -> None:
    """Over random graphs and runs; some manifests are damaged, some builds were cut off, some runs are dropped."""
    with tempfile.TemporaryDirectory() as folder:
        store, made, inputs = Store(Path(folder)), list[Ref](), dict[Ref, list[Ref]]()
        for number in range(data.draw(st.integers(1, 9))):
            sources = data.draw(st.lists(st.sampled_from(made), max_size=2)) if made else []
            named = {f"input-{position}": source for position, source in enumerate(sources)}
            made.append(store.build(recipe(number, **named), work))
            inputs[made[-1]] = sources
        some = st.lists(st.sampled_from(made), max_size=2)
        lines = [(data.draw(st.sampled_from("ab")), data.draw(some)) for _ in range(data.draw(st.integers(1, 4)))]
        for name, refs in lines:
            record(store, name, *refs)
        keep = data.draw(st.integers(1, 2))
        forget = data.draw(st.sampled_from([(), (lines[0][0],)]))
        wanted = set[Ref]()
        for name in {name for name, _ in lines} - set(forget):
            distinct = list[list[Ref]]()
            for refs in (refs for other, refs in lines if other == name):  # running a line again makes it the last one
                distinct = [*(old for old in distinct if old != refs), refs]
            wanted.update(*distinct[-keep:])
        for ref in reversed(made):
            if ref in wanted:
                wanted.update(inputs[ref])
        damaged = {ref for ref in made if ref not in wanted and data.draw(st.booleans())}
        for ref in damaged:
            (store.path(ref) / "manifest.json").write_text(data.draw(st.sampled_from(["", "{}", "torn"])))
        partials = {
            number: cut_off(store, recipe(number), age=data.draw(st.sampled_from([1, 9])) * DAY) for number in (90, 91)
        }
        old = {number for number, path in partials.items() if path.stat().st_mtime < time.time() - 5 * DAY}

        before = sorted(Path(folder).rglob("*"))
        planned = survey(store, keep=keep, forget=forget, partial_age=5 * DAY)
        assert sorted(Path(folder).rglob("*")) == before  # a look changes nothing
        removed = collect(store, keep=keep, forget=forget, partial_age=5 * DAY)
        assert [one.path for one in removed.waste] == [one.path for one in planned.waste]
        assert {one.ref for one in removed.waste} == set(made) - wanted | {recipe(number).ref for number in old}
        assert set(store.refs()) == set(removed.kept) == wanted
        assert all(store.verify(ref) == [] for ref in wanted)
        assert {number for number, path in partials.items() if not path.exists()} == old
        assert set(Runs(store).names()) == {name for name, _ in lines} - set(forget)
        left = {path.name for path in Path(folder).glob("*/*")}
        assert left == {ref.key for ref in wanted} | {f"{name}.json" for name in Runs(store).names()} | {
            path.name for number, path in partials.items() if number not in old
        }  # fmt: skip
        if Runs(store).names():
            assert collect(store, keep=keep, partial_age=5 * DAY).waste == []


def test_without_any_run_nothing_goes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.build(recipe(0), work)
    with pytest.raises(ValueError, match="no run is recorded.*zs-seg run"):
        collect(store)
    record(store, "demo", recipe(0).ref)
    with pytest.raises(ValueError, match="no run 'other'.*demo"):
        collect(store, forget=["other"])
    with pytest.raises(ValueError, match="keep must be 1"):
        collect(store, keep=0)
    (tmp_path / "runs/demo.json").write_text("[{}]")
    with pytest.raises(ValueError, match="demo.json is damaged"):  # it may have been the one that needs everything
        collect(store)
    assert store.verify(recipe(0).ref) == []


def test_reasons_name_the_earlier_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(3):
        store.build(recipe(number), work)
    record(store, "demo", recipe(0).ref)
    record(store, "demo", recipe(1).ref)
    reasons = {one.ref: one.reason for one in survey(store).waste}
    assert reasons[recipe(0).ref].startswith("of an earlier run demo (")
    assert reasons[recipe(2).ref] == "no run reaches it"
    assert {one.ref for one in survey(store, keep=2).waste} == {recipe(2).ref}
    record(store, "demo", recipe(0).ref)  # run again, it is the last one
    assert {one.ref for one in survey(store).waste} == {recipe(1).ref, recipe(2).ref}


def test_partial_builds_that_a_run_needs_stay_however_old(tmp_path: Path) -> None:
    store = Store(tmp_path)
    needed, other, young = (cut_off(store, recipe(n), age=age) for n, age in ((0, 99 * DAY), (1, 99 * DAY), (2, 1)))
    record(store, "demo", recipe(0).ref)
    (waste,) = collect(store).waste
    assert (waste.ref, waste.reason) == (recipe(1).ref, "cut off, untouched for 99 days")
    assert needed.exists() and young.exists() and not other.exists()


def test_a_removal_cut_off_and_a_folder_without_manifest_are_cleared(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.build(recipe(0), work)
    record(store, "demo", recipe(0).ref)
    (aside,) = store.set_aside(
        recipe(1).ref, store.path(store.build(recipe(1), work)), suffix=REMOVED
    )  # and the process dies here
    store.build(recipe(2), work)
    (store.path(recipe(2).ref) / "manifest.json").unlink()
    assert {one.reason for one in collect(store).waste} == {"an interrupted removal", "has no manifest"}
    assert not aside.exists() and not store.path(recipe(2).ref).exists()
    assert store.refs() == [recipe(0).ref]


def test_what_is_set_aside_may_vanish_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file that a push sends into a store lies there for a moment under such a name."""
    store = Store(tmp_path)
    record(store, "demo", store.build(recipe(0), work))
    gone, old, glob = tmp_path / "text" / f".1{ASIDE}", tmp_path / "text" / f".2{ASIDE}", Path.glob
    gone.write_text("x")
    old.mkdir()

    def listed(folder: Path, pattern: str) -> Iterator[Path]:
        found = list(glob(folder, pattern))
        if pattern.endswith(ASIDE):
            gone.unlink()
        return iter(found)

    monkeypatch.setattr(Path, "glob", listed)
    assert [waste.path for waste in survey(store, partial_age=-1).waste] == [old]


@contextmanager
def process(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    running = subprocess.Popen(words, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def test_a_living_run_keeps_its_artefacts_though_another_took_its_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    mine, theirs = store.build(recipe(0), work), store.build(recipe(1), work)
    with process(command(hold_run, tmp_path, "demo", str(theirs))) as holder:
        assert holder.stdout and holder.stdout.readline() == "holds\n"
        record(store, "demo", mine)
        assert collect(store).waste == []
        holder.kill()
        holder.wait()
        assert list((tmp_path / "runs").glob(".*.running"))  # the killed run's mark is still there
        assert [one.ref for one in collect(store).waste] == [theirs]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo.json"]


def test_what_a_build_reads_and_writes_is_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    source, kept = store.build(recipe(0), work), store.build(recipe(1), work)
    record(store, "demo", kept)
    with process(command(hold_build, tmp_path, str(source))) as builder:
        assert builder.stdout and builder.stdout.readline() == "builds\n"
        (building,) = store.locked()
        assert survey(store, partial_age=0).waste == []
        found = collect(store, partial_age=0)
        assert (found.waste, found.locked) == ([], [building])
        assert store.holder(building).startswith(f"process {builder.pid} on ")
        with pytest.raises(ValueError, match=f"being built by process {builder.pid} on .* since 20"):
            store.remove(building)
        builder.kill()
        builder.wait()
        assert {one.ref for one in collect(store, partial_age=0).waste} == {source, building}


def test_no_run_begins_while_waste_is_picked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It would find complete what is about to go."""
    caplog.set_level("INFO", logger="storage")
    store, begun = Store(tmp_path), threading.Event()
    store.build(recipe(0), work)

    def run() -> None:
        with Runs(store).running(line("demo", recipe(0).ref)):
            begun.set()

    thread = threading.Thread(target=run)
    with Runs(store).exclusive():
        thread.start()
        wait_for(lambda: "waiting for the list of runs" in caplog.text)
        assert not begun.is_set()
        assert f"process {os.getpid()} on " in caplog.text
    thread.join(20)
    assert begun.is_set() and Runs(store).names() == ["demo"]


def test_a_reader_finds_all_of_an_artefact_or_nothing(tmp_path: Path) -> None:
    """Readers open while artefacts are removed and built again, over and over."""
    store, ended = Store(tmp_path), threading.Event()
    record(store, "demo", recipe(1).ref)
    opened, wrong = 0, list[str]()

    def many_files(build: Build) -> None:
        for number in range(20):
            (build.path / f"{number}.txt").write_text("x")
            build.add(build.path / f"{number}.txt")

    def read() -> None:
        nonlocal opened
        while not ended.is_set():
            try:
                store.open(recipe(0).ref)
                opened += 1
            except ValueError as error:
                if not re.match(rf"{recipe(0).ref} is (missing|locked|partial) in ", str(error)):
                    wrong.append(str(error))  # such as that it is damaged

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(15):
        store.build(recipe(0), many_files)
        wait_for(lambda count=opened: opened > count or wrong)
        assert [one.ref for one in collect(store).waste] == [recipe(0).ref]
    ended.set()
    reader.join(20)
    assert opened and not wrong


@pytest.mark.parametrize("name", ["", "../x", ".hidden", "a/b", "a b", "x" * 101])
def test_a_name_that_is_no_file_name(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a run"):
        line(name)


def test_a_whole_line_is_kept_under_its_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    steps, others = demo_line(), demo_line(1)
    fill(store, steps)
    fill(store, others)
    note(store, "demo", steps)
    assert {one.ref for one in collect(store).waste} == {step.recipe.ref for step in others[4:]}
    assert set(store.refs()) == {step.recipe.ref for step in steps}
    assert json.loads((tmp_path / "runs/demo.json").read_text())[0]["refs"]["v2c"] == str(steps[4].recipe.ref)
