"""Nothing is made from a changed byte: inputs are hashed before a build and after it, and what a killed build left is
read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_injection import flip
from numpy.random import default_rng

from pipeline.inference.model import checkpoint_folder
from pipeline.runtime import Runtime
from pipeline.training.config import Schedule
from pipeline.training.curves import CURVES, Record
from storage.keys import Recipe, Ref
from storage.shards import Sample, check_shard, write_shard
from storage.store import Build, Store

SHARDS = Recipe(kind="shards", stage="shard", version=1, config=None, inputs={})
TOKENS = Recipe(kind="tokens", stage="cache-clip", version=1, config=None, inputs={"shards": SHARDS.ref})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.build(SHARDS, lambda build: put(build, "an input"))
    return store


def put(build: Build, text: str) -> None:
    (build.path / "a.txt").write_text(text)


def damage(store: Store, ref: Ref = SHARDS.ref) -> None:
    flip(store.path(ref) / "a.txt", default_rng(0))


def refused(store: Store, work: Callable[[Build], None]) -> str:
    with pytest.raises(ValueError) as caught:
        store.build(TOKENS, work)
    assert store.state(TOKENS.ref) == "missing"  # not even partial: what was made of it is gone
    assert "\n" not in str(caught.value)
    return str(caught.value)


TOLD = f"{SHARDS.ref} is damaged (a.txt has changed (sha256 differs)); rebuild it with `zs-seg run --force shard`"


def test_a_changed_input_is_found_before_and_what_was_made_of_it_goes(store: Store) -> None:
    def half(build: Build) -> None:
        put(build, "half")
        fail()

    with pytest.raises(RuntimeError):
        store.build(TOKENS, half)
    assert store.state(TOKENS.ref) == "partial"
    damage(store)
    assert refused(store, lambda build: pytest.fail("built")) == TOLD


def fail() -> None:
    raise RuntimeError("no luck")


def test_an_input_that_changes_meanwhile(store: Store) -> None:
    def work(build: Build) -> None:
        put(build, "made of it")
        damage(store)

    assert refused(store, work) == TOLD


def test_an_error_over_a_changed_input_is_the_inputs(store: Store) -> None:
    def work(build: Build) -> None:
        damage(store)
        raise KeyError("something in it")

    assert refused(store, work) == TOLD


def test_an_error_of_the_stages_own_passes(store: Store) -> None:
    with pytest.raises(RuntimeError, match="no luck"):
        store.build(TOKENS, lambda _: fail())


def test_an_input_that_is_rebuilt_meanwhile_with_other_bytes(store: Store) -> None:
    def work(build: Build) -> None:
        store.remove(SHARDS.ref)
        store.build(SHARDS, lambda build: put(build, "another"))

    assert "was rebuilt meanwhile, with other bytes; run again" in refused(store, work)
    store.build(TOKENS, lambda build: put(build, "made of it"))


def test_an_input_that_is_gone_leaves_what_there_is(store: Store) -> None:
    def work(build: Build) -> None:
        put(build, "half")
        store.remove(SHARDS.ref)

    with pytest.raises(ValueError, match=f"{SHARDS.ref} is missing"):
        store.build(TOKENS, work)
    assert store.state(TOKENS.ref) == "partial"


def test_a_piece_that_a_killed_build_left_damaged_is_made_again(tmp_path: Path) -> None:
    """A flipped bit in a JPEG: no format but ours would notice."""
    sample = Sample(image_id=1, image=b"j" * 2000, png=b"p", height=1, width=1, segments=())
    build, tar = Build(store=Store(tmp_path), recipe=TOKENS, path=tmp_path), tmp_path / "train-000000.tar"
    assert not build.holds(tar, check_shard)
    write_shard(tar, [sample])
    whole = tar.read_bytes()
    for at in (1000, 512 + 2010, len(whole) - 1):  # in the JPEG, in the padding behind it, in the end of the archive
        assert build.holds(tar, check_shard)
        tar.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert not build.holds(tar, check_shard)
        assert not tar.exists()
        write_shard(tar, [sample])


def test_what_a_killed_writer_of_weights_left_does_not_become_part_of_the_artefact(store: Store) -> None:
    def killed(build: Build) -> None:
        (build.path / ".tmpxlBhGA").write_text("safetensors writes to such a name first")
        fail()

    with pytest.raises(RuntimeError):
        store.build(TOKENS, killed)
    assert list(store.open(store.build(TOKENS, lambda build: put(build, "whole"))).manifest.files) == ["a.txt"]


def test_a_damaged_checkpoint_is_not_predicted_with(store: Store) -> None:
    def work(build: Build) -> None:
        put(build, "weights")
        (build.path / "meta.json").write_text(json.dumps({"stage": "v2c"}))

    ref = store.build(Recipe(kind="checkpoint", stage="v2c", version=1, config=None, inputs={}), work)
    assert checkpoint_folder(store, ref.key) == store.path(ref)
    damage(store, ref)
    with pytest.raises(ValueError, match=f"{ref} is damaged .*--force v2c"):
        checkpoint_folder(store, ref.key)


def test_curves_go_on_only_from_what_was_written(tmp_path: Path) -> None:
    def record(start: int, state: dict[str, object]) -> Record:
        return Record(
            "g2s", tmp_path, Schedule(steps=40), start=start, state=state, runtime=Runtime(progress=False), writes=True
        )

    with record(0, {}) as first:
        for _ in range(20):
            first.add({"fit": 1.0}, norm=1.0, waited=0.0, seconds=1.0)
        state = first.state()
    path = tmp_path / CURVES
    whole = path.read_bytes()
    with record(20, state) as second:
        for _ in range(10):
            second.add({"fit": 2.0}, norm=1.0, waited=0.0, seconds=1.0)
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 3
    flip(path, default_rng(3))
    if path.read_bytes().startswith(whole):  # the flip fell into the third row, which the state does not count
        path.write_bytes(whole.replace(b"1.0", b"3.0", 1))
    with pytest.raises(ValueError, match=r"curves\.jsonl is damaged; delete it to go on"), record(20, state):
        pass
    path.unlink()
    with record(20, state) as again:
        assert again.rows == 0
