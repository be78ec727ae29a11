"""Bytes per second of push and pull beside fsspec's own recursive copy of the same files, in turn, in one run.

    PYTHONPATH=.:tests/helpers python tests/helpers/throughput.py FOLDER [MB [FILES [ROUNDS]]]

An artefact of FILES files with MB in all goes to a real S3 server on loopback, and comes back; `push` and `pull` also hash
every byte. Of each pair now the one goes first and now the other; both have connected before the clock runs.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
from s3_server import s3_server

from storage import transfer
from storage.keys import Recipe
from storage.remote import Remote
from storage.store import Build, Store


def seconds(work: Callable[[], object]) -> float:
    os.sync()
    time.sleep(0.3)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(root: str, megabytes: int = 400, files: int = 20, rounds: int = 7) -> None:
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
        plain.ls("bucket")
        for number in range(rounds):
            remote, there = Remote(f"s3://bucket/{number}"), f"bucket/plain/{number}/"
            remote.require()
            other, copy = Store(folder / f"other {number}"), folder / f"copy {number}"
            pairs = (
                {
                    "push": lambda remote=remote: transfer.push(store, remote, [manifest], advance=abs),
                    "fsspec put": lambda there=there: plain.put(f"{store.path(ref)}/", there, recursive=True),
                },
                {
                    "pull": lambda remote=remote, other=other: transfer.pull(other, remote, [manifest], advance=abs),
                    "fsspec get": lambda there=there, copy=copy: plain.get(there, f"{copy}/", recursive=True),
                },
            )
            for pair in pairs:
                for name in list(pair)[:: 1 if number % 2 else -1]:
                    found[name].append(seconds(pair[name]))
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
