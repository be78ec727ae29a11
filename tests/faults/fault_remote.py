"""Kills pushes and pulls at random moments, on a folder and on an S3 server, and counts what became of them.

    PYTHONPATH=.:tests/helpers:tests/faults python tests/faults/fault_remote.py [COUNT [SEED]]

Wrong is: complete on either side, and any byte other than the source's. 30 kills of each kind, if not COUNT.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from children import ENVIRONMENT, command
from remote_processes import make, pull, push
from s3_server import s3_server

from storage import transfer
from storage.remote import Remote
from storage.store import MANIFEST, Store


def now() -> dict[str, str]:
    """The environment of children, with what was set since."""
    return {**os.environ, "PYTHONPATH": ENVIRONMENT["PYTHONPATH"]}


def none(_: int) -> None:
    pass


def killed(words: list[str], seconds: float) -> bool:
    """Run and kill -9 a process after so many seconds; whether it was still at work."""
    process = subprocess.Popen(words, env=now(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.stdout
    process.stdout.close()
    return process.returncode == -signal.SIGKILL


def kill_at_random(store: Store, url: str, folder: Path, *, times: int, seed: int = 0) -> int:
    """Kill pushes and pulls at random moments; after each, nothing that looks whole may differ. How many died at work."""
    draw, died, whole = random.Random(seed), 0, 0.0
    for direction, function in (("push", push), ("pull", pull)):
        for number in range(times):
            ref = make(store, number)
            other, remote = Store(folder / f"{direction} {number}"), Remote(url)
            if direction == "push":
                remote.delete(str(ref))
            source = store if direction == "push" else other
            words = command(function, source.root, url, str(ref))
            if number == 0:
                begun = time.monotonic()
                subprocess.run(words, env=now(), check=True, stdout=subprocess.DEVNULL)
                whole = time.monotonic() - begun
                continue
            died += killed(words, draw.uniform(0.3, 1.05) * whole)
            if direction == "push" and (there := remote.manifest(ref)):
                assert there.files == store.open(ref).manifest.files
            assert direction == "push" or other.state(ref) in ("missing", "fresh")
            # Whatever it left, the next try ends with the same bytes, on both sides.
            assert transfer.push(store, remote, [store.open(ref).manifest], advance=none) == [ref]
            transfer.pull(other, remote, [store.open(ref).manifest], advance=none)
            assert other.verify(ref) == []
            files = store.open(ref).manifest.files
            assert {name: size for name, size in remote.sizes(str(ref)).items() if name != MANIFEST} == {
                name: entry["bytes"] for name, entry in files.items()
            }
            assert (other.path(ref) / MANIFEST).read_bytes() == (store.path(ref) / MANIFEST).read_bytes()
            shutil.rmtree(other.root)
    return died


def main(count: int = 30, seed: int = 0) -> None:
    with s3_server() as environment, tempfile.TemporaryDirectory() as name:
        os.environ.update(environment)
        for kind in ("file", "s3"):
            folder = Path(name) / kind
            (folder / "remote").mkdir(parents=True)
            url = f"file://{folder}/remote" if kind == "file" else "s3://bucket/faults"
            died = kill_at_random(Store(folder / "store"), url, folder, times=count + 1, seed=seed)
            print(f"{kind}://: {2 * count} pushes and pulls, {died} killed at work, 0 wrong results", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
