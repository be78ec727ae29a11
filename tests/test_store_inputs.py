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
from storage.atomic import ASIDE, write_text
from storage.errors import UserError
from storage.inputs import NOTE, Inputs, vouch
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
    build.add(build.path / "a.txt")


def damage(store: Store, ref: Ref = SHARDS.ref) -> None:
    flip(store.path(ref) / "a.txt", default_rng(0))


def mend(store: Store, text: str = "an input") -> None:
    """What the message advises."""
    store.set_aside(SHARDS.ref, store.path(SHARDS.ref))
    store.build(SHARDS, lambda build: put(build, text))


def refused(store: Store, work: Callable[[Build], None]) -> str:
    with pytest.raises(UserError) as caught:
        store.build(TOKENS, work)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def asides(store: Store, kind: str = "tokens") -> list[Path]:
    return sorted((store.root / kind).glob(f".*{ASIDE}"))


DAMAGED = (
    f"{SHARDS.ref} is damaged (a.txt has changed (sha256 differs)); `zs-seg verify {SHARDS.key} --set-aside` sets it "
    "aside, and the next run makes it anew"
)


def cut_off(store: Store) -> None:
    """A build that leaves state.txt."""

    def half(build: Build) -> None:
        vouch(build.path)
        (build.path / "state.txt").write_text("half")
        fail()

    with pytest.raises(RuntimeError):
        store.build(TOKENS, half)
    assert store.state(TOKENS.ref) == "partial"


def finish(store: Store) -> bool:
    """Build; whether it went on with what `cut_off` left."""
    went_on = list[bool]()

    def work(build: Build) -> None:
        went_on.append((build.path / "state.txt").exists())
        put(build, "made of it")

    provenance = store.open(store.build(TOKENS, work)).manifest.provenance
    assert provenance["resumed"] == went_on[0]
    return went_on[0]


def fail() -> None:
    raise RuntimeError("no luck")


GOES_ON = f"{DAMAGED}; cache-clip then goes on where it was, if the bytes are the same"


def test_a_changed_input_stops_the_build_which_goes_on_with_the_same_bytes(store: Store) -> None:
    cut_off(store)
    damage(store)
    assert refused(store, lambda build: pytest.fail("built")) == GOES_ON
    assert (store.state(TOKENS.ref), asides(store)) == ("partial", [])
    mend(store)
    assert finish(store)
    assert len(asides(store, "shards")) == 1  # the damaged input is there to look at


