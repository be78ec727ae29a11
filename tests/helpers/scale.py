"""What commands cost on data of COCO's size, and whether that grows with the number of files and no faster.

    PYTHONPATH=.:tests/helpers python tests/helpers/scale.py FOLDER [TARS ...]

Makes stores of 10, 100 and 1,000 tars (118 images each, 13 files of tokens a tar) of which every file is a small
stand-in, runs each command in a process of its own, and prints seconds and the largest memory of it; the remote is a
folder, or `REMOTE=s3` a server on loopback. Of these numbers the documents cite some.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from many_artefacts import demo_line, note
from s3_server import s3_server

from storage import through, transfer
from storage.keys import Recipe
from storage.remote import Remote
from storage.shards import Sample, read_shard, write_shard
from storage.store import Build, Store

IMAGES, INSTANCES = 118, 1300  # a tar
ARRAYS = ("global", "instance", "offsets", "segment_id", "kept", "mirrored_global")


def work(stage: str, tars: int, build: Build) -> None:
    both = {"images": IMAGES * tars, "encoded": IMAGES * tars, "instances": INSTANCES * tars}
    build.counts.update({
        "scenes": {"train2017": both, "val2017": both}, "shard": {"train": both, "val": both}, "cache-clip": {"train": both, "val": both},
        "text": {"classes": 56}, "queries": {"views": IMAGES * tars}, "evaluate": {"images": 50},
    }.get(stage, {}))  # fmt: skip
    for number in range(tars if stage in ("shard", "cache-clip", "queries") else 3):
        names = [f"train-{number:06d}.tar"]
        if stage == "cache-clip":
            group = f"train-{number:06d}.zarr"
            names = [
                f"{group}/zarr.json",
                *(f"{group}/{array}/{file}" for array in ARRAYS for file in ("zarr.json", "c")),
            ]
        for name in names:
            (build.path / name).parent.mkdir(parents=True, exist_ok=True)
            (build.path / name).write_text(f"{number} {name}")
            build.add(build.path / name)


# What the system reports of a child that has ended counts what its parent had when it began.
CHILD = """
import sys
from flows.cli import main
status = main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""


def command(*words: object) -> tuple[float, int]:
    """Seconds and largest memory in bytes of a command."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, words)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return time.monotonic() - started, 1024 * int(done.stdout.splitlines()[-1])


def shards(tars: int, build: Build) -> None:
    for number in range(tars):
        path = build.path / f"train-{number:06d}.tar"
        write_shard(path, (
            Sample(image_id=1 + number * IMAGES + row, image=b"x" * 1000, png=b"p", height=1, width=1, segments=()) for row in range(IMAGES)
        ))  # fmt: skip
        build.add(path)


def read_through(folder: Path, tars: int, url: str) -> None:
    """Every row twice, window by window as a training reads them, through a cache of a fifth of the tars (8 at least)."""
    store, here = Store(folder / "shards"), Store(folder / "here")
    ref = store.build(Recipe(kind="shards", stage="shard", version=1, config=None, inputs={}), partial(shards, tars))
    manifest, remote = store.open(ref).manifest, Remote(f"{url}-shards")
    remote.require(make=True)
    transfer.push(store, remote, [manifest], advance=abs)
    through.leave(here, remote, manifest, size=max(tars // 5, 8) * manifest.bytes // tars)
    for name, where in (("from this disk", store), ("read-through", here)):
        started, read = time.monotonic(), 0
        paths = [where.path(ref) / name for name in manifest.files] * 2
        windows = [paths[at : at + 4] for at in range(0, len(paths), 4)]
        for window, following in zip(windows, [*windows[1:], []], strict=True):
            through.ahead(window + following)
            read += sum(1 for path in window for _ in read_shard(path))
        seconds = time.monotonic() - started
        assert read == 2 * IMAGES * tars
        print(
            f"| {IMAGES * tars:,} | rows {name} | {seconds:.2f} s | {1e6 * seconds / read:.0f} us a row |", flush=True
        )


def measure(folder: Path, tars: int, url: str) -> None:
    store, steps = Store(folder / "store"), demo_line()
    for step in steps:
        store.build(step.recipe, partial(work, step.name, tars))
    store.remove(steps[0].recipe.ref)  # `plan` would count its images, which are none
    note(store, "demo", steps)
    here, other = ("--store", store.root), ("--store", folder / "other")
    files = sum(len(store.open(ref).manifest.files) for ref in store.refs())
    tried: dict[str, tuple[object, ...]] = {
        "plan": ("plan", "--preset", "demo", *here),
        "push": ("push", "--to", url, *here),
        "push of nothing": ("push", "--to", url, *here),
        "pull": ("pull", "--from", url, *other),
        "pull of nothing": ("pull", "--from", url, *other),
        "verify --sample 100": ("verify", "--sample", "100", *here),
        "verify --remote --sample 100": ("verify", "--remote", url, "--sample", "100", *here),
        "gc --remote": ("gc", "--remote", url, *here),
    }
    for name, words in tried.items():
        seconds, memory = command(*words)
        print(f"| {IMAGES * tars:,} | {files:,} | {name} | {seconds:.2f} s | {1e6 * seconds / files:.0f} us | {memory / 1e6:.0f} MB |", flush=True)  # fmt: skip


def main(root: str, *tars: str) -> None:
    print("| images | files | command | time | a file | memory |\n| --- | --- | --- | --- | --- | --- |")
    for number in map(int, tars or ("10", "100", "1000")):
        folder = Path(root) / str(number)
        folder.mkdir(parents=True)
        if os.environ.get("REMOTE") == "s3":
            with s3_server() as environment:
                os.environ.update(environment)
                measure(folder, number, "s3://bucket/scale")
                read_through(folder, number, "s3://bucket/scale")
        else:
            measure(folder, number, f"file://{folder}/remote")
            read_through(folder, number, f"file://{folder}/remote")


if __name__ == "__main__":
    main(*sys.argv[1:])
