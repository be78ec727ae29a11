"""A store with an address: the same bytes there and back, on a folder and on a real S3 server; what is damaged, missing
or half sent is never taken for whole."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from children import ENVIRONMENT, command
from fault_remote import kill_at_random, now
from many_artefacts import demo_line, fill, note
from probe import probe
from remote_processes import FILES, make, push
from s3_server import SECRET, s3_server
from tiny import QUIET, build, tiny_config

from flows import runs
from flows.cli import main
from flows.elsewhere import Elsewhere
from storage import remote_care, remote_files, transfer
from storage.errors import UserError
from storage.keys import Ref
from storage.remote import LIST, Remote, Remotes
from storage.remote_files import require_address, without_secrets
from storage.runs import RunRecord, Runs
from storage.store import MANIFEST, Store

STAGES = len(demo_line())


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty remote."""
    if request.param == "file":
        (tmp_path / "remote").mkdir()
        return f"file://{tmp_path}/remote"
    for name, value in request.getfixturevalue("s3").items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def none(_: int) -> None:
    pass


def sent(store: Store, url: str, *refs: Ref) -> list[Ref]:
    return transfer.push(store, Remote(url), [store.open(ref).manifest for ref in refs], advance=none)


def fetched(store: Store, url: str, *refs: Ref) -> list[Ref]:
    remote = Remote(url)
    return transfer.pull(store, remote, [m for ref in refs if (m := remote.manifest(ref))], advance=none)


def says(capsys: pytest.CaptureFixture[str], store: Store, *words: str, status: int = 0) -> list[str]:
    assert main((*words, "--store", str(store.root))) == status
    output = capsys.readouterr()
    return (output.err if status else output.out).splitlines()


def contents(store: Store, ref: Ref) -> dict[str, bytes]:
    folder = store.path(ref)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_and_back_are_the_same_bytes_and_nothing_else(store: Store, url: str, tmp_path: Path) -> None:
    refs, other = [make(store, number) for number in range(3)], Store(tmp_path / "other")
    (store.path(refs[0]) / ".DS_Store").write_text("stray")
    assert sent(store, url, *refs) == refs
    assert sent(store, url, *refs) == refs
    assert fetched(other, url, *refs) == refs
    assert fetched(other, url, *refs) == []
    for ref in refs:
        assert other.verify(ref) == [] and other.strays(ref) == []
        assert contents(other, ref).keys() == {MANIFEST, *FILES}
        assert (other.path(ref) / MANIFEST).read_bytes() == (store.path(ref) / MANIFEST).read_bytes()
    assert sorted(path.name for path in (other.root / "tokens").iterdir()) == sorted(ref.key for ref in refs)
    remote = Remote(url)
    assert remote.refs() == sorted(refs, key=str)
    assert remote.sizes("tokens").keys() == {f"{ref.key}/{name}" for ref in refs for name in (MANIFEST, *FILES)}
    if url.startswith("file"):  # such a remote is a store
        there = Store(Path(url.removeprefix("file://")))
        assert there.refs() == sorted(refs, key=str) and all(there.verify(ref) == [] for ref in refs)


def test_commands(capsys: pytest.CaptureFixture[str], store: Store, url: str, tmp_path: Path) -> None:
    fill(store, demo_line(), files=3)
    note(store, "demo", demo_line())
    every = f"{STAGES} artefacts with {3 * STAGES} B"
    assert says(capsys, store, "remote", "add", "lab", url)[0].startswith(f"lab is {url}")
    assert f"lab     {url}" in says(capsys, store, "remote", "list")
    assert says(capsys, store, "push", "--dry-run")[-1].startswith(f"{every} would go to lab; 0 complete")
    assert Remote(url).refs() == []
    assert says(capsys, store, "push", "demo")[-1].startswith(f"{every} sent to lab; 0 complete already")
    assert says(capsys, store, "push")[-1].startswith(f"0 artefacts with 0 B sent to lab; {STAGES} complete")
    other = Store(tmp_path / "other")
    assert says(capsys, other, "pull", "demo", "--from", "lab", status=2)[0].startswith("zs-seg: no remote 'lab' in ")
    assert f"{every} would come" in says(capsys, other, "pull", "--dry-run", "--from", url)[-1]
    one = demo_line()[0].recipe.ref
    assert says(capsys, other, "pull", one.key[:8], "--from", url)[-1].startswith("1 artefact with 3 B fetched")
    status = says(capsys, other, "status", "--remote", url)
    rest = f"{STAGES - 1} with {3 * STAGES - 3} B"
    assert len(status) == STAGES + 1 and status[-1].startswith(f"1 on both sides, 0 with 0 B to push, {rest} to pull")
    assert says(capsys, other, "pull", "--from", url)[-1].startswith(
        f"{STAGES - 1} artefacts with {3 * STAGES - 3} B fetched"
    )
    assert says(capsys, other, "pull", "demo", "--from", url)[-1].startswith("0 artefacts with 0 B fetched")
    assert json.loads("\n".join(says(capsys, other, "status", "--remote", url, "--json")))["there"] == []
    assert Runs(other).lines("demo") == Runs(store).lines("demo") == Remote(url).lines("demo")
    assert other.refs() == store.refs()
    assert "did you mean 'demo'" in says(capsys, other, "pull", "dem0", "--from", url, status=2)[0]
    assert says(capsys, store, "remote", "remove", "lab")[0].startswith("lab is forgotten")
    assert says(capsys, store, "push", status=2)[0].startswith("zs-seg: which remote?")


