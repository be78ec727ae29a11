"""What only a GPU shows, shown without one: every stage runs on a device that refuses to mix its tensors with the
CPU's, and that counts the waits for it and the bytes copied to it.
"""

from __future__ import annotations

import json
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pretend_line
import pytest
from children import start
from pretend_line import config
from tiny import build, copy_artefacts

from pipeline.line import line
from pipeline.teacher.text_bank import open_text
from pipeline.training.distributed import ALONE
from pipeline.training.loader import SHIPPED, Batch, TrainingData
from pipeline.training.query_loader import QueryBatch, query_batches
from storage.queries import read_queries
from storage.store import Store

INT64, FLOAT32 = 8, 4  # bytes
STEADY = (1, 3)  # steps that follow neither the set-up nor a saved state, of the second and the resumed half


# ------------------------------------------------------------------------------------------------ the device itself


def test_the_device_refuses_and_counts_as_cuda_does(tmp_path: Path) -> None:
    child = start(pretend_line.show_what_it_refuses, tmp_path / "found.json")
    assert child.wait() == 0, child.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert all("on the CPU" in str(found.pop(name)) for name in ("add", "matrix product", "into the CPU"))
    assert "indexed by one on the device" in found.pop("indexed by the device")
    assert found == {
        "number": [0, 0], "copy": [1, 24], "queued copy": [0, 24], "list": [1, 8], "item": [1, 0], "tolist": [1, 0],
        "back": [1, 0], "truth": [1, 0], "nonzero": [1, 0], "bools": [1, 0], "integers": [0, 0],
        "the CPU's integers": [1, 16], "backward": [0, 0], "backward of bools": [2, 0], "generator": [0, 0],
        "optimiser": [0, 0],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ the stages on it


def walk(variant: str, shared_store: Store, folder: Path) -> tuple[str, Store, dict[str, Any]]:
    """A variant of the tiny line, the store where it ran on the device, and what was counted there."""
    made = build(shared_store, config(variant), until="shard")
    store = Store(folder / "store")
    copy_artefacts(shared_store, store, [stage.recipe.ref for stage in made.values()])
    image = next((store.path(made["scenes"].recipe.ref) / "val2017").iterdir())
    child = start(pretend_line.walk, store.root, variant, image, folder / "counted.json")
    assert child.wait() == 0, child.err
    return variant, store, json.loads((folder / "counted.json").read_text())


@pytest.fixture(scope="module", params=["mask2former", "maskformer"])
def walked(
    request: pytest.FixtureRequest, shared_store: Store, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Store, dict[str, Any]]:
    return walk(request.param, shared_store, tmp_path_factory.mktemp(request.param))


@pytest.mark.slow
def test_every_stage_runs_and_a_training_step_waits_no_more_than_it_must(
    walked: tuple[str, Store, dict[str, Any]],
) -> None:
    """Once for the costs of each part's matching, and once for the step's numbers."""
    variant, _, counted = walked
    assert list(counted) == [*(stage.name for stage in line(config(variant))), "predict"]
    for stage, expected in (
        ("v2c", {"models/matcher.py": config(variant).v2c.accumulate, "pipeline/training/loop.py": 1}),
        ("g2s", {"pipeline/training/loop.py": 1}),
        ("cpa", {"pipeline/training/loop.py": 1}),
    ):
        for step in STEADY:
            waits: dict[str, int] = {}
            for place, number in counted[stage]["steps"][step]["waits"].items():
                file = place.partition(":")[0]
                waits[file] = waits.get(file, 0) + number
            assert waits == expected, (stage, step, counted[stage]["steps"][step]["waits"])


@pytest.mark.slow
def test_a_step_with_candidate_regions_waits_no_more_often(shared_store: Store, tmp_path: Path) -> None:
    """Their costs come back with those of the segments; the masks of both are one map on the way to the device."""
    _, store, counted = walk("regions", shared_store, tmp_path)
    used, stages = config("regions"), {stage.name: stage for stage in line(config("regions"))}
    shards, tokens, text = (store.path(stages[name].recipe.ref) for name in ("shard", "cache-clip", "text"))
    data = TrainingData(
        shards, tokens, open_text(text, ""), used.v2c.augment, seed=used.v2c.seed, workers=1, regions=True
    )
    for step in STEADY:
        traffic = counted["v2c"]["steps"][step]
        assert sum(traffic["waits"].values()) == 2, traffic["waits"]
        loaded = sum(number for place, number in traffic["copied"].items() if "training/loader.py" in place)
        assert loaded == views_bytes(data, used.v2c.batch, step)


def stage_1_bytes(batch: Batch, variant: str) -> int:
    """What `V2CCriterion` sends for a batch, from its segments alone: every segment is matched once a layer."""
    own = config(variant).v2c
    layers = own.segmenter.decoder_layers + (own.segmenter.architecture == "mask2former")
    images, queries, dim = len(batch.image_ids), own.segmenter.queries, batch.instance_tokens[0].shape[1]
    segments = [len(labels) for labels in batch.labels]
    assert max(segments) <= queries
    parts = [segments[i : i + images // own.accumulate] for i in range(0, images, images // own.accumulate)]
    padded = sum(len(part) * max(part) for part in parts)
    # labels and places for the costs; layer, image, query and segment of the matches; image and query of the last
    integers = padded + 2 * sum(segments) + 4 * layers * sum(segments) + 2 * sum(segments)
    # targets, rows of the global tokens, and the three totals
    integers += layers * images * queries + images + 3
    tokens = sum(segments) * dim * (2 if own.instance_negatives == "batch" else 1)
    matched = images * queries
    return integers * INT64 + tokens * FLOAT32 + matched


def views_bytes(data: TrainingData, size: int, step: int) -> int:
    """What the loader ships of a batch of `size`: images as decoded, the numbers of their targets, and their places."""
    entries = islice(chain.from_iterable(data._read(size, step, ALONE)), size)
    views = [data._view(*entry) for entry in entries]
    return sum(getattr(view, name).nbytes for view in views for name in SHIPPED)


def stage_2_bytes(batch: QueryBatch, text: int) -> int:
    """Real features, noise, class, target and image of every matched query; feature and image of every other."""
    matched, size = int((batch.category >= 0).sum()), batch.feature.shape[2]
    others = batch.category.numel() - matched
    return matched * ((size + text) * FLOAT32 + 3 * INT64) + others * (size * FLOAT32 + INT64)


def stage_3_bytes(batch: QueryBatch, text: int, synthetic: int) -> int:
    """Feature and target of every query; class and noise of every generated feature."""
    size = batch.feature.shape[2]
    return batch.category.numel() * (size * FLOAT32 + INT64) + synthetic * ((size + text) * FLOAT32 + INT64)


@pytest.mark.slow
def test_a_training_step_copies_its_batch_and_nothing_else(walked: tuple[str, Store, dict[str, Any]]) -> None:
    variant, store, counted = walked
    used, stages = config(variant), {stage.name: stage for stage in line(config(variant))}
    shards, tokens, text = (store.path(stages[name].recipe.ref) for name in ("shard", "cache-clip", "text"))
    bank, cached = open_text(text, ""), read_queries(store.open(stages["queries"].recipe.ref).folders(".zarr"))
    data = TrainingData(shards, tokens, bank, used.v2c.augment, seed=used.v2c.seed, workers=1)
    dim = bank.embedding.shape[-1]
    for step in STEADY:
        expected = {
            "v2c": views_bytes(data, used.v2c.batch, step)
            + stage_1_bytes(next(data.batches(used.v2c.batch, start=step)), variant),
            "g2s": stage_2_bytes(next(query_batches(cached, used.g2s, step, matched=True)), dim),
            "cpa": stage_3_bytes(next(query_batches(cached, used.cpa, step)), dim, used.cpa.synthetic),
        }
        assert {stage: sum(counted[stage]["steps"][step]["copied"].values()) for stage in expected} == expected
