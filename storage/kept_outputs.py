"""The segmenter's outputs for the first validation images, kept by the report for sweeps: one zarr group."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from storage.errors import UserError, anew
from storage.groups import group_files, read_group, write_group

_DTYPES = {
    "image_id": np.int64, "sizes": np.int32, "masks": np.float32, "inductive": np.float32, "transductive": np.float32,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KeptOutputs:
    """Of n images: `image_id` (n,); `sizes` (n, 4, 2), height and width of the mask logits, of the network's input, of
    the resized image in it, and of the image as stored; `masks`, the mask logits of Q queries, image after image,
    flat; and each checkpoint's class logits, `inductive` and `transductive` (n, Q, K)."""

    image_id: np.ndarray
    sizes: np.ndarray
    masks: np.ndarray
    inductive: np.ndarray
    transductive: np.ndarray

    def __post_init__(self) -> None:
        n, shape = len(self.image_id), self.inductive.shape
        values = int(self.sizes[:, 0].prod(1, dtype=np.int64).sum()) if self.sizes.shape == (n, 4, 2) else -1
        fits = len(shape) == 3 and shape[0] == n and self.transductive.shape == shape
        if not fits or self.masks.shape != (values * shape[1],):
            shapes = {field.name: getattr(self, field.name).shape for field in fields(self)}
            raise UserError(f"arrays of kept outputs do not fit together: {shapes}")

    def masks_of(self, image: int) -> np.ndarray:
        """Mask logits (Q, h, w) of image number `image`."""
        queries, areas = self.inductive.shape[1], self.sizes[:, 0].prod(1, dtype=np.int64)
        start = int(areas[:image].sum()) * queries
        return self.masks[start : start + int(areas[image]) * queries].reshape(queries, *self.sizes[image, 0])


def write_kept_outputs(
    path: Path,
    *,
    image_id: np.ndarray,
    sizes: np.ndarray,
    masks: np.ndarray,
    inductive: np.ndarray,
    transductive: np.ndarray,
) -> list[Path]:
    """Write the group and return its files; shapes as in `KeptOutputs`.

    Raises UserError when the arrays do not fit together.
    """
    given = {
        "image_id": image_id, "sizes": sizes, "masks": masks, "inductive": inductive, "transductive": transductive,
    }  # fmt: skip
    arrays = {name: array.astype(_DTYPES[name]) for name, array in given.items()}
    KeptOutputs(**arrays)
    write_group(path, arrays)
    return group_files(path, arrays)


def read_kept_outputs(path: Path) -> KeptOutputs:
    """Raises UserError, naming the group, when it is missing, damaged or its arrays disagree."""
    arrays = read_group(path, _DTYPES)
    try:
        return KeptOutputs(**arrays)
    except UserError as error:
        raise UserError(f"{path}: {error}; {anew()}") from error