def test_a_run_in_an_empty_store_fetches_what_it_needs_and_builds_the_rest(
    capsys: pytest.CaptureFixture[str], store: Store, url: str, tmp_path: Path
) -> None:
    """No stage of these small artefacts could be built: it would stop over what they hold."""
    fill(store, demo_line(), files=3)
    sent(store, url, *(step.recipe.ref for step in demo_line()))
    other, words = Store(tmp_path / "other"), ("run", "--preset", "demo", "--until", "cpa", "--remote", url)
    plan = says(capsys, other, "plan", "--preset", "demo", "--remote", url)
    assert [line.split()[2] for line in plan[1 : STAGES + 1]] == ["remote"] * STAGES
    assert f"0 of {STAGES} stages to build" in "\n".join(plan) and any("fetches 1: 3 B" in line for line in plan)
    printed, place = says(capsys, other, *words), [step.name for step in demo_line()].index("cpa")
    assert [line.rpartition("  ")[2].split(url)[0] for line in printed] == ["left in "] * place + ["from "]
    assert other.refs() == [demo_line()[place].recipe.ref]
    # What a stage that is to be built reads is fetched: stage v2c with another setting reads three artefacts.
    config = ("--preset", "demo", "--v2c.lr", "3e-4", "--v2c.steps", "1")
    plan = json.loads("\n".join(says(capsys, other, "plan", *config, "--remote", url, "--json")))
    read = {str(step.recipe.ref) for step in demo_line() if step.name in ("shard", "text", "cache-clip")}
    later = [step.name for step in demo_line()].index("v2c")
    assert read <= set(plan["to_fetch"]) and plan["to_build"] == STAGES - later
    assert plan["fetched_bytes"] == 3 * len(plan["to_fetch"])


@pytest.mark.slow
def test_a_whole_line_there_and_back_gives_the_same_report(shared_store: Store, url: str, tmp_path: Path) -> None:
    """Pulled into an empty store, nothing is built. Looked up by a run, only the report is fetched."""
    steps = list(build(shared_store, tiny_config()).values())
    refs = [step.recipe.ref for step in steps]
    assert sent(shared_store, url, *refs) == refs
    published = {}
    for name in ("shared", "pulled", "looked up"):
        store, elsewhere = Store(tmp_path / name), {}
        if name == "shared":
            store = shared_store
        elif name == "pulled":
            assert fetched(store, url, *refs) == refs
        else:
            found = Elsewhere.look(store, steps, remote=url, push=False)
            found.fetch(found.needed(steps))
            elsewhere = found.have
            assert store.refs() == [refs[-1]]
        if name != "looked up":
            assert not any(runs.build(step, store, QUIET).built for step in steps)
        folder = runs.publish("demo", steps, store, tmp_path / f"runs of {name}", elsewhere=elsewhere)
        published[name] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert len(published["shared"]) > 2
    assert published["shared"] == published["pulled"] == published["looked up"]


