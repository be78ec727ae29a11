"""Tokens: arrays come back as they were, equal bytes for equal arrays, disagreement and damage are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples import examples
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from storage.tokens import check_tokens, read_tokens, region_group, token_files, write_tokens


def tokens(seed: int, n: int, dim: int = 4, *, mirrored: bool = False, regions: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    kept = rng.random(n) < 0.7
    rows = rng.integers(0, 4, n) * kept
    m = int(rows.sum())
    also: dict[str, Any] = {
        "mirrored_global": (rng.standard_normal((1, n, dim)) * kept[:, None]).astype(np.float16),
        "mirrored_instance": rng.standard_normal((1, m, dim)).astype(np.float16),
    }
    if regions:
        counts = rng.integers(0, 3, n) * kept
        maps = [rng.integers(0, count + 1, (3, 5)).astype(np.uint8) if count else None for count in counts]
        found = rng.standard_normal((1 + mirrored, int(counts.sum()), dim))
        also["regions"] = region_group(found, maps, counts.tolist(), rng.integers(0, 9, n).tolist())
    return {name: value for name, value in also.items() if mirrored or name == "regions"} | {
        "global_": (rng.standard_normal((n, dim)) * kept[:, None]).astype(np.float16),
        "instance": rng.standard_normal((m, dim)).astype(np.float16),
        "offsets": np.concatenate([[0], np.cumsum(rows)]),
        "segment_id": rng.integers(1, 256**3, m).astype(np.int32),
        "kept": kept,
    }


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@examples(15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 999), n=st.integers(0, 6), mirrored=st.booleans(), regions=st.booleans())
def test_what_is_written_comes_back(tmp_path: Path, seed: int, n: int, mirrored: bool, regions: bool) -> None:
    written = tokens(seed, n, mirrored=mirrored, regions=regions)
    write_tokens(tmp_path / "a.zarr", **written)
    read = read_tokens(tmp_path / "a.zarr")
    expected_regions = written.pop("regions", None)
    assert (read.regions is not None) == regions
    if read.regions:
        for name, array in expected_regions.arrays().items():
            np.testing.assert_array_equal(read.regions.arrays()[name], array, err_msg=name)
            assert read.regions.arrays()[name].dtype == array.dtype
    check_tokens(tmp_path / "a.zarr")
    on_disk = {
        str(path.relative_to(tmp_path / "a.zarr")) for path in (tmp_path / "a.zarr").rglob("*") if path.is_file()
    }
    assert {str(path.relative_to(tmp_path / "a.zarr")) for path in token_files(tmp_path / "a.zarr")} == on_disk
    for name, array in written.items():
        np.testing.assert_array_equal(getattr(read, name), array, err_msg=name)
    assert (read.global_.dtype, read.instance.dtype, read.kept.dtype) == (np.float16, np.float16, np.bool_)
    for i in range(n):
        assert read.rows(i) == slice(written["offsets"][i], written["offsets"][i + 1])
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]
    assert read.views == 1 + mirrored
    other = (
        (written["mirrored_global"][0], written["mirrored_instance"][0]) if mirrored else (read.global_, read.instance)
    )
    for array, expected in zip(read.view(mirrored=True), other, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_a_zero_row_is_a_segment_without_a_token(tmp_path: Path) -> None:
    written = tokens(1, 5)
    written["instance"][2] = 0
    write_tokens(tmp_path / "a.zarr", **written)
    assert np.flatnonzero(~read_tokens(tmp_path / "a.zarr").encoded).tolist() == [2]


def test_all_left_out(tmp_path: Path) -> None:
    write_tokens(
        tmp_path / "a.zarr",
        global_=np.zeros((3, 8)),
        instance=np.zeros((0, 8)),
        offsets=np.zeros(4),
        segment_id=np.zeros(0),
        kept=np.zeros(3),
    )
    read = read_tokens(tmp_path / "a.zarr")
    assert read.instance.shape == (0, 8) and not read.kept.any()


def test_equal_arrays_give_equal_bytes_and_a_second_write_replaces(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.zarr", **tokens(1, 5))
    write_tokens(tmp_path / "b.zarr", **tokens(2, 6))
    write_tokens(tmp_path / "b.zarr", **tokens(1, 5))
    assert content(tmp_path / "a.zarr") == content(tmp_path / "b.zarr")


@pytest.mark.parametrize(
    "change",
    [
        {"global_": np.zeros((4, 4))},
        {"instance": np.zeros((1, 4))},
        {"segment_id": np.zeros(99)},
        {"offsets": np.zeros(6)},
        {"offsets": np.zeros(5)},
        {"kept": np.zeros(5)},
        {"global_": np.zeros((5, 3))},
        {"global_": np.zeros(5)},
        {"mirrored_global": np.zeros((2, 5, 4)), "mirrored_instance": np.zeros((2, 7, 4))},
        {"mirrored_global": np.zeros((1, 5, 4))},
    ],
)
def test_arrays_that_disagree_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="token"):
        write_tokens(tmp_path / "a.zarr", **{**tokens(1, 5), **change})
    assert list(tmp_path.iterdir()) == []


def test_regions_come_back_image_by_image(tmp_path: Path) -> None:
    maps = [np.array([[0, 1], [2, 2]], np.uint8), None, np.array([[1, 0, 300]], np.uint16)]
    rows = np.arange(303 * 4).reshape(1, 303, 4) / 2048
    base = tokens(3, 3) | {"kept": np.ones(3)}
    write_tokens(tmp_path / "a.zarr", **base, regions=region_group(rows, maps, [2, 0, 301], [4, 5, 0]))
    regions = read_tokens(tmp_path / "a.zarr").regions
    assert regions and regions.counts.tolist() == [2, 0, 301] and regions.fragments.tolist() == [4, 5, 0]
    for sample, (expected, start) in enumerate(zip(maps, (0, 2, 2), strict=True)):
        own = regions.of(sample, mirrored=True)
        np.testing.assert_array_equal(own, rows[0, start : start + len(own)].astype(np.float16))
        if expected is not None:
            np.testing.assert_array_equal(regions.map(sample), expected)


def test_regions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base: dict[str, Any] = tokens(3, 3) | {"kept": np.ones(3)}
    one = np.ones((2, 2), np.uint8)
    good = region_group(np.ones((1, 2, 4)), [one, None, one], [1, 0, 1], [0, 0, 0])
    with pytest.raises(ValueError, match="without a map, or a map without regions"):
        region_group(np.ones((1, 2, 4)), [one, None, None], [1, 0, 1], [0, 0, 0])
    with pytest.raises(ValueError, match="must rise from 0 to 2"):
        region_group(np.ones((1, 2, 4)), [one, None, one], [1, 0, 2], [0, 0, 0])
    with pytest.raises(ValueError, match="do not fit together"):
        region_group(np.ones((1, 2, 4)), [one, None, one], [1, 1], [0, 0, 0])
    others: list[dict[str, Any]] = [
        {"kept": np.array([True, True, False]), "global_": np.array([[1.0] * 4, [1.0] * 4, [0.0] * 4])},
        {"regions": region_group(np.ones((2, 2, 4)), [one, None, one], [1, 0, 1], [0, 0, 0])},
        {"regions": region_group(np.ones((1, 2, 5)), [one, None, one], [1, 0, 1], [0, 0, 0])},
        {"regions": region_group(np.ones((1, 2, 4)), [one, one], [1, 1], [0, 0])},
    ]
    none: dict[str, Any] = {"instance": np.zeros((0, 4)), "offsets": np.zeros(4), "segment_id": np.zeros(0)}
    for other in others:
        with pytest.raises(ValueError, match="not of the same samples"):
            write_tokens(tmp_path / "a.zarr", **{**base, **none, "regions": good, **other})
    assert list(tmp_path.iterdir()) == []


def test_left_out_samples_have_no_tokens(tmp_path: Path) -> None:
    good = tokens(1, 5)
    kept = good["kept"].copy()
    kept[np.flatnonzero(kept)[0]] = False
    with pytest.raises(ValueError, match="not kept"):
        write_tokens(tmp_path / "a.zarr", **{**good, "kept": kept})
    good = tokens(1, 5, mirrored=True)
    assert not good["kept"].all()
    with pytest.raises(ValueError, match="not kept"):
        write_tokens(tmp_path / "a.zarr", **{**good, "mirrored_global": np.ones((1, 5, 4))})


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    with pytest.raises(ValueError, match=r"a\.zarr is missing"):
        read_tokens(path)
    write_tokens(path, **tokens(1, 5, regions=True))
    for name, data in content(path).items():
        if name == "zarr.json":  # says only that this is a group
            continue
        for damaged in (None, data[: len(data) // 2], b""):
            if damaged is None:
                (path / name).unlink()
            else:
                (path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=r"a\.zarr: array \w+ is missing or damaged") as caught:
                read_tokens(path)
            assert "\n" not in str(caught.value)
        (path / name).write_bytes(data)
    read_tokens(path)


def test_a_group_put_together_from_two_is_refused(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.zarr", **tokens(1, 5))
    write_tokens(tmp_path / "b.zarr", **tokens(2, 6))
    (tmp_path / "b.zarr" / "global").rename(tmp_path / "old")
    (tmp_path / "a.zarr" / "global").rename(tmp_path / "b.zarr" / "global")
    with pytest.raises(ValueError, match=r"b\.zarr: token arrays do not fit"):
        read_tokens(tmp_path / "b.zarr")
