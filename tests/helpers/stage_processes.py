"""Stages in processes of their own that reach a known moment and wait there to be killed, or end themselves."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sharding import CONFIG, shard
from tiny import build, tiny_config

from pipeline import shard as shard_stage
from pipeline.runtime import Runtime
from storage.store import Store


def train_until_saved(store: str, stage: str) -> None:
    """Train `stage` of the tiny line, from what the store has, and wait as soon as a state is saved."""
    from pipeline.training import loop

    save = loop.save_training_state

    def save_and_wait(folder: Path, state: dict[str, Any]) -> None:
        save(folder, state)
        print("saved", state["step"], flush=True)
        time.sleep(300)

    loop.save_training_state = save_and_wait
    runtime = Runtime(progress=False, threads=1, checkpoint_every=2, dask="none")
    build(Store(Path(store)), tiny_config(), until=stage, runtime=runtime)


def train_until_terminated(store: str) -> None:
    """Train v2c of the tiny line; SIGTERM comes while it waits for its fourth batch, long before a state is due."""
    from pipeline.training.loader import TrainingData

    real = TrainingData.batches

    def batches(self: TrainingData, *arguments: Any, **options: Any) -> Iterator[Any]:
        for number, batch in enumerate(real(self, *arguments, **options)):
            if number == 3:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    TrainingData.batches = batches  # pyright: ignore[reportAttributeAccessIssue]
    runtime = Runtime(progress=False, threads=1, checkpoint_every=1000, dask="none")
    build(Store(Path(store)), tiny_config(), until="v2c", runtime=runtime)


def shard_until(coco: str, store: str, image_id: int) -> None:
    """Shard a folder in COCO's layout, bad images left out, and wait at an image."""
    load = shard_stage._load

    def load_or_wait(done: dict[int, Any], item: Any) -> Any:
        if item.image_id == image_id:
            time.sleep(300)
        return load(done, item)

    shard_stage._load = load_or_wait
    shard(Path(coco), Store(Path(store)), replace(CONFIG, skip_bad=True))
