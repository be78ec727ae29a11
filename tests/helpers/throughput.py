"""Bytes per second of push and pull beside fsspec's own recursive copy of the same files, in turn, in one run.

    PYTHONPATH=.:tests/helpers python tests/helpers/throughput.py FOLDER [MB [FILES [ROUNDS]]]

An artefact of FILES files with MB in all goes to a real S3 server on loopback, and comes back; `push` and `pull` also hash every byte.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from s3_server import s3_server

from storage import transfer
from storage.keys import Recipe
from storage.remote import Remote
from storage.store import Build, Store


def seconds(work: Callable[..., object], *arguments: Any, **named: Any) -> float:
    os.sync()
    started = time.perf_counter()
    work(*arguments, **named)
    return time.perf_counter() - started


def main(root: str, megabytes: int = 400, files: int = 20, rounds: int = 5) -> None:
    folder = Path(root)

    def make(build: Build) -> None:
        for number in range(files):
            path = build.path / f"train-{number:06d}.tar"
            path.write_bytes(os.urandom(megabytes * 1_000_000 // files))
            build.add(path)

    store = Store(folder / "store")
    ref = store.build(Recipe(kind="shards", stage="shard", version=1, config=None, inputs={}), make)
    manifest, found = store.open(ref).manifest, {name: [] for name in ("push", "fsspec put", "pull", "fsspec get")}
    with s3_server() as environment:
        os.environ.update(environment)
        plain = fsspec.filesystem("s3")
        for number in range(rounds):
            url, other, copy = f"s3://bucket/{number}", Store(folder / f"other {number}"), folder / f"copy {number}"
            found["push"].append(seconds(transfer.push, store, Remote(url), [manifest], advance=abs))
            there = f"bucket/plain/{number}"
            found["fsspec put"].append(seconds(plain.put, f"{store.path(ref)}/", f"{there}/", recursive=True))
            found["pull"].append(seconds(transfer.pull, other, Remote(url), [manifest], advance=abs))
            found["fsspec get"].append(seconds(plain.get, f"{there}/", f"{copy}/", recursive=True))
            assert other.verify(ref) == []
            shutil.rmtree(other.root)
            shutil.rmtree(copy)
            for path in (f"bucket/{number}", there):
                plain.rm(path, recursive=True)
    for name, times in found.items():
        rate = [megabytes / one for one in times]
        print(f"{name:<11} {statistics.median(rate):.0f} MB/s (median of {rounds}; {min(rate):.0f} to {max(rate):.0f})")
    for ours, theirs in (("push", "fsspec put"), ("pull", "fsspec get")):
        ratios = [other / one for one, other in zip(found[ours], found[theirs], strict=True)]
        print(f"{ours} / {theirs}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
