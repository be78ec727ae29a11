"""A zarr 3 group of arrays, each written whole, as one chunk, by one writer.

Whole groups only: on zarr 3.1, writers that share a chunk lose data silently. Equal arrays give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import zarr

from storage.atomic import replacing


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


def read_group(path: Path, dtypes: Mapping[str, np.dtype | type]) -> dict[str, np.ndarray]:
    """The arrays of those names.

    Raises ValueError, naming the group, when one is missing, damaged or of another dtype.
    """
    cure = "find the damage with `zs-seg verify` and rebuild that artefact with `zs-seg run --force`"
    if not path.is_dir():
        raise ValueError(f"{path} is missing; {cure}")
    arrays = {}
    for name, dtype in dtypes.items():
        try:
            array = zarr.open_array(path / name, mode="r", zarr_format=3)
            if array.nchunks_initialized != array.nchunks:  # zarr would read zeros
                raise ValueError("its data is gone")
            arrays[name] = np.asarray(array[...])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: array {name} is missing or damaged; {cure}") from error
        if arrays[name].dtype != dtype:
            raise ValueError(f"{path}: array {name} is {arrays[name].dtype}, not {np.dtype(dtype)}; {cure}")
    return arrays
