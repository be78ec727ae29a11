"""Tokens: the frozen teacher's embeddings of every image and every masked instance, one zarr group a tar.

Row i of a group is sample i of the tar of the same name, so a reader walks both in step without a join.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storage.errors import UserError, anew
from storage.groups import check_group, group_files, read_group, write_group

_DTYPES = {
    **dict.fromkeys(("global", "instance", "mirrored_global", "mirrored_instance"), np.float16),
    "offsets": np.int64,
    "segment_id": np.int32,
    "kept": np.bool_,
}


@dataclass(frozen=True, kw_only=True)
class TokenGroup:
    """The tokens of one tar with n samples and m kept segments; rows are unit-norm embeddings of size D.

    `global_` (n, D) float16, one row a sample; `instance` (m, D) float16 and `segment_id` (m,) int32, one row a
    segment; sample i has the instance rows `offsets[i]:offsets[i + 1]`, offsets (n+1,) int64: all its segments, or
    under pixel-ignore those of seen classes. `kept` (n,) bool is False for a sample that the protocol keeps from
    training: its global row is zero and it has no instance rows. The instance row of a segment that is too small to be
    encoded is zero. `mirrored_global` (v, n, D) and `mirrored_instance` (v, m, D) float16 are the same of the mirrored
    images, v = 1 or, where only one view was encoded, 0.
    """

    global_: np.ndarray
    instance: np.ndarray
    mirrored_global: np.ndarray
    mirrored_instance: np.ndarray
    offsets: np.ndarray
    segment_id: np.ndarray
    kept: np.ndarray

    def __post_init__(self) -> None:
        n, m = len(self.kept), len(self.segment_id)
        fits = (
            self.global_.ndim == self.instance.ndim == 2
            and self.offsets.ndim == self.segment_id.ndim == self.kept.ndim == 1
            and self.global_.shape[0] == n
            and self.instance.shape == (m, self.global_.shape[1])
            and self.mirrored_global.shape[0:1] in ((0,), (1,))
            and self.mirrored_global.shape[1:] == self.global_.shape
            and self.mirrored_instance.shape == self.mirrored_global.shape[:1] + self.instance.shape
            and self.offsets.shape == (n + 1,)
        )
        if not fits:
            shapes = {name: array.shape for name, array in self.arrays().items()}
            raise UserError(f"token arrays do not fit together: {shapes}")
        rows = np.diff(self.offsets)
        if self.offsets[0] != 0 or self.offsets[-1] != m or (rows < 0).any():
            raise UserError(f"token offsets must rise from 0 to {m}")
        if rows[~self.kept].any() or self.global_[~self.kept].any() or self.mirrored_global[:, ~self.kept].any():
            raise UserError("a sample that is not kept has tokens")

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by their names on disk."""
        return {
            "global": self.global_,
            "instance": self.instance,
            "mirrored_global": self.mirrored_global,
            "mirrored_instance": self.mirrored_instance,
            "offsets": self.offsets,
            "segment_id": self.segment_id,
            "kept": self.kept,
        }

    @property
    def views(self) -> int:
        """1, or 2 with the mirrored images'."""
        return 1 + len(self.mirrored_global)

    @property
    def encoded(self) -> np.ndarray:
        """(m,) bool: which instance rows hold a token; the others' segments are too small."""
        return (self.instance != 0).any(1)

    def view(self, *, mirrored: bool) -> tuple[np.ndarray, np.ndarray]:
        """Global (n, D) and instance (m, D) tokens of the images, or of the mirrored ones where these were encoded."""
        if mirrored and self.views == 2:
            return self.mirrored_global[0], self.mirrored_instance[0]
        return self.global_, self.instance

    def rows(self, sample: int) -> slice:
        """Where a sample's instance rows are."""
        return slice(int(self.offsets[sample]), int(self.offsets[sample + 1]))


def write_tokens(
    path: Path,
    *,
    global_: np.ndarray,
    instance: np.ndarray,
    offsets: np.ndarray,
    segment_id: np.ndarray,
    kept: np.ndarray,
    mirrored_global: np.ndarray | None = None,
    mirrored_instance: np.ndarray | None = None,
) -> None:
    """Write a tar's tokens, shapes as in `TokenGroup`; the group appears whole or not at all. No mirrored ones: one
    view.

    Raises UserError when the arrays do not fit together.
    """
    none = np.zeros((0, *global_.shape)), np.zeros((0, *instance.shape))
    tokens = TokenGroup(
        global_=global_.astype(np.float16),
        instance=instance.astype(np.float16),
        mirrored_global=(none[0] if mirrored_global is None else mirrored_global).astype(np.float16),
        mirrored_instance=(none[1] if mirrored_instance is None else mirrored_instance).astype(np.float16),
        offsets=offsets.astype(np.int64),
        segment_id=segment_id.astype(np.int32),
        kept=kept.astype(np.bool_),
    )
    write_group(path, tokens.arrays())


def read_tokens(path: Path) -> TokenGroup:
    """The tokens of a tar. Raises UserError, naming the group, when it is missing, damaged or its arrays disagree."""
    arrays = read_group(path, _DTYPES)
    try:
        return TokenGroup(global_=arrays.pop("global"), **arrays)
    except UserError as error:
        raise UserError(f"{path}: {error}; {anew()}") from error


def token_files(path: Path) -> list[Path]:
    """The files of one group."""
    return group_files(path, _DTYPES)


def check_tokens(path: Path) -> None:
    """Read a tar's tokens, every byte of them. Raises UserError when they are damaged."""
    check_group(path, read_tokens(path).arrays())