def test_run_push_leaves_what_is_complete(
    capsys: pytest.CaptureFixture[str], store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("--preset", "demo", "--data.train-images", "2", "--data.val-images", "1", "--until", "scenes")
    assert "built in" in says(capsys, store, "run", *small, "--push", "--remote", url)[0]
    (ref,) = store.refs()
    made = Remote(url).manifest(ref)
    assert made and made.files == store.open(ref).manifest.files
    assert made.provenance["user"] and made.provenance["host"]
    assert Remote(url).lines("demo") == Runs(store).lines("demo")
    store.remove(ref)
    (line,) = says(capsys, store, "run", *small, "--remote", url)
    assert f"from {url}, built by {made.provenance['user']} on {made.provenance['host']}" in line
    assert store.open(ref).manifest == made
    # What could not be sent is reported, after the work is done.
    Remote(url).delete(str(ref))
    store.remove(ref)

    def fail(*_: object, **__: object) -> None:
        raise UserError("no way")

    monkeypatch.setattr(transfer, "push", fail)
    error = says(capsys, store, "run", *small, "--push", "--remote", url, status=2)[-1]
    assert "1 artefact did not reach" in error and "no way" in error
    assert store.state(ref) == "fresh"


# ---------------------------------------------------------------------------------------------------- damage and kills


@pytest.mark.parametrize("fault", ["flipped", "cut", "missing", "swapped", "empty file missing"])
def test_damaged_files_there_are_found(store: Store, url: str, tmp_path: Path, fault: str) -> None:
    ref, other, remote = make(store, 1), Store(tmp_path / "other"), Remote(url)
    sent(store, url, ref)
    name = "a.zarr/zarr.json" if fault.startswith("empty") else "train-000000.tar"
    data = remote.read(f"{ref}/{name}")
    assert data is not None
    if "missing" in fault:
        remote.delete(f"{ref}/{name}")
    elif fault == "flipped":
        remote.write(f"{ref}/{name}", data[:5000] + b"\xff" + data[5001:])
    elif fault == "cut":
        remote.write(f"{ref}/{name}", data[:-1])
    else:
        for one, two in (("a.zarr/c/0", "a.zarr/c/1"), ("a.zarr/c/1", "a.zarr/c/0")):
            remote.write(f"{ref}/{one}", (store.path(ref) / two).read_bytes())
    with pytest.raises(UserError, match=rf"{ref} is damaged in .*zs-seg verify {ref} --remote"):
        fetched(other, url, ref)
    assert other.state(ref) == "missing" and other.refs() == []
    remote.rename(f"{ref}/{MANIFEST}", f"{ref}/{MANIFEST}.aside")
    assert sent(store, url, ref) == [ref] and fetched(other, url, ref) == [ref] and other.verify(ref) == []


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "a/../../x", "a\\b", MANIFEST, ""])
def test_a_manifest_names_files_of_its_folder(store: Store, url: str, tmp_path: Path, name: str) -> None:
    from dataclasses import replace

    ref, remote = make(store, 1), Remote(url)
    sent(store, url, ref)
    manifest = store.open(ref).manifest
    remote.write(f"{ref}/{MANIFEST}", replace(manifest, files={name: manifest.files["index.json"]}).dumps().encode())
    with pytest.raises(UserError, match="cannot be used"):
        fetched(Store(tmp_path / "other"), url, ref)
    remote.write(f"{ref}/{MANIFEST}", b"[]")
    with pytest.raises(UserError, match="cannot be used"):
        remote.manifest(ref)


def test_a_damaged_local_file_is_not_sent(store: Store, url: str) -> None:
    ref = make(store, 1)
    path = store.path(ref) / "train-000000.tar"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(UserError, match=rf"{ref} is damaged \(train-000000.tar has changed"):
        sent(store, url, ref)
    assert Remote(url).manifest(ref) is None


def test_what_cannot_arrive_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    """As when another push of the same artefact has renamed the folder into which a file is to go."""
    ref, remote = make(store, 1), Remote(f"file://{tmp_path}/remote")
    remote.make_folder("tokens/there")
    source, entry = store.path(ref) / "index.json", store.open(ref).manifest.files["index.json"]
    with pytest.raises(FileNotFoundError):
        remote.write("tokens/gone/x", b"x")
    with pytest.raises(FileNotFoundError):
        remote.create("tokens/gone/x", b"x")
    with pytest.raises(FileNotFoundError):
        remote.send(source, "tokens/gone/x", sha256=entry["sha256"], advance=none)
    assert "has changed" in remote.send(source, "tokens/there/x", sha256="0" * 64, advance=none)
    assert remote.create("tokens/there/y", b"y") and not remote.create("tokens/there/y", b"z")
    assert remote.sizes("") == {"tokens/there/y": 1}


