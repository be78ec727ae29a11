"""What other processes do to a store while a test looks on or kills them."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from storage.atomic import write_text
from storage.inputs import NOTE
from storage.keys import Recipe, Ref
from storage.provenance import provenance
from storage.runs import RunRecord, Runs
from storage.store import Build, Store

TOKENS = Recipe(kind="tokens", stage="cache-clip", version=3, config={"size": 4}, inputs={})
SHARED = Recipe(kind="tokens", stage="cache-clip", version=1, config=None, inputs={})


def build_two_files(store: str, begun: str, go: str) -> None:
    """Build TOKENS: a.txt, an x at the end of the file `begun`, and as soon as the file `go` is there b/c.txt."""

    def work(build: Build) -> None:
        (build.path / "a.txt").write_text("first")
        with Path(begun).open("a") as file:
            file.write("x")
        while not Path(go).exists():
            time.sleep(0.01)
        (build.path / "b").mkdir(exist_ok=True)
        (build.path / "b" / "c.txt").write_text("second")
        build.add(build.path / "a.txt", build.path / "b" / "c.txt")
        build.counts["samples"] = 2

    Store(Path(store)).build(TOKENS, work)


def build_as(store: str, then: str, *rights: str) -> None:
    """Build SHARED, files of every format, with the `rights` user, group and umask if given; before it is complete die
    where `then` is "die", or wait for the file `then`. Where that begins with "read" build something so named from it.
    """
    # Imported before the rights change: they lie where another user may not read.
    import numpy as np
    import torch

    from storage.checkpoints import STATE, load_training_state, save_checkpoint, save_training_state
    from storage.groups import write_group
    from storage.shards import Sample, write_shard

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    provenance()
    if rights:
        user, group, umask = map(int, rights)
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
        os.umask(umask)

    def work(build: Build) -> None:
        (build.path / "part").mkdir(exist_ok=True)
        write_text(build.path / "part" / "a.txt", "first")
        with (build.path / "log.txt").open("a") as file:
            file.write("x")
        load_training_state(build.path)  # perhaps another user's
        save_training_state(build.path, {"weight": torch.ones(3)})
        save_checkpoint(build.path, {"weight": torch.ones(3)}, {})
        write_group(build.path / "a.zarr", {"ones": np.ones(3)})
        write_shard(build.path / "a.tar", [Sample(image_id=1, image=b"j", png=b"p", height=1, width=1, segments=())])
        if then == "die":
            os._exit(9)
        while then and not Path(then).exists():
            time.sleep(0.01)
        build.scratch.append(build.path / STATE)
        ours = (file for file in build.path.rglob("*") if file.is_file() and file.name not in (NOTE, STATE))
        build.add(*ours)

    opened = Store(Path(store))
    try:
        if then.startswith("read"):
            opened.build(
                Recipe(kind="text", stage="x", version=1, config=then, inputs={"a": SHARED.ref}), lambda _: None
            )
            return
        with Runs(opened).running(RunRecord.now(name="demo", command="x", refs={"cache-clip": SHARED.ref})):
            opened.build(SHARED, work)
    except ValueError as error:
        sys.exit(f"refused: {error}")


def hold_run(store: str, name: str, *refs: str) -> None:
    """Be a run of that name with these artefacts, until killed."""
    held = {str(i): Ref.parse(text) for i, text in enumerate(refs)}
    with Runs(Store(Path(store))).running(RunRecord.now(name=name, command="x", refs=held)):
        print("holds", flush=True)
        sys.stdin.read()


def hold_build(store: str, source: str) -> None:
    """Build an artefact of its own from the input `source`, no run named, until killed."""

    def work(build: Build) -> None:
        print("builds", flush=True)
        sys.stdin.read()

    Store(Path(store)).build(Recipe(kind="text", stage="x", version=1, config=1, inputs={"a": Ref.parse(source)}), work)
