"""A zarr 3 group of arrays, each written whole, as one chunk, by one writer.

Whole groups only: on zarr 3.1, writers that share a chunk lose data silently. Equal arrays give equal bytes. Behind
each array stands its CRC-32C, which `read_group` checks; groups of an older version lack it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from storage.atomic import replacing
from storage.errors import NO_FILE, UserError, anew


def write_group(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays as the group `path`, which appears whole or not at all."""
    with replacing(path) as temporary:
        _fill(zarr.open_group(temporary, mode="w", zarr_format=3), arrays)


def _fill(group: zarr.Group, arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        group.create_array(
            name,
            data=np.ascontiguousarray(array),
            chunks=tuple(max(1, size) for size in array.shape),
            compressors=[Crc32cCodec()],  # embeddings do not compress
            config={"write_empty_chunks": True},  # else zarr leaves out all-zero arrays, and a lost file reads as zeros
        )


def check_group(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Compare every file of the group with what writing `arrays`, as read from there, makes. Raises UserError where one
    differs. Files that are none of the group's are not looked at."""
    expected: dict[str, Any] = {}
    _fill(zarr.open_group(MemoryStore(expected), mode="w", zarr_format=3), arrays)
    for name in sorted(expected):
        if not (path / name).is_file() or (path / name).read_bytes() != expected[name].to_bytes():
            raise UserError(f"{path}: {name} is not what was written")


def group_files(path: Path, names: Iterable[str]) -> list[Path]:
    """The files of a group with arrays of those names: of each its metadata and, unless it is empty, its only chunk."""
    files = [path / "zarr.json"]
    for name in names:
        files.append(path / name / "zarr.json")
        shape = json.loads(files[-1].read_bytes())["shape"]
        if all(shape):
            files.append(_chunk(path, name, len(shape)))
    return files


def _chunk(path: Path, name: str, ndim: int) -> Path:
    return path / name / "c" / "/".join("0" * ndim)


def map_array(path: Path, name: str, dtype: np.dtype | type) -> np.ndarray:
    """One array of a group, mapped into memory and not read: its only chunk begins with the array, byte for byte.

    Raises UserError as `read_group` does; wrong bytes in the data go unnoticed.
    """
    with _damage_named(path, name):
        array, chunk = _open(path, name, dtype)
        return np.memmap(chunk, array.dtype, "r", shape=array.shape) if array.size else np.empty(array.shape, dtype)


def read_group(path: Path, dtypes: Mapping[str, np.dtype | type]) -> dict[str, np.ndarray]:
    """The arrays of those names.

    Raises UserError, naming the group, when one is missing, damaged or of another dtype, and OSError where that cannot
    be found out.
    """
    arrays = {}
    for name, dtype in dtypes.items():
        with _damage_named(path, name):
            arrays[name] = np.asarray(_open(path, name, dtype)[0][...])
    return arrays


def _open(path: Path, name: str, dtype: np.dtype | type) -> tuple[zarr.Array, Path]:
    """An array and its only chunk, which is of the right size: where none is, zarr would read zeros."""
    array = zarr.open_array(path / name, mode="r", zarr_format=3)
    chunk = _chunk(path, name, array.ndim)
    if array.dtype != dtype:
        raise UserError(f"it is {array.dtype}, not {np.dtype(dtype)}")
    if array.size:
        if array.chunks != array.shape or array.compressors not in ((), (Crc32cCodec(),)):
            raise UserError("it was not written as one plain chunk")
        if chunk.stat().st_size != array.size * array.dtype.itemsize + 4 * len(array.compressors):
            raise UserError("its data is cut off")
    return array, chunk


@contextmanager
def _damage_named(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # zarr and its codecs raise many unrelated types
        if isinstance(error, MemoryError | OSError) and not isinstance(error, NO_FILE):
            raise
        what = f"{path}: array {name} is missing or damaged" if path.is_dir() else f"{path} is missing"
        raise UserError(f"{what} ({' '.join(str(error).split())}); {anew()}") from error
