"""Queries: groups are read as one bank in name order; groups that do not fit are refused; batches sorted by size give
the same queries."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import build, tiny_config

import pipeline.queries
from pipeline.inference.model import load_model
from pipeline.teacher.text_bank import open_text
from pipeline.training.config import QueriesConfig
from pipeline.training.loader import TrainingData
from storage.queries import MappedRows, check_queries, read_queries, write_queries
from storage.shards import Sample, Shards, decode_ids, decode_image, encode_ids, read_shard, write_shard
from storage.store import Store


def queries(seed: int, n: int, count: int = 3, width: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    segment = rng.integers(-1, 5, (n, count)).astype(np.int32)
    return {
        "feature": rng.standard_normal((n, count, width)).astype(np.float16),
        "segment": segment,
        "category": np.where(segment < 0, -1, rng.integers(0, 9, (n, count))).astype(np.int32),
        "image_id": rng.integers(0, 10**12, n),
        "view": rng.integers(0, 4, n).astype(np.int8),
    }


def test_groups_are_read_in_name_order(tmp_path: Path) -> None:
    parts = {1: queries(1, 2), 0: queries(2, 5), 10: queries(3, 1)}
    for i, part in parts.items():
        write_queries(tmp_path / f"train-{i:06d}.zarr", **part)
    bank = read_queries(sorted(tmp_path.glob("*.zarr")))
    for name in parts[0]:
        expected = np.concatenate([parts[i][name] for i in (0, 1, 10)])
        found = bank.feature[np.arange(len(expected))] if name == "feature" else getattr(bank, name)
        np.testing.assert_array_equal(found, expected, err_msg=name)
        assert found.dtype == expected.dtype


def test_features_stay_on_the_disk_until_they_are_asked_for(tmp_path: Path) -> None:
    """Groups without a view do no harm; rows come in the order they are asked for in, also twice."""
    parts = [queries(1, 3), queries(2, 0), queries(3, 2)]
    for i, part in enumerate(parts):
        write_queries(tmp_path / f"train-{i:06d}.zarr", **part)
    bank = read_queries(sorted(tmp_path.glob("*.zarr")))
    assert isinstance(bank.feature, MappedRows) and all(isinstance(part, np.memmap) for part in bank.feature.parts)
    whole = np.concatenate([part["feature"] for part in parts])
    assert bank.feature.shape == whole.shape
    rows = np.array([4, 0, 3, 4])
    np.testing.assert_array_equal(bank.feature[rows], whole[rows])
    empty = tmp_path / "empty"
    write_queries(empty / "train-000000.zarr", **queries(2, 0))
    assert read_queries(sorted(empty.iterdir())).feature.shape == (0, 3, 4)


def test_equal_arrays_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_queries(tmp_path / name / "train-000000.zarr", **queries(1, 2))
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 11  # a group, five arrays, five chunks
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"segment": np.zeros((2, 4))},
        {"category": np.zeros((3, 3))},
        {"category": np.full((2, 3), -2)},
        {"image_id": np.zeros(3)},
        {"view": np.zeros((2, 1))},
        {"feature": np.zeros((2, 3))},
    ],
)
def test_arrays_that_disagree_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="segment and category|do not fit together"):
        write_queries(tmp_path / "train-000000.zarr", **{**queries(1, 2), **change})
    assert list(tmp_path.iterdir()) == []


def test_no_groups_and_groups_that_differ(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no queries"):
        read_queries(sorted(tmp_path.glob("*.zarr")))
    write_queries(tmp_path / "train-000000.zarr", **queries(1, 2))
    write_queries(tmp_path / "train-000001.zarr", **queries(1, 2, width=5))
    with pytest.raises(ValueError, match=r"train-000001\.zarr and .*train-000000\.zarr differ"):
        read_queries(sorted(tmp_path.glob("*.zarr")))


def test_a_damaged_group_is_named(tmp_path: Path) -> None:
    write_queries(tmp_path / "train-000000.zarr", **queries(1, 2))
    chunk = tmp_path / "train-000000.zarr" / "feature" / "c" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-000000\.zarr: array feature is missing or damaged"):
        read_queries(sorted(tmp_path.glob("*.zarr")))


def cut(sample: Sample, height: int, width: int) -> Sample:
    """The sample's upper left corner."""
    jpeg = io.BytesIO()
    Image.fromarray(decode_image(sample)[:height, :width]).save(jpeg, "JPEG")
    png = encode_ids(decode_ids(sample)[:height, :width])
    return replace(sample, image=jpeg.getvalue(), png=png, height=height, width=width)


def test_batches_sorted_by_size_give_the_same_queries(shared_store: Store, tmp_path: Path) -> None:
    """Of a tar whose images have three sizes, in both views."""
    steps = build(shared_store, tiny_config(), until="v2c")
    shards, tokens, text, checkpoint = (
        shared_store.path(steps[s].recipe.ref) for s in ("shard", "cache-clip", "text", "v2c")
    )
    tar = Shards(shards).tars("train")[0]
    sizes = [(96, 96), (60, 96), (96, 60), (96, 96), (60, 96), (96, 96), (96, 96), (60, 96)]
    samples = [cut(sample, *size) for sample, size in zip(read_shard(tar), sizes, strict=True)]
    write_shard(tmp_path / tar.name, samples)

    bank = open_text(text, steps["text"].recipe.ref.key)
    model = load_model(checkpoint)
    data = TrainingData(shards, tokens, bank, model.meta.augment, seed=0, workers=2)
    data.tars[0] = tmp_path / tar.name
    passes: list[tuple[int, ...]] = []
    model.segmenter.register_forward_pre_hook(lambda _, given: passes.append((len(given[0]), *given[0].shape[-2:])))
    config, found, counts = QueriesConfig(views=2, batch=3), [], []
    for window in (1, 8):
        path = tmp_path / str(window) / "train-000000.zarr"
        pipeline.queries._write_group(path, 0, data, model, bank, config, window=window)
        check_queries(path)
        found.append(read_queries([path]))
        counts.append(passes.copy())
        passes.clear()
    neighbours, full = found
    kept = [samples[row] for row in data.kept[0]]
    assert neighbours.image_id.tolist() == [s.image_id for s in kept] * 2
    assert neighbours.view.tolist() == [0] * len(kept) + [1] * len(kept)
    for name in ("segment", "category", "image_id", "view"):
        np.testing.assert_array_equal(getattr(neighbours, name), getattr(full, name))
    rows = np.arange(len(kept) * 2)
    np.testing.assert_allclose(neighbours.feature[rows], full.feature[rows], atol=2e-3)
    assert (neighbours.category >= 0).any(1).sum() > len(kept)
    own = [(s.height, s.width) for s in kept]
    runs = 1 + sum(a != b for a, b in itertools.pairwise(own))
    views = -(-len(kept) // 3)
    assert len(counts[0]) - views >= runs > len({*own}) + 1
    assert len(counts[1]) - views == sum(-(-own.count(size) // 3) for size in {*own})
