"""A zarr 3 group of arrays, each written whole, as one chunk, by one writer.

Whole groups only: on zarr 3.1, writers that share a chunk lose data silently. Equal arrays give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import zarr

from storage.atomic import replacing

CURE = "find the damage with `zs-seg verify` and rebuild that artefact with `zs-seg run --force`"


def write_group(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays as the group `path`, which appears whole or not at all."""
    with replacing(path) as temporary:
        group = zarr.open_group(temporary, mode="w", zarr_format=3)
        for name, array in arrays.items():
            group.create_array(
                name,
                data=np.ascontiguousarray(array),
                chunks=tuple(max(1, size) for size in array.shape),
                compressors=None,  # embeddings do not compress
                config={
                    "write_empty_chunks": True
                },  # else zarr leaves out all-zero arrays, and a lost file reads as zeros
            )


def map_array(path: Path, name: str, dtype: np.dtype | type) -> np.ndarray:
    """One array of a group, mapped into memory and not read: its only chunk is the array, byte for byte.

    Raises ValueError as `read_group` does.
    """
    try:
        array = zarr.open_array(path / name, mode="r", zarr_format=3)
        if not array.size:
            return np.empty(array.shape, dtype)
        chunk = path / name / "c" / "/".join("0" * array.ndim)
        if array.dtype != dtype or array.chunks != array.shape or array.compressors:
            raise ValueError("it was not written as one plain chunk")
        if chunk.stat().st_size != array.size * array.dtype.itemsize:
            raise ValueError("its data is cut off")
        return np.memmap(chunk, array.dtype, "r", shape=array.shape)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: array {name} is missing or damaged; {CURE}") from error


def read_group(path: Path, dtypes: Mapping[str, np.dtype | type]) -> dict[str, np.ndarray]:
    """The arrays of those names.

    Raises ValueError, naming the group, when one is missing, damaged or of another dtype.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is missing; {CURE}")
    arrays = {}
    for name, dtype in dtypes.items():
        try:
            array = zarr.open_array(path / name, mode="r", zarr_format=3)
            if array.nchunks_initialized != array.nchunks:  # zarr would read zeros
                raise ValueError("its data is gone")
            arrays[name] = np.asarray(array[...])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: array {name} is missing or damaged; {CURE}") from error
        if arrays[name].dtype != dtype:
            raise ValueError(f"{path}: array {name} is {arrays[name].dtype}, not {np.dtype(dtype)}; {CURE}")
    return arrays
