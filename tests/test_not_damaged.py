"""What cannot be read just now, here for want of file descriptors, is no damage: nothing is made again or set aside for
it, and nobody is asked to delete it."""

from __future__ import annotations

import errno
import itertools
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from remote_processes import make
from store_processes import TOKENS

from storage import groups, remote_care, remote_files
from storage.checkpoints import load_checkpoint, load_training_state, save_checkpoint, save_training_state
from storage.errors import UserError
from storage.groups import check_group, map_array, read_group, write_group
from storage.lineage import Lineage
from storage.remote import Remote
from storage.store import MANIFEST, Build, Store


@contextmanager
def no_more_files() -> Iterator[None]:
    """Inside, this process can open none."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, limits[1]))
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    stack.callback(os.close, os.open("/dev/null", os.O_RDONLY))
            with pytest.raises(OSError) as caught:
                yield
            assert caught.value.errno == errno.EMFILE and isinstance(caught.value.filename, str)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


ARRAYS = {"token": np.arange(6, dtype=np.float32).reshape(2, 3)}


def test_a_group_that_a_killed_build_left(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        check_group(path, read_group(path, {"token": np.float32}))

    group, build = tmp_path / "a.zarr", Build(store=Store(tmp_path), recipe=TOKENS, path=tmp_path)
    write_group(group, ARRAYS)
    assert build.holds(group, read)
    with no_more_files():
        build.holds(group, read)
    with no_more_files():
        map_array(group, "token", np.float32)
    assert build.holds(group, read)


def test_memory_that_does_not_suffice_for_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group, build = tmp_path / "a.zarr", Build(store=Store(tmp_path), recipe=TOKENS, path=tmp_path)
    write_group(group, ARRAYS)

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(groups, "_open", full)
    with pytest.raises(MemoryError):
        build.holds(group, lambda path: read_group(path, {"token": np.float32}))
    assert group.is_dir()


def test_a_training_state_and_a_checkpoint(tmp_path: Path) -> None:
    save_training_state(tmp_path, {"step": 3})
    save_checkpoint(tmp_path, {"a": torch.ones(3)}, {})
    with no_more_files():
        load_training_state(tmp_path)
    with no_more_files():
        load_checkpoint(tmp_path)
    assert load_training_state(tmp_path) == {"step": 3} and load_checkpoint(tmp_path)[0].keys() == {"a"}


def test_a_manifest_at_a_remote_that_fails_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "WAITS", ())
    ref, remote = make(Store(tmp_path), 1), Remote(f"file://{tmp_path}")
    read, answers = remote._fs.cat_file, itertools.repeat(True)

    def reads(*args: Any, **options: Any) -> bytes:
        if not next(answers):
            raise TimeoutError("no answer")
        return read(*args, **options)

    monkeypatch.setattr(remote._fs, "cat_file", reads)
    for look in (remote_care._manifest, remote_care.verify):
        answers = itertools.chain([False], itertools.repeat(True))
        with pytest.raises(UserError, match="no answer"):
            look(remote, ref)
    answers = itertools.repeat(True)
    assert remote_care.verify(remote, ref) == []
    remote.write(f"{ref}/{MANIFEST}", b"[]")
    assert remote_care._manifest(remote, ref) is None and "cannot be used" in remote_care.verify(remote, ref)[0]


def test_a_manifest(tmp_path: Path) -> None:
    """`verify --set-aside` would set an intact artefact aside; `gc` would take what it was made from for of no use."""
    store = Store(tmp_path)
    ref = make(store, 2, inputs={"source": make(store, 1)})
    with no_more_files():
        store.verify(ref)
    with no_more_files():
        Lineage(store).reach([ref])
    assert len(Lineage(store).reach([ref])) == 2 and store.verify(ref) == []
    (store.path(ref) / MANIFEST).unlink()
    assert "cannot be used" in store.verify(ref)[0] and Lineage(store).reach([ref]) == {ref}