def cut_off(store: Store, url: str, ref: Ref, monkeypatch: pytest.MonkeyPatch, *, after: int) -> list[str]:
    """A push that ends after so many files; their names."""
    remote, arrived = Remote(url, threads=1), list[str]()

    def send(source: Path, path: str, **options: Any) -> str:
        if len(arrived) == after:
            raise UserError("cut off")
        arrived.append(path.partition(ref.key)[2].partition("/")[2])
        return Remote.send(remote, source, path, **options)

    monkeypatch.setattr(remote, "send", send)
    with pytest.raises(UserError, match="cut off"):
        transfer.push(store, remote, [store.open(ref).manifest], advance=none)
    return arrived


def test_a_cut_off_push_goes_on_with_the_files_that_are_missing(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = make(store, 1)
    first = cut_off(store, url, ref, monkeypatch, after=4)
    second = cut_off(store, url, ref, monkeypatch, after=3)
    moved, remote, manifest = list[int](), Remote(url), store.open(ref).manifest
    transfer.push(store, remote, [manifest], advance=moved.append)
    assert len({*first, *second}) == 7 and sum(moved) == manifest.bytes
    assert moved[0] == sum(manifest.files[name]["bytes"] for name in (*first, *second))
    assert remote_care.verify(remote, ref) == []


def test_a_push_after_a_set_aside_trusts_none_of_the_files_that_lie_there(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one that goes on with it."""
    ref, remote = make(store, 1), Remote(url)
    sent(store, url, ref)
    remote.write(f"{ref}/train-000001.tar", bytes(FILES["train-000001.tar"]))
    remote_care.set_aside(remote, ref)
    cut_off(store, url, ref, monkeypatch, after=1)
    assert sent(store, url, ref) == [ref] and remote_care.verify(remote, ref) == []


def test_a_folder_goes_at_once_where_folders_can_be_renamed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its note what a push had sent would be taken for what the next one sends."""
    remote = Remote(f"file://{tmp_path}/remote")
    remote.make_folder("tokens/.x.pushing")
    remote.write("tokens/.x.pushing/a", b"x")
    monkeypatch.setattr(remote._fs, "rm", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        remote.delete("tokens/.x.pushing")
    assert remote.sizes("tokens/.x.pushing") == {}
    (left,) = remote.sizes("tokens")
    assert re.fullmatch(r"\.[0-9a-f]{16}\.aside/a", left)


def test_a_cut_off_pull_goes_on_in_the_file(
    store: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "BLOCK", 100_000)
    ref, other = make(store, 1), Store(tmp_path / "other")
    sent(store, url, ref)
    folder = other.arriving(ref)
    (folder / "a.zarr").mkdir(parents=True)
    (folder / "train-000000.tar").write_bytes((store.path(ref) / "train-000000.tar").read_bytes()[:2_900_000])
    (folder / "train-000001.tar").write_bytes(b"of another version" * 1000)
    (folder / "left over").write_text("x")
    moved: list[int] = []
    remote = Remote(url)
    manifest = store.open(ref).manifest
    assert transfer.arrived(other, [manifest]) == 2_900_000 + 18_000
    transfer.pull(other, remote, [manifest], advance=moved.append)
    assert other.verify(ref) == [] and other.strays(ref) == []
    assert sum(moved) == manifest.bytes - 2_918_000  # what was there counts once, however it came
    assert sum(number for number in moved if number > 0) < manifest.bytes - 2_800_000


@pytest.mark.parametrize("fault", ["cut off", "longer"])
def test_a_stream_that_ends_early_or_late(
    store: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The rest comes by blocks, and a file is never longer than the manifest has it."""
    ref, other, remote = make(store, 1), Store(tmp_path / "other"), Remote(url)
    sent(store, url, ref)
    manifest, stream, moved = store.open(ref).manifest, Remote.stream, list[int]()

    def other_stream(self: Remote, path: str) -> Iterator[bytes]:
        pieces = stream(self, path)
        yield next(pieces)
        if fault == "longer":
            yield from pieces
            yield b"x"

    monkeypatch.setattr(Remote, "stream", other_stream)
    if fault == "longer":
        with pytest.raises(UserError, match="has 3000001 bytes instead of 3000000"):
            transfer.pull(other, remote, [manifest], advance=moved.append)
        assert other.state(ref) == "missing"
    else:
        transfer.pull(other, remote, [manifest], advance=moved.append)
        assert other.verify(ref) == [] and sum(moved) == manifest.bytes


@pytest.mark.slow
def test_killed_pushes_and_pulls_are_never_taken_for_whole(store: Store, url: str, tmp_path: Path) -> None:
    """`python tests/faults/fault_remote.py` does it 30 times each."""
    assert kill_at_random(store, url, tmp_path, times=3) > 0


def test_two_pushers_at_once(store: Store, url: str, tmp_path: Path) -> None:
    """Of the same bytes both come through; of other bytes the first to begin, and the other one is left out."""
    ref, other = make(store, 1), Store(tmp_path / "other")
    shutil.copytree(store.root, other.root)
    words = [command(push, root, url, str(ref)) for root in (store.root, other.root)]
    both = [subprocess.Popen(w, env=now(), stdout=subprocess.PIPE, text=True) for w in words]
    assert [process.communicate()[0].strip() for process in both] == [str(ref)] * 2
    third = Store(tmp_path / "third")
    assert fetched(third, url, ref) == [ref] and third.verify(ref) == []
    assert Remote(url).sizes("tokens").keys() == {f"{ref.key}/{name}" for name in (MANIFEST, *FILES)}


def test_of_two_pushers_with_other_bytes_the_first_to_begin_counts(
    store: Store, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Store(tmp_path / "other")
    ref = make(store, 1)
    assert make(other, 1, other=True) == ref and other.open(ref).manifest.files != store.open(ref).manifest.files
    # The first was cut off after it had said what is to come, and sent one file.
    remote, hidden = Remote(url), f"tokens/.{ref.key}.pushing"
    remote.make_folder(hidden)
    assert remote.create(f"{hidden}/{transfer.NOTE}", store.open(ref).manifest.dumps().encode())
    assert not remote.create(f"{hidden}/{transfer.NOTE}", b"other")
    assert sent(other, url, ref) == [] and "another push of it" in caplog.text
    assert remote.manifest(ref) is None
    assert sent(store, url, ref) == [ref]
    caplog.clear()
    assert sent(other, url, ref) == [] and "with other bytes" in caplog.text
    third = Store(tmp_path / "third")
    fetched(third, url, ref)
    assert third.open(ref).manifest == store.open(ref).manifest and third.verify(ref) == []
    comparison = transfer.compare(other, remote, [ref])
    assert comparison.other == [ref] and not comparison.here


def test_runs_of_two_places_become_one_list(store: Store, url: str, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    lines = [RunRecord(name="demo", command="x", refs={"v2c": Ref(kind="text", key=f"{n:016x}")}, user="u",
                       date=f"2026-01-0{n}T00:00:00+0000") for n in (1, 2, 3)]  # fmt: skip
    for where, some in ((store, lines[:2]), (other, [lines[0], lines[2]])):
        with Runs(where).exclusive():
            Runs(where).merge("demo", some)
        transfer.push_run(where, Remote(url), "demo")
    assert Remote(url).lines("demo") == lines
    transfer.pull_run(store, Remote(url), "demo")
    assert Runs(store).lines("demo") == lines


# ------------------------------------------------------------------------------------------------- requests and errors


def test_a_push_of_nothing_looks_at_one_file_an_artefact(store: Store, tmp_path: Path) -> None:
    """And at no listing of files; a pull of nothing at none."""
    fill(store, demo_line(), files=30)
    note(store, "demo", demo_line())
    there = tmp_path / "remote"
    assert main(("push", "--to", f"file://{there}", "--store", str(store.root))) == 0
    for words, expected in (("push", STAGES), ("pull", 0)):
        flag = "--to" if words == "push" else "--from"
        run = command(probe, there, words, flag, f"file://{there}", "--store", store.root)
        done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        opened = json.loads(done.stdout.splitlines()[-1])["opened"]
        artefacts = {name: number for name, number in opened.items() if "/runs/" not in name and "/.probe." not in name}
        assert len(artefacts) == expected and set(artefacts.values()) <= {1}
        assert all(name.endswith(f"/{MANIFEST}") for name in artefacts)
        assert not {"torch", "prefect"} & set(json.loads(done.stdout.splitlines()[-1])["modules"])


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("s3://id:secret@bucket/x", "credentials to the environment"), ("s3://user@bucket/x", "takes no user"), ("s3://", "names no folder"),
        ("ssh://me:secret@host/x", "credentials to the environment"), ("https://host/x?sig=secret", "credentials"), ("/data/x", "no address"),
        ("s4://bucket/x", "no address"), ("file://", "names no folder"), ("hf://x?token=secret", "credentials to the environment"),
    ],
)  # fmt: skip
def test_addresses_that_are_refused(capsys: pytest.CaptureFixture[str], store: Store, address: str, why: str) -> None:
    for words in (
        ("remote", "add", "lab", address),
        ("push", "--to", address if "://" in address else f"s4:{address}"),
    ):
        (line,) = says(capsys, store, *words, status=2)
        assert "secret" not in line and (words[0] == "push" or why in line)
    assert not (store.root / LIST).exists()


def test_remotes_have_one_address_each(store: Store) -> None:
    remotes = Remotes(store)
    remotes.add("lab", "s3://bucket/x")
    remotes.add("lab", "s3://bucket/x")
    for name, url in (("lab", "s3://bucket/y"), ("a b", "s3://bucket/y"), ("", "s3://bucket/y")):
        with pytest.raises(UserError):
            remotes.add(name, url)
    assert Remotes(store).all() == {"lab": "s3://bucket/x"} and remotes.open().url == "s3://bucket/x"
    with pytest.raises(UserError, match="did you mean 'lab'"):
        remotes.open("lob")
    remotes.path.write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        remotes.all()
    require_address("ssh://me@host:2222/data")
    require_address("hf://datasets/me/tokens@main/x")


def test_a_server_that_fails_is_tried_again_and_then_named(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote_files, "WAITS", (0.01, 0.01))
    remote, calls = Remote(f"file://{tmp_path}"), []

    def fails(times: int) -> object:
        def call() -> str:
            calls.append(1)
            if len(calls) <= times:
                raise TimeoutError("no answer")
            return "answer"

        calls.clear()
        return call

    assert remote._tried(fails(2)) == "answer" and len(calls) == 3  # type: ignore[arg-type]
    assert caplog.text.count("trying again in") == 2
    with pytest.raises(UserError, match=r"fails \(TimeoutError: no answer\); mend the address or the connection"):
        remote._tried(fails(3))  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):  # a fault of ours
        remote._tried(lambda: 1 / 0)


def test_a_folder_without_room_is_a_remote_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "WAITS", ())
    limits, remote = resource.getrlimit(resource.RLIMIT_FSIZE), Remote(f"file://{tmp_path}")
    remote.make_folder("tokens")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        for write in (remote.write, remote.create):
            with pytest.raises(UserError, match=r"fails \(OSError.*File too large"):
                write("tokens/x", bytes(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def link(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no hard links here")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UserError, match="no hard links here"):
        remote.create("tokens/x", b"x")
    assert remote.sizes("") == {}


def test_a_server_that_is_gone_or_denies_and_a_bucket_that_is_not_there(
    capsys: pytest.CaptureFixture[str], store: Store, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "WAITS", (0.01,))
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    fill(store, demo_line()[:1])
    note(store, "demo", demo_line()[:1])
    line = says(capsys, store, "push", "--to", "s3://no-such-bucket/x", status=2)[-1]
    assert "bucket no-such-bucket is not there" in line
    assert "bucket no-such-bucket is not there" in says(
        capsys, store, "run", "--preset", "demo", "--remote", "s3://no-such-bucket/x", status=2)[-1]  # fmt: skip
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    line = says(capsys, store, "pull", "demo", "--from", "s3://bucket/x", status=2)[-1]
    assert line.startswith("zs-seg: remote s3://bucket/x (s3://bucket/x) fails (") and "run the same again" in line
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    line = says(capsys, store, "pull", "demo", "--from", "s3://bucket/x", status=2)[-1]
    assert "denies access" in line and "credentials in the environment" in line


def test_a_package_that_is_missing_is_named(
    capsys: pytest.CaptureFixture[str], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address, package in (("s3://b/x", "s3fs"), ("gs://b/x", "gcsfs"), ("ssh://h/x", "paramiko")):
        monkeypatch.setitem(sys.modules, package, None)
        (line,) = says(capsys, store, "pull", "demo", "--from", address, status=2)
        assert line.endswith(f"needs {package}, which is not installed: pip install {package}")


def test_credentials_are_in_no_file_and_no_message(
    store: Store, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    words = [sys.executable, "-m", "flows.cli"]
    small = ["--preset", "demo", "--data.train-images", "2", "--data.val-images", "1", "--until", "scenes"]
    told = ""
    for more in (
        ["remote", "add", "lab", "s3://bucket/secrets"],
        ["run", *small, "--push", "--remote", "lab"],
        ["push"],
        ["status"],
    ):
        done = subprocess.run([*words, *more, "--store", store.root], env=now(), cwd=tmp_path,
                              capture_output=True, text=True, check=True)  # fmt: skip
        told += done.stdout + done.stderr
    files = [path for path in store.root.rglob("*") if path.is_file()]
    remote = Remote("s3://bucket/secrets")
    there = [remote.read(name) or b"" for name in remote.sizes("")]
    assert len(files) > 3 and len(there) > 3
    for text in (told.encode(), *(path.read_bytes() for path in files), *there):
        assert SECRET.encode() not in text and b"testing-id" not in text
    assert without_secrets(f"bad {SECRET} at s3://me:pw@host") == "bad *** at s3://***@host"


def test_progress_has_a_rate_and_bytes(
    capsys: pytest.CaptureFixture[str], store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ref = make(store, 1)
    with caplog.at_level(logging.INFO):
        assert main(("push", str(ref), "--to", f"file://{tmp_path}/remote", "--store", str(store.root))) == 0
    assert "push: 100%, 3.05M of 3.05M [" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- gc and verify


def two_lines(store: Store, url: str) -> tuple[set[Ref], set[Ref]]:
    """A remote with a run of two lines: the artefacts of the last one, and those that only the earlier one needs."""
    fill(store, demo_line(100), files=2)
    fill(store, demo_line(), files=2)
    for number in (100, 0):
        with Runs(store).exclusive():
            refs = {step.name: step.recipe.ref for step in demo_line(number)}
            line = RunRecord(
                name="demo", command="x", refs=refs, user="u", date=f"2026-01-0{2 - number // 100}T00:00:00+0000"
            )
            Runs(store).merge("demo", [line])
    sent(store, url, *store.refs())
    transfer.push_run(store, Remote(url), "demo")
    last, earlier = ({step.recipe.ref for step in demo_line(number)} for number in (0, 100))
    return last, earlier - last


def test_gc_of_a_remote_keeps_what_its_runs_reach(
    capsys: pytest.CaptureFixture[str], store: Store, url: str, tmp_path: Path
) -> None:
    assert "no run" in says(capsys, store, "gc", "--remote", url, "--delete", status=2)[0]
    last, earlier = two_lines(store, url)
    stray = make(store, 1)
    sent(store, url, stray)
    found = json.loads("\n".join(says(capsys, store, "gc", "--remote", url, "--json")))
    reasons = {folder["name"]: folder["reason"] for folder in found["folders"]}
    assert reasons.keys() == {str(ref) for ref in earlier | {stray}}
    assert reasons[str(stray)] == "no run reaches it"
    assert all(reasons[str(ref)].startswith("of an earlier run demo (u, 2026-01-01") for ref in earlier)
    assert set(found["kept"]) == {str(ref) for ref in last}
    assert set(Remote(url).refs()) == last | earlier | {stray}  # without --delete nothing goes
    text = says(capsys, store, "gc", "--remote", url, "--keep", "2")
    assert len(text) == 3 and text[1].startswith(str(stray))
    assert "removed" in says(capsys, store, "gc", "--remote", url, "--delete")[-1]
    assert set(Remote(url).refs()) == last
    other = Store(tmp_path / "other")
    assert set(fetched(other, url, *last)) == last
    assert says(capsys, store, "gc", "--remote", url, "--delete")[-1].startswith("0 folders with 0 B removed")
    # What it removed can be pushed again.
    assert set(sent(store, url, *earlier)) == earlier


def test_gc_of_a_remote_keeps_what_a_run_reaches_though_it_is_damaged(store: Store, url: str) -> None:
    """And though a push has stopped at the damaged manifest and left its note, long ago. What no run reaches goes."""
    last, earlier = two_lines(store, url)
    remote, (edited, lost, pushed, *_), (stray, *_) = Remote(url), sorted(last, key=str), sorted(earlier, key=str)
    for ref in (edited, pushed, stray):
        remote.write(f"{ref}/{MANIFEST}", b"[]")
    remote_care.set_aside(remote, lost)
    with pytest.raises(UserError, match="cannot be used"):
        sent(store, url, pushed)
    before = {ref: remote.sizes(str(ref)) for ref in (edited, lost, pushed)}
    time.sleep(1.1)
    assert stray in {one.ref for one in remote_care.collect(remote, partial_age=1).waste}
    assert {ref: remote.sizes(str(ref)) for ref in before} == before and not remote.sizes(str(stray))


def test_what_s3_does_not_let_go_is_an_error(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many files deleted in one request S3 refuses single ones in an answer of success."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    remote, client = Remote("s3://bucket/denied"), boto3.client("s3")
    for name in ("tokens/x/a", "tokens/x/b", "tokens/x/c"):
        remote.write(name, b"x")
    held = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:DeleteObject",
        "Resource": "arn:aws:s3:::bucket/denied/tokens/x/b",
    }
    client.put_bucket_policy(Bucket="bucket", Policy=json.dumps({"Version": "2012-10-17", "Statement": [held]}))
    try:
        with pytest.raises(UserError, match="denies access"):
            remote.delete("tokens/x")
        assert remote.sizes("") == {"tokens/x/b": 1}
    finally:
        client.delete_bucket_policy(Bucket="bucket")
    remote.delete("tokens/x")
    assert remote.sizes("") == {}


def test_gc_of_a_remote_leaves_a_push_under_way_alone(store: Store, url: str) -> None:
    """And what it was made from, for so long as its note is young; later, what a cut-off push sent goes."""
    two_lines(store, url)
    source, remote = make(store, 1), Remote(url)
    sent(store, url, source)
    ref = make(store, 2, inputs={"source": source})
    hidden = f"tokens/.{ref.key}.pushing"
    folder = hidden if remote.renames else str(ref)
    for path in {hidden, folder}:
        remote.make_folder(path)
    remote.create(f"{hidden}/{transfer.NOTE}", store.open(ref).manifest.dumps().encode())
    remote.write(f"{folder}/index.json", b"x")
    remote_care.collect(remote)
    assert remote.read(f"{folder}/index.json") == b"x" and remote.manifest(source)
    time.sleep(1.1)
    assert len(remote_care.collect(remote, partial_age=1).waste) >= 1
    assert remote.read(f"{folder}/index.json") is None and remote.read(f"{hidden}/{transfer.NOTE}") is None
    assert remote.manifest(source) is None
    assert sent(store, url, ref) == [ref]


def test_no_run_is_pushed_while_a_gc_is_at_work_there(store: Store, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    two_lines(store, url)
    begun = threading.Event()
    with Remote(url).exclusive():
        thread = threading.Thread(target=lambda: (transfer.push_run(store, Remote(url), "demo"), begun.set()))
        thread.start()
        assert not begun.wait(1)
    assert begun.wait(30)
    thread.join()


def test_verify_of_a_remote_finds_every_fault_and_sets_aside(
    capsys: pytest.CaptureFixture[str], store: Store, url: str, tmp_path: Path
) -> None:
    refs, remote = [make(store, number) for number in range(4)], Remote(url)
    sent(store, url, *refs)
    assert says(capsys, store, "verify", "--remote", url)[-1].endswith("intact")
    assert "drawn with --seed 3" in says(capsys, store, "verify", "--remote", url, "--sample", "5", "--seed", "3")[0]
    data = remote.read(f"{refs[0]}/train-000001.tar") or b""
    remote.write(f"{refs[0]}/train-000001.tar", b"\xff" + data[1:])
    remote.delete(f"{refs[1]}/a.zarr/zarr.json")
    remote.write(f"{refs[2]}/train-000001.tar", data + b"x")
    line = says(capsys, store, "verify", "--remote", url, status=2)[-1]
    assert "3 of 4 artefacts" in line and all((str(ref) in line) == (ref != refs[3]) for ref in refs)
    # Sizes and missing files show without reading a byte; of flipped ones the drawn ones do.
    assert "2 of 4" in says(capsys, store, "verify", "--remote", url, "--sample", "1", "--seed", "5", status=2)[-1]
    printed = says(capsys, store, "verify", "--remote", url, "--set-aside")
    assert sum("is set aside there" in line for line in printed) == 3
    assert [remote.manifest(ref) is None for ref in refs] == [True] * 3 + [False]
    assert sent(store, url, *refs) == refs
    assert says(capsys, store, "verify", "--remote", url)[-1].endswith("intact")
    assert says(capsys, store, "verify", str(refs[0]), "--remote", url)[0].endswith("intact")
