"""Parts that machines without the store's disk make: of the very bytes that the build reads, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from remote_processes import make

from flows.elsewhere import Elsewhere
from pipeline.runtime import Runtime
from pipeline.teacher.pieces import TarJob, _bring, make_group
from storage import pieces, transfer
from storage.errors import UserError
from storage.keys import Ref
from storage.remote import Remote
from storage.store import Store

ARTEFACT = Ref(kind="tokens", key="0" * 16)


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    found = Remote(f"file://{tmp_path}/remote")
    found.require(make=True)
    return found


@pytest.fixture
def stores(tmp_path: Path, remote: Remote) -> tuple[Store, Store, Ref]:
    """Ours and another with an artefact of the same key and other bytes; the remote has the other's."""
    ours, other = Store(tmp_path / "ours"), Store(tmp_path / "other")
    ref = make(ours, 1)
    assert make(other, 1, other=True) == ref
    transfer.push(other, remote, [other.open(ref).manifest], advance=abs)
    return ours, other, ref


def job_of(store: Store, ref: Ref, home: Path) -> TarJob:
    """The job of the process that builds, with `home` as its partial folder."""
    home.mkdir(exist_ok=True)
    artefact = store.open(ref)
    return TarJob(
        tar=artefact.path / "train-000000.tar",
        sha256=artefact.manifest.files["train-000000.tar"]["sha256"],
        group=home / "train-000000.zarr",
        images=1,
        artefact=ARTEFACT,
    )


def work(job: TarJob, remote: Remote) -> None:
    """As a worker that has no such partial folder; a group is a copy of the tar."""

    def write(job: TarJob, path: Path) -> None:
        path.mkdir()
        (path / "rows").write_bytes(job.tar.read_bytes())

    away = replace(job, group=Path("/nowhere") / job.group.name)
    make_group(away, write, Runtime(device="cpu", remote=remote.url), lambda *_: None)


def test_a_worker_does_not_read_other_bytes_than_the_build(
    tmp_path: Path, remote: Remote, stores: tuple[Store, Store, Ref]
) -> None:
    ours, _, ref = stores
    job = job_of(ours, ref, tmp_path / "home")
    with pytest.raises(UserError, match=f"{ref} has other bytes in file://.*train-000000.tar.*pass a --remote"):
        work(job, remote)
    assert remote.sizes(pieces.folder_of(ARTEFACT)) == {} and not _bring(job, remote)
    remote.delete(str(ref))
    transfer.push(ours, remote, [ours.open(ref).manifest], advance=abs)
    work(job, remote)
    assert _bring(job, remote) and (job.group / "rows").read_bytes() == job.tar.read_bytes()


def test_a_part_that_a_killed_run_left_counts_for_the_same_bytes_alone(
    tmp_path: Path, remote: Remote, stores: tuple[Store, Store, Ref]
) -> None:
    ours, other, ref = stores
    theirs = job_of(other, ref, tmp_path / "theirs")
    work(theirs, remote)
    job = job_of(ours, ref, tmp_path / "home")
    assert not _bring(job, remote)
    remote.delete(str(ref))
    transfer.push(ours, remote, [ours.open(ref).manifest], advance=abs)
    work(job, remote)
    for one in (job, theirs):
        assert _bring(one, remote) and (one.group / "rows").read_bytes() == one.tar.read_bytes()
    pieces.forget(remote, ARTEFACT)
    assert remote.sizes(pieces.folder_of(ARTEFACT)) == {}


def test_what_the_remote_has_with_other_bytes_is_named(
    remote: Remote, stores: tuple[Store, Store, Ref], caplog: pytest.LogCaptureFixture
) -> None:
    ours, other, ref = stores
    for store, named in ((other, False), (ours, True)):
        elsewhere = Elsewhere(store=store, remote=remote, push=True)
        elsewhere.leave(ref)
        elsewhere.finish()
        assert (f"{ref} is in {remote} with other bytes" in caplog.text) == named
    assert remote.manifest(ref) == other.open(ref).manifest
