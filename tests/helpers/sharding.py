"""What the tests of stage shard share: a small config, and what a build made."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.benchmarks import load_benchmark
from pipeline.data.config import ShardConfig
from pipeline.runtime import Runtime
from pipeline.shard import coco_source, run
from storage.keys import Ref
from storage.shards import Sample, Shards, read_shard
from storage.store import Store

BENCHMARK = load_benchmark("coco-panoptic-zps")
QUIET = Runtime(progress=False, threads=2)
CONFIG = ShardConfig(samples_per_tar=2)
JPEG, PNG = f"train2017/{12:012d}.jpg", f"annotations/panoptic_train2017/{12:012d}.png"  # of image 12


def shard(coco: Path, store: Store, config: ShardConfig = CONFIG) -> Ref:
    return run(config, source=coco_source(coco), benchmark=BENCHMARK, store=store, runtime=QUIET)


def samples(folder: Path, split: str) -> list[Sample]:
    return [sample for tar in Shards(folder).tars(split) for sample in read_shard(tar)]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
