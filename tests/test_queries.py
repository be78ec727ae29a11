"""Queries: groups are read as one bank in name order; groups that do not fit are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.queries import MappedRows, read_queries, write_queries


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