def test_and_not_with_others_unless_it_is_asked_to(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    cut_off(store)
    damage(store)
    refused(store, lambda build: pytest.fail("built"))
    mend(store, "other text")
    assert not finish(store)
    (aside,) = asides(store)
    assert (aside / "state.txt").read_text() == "half"
    partial = store.partial(TOKENS.ref)
    assert (
        f"cache-clip: what cache-clip had made is set aside as {aside}; to go on with it nevertheless, rename it to "
        f"{partial.name} and delete its inputs.json ({SHARDS.ref}/a.txt had other bytes then)"
    ) in caplog.messages
    store.remove(TOKENS.ref)
    aside.rename(partial)
    (partial / NOTE).unlink()
    assert finish(store)


@pytest.mark.parametrize("note", [b"{", b"[]", b'{"hashes": 1, "seen": {}}', b'{"a": 1}', b"\xff"])
def test_what_is_made_of_nobody_knows_what_is_set_aside(store: Store, note: bytes) -> None:
    cut_off(store)
    (store.partial(TOKENS.ref) / NOTE).write_bytes(note)
    assert not finish(store)
    assert len(asides(store)) == 1


def test_bytes_that_change_without_a_write_were_not_vouched_for(store: Store) -> None:
    """A disk that gives other bytes than it was given: when it began nobody knows, so a saved state is set aside."""
    cut_off(store)
    damage(store)
    partial = store.partial(TOKENS.ref)
    note = Inputs.read(partial)
    assert note
    note.look(store.root, SHARDS.ref, store.open(SHARDS.ref).manifest.files)  # as if the write had not been seen
    note.write(partial)
    assert "is set aside as" in refused(store, lambda build: pytest.fail("built"))
    assert len(asides(store)) == 1


def test_nothing_is_vouched_for_after_an_input_has_changed(store: Store) -> None:
    def work(build: Build) -> None:
        file = store.path(SHARDS.ref) / "a.txt"
        vouch(build.path)
        file.chmod(0o600)  # touched, and the same
        vouch(build.path)
        whole = file.read_bytes()
        damage(store)
        with pytest.raises(UserError, match="a.txt has changed while it was read"):
            vouch(build.path)
        file.write_bytes(whole)
        vouch(build.path)
        file.unlink()
        vouch(build.path)

    assert refused(store, work) == GOES_ON.replace("has changed (sha256 differs)", "is missing")


def test_who_computes_along_from_a_disk_of_its_own_has_the_builders_inputs_or_stops(store: Store) -> None:
    """Nothing stays here, whatever happens; a byte that changes without a write is found at the end."""

    def along(work: Callable[[Build], None]) -> str:
        try:
            store.compute_along(TOKENS, work)
        except UserError as error:
            return str(error)
        finally:
            assert list((store.root / "tokens").iterdir()) == [] and store.state(TOKENS.ref) == "missing"
        return ""

    def check(build: Build) -> None:
        assert build.open("shards").path == store.path(SHARDS.ref)
        vouch(build.path)
        vouch(build.path, again=True)

    def changes(build: Build) -> None:
        vouch(build.path)
        damage(store)
        vouch(build.path)

    def changes_unseen(build: Build) -> None:
        damage(store)
        (seen := Inputs()).look(store.root, SHARDS.ref, store.open(SHARDS.ref).manifest.files)
        seen.write(build.path)
        vouch(build.path)
        vouch(build.path, again=True)

    assert along(check) == ""
    assert "a.txt has changed while it was read" in along(changes)
    assert along(lambda build: pytest.fail("begun")) == DAMAGED
    mend(store)
    assert "a.txt has changed while it was read" in along(changes_unseen)


def test_an_input_that_changes_meanwhile(store: Store) -> None:
    def work(build: Build) -> None:
        put(build, "made of it")
        damage(store)

    assert refused(store, work) == GOES_ON
    assert store.state(TOKENS.ref) == "partial"


def test_an_error_over_a_changed_input_is_the_inputs(store: Store) -> None:
    def work(build: Build) -> None:
        damage(store)
        raise KeyError("something in it")

    assert refused(store, work) == GOES_ON


STRAYS = (".DS_Store", ".a.txt.swp", "a.txt~", ".nfs0000000000000001", "Thumbs.db", "a copy.txt", "sub/.DS_Store")


def litter(folder: Path) -> None:
    (folder / "sub").mkdir(exist_ok=True)
    for name in STRAYS:
        (folder / name).write_text("x")
    (folder / "gone.lnk").symlink_to("nowhere")


def test_stray_files_are_no_damage_and_no_part_of_anything(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """In an input before, while and after it is read, and in what a killed build left."""
    caplog.set_level("INFO", logger="storage")
    litter(store.path(SHARDS.ref))
    cut_off(store)
    litter(store.partial(TOKENS.ref))

    def work(build: Build) -> None:
        (store.path(SHARDS.ref) / ".index.swp").write_text("x")
        put(build, "made of it")

    ref = store.build(TOKENS, work)
    found = sorted((*STRAYS, "gone.lnk"))
    assert list(store.open(ref).manifest.files) == ["a.txt"]
    assert store.verify(ref) == store.verify(SHARDS.ref) == []
    assert store.strays(ref) == sorted([*found, "state.txt"])
    assert store.strays(SHARDS.ref) == sorted([*found, ".index.swp"])
    assert f"cache-clip: not part of {ref}: {', '.join(store.strays(ref))}" in caplog.messages


def test_a_finished_artefact_that_lost_its_manifest_is_set_aside_and_not_deleted(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = store.path(SHARDS.ref) / "manifest.json"
    manifest.rename(manifest.with_name("manifest (1).json"))
    store.build(SHARDS, lambda build: put(build, "an input"))
    (aside,) = asides(store, "shards")
    assert (aside / "a.txt").read_text() == "an input"
    assert f"{SHARDS.ref} had lost its manifest.json; what was left of it is set aside as {aside}" in caplog.text
    assert store.verify(SHARDS.ref) == []


def test_scratch_goes_and_everything_else_stays(store: Store) -> None:
    def work(build: Build) -> None:
        put(build, "made of it")
        (build.path / "state.txt").write_text("state")
        build.scratch += [build.path / "state.txt", build.path / "never written"]

    ref = store.build(TOKENS, work)
    assert sorted(path.name for path in store.path(ref).iterdir()) == ["a.txt", "manifest.json"]


def test_a_stage_that_names_none_of_its_files_is_a_bug(store: Store) -> None:
    with pytest.raises(AssertionError, match="Build.add"):
        store.build(TOKENS, lambda build: write_text(build.path / "a.txt", "x"))


def test_an_error_of_the_stages_own_passes(store: Store) -> None:
    with pytest.raises(RuntimeError, match="no luck"):
        store.build(TOKENS, lambda _: fail())


def test_an_input_that_is_rebuilt_meanwhile_with_other_bytes(store: Store) -> None:
    def work(build: Build) -> None:
        store.remove(SHARDS.ref)
        store.build(SHARDS, lambda build: put(build, "another"))

    assert "was rebuilt meanwhile, with other bytes; run again (what cache-clip had made is set" in refused(store, work)
    assert (len(asides(store)), finish(store)) == (1, False)


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
        build.add(build.path / "meta.json")

    ref = store.build(Recipe(kind="checkpoint", stage="v2c", version=1, config=None, inputs={}), work)
    assert checkpoint_folder(store, ref.key) == store.path(ref)
    damage(store, ref)
    with pytest.raises(ValueError, match=f"{ref} is damaged .*--set-aside"):
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
