"""Mask tokens: the frozen teacher's embeddings of the masks that a frozen network finds, one zarr group a tar."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from storage.errors import UserError, anew
from storage.groups import check_group, group_files, read_group, write_group

_DTYPES = {
    "image_id": np.int64, "offsets": np.int64, "query": np.int32, "token": np.float16, "scale": np.float32,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MaskTokenGroup:
    """The tokens of n images of one tar, in its order: all of a validation tar, of a training tar the first of those
    that the protocol leaves.

    `image_id` (n,) int64; image i has the rows `offsets[i]:offsets[i + 1]`, offsets (n+1,) int64, of `query` (m,)
    int32, the queries that have a token, ascending within an image, and of `token` (m, D) float16, of unit length.
    `scale` (1,) float32 is e^s, by which the teacher multiplies its cosines.
    """

    image_id: np.ndarray
    offsets: np.ndarray
    query: np.ndarray
    token: np.ndarray
    scale: np.ndarray

    def __post_init__(self) -> None:
        n, m = len(self.image_id), len(self.query)
        expected = {"image_id": (n,), "offsets": (n + 1,), "query": (m,), "token": (m, *self.token.shape[1:])}
        shapes = {field.name: getattr(self, field.name).shape for field in fields(self)}
        if shapes != expected | {"scale": (1,)} or self.token.ndim != 2:
            raise UserError(f"mask token arrays do not fit together: {shapes}")
        if self.offsets[0] != 0 or self.offsets[-1] != m or (np.diff(self.offsets) < 0).any():
            raise UserError(f"mask token offsets must rise from 0 to {m}")
        within = np.ones(m, bool)
        within[self.offsets[:-1][np.diff(self.offsets) > 0]] = False  # an image's first row follows another's last
        if (self.query < 0).any() or (np.diff(self.query) <= 0)[within[1:]].any():
            raise UserError("the queries of an image must rise from 0")

    def of(self, image: int) -> tuple[np.ndarray, np.ndarray]:
        """Queries (k,) and tokens (k, D) of the group's image number `image`."""
        rows = slice(int(self.offsets[image]), int(self.offsets[image + 1]))
        return self.query[rows], self.token[rows]


def write_mask_tokens(
    path: Path, *, image_id: np.ndarray, offsets: np.ndarray, query: np.ndarray, token: np.ndarray, scale: float
) -> None:
    """Write one tar's mask tokens, shapes as in `MaskTokenGroup`; the group appears whole or not at all.

    Raises UserError when the arrays do not fit together.
    """
    given = {"image_id": image_id, "offsets": offsets, "query": query, "token": token, "scale": np.array([scale])}
    arrays = {name: array.astype(_DTYPES[name]) for name, array in given.items()}
    MaskTokenGroup(**arrays)
    write_group(path, arrays)


def read_mask_tokens(path: Path) -> MaskTokenGroup:
    """The mask tokens of a tar. Raises UserError, naming the group, when it is missing, damaged or its arrays
    disagree."""
    arrays = read_group(path, _DTYPES)
    try:
        return MaskTokenGroup(**arrays)
    except UserError as error:
        raise UserError(f"{path}: {error}; {anew()}") from error


def check_mask_tokens(path: Path) -> None:
    """Read one group, every byte of it. Raises UserError when it is damaged."""
    group = read_mask_tokens(path)
    check_group(path, {field.name: getattr(group, field.name) for field in fields(group)})


def mask_token_files(path: Path) -> list[Path]:
    """The files of one group."""
    return group_files(path, _DTYPES)
