"""Queries: the frozen segmenter's query features of the training images, the only data of stages 2 and 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from storage.errors import UserError, anew
from storage.groups import check_group, group_files, map_array, read_group, write_group

_DTYPES = {"feature": np.float16, "segment": np.int32, "category": np.int32, "image_id": np.int64, "view": np.int8}


class MappedRows:
    """Rows of several arrays, one after the other, mapped and read when indexed: 6 GB for COCO, of which the system
    caches what fits in memory."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = [part for part in parts if len(part)] or list(parts[:1])
        self.first = np.cumsum([0, *map(len, self.parts)])
        self.shape = (int(self.first[-1]), *parts[0].shape[1:])
        self.ndim, self.dtype = parts[0].ndim, parts[0].dtype

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """(B,) row numbers -> (B, ...)."""
        part = np.searchsorted(self.first, rows, side="right") - 1
        return np.stack([self.parts[p][row - self.first[p]] for p, row in zip(part, rows, strict=True)])


@dataclass(frozen=True, kw_only=True)
class QueryBank:
    """Query features of n views of images, Q queries each.

    `feature` (n, Q, C) float16, see `MappedRows`; `segment` (n, Q) int32, index of the query's segment among the
    image's, -1 = none; `category` (n, Q) int32, class index in the text bank, -1 = none; `image_id` (n,) int64; `view`
    (n,) int8, 0 = the plain image, others augmented (D9).
    """

    feature: np.ndarray | MappedRows
    segment: np.ndarray
    category: np.ndarray
    image_id: np.ndarray
    view: np.ndarray

    def __post_init__(self) -> None:
        n, queries = self.feature.shape[:2] if self.feature.ndim == 3 else (-1, -1)
        expected = {"segment": (n, queries), "category": (n, queries), "image_id": (n,), "view": (n,)}
        shapes = {field.name: getattr(self, field.name).shape for field in fields(self)}
        if any(shapes[name] != shape for name, shape in expected.items()):
            raise UserError(f"query arrays do not fit together: {shapes}")
        if (self.segment < -1).any() or (self.category < -1).any():
            raise UserError("segment and category must be -1 or an index")


def write_queries(
    path: Path,
    *,
    feature: np.ndarray,
    segment: np.ndarray,
    category: np.ndarray,
    image_id: np.ndarray,
    view: np.ndarray,
) -> None:
    """Write one tar's queries, shapes as in `QueryBank`; the group appears whole or not at all.

    Raises UserError when the arrays do not fit together.
    """
    arrays = {"feature": feature, "segment": segment, "category": category, "image_id": image_id, "view": view}
    arrays = {name: array.astype(_DTYPES[name]) for name, array in arrays.items()}
    QueryBank(**arrays)
    write_group(path, arrays)


def check_queries(path: Path) -> None:
    """Read one group, every byte of it. Raises UserError when it is damaged."""
    arrays = read_group(path, _DTYPES)
    QueryBank(**arrays)
    check_group(path, arrays)


def query_files(path: Path) -> list[Path]:
    """The files of one group."""
    return group_files(path, _DTYPES)


def read_queries(paths: Sequence[Path]) -> QueryBank:
    """The groups of a queries artefact one after the other, in the order given.

    Raises UserError when there is none, or one is damaged or does not fit the others.
    """
    if not paths:
        raise UserError(f"an artefact holds no queries; {anew()}")
    small = {name: dtype for name, dtype in _DTYPES.items() if name != "feature"}
    labels = [read_group(path, small) for path in paths]
    features = []
    for path, arrays in zip(paths, labels, strict=True):
        part = map_array(path, "feature", _DTYPES["feature"])
        try:
            QueryBank(feature=part, **arrays)
        except UserError as error:
            raise UserError(f"{path}: {error}; {anew()}") from error
        if features and part.shape[1:] != features[0].shape[1:]:
            raise UserError(f"{path} and {paths[0]} differ in shape; {anew()}")
        features.append(part)
    small_arrays = {name: np.concatenate([arrays[name] for arrays in labels]) for name in small}
    return QueryBank(feature=MappedRows(features), **small_arrays)
