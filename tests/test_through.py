"""Read-through: the tars of an artefact that stay in a remote are read as the manifest lists them, through a cache of
bounded size; a training comes to the same bytes."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from s3_server import s3_server
from tiny import QUIET, build, copy_artefacts, tiny_config

from pipeline.line import line
from storage import remote_files, through, transfer
from storage.errors import UserError
from storage.inputs import Inputs
from storage.keys import Recipe
from storage.remote import Remote
from storage.shards import Sample, Shards, read_shard, write_index, write_shard
from storage.store import ELSEWHERE, MANIFEST, Build, Store

TARS, SIZE = 20, 20_480  # tars, and bytes of each
RECIPE = Recipe(kind="shards", stage="shard", version=1, config=None, inputs={})


def work(build: Build) -> None:
    entries = []
    for number in range(TARS):
        name = f"train-{number:06d}.tar"
        image = bytes((number * 31 + i) % 251 for i in range(8000))
        write_shard(
            build.path / name, [Sample(image_id=number + 1, image=image, png=b"p", height=1, width=1, segments=())]
        )
        entries.append({"tar": name, "samples": 1, "segments": 0})
        build.add(build.path / name)
    write_index(build.path, {"train": entries, "val": []})
    build.add(build.path / "index.json")


@pytest.fixture
def source(tmp_path: Path) -> tuple[Store, Remote]:
    """A store with shards, and a remote that has them, too."""
    store = Store(tmp_path / "source")
    ref = store.build(RECIPE, work)
    (tmp_path / "remote").mkdir()
    remote = Remote(f"file://{tmp_path}/remote")
    transfer.push(store, remote, [store.open(ref).manifest], advance=abs)
    return store, remote


@pytest.fixture
def here(source: tuple[Store, Remote], tmp_path: Path) -> Store:
    """A store that reads them through a cache for eight of the twenty."""
    store, remote = source
    here = Store(tmp_path / "here")
    through.leave(here, remote, store.open(RECIPE.ref).manifest, size=8 * SIZE)
    return here


def cached(store: Store) -> int:
    return sum(path.stat().st_size for path in (store.root / through.CACHE).iterdir())


def test_all_tars_are_read_and_few_kept(source: tuple[Store, Remote], here: Store) -> None:
    folder = here.open(RECIPE.ref).path
    assert sorted(path.name for path in folder.iterdir()) == [ELSEWHERE, "index.json", "manifest.json"]
    assert here.state(RECIPE.ref) == "fresh" and here.verify(RECIPE.ref) == [] and here.strays(RECIPE.ref) == []
    whole = Shards(source[0].path(RECIPE.ref)).tars("train")
    assert whole[0].stat().st_size == SIZE
    for _ in range(2):
        for tar, other in zip(Shards(folder).tars("train"), whole, strict=True):
            assert list(read_shard(tar)) == list(read_shard(other))
            assert cached(here) <= 8 * SIZE
    assert cached(here) == 8 * SIZE


def test_what_is_in_the_cache_is_not_fetched_again_and_the_least_recently_used_goes(
    here: Store, source: tuple[Store, Remote]
) -> None:
    tars = Shards(here.path(RECIPE.ref)).tars("train")
    through.ahead(tars[:8])
    for tar in tars[:8]:
        list(read_shard(tar))
    list(read_shard(tars[0]))  # now the second is the oldest
    list(read_shard(tars[8]))
    shutil.rmtree(source[1].url.removeprefix("file://"))
    for tar in (tars[0], *tars[2:9]):
        list(read_shard(tar))
    with pytest.raises(UserError, match="is damaged in file://.*train-000001.tar is missing"):
        list(read_shard(tars[1]))


def test_damage_in_the_cache_is_fetched_again_and_damage_there_is_an_error(
    here: Store, source: tuple[Store, Remote], caplog: pytest.LogCaptureFixture
) -> None:
    tars = Shards(here.path(RECIPE.ref)).tars("train")
    first = list(read_shard(tars[0]))
    (kept,) = (here.root / through.CACHE).iterdir()
    data = kept.read_bytes()
    for wrong in (data[:-1], b"\xff" + data[1:], b""):
        kept.write_bytes(wrong)
        assert list(read_shard(tars[0])) == first
    assert caplog.text.count("fetching it again") == 3
    source[1].write(f"{RECIPE.ref}/{tars[1].name}", data)  # another tar's
    with pytest.raises(UserError, match=r"train-000001.tar has changed .*zs-seg verify"):
        list(read_shard(tars[1]))
    assert [path.name for path in (here.root / through.CACHE).iterdir()] == [kept.name]


def test_what_killed_readers_left_in_the_cache(here: Store) -> None:
    """It counts, and goes when nobody has written it for a while: what comes now lies there, too, under such a name."""
    tars, cache = Shards(here.path(RECIPE.ref)).tars("train"), here.root / through.CACHE
    cache.mkdir()
    dead, living = (cache / f".{name}.writing" for name in ("dead", "living"))
    for path in (dead, living):
        path.write_bytes(bytes(2 * SIZE))
    os.utime(dead, (0, time.time() - 1000))
    for tar in tars:
        assert len(list(read_shard(tar))) == 1
        assert cached(here) <= 8 * SIZE
    assert not dead.exists() and living.exists() and cached(here) == 8 * SIZE


def test_many_readers_at_once(here: Store, source: tuple[Store, Remote]) -> None:
    tars = Shards(here.path(RECIPE.ref)).tars("train")
    errors: list[BaseException] = []

    def walk(start: int) -> None:
        try:
            for number in range(TARS):
                tar = tars[(start + 7 * number) % TARS]
                assert [sample.image_id for sample in read_shard(tar)] == [int(tar.stem[-6:]) + 1]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=walk, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and cached(here) <= 8 * SIZE + 4 * SIZE  # what four threads bring at once


def test_a_cache_that_is_too_small_and_what_cannot_be_pushed(
    source: tuple[Store, Remote], here: Store, tmp_path: Path
) -> None:
    store, remote = source
    manifest = store.open(RECIPE.ref).manifest
    with pytest.raises(UserError, match="is too small"):
        through.leave(Store(tmp_path / "other"), remote, manifest, size=8 * SIZE - 1)
    assert Store(tmp_path / "other").state(RECIPE.ref) == "missing"
    remote.delete(str(RECIPE.ref))
    with pytest.raises(UserError, match="read through"):
        transfer.push(here, remote, [manifest], advance=abs)


def test_a_cut_off_pull_is_no_part_of_what_is_read_through_and_the_reverse(
    source: tuple[Store, Remote], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, remote = source
    here, ref, manifest = Store(tmp_path / "other"), RECIPE.ref, store.open(RECIPE.ref).manifest
    here.arriving(ref).mkdir(parents=True)
    for number, size in ((0, SIZE), (3, 1234)):  # a whole one and a torn one
        tar = f"train-{number:06d}.tar"
        (here.arriving(ref) / tar).write_bytes((store.path(ref) / tar).read_bytes()[:size])
    through.leave(here, remote, manifest, size=8 * SIZE)
    assert sorted(path.name for path in here.open(ref).path.iterdir()) == [ELSEWHERE, "index.json", MANIFEST]
    tars = Shards(here.path(ref)).tars("train")
    assert [sample.image_id for tar in tars for sample in read_shard(tar)] == list(range(1, TARS + 1))
    here.remove(ref)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "_complete", die)
        through.leave(here, remote, manifest, size=8 * SIZE)
    assert transfer.pull(here, remote, [manifest], advance=abs) == [ref]
    assert {path.name for path in here.path(ref).iterdir()} == {*manifest.files, MANIFEST}
    (here.path(ref) / tars[3].name).unlink()
    assert here.verify(ref) == [f"{tars[3].name} is missing"]


def test_a_remote_that_fails_for_a_while(here: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "WAITS", (0.01, 0.01))
    failures = iter([True, True, False, True, True, True])
    system, tars = through._open, Shards(here.path(RECIPE.ref)).tars("train")
    folder = tars[0].parent
    remote = system(folder, (folder / ELSEWHERE).stat().st_mtime_ns).remote
    read = remote._fs.cat_file

    def fails(*words: object, **named: object) -> bytes:
        if next(failures, False):
            raise TimeoutError("slow")
        return read(*words, **named)

    monkeypatch.setattr(remote._fs, "cat_file", fails)
    assert len(list(read_shard(tars[0]))) == 1
    with pytest.raises(UserError, match="mend the address or the connection"):
        list(read_shard(tars[1]))


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.mark.slow
def test_a_training_comes_to_the_same_bytes(
    shared_store: Store, s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From S3, through a cache for 8 tars of 40, after a cut in the middle."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    config = tiny_config()
    config = replace(config, shard=replace(config.shard, samples_per_tar=1))
    steps = build(shared_store, config, until="v2c")
    here, remote = Store(tmp_path / "here"), Remote("s3://bucket/through")
    shards = steps["shard"].recipe.ref
    manifest = shared_store.open(shards).manifest
    transfer.push(shared_store, remote, [manifest], advance=abs)
    size = sum(sorted(entry["bytes"] for name, entry in manifest.files.items() if name.endswith(".tar"))[-8:])
    through.leave(here, remote, manifest, size=size)
    assert size < manifest.bytes / 4
    copy_artefacts(shared_store, here, [steps["text"].recipe.ref])
    tokens, stage = (stage for stage in line(config) if stage.name in ("cache-clip", "v2c"))
    tokens.run(store=here, runtime=QUIET)
    assert here.open(tokens.recipe.ref).manifest.files == shared_store.open(tokens.recipe.ref).manifest.files
    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        stage.run(store=here, runtime=replace(QUIET, checkpoint_every=3))
    note = Inputs.read(here.partial(stage.recipe.ref))
    assert note and note.hashes
    stage.run(store=here, runtime=replace(QUIET, checkpoint_every=3))
    ours, theirs = here.open(stage.recipe.ref).manifest.files, shared_store.open(stage.recipe.ref).manifest.files
    weights = [name for name in ours if name.endswith(".safetensors")]
    assert weights and all(ours[name] == theirs[name] for name in weights)
    assert cached(here) <= size


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    from pipeline.training import loop

    save = loop.save_training_state

    def save_and_stop(folder: Path, state: dict[str, int]) -> None:
        save(folder, state)
        if state["step"] == step:
            monkeypatch.setattr(loop, "save_training_state", save)
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_training_state", save_and_stop)
