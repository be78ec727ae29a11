"""Tokens: the frozen teacher's embeddings of every image and every masked instance, one zarr group a tar; and, where
they were wanted, of class-less regions of the area without a label, with the maps of these regions.

Row i of a group is sample i of the tar of the same name, so a reader walks both in step without a join.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from storage.errors import UserError, anew
from storage.groups import check_group, group_files, read_group, write_group
from storage.images import open_image

_DTYPES = {
    **dict.fromkeys(("global", "instance", "mirrored_global", "mirrored_instance"), np.float16),
    "offsets": np.int64,
    "segment_id": np.int32,
    "kept": np.bool_,
}
_REGION_DTYPES = {
    **dict.fromkeys(("region", "mirrored_region"), np.float16),
    **dict.fromkeys(("region_offsets", "region_map_offsets"), np.int64),
    "region_map": np.uint8,
    "region_fragments": np.int32,
}


@dataclass(frozen=True, kw_only=True)
class RegionGroup:
    """The candidate regions of one tar with n samples: r regions, rows are unit-norm embeddings of size D.

    `tokens` (r, D) float16; sample i has the rows `offsets[i]:offsets[i + 1]`, offsets (n+1,) int64, and the map whose
    PNG, "" without regions, is the bytes `map_offsets[i]:map_offsets[i + 1]` of `maps` (bytes,) uint8, map_offsets
    (n+1,) int64. `fragments` (n,) int32: the parts of a sample's unlabelled area that are too small to be a region.
    `mirrored` (v, r, D) float16: as in `TokenGroup`.
    """

    tokens: np.ndarray
    mirrored: np.ndarray
    offsets: np.ndarray
    maps: np.ndarray
    map_offsets: np.ndarray
    fragments: np.ndarray

    def __post_init__(self) -> None:
        n, r = len(self.fragments), len(self.tokens)
        fits = (
            self.tokens.ndim == 2
            and self.maps.ndim == self.fragments.ndim == 1
            and self.mirrored.shape[0:1] in ((0,), (1,))
            and self.mirrored.shape[1:] == self.tokens.shape
            and self.offsets.shape == self.map_offsets.shape == (n + 1,)
        )
        if not fits:
            shapes = {name: array.shape for name, array in self.arrays().items()}
            raise UserError(f"region arrays of these tokens do not fit together: {shapes}")
        for offsets, end in ((self.offsets, r), (self.map_offsets, len(self.maps))):
            if offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 0).any():
                raise UserError(f"region offsets of these tokens must rise from 0 to {end}")
        if ((np.diff(self.offsets) > 0) != (np.diff(self.map_offsets) > 0)).any():
            raise UserError("these tokens have regions without a map, or a map without regions")

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by their names on disk."""
        return {
            "region": self.tokens,
            "mirrored_region": self.mirrored,
            "region_offsets": self.offsets,
            "region_map": self.maps,
            "region_map_offsets": self.map_offsets,
            "region_fragments": self.fragments,
        }

    @property
    def counts(self) -> np.ndarray:
        """(n,): the regions of each sample."""
        return np.diff(self.offsets)

    def of(self, sample: int, *, mirrored: bool) -> np.ndarray:
        """Tokens (r_i, D) of a sample's regions, of the mirrored image where that was encoded."""
        rows = slice(int(self.offsets[sample]), int(self.offsets[sample + 1]))
        return (self.mirrored[0] if mirrored and len(self.mirrored) else self.tokens)[rows]

    def map(self, sample: int) -> np.ndarray:
        """(H, W) uint8 or uint16: the number of each pixel's region, from 1 in the order of the tokens, or 0. Of a
        sample with regions."""
        png = self.maps[self.map_offsets[sample] : self.map_offsets[sample + 1]].tobytes()
        return np.asarray(open_image(io.BytesIO(png), ("PNG",)))


def region_group(
    tokens: np.ndarray, maps: Sequence[np.ndarray | None], counts: Sequence[int], fragments: Sequence[int]
) -> RegionGroup:
    """The group of n samples: tokens (v, r, D) of all their regions, v views; for each sample its map (H, W) uint8 or
    uint16, None without regions, how many regions it shows, and the number of its fragments."""
    pngs = [b"" if one is None else _grey_png(one) for one in maps]
    return RegionGroup(
        tokens=tokens[0].astype(np.float16),
        mirrored=tokens[1:].astype(np.float16),
        offsets=np.cumsum([0, *counts], dtype=np.int64),
        maps=np.frombuffer(b"".join(pngs), np.uint8),
        map_offsets=np.cumsum([0, *map(len, pngs)], dtype=np.int64),
        fragments=np.array(fragments, np.int32),
    )


def _grey_png(numbers: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(numbers).save(file, format="PNG")
    return file.getvalue()


@dataclass(frozen=True, kw_only=True)
class TokenGroup:
    """The tokens of one tar with n samples and m kept segments; rows are unit-norm embeddings of size D.

    `global_` (n, D) float16, one row a sample; `instance` (m, D) float16 and `segment_id` (m,) int32, one row a
    segment; sample i has the instance rows `offsets[i]:offsets[i + 1]`, offsets (n+1,) int64: all its segments, or
    under pixel-ignore those of seen classes. `kept` (n,) bool is False for a sample that the protocol keeps from
    training: its global row is zero and it has no instance rows. The instance row of a segment that is too small to be
    encoded is zero. `mirrored_global` (v, n, D) and `mirrored_instance` (v, m, D) float16 are the same of the mirrored
    images, v = 1 or, where only one view was encoded, 0. `regions` are the candidate regions of training images, None
    where none were looked for.
    """

    global_: np.ndarray
    instance: np.ndarray
    mirrored_global: np.ndarray
    mirrored_instance: np.ndarray
    offsets: np.ndarray
    segment_id: np.ndarray
    kept: np.ndarray
    regions: RegionGroup | None = None

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
        if self.regions and (
            len(self.regions.fragments) != n
            or self.regions.tokens.shape[1] != self.global_.shape[1]
            or len(self.regions.mirrored) != len(self.mirrored_global)
            or self.regions.counts[~self.kept].any()
        ):
            raise UserError("region tokens and the others are not of the same samples")

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
            **(self.regions.arrays() if self.regions else {}),
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
    regions: RegionGroup | None = None,
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
        regions=regions,
    )
    write_group(path, tokens.arrays())


def read_tokens(path: Path) -> TokenGroup:
    """The tokens of a tar. Raises UserError, naming the group, when it is missing, damaged or its arrays disagree."""
    arrays = read_group(path, _names(path))
    try:
        regions = (
            RegionGroup(
                tokens=arrays.pop("region"),
                mirrored=arrays.pop("mirrored_region"),
                offsets=arrays.pop("region_offsets"),
                maps=arrays.pop("region_map"),
                map_offsets=arrays.pop("region_map_offsets"),
                fragments=arrays.pop("region_fragments"),
            )
            if "region" in arrays
            else None
        )
        return TokenGroup(global_=arrays.pop("global"), regions=regions, **arrays)
    except UserError as error:
        raise UserError(f"{path}: {error}; {anew()}") from error


def token_files(path: Path) -> list[Path]:
    """The files of one group."""
    return group_files(path, _names(path))


def _names(path: Path) -> dict[str, type]:
    """The arrays of a group, and their types: those of regions are all there, or none is."""
    return _DTYPES | (_REGION_DTYPES if any((path / name).exists() for name in _REGION_DTYPES) else {})


def check_tokens(path: Path) -> None:
    """Read a tar's tokens, every byte of them. Raises UserError when they are damaged."""
    check_group(path, read_tokens(path).arrays())
