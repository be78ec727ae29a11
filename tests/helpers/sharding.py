"""What the tests of stage shard share: a small config, and what a build made."""

from __future__ import annotations

from pathlib import Path

from pipeline import shard as stage
from pipeline.data.benchmarks import load_benchmark
from pipeline.data.coco import coco_source
from pipeline.data.config import ShardConfig
from pipeline.line import Stage
from pipeline.runtime import Runtime
from storage.keys import Ref
from storage.shards import Sample, Shards, read_shard
from storage.store import Store

BENCHMARK = load_benchmark("coco-panoptic-zps")
QUIET = Runtime(progress=False, threads=2)
CONFIG = ShardConfig(samples_per_tar=2)
JPEG, PNG = f"train2017/{12:012d}.jpg", f"annotations/panoptic_train2017/{12:012d}.png"  # of image 12


def shard(coco: Path, store: Store, config: ShardConfig = CONFIG) -> Ref:
    return Stage.of(stage, config, source=coco_source(coco), benchmark=BENCHMARK).run(store, QUIET)


def samples(folder: Path, split: str) -> list[Sample]:
    return [sample for tar in Shards(folder).tars(split) for sample in read_shard(tar)]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
