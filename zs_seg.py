"""Segment images with a trained checkpoint from Python.

    import zs_seg

    seg = zs_seg.load("demo")                                 # a run, the key of a checkpoint, or a folder
    result = seg("photo.jpg", names=["zebra", "grass:stuff"])
    for segment in result.segments:
        print(segment.name, segment.score, segment.bbox)
    result.save("photo_segments.png")                         # .json saves COCO's format

In a notebook a result shows itself as a picture.
"""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.images import decode_image, read_image
from pipeline.inference.config import ALPHA, BETA
from pipeline.inference.model import checkpoint_folder
from pipeline.inference.words import read_words
from pipeline.runtime import Runtime
from storage.atomic import write_text
from storage.errors import UserError
from storage.store import Store

if TYPE_CHECKING:
    from pipeline.data.benchmarks import Category
    from pipeline.inference.predictor import Chooser, Predictor, Seen, Segment

__all__ = ["AnyImage", "Result", "Segmenter", "UserError", "load"]

AnyImage: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]"
"""A path, the bytes of an image file, a PIL image, or an array (H, W, 3) or (H, W) of uint8, RGB or grey."""


def load(
    what: str | os.PathLike[str],
    *,
    store: str | os.PathLike[str] = "",
    device: str = "auto",
    threads: int = 0,
    teacher_weights: str | os.PathLike[str] = "",
) -> Segmenter:
    """A checkpoint, ready for images.

    Args:
        what: the name of a run, such as "demo" (its last checkpoint) or "demo:v2c"; the key of a checkpoint, or the
            beginning of one; or a folder: a checkpoint's, or one that `zs-seg export --folder` wrote.
        store: the folder of artefacts; "" takes the environment's ZS_SEG_STORE, else ./artifacts.
        device: auto (the GPU if there is one), or a torch device such as cpu or cuda:1.
        threads: CPU threads; 0 takes one per core.
        teacher_weights: the teacher's weights file, where it was a local one and is needed: for further names,
            and with `with_teacher`.

    Raises UserError (a ValueError, one line) where there is no such checkpoint, or it is damaged.
    """
    runtime = Runtime(device=device, threads=threads, progress=False)
    root = Store(Path(store or os.environ.get("ZS_SEG_STORE") or "artifacts"))
    folder = checkpoint_folder(root, os.fspath(what))

    from pipeline.inference.predictor import Predictor

    return Segmenter(Predictor.load(folder, root, runtime, os.fspath(teacher_weights)))


class Segmenter:
    """A checkpoint; call it with images. `load` makes it."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._seen: Seen | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the checkpoint's own classes."""
        return tuple(self.predictor.model.meta.classes.names)

    @overload
    def __call__(
        self,
        image: AnyImage,
        names: Iterable[str] = ...,
        *,
        only: bool = ...,
        min_score: float = ...,
        object_threshold: float | None = ...,
        overlap_threshold: float | None = ...,
        seen_offset: float = ...,
        with_teacher: bool = ...,
        alpha: float = ...,
        beta: float = ...,
    ) -> Result: ...
    @overload
    def __call__(
        self,
        image: Sequence[AnyImage],
        names: Iterable[str] = ...,
        *,
        only: bool = ...,
        min_score: float = ...,
        object_threshold: float | None = ...,
        overlap_threshold: float | None = ...,
        seen_offset: float = ...,
        with_teacher: bool = ...,
        alpha: float = ...,
        beta: float = ...,
    ) -> list[Result]: ...

    def __call__(
        self,
        image: AnyImage | Sequence[AnyImage],
        names: Iterable[str] = (),
        *,
        only: bool = False,
        min_score: float = 0.0,
        object_threshold: float | None = None,
        overlap_threshold: float | None = None,
        seen_offset: float = 0.0,
        with_teacher: bool = False,
        alpha: float = ALPHA,
        beta: float = BETA,
    ) -> Result | list[Result]:
        """Segment an image, or each of a list.

        The last image is remembered: asked again for other names or thresholds, the network does not run again.

        Args:
            image: see `AnyImage`; files are shown upright, as their orientation says.
            names: class names beside the checkpoint's own: "zebra", "grass:stuff" (things, unless marked), "sofa|couch"
                (synonyms).
            only: choose among `names` alone.
            min_score: leave out segments with a lower score, in [0, 1].
            object_threshold: the score in [0, 1] above which a query competes for pixels; None = the checkpoint's.
            overlap_threshold: the smallest share of its own mask that a segment must win; None = the checkpoint's.
            seen_offset: subtracted from the scores of classes seen in training where a class is chosen.

            with_teacher: multiply the class scores with those of the checkpoint's teacher for the masks that are found.
            alpha, beta: the teacher's exponent for seen and for unseen classes, in [0, 1]; 1 = the teacher alone.

        Raises UserError for an image that cannot be read, a name that does not fit beside the others, and a number out
        of range.
        """
        chooser = self.predictor.chooser(
            read_words(names),
            only=only,
            min_score=min_score,
            object_threshold=object_threshold,
            overlap_threshold=overlap_threshold,
            seen_offset=seen_offset,
            with_teacher=with_teacher,
            alpha=alpha,
            beta=beta,
        )
        if isinstance(image, str | bytes | os.PathLike | Image.Image | np.ndarray):
            return self._one(image, chooser)
        return [self._one(one, chooser) for one in image]

    def _one(self, image: AnyImage, chooser: Chooser) -> Result:
        pixels, name = _pixels(image)
        from pipeline.inference.predictor import foreign

        if reason := foreign(self.predictor.model, pixels):
            warnings.warn(reason, stacklevel=3)
        prediction = self.predictor.name(self._look(pixels), chooser)
        return Result(
            image=pixels,
            map=prediction.ids,
            segments=prediction.segments,
            categories=chooser.vocabulary.categories,
            file_name=name,
        )

    def _look(self, pixels: NDArray[np.uint8]) -> Seen:
        if self._seen is None or not np.array_equal(self._seen.image, pixels):
            self._seen = self.predictor.look(pixels.copy())
        return self._seen

    def __repr__(self) -> str:
        meta = self.predictor.model.meta
        return f"<zs_seg.Segmenter: {meta.stage}, {len(meta.classes.names)} classes>"


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Result:
    """The segments of one image.

    Attributes:
        image: (H, W, 3) uint8 RGB, upright.
        map: (H, W) int32, the id of each pixel's segment; 0 = none.
        segments: `id`, `name`, `score` in [0, 1], `isthing`, `seen` (in training), `area` in pixels, `bbox` (left, top,
            width, height) and `category_id` of each.
        categories: `id`, `name` and `isthing` of all classes that could be chosen.
        file_name: of the image, "image.png" where it came from no file.
    """

    image: NDArray[np.uint8]
    map: NDArray[np.int32]
    segments: tuple[Segment, ...]
    categories: tuple[Category, ...]
    file_name: str

    def mask(self, segment: Segment | int) -> NDArray[np.bool_]:
        """The pixels (H, W) of a segment, or of that id."""
        return self.map == (segment if isinstance(segment, int) else segment.id)

    def picture(self, side: int | None = None) -> Image.Image:
        """The image with its segments outlined and named, its long side `side` pixels; None = the image's own, times a
        whole number where that is short. Classes unseen in training are crimson."""
        from pipeline.report.overlay import labels_of, overlay

        named = {segment.category_id: (segment.name, segment.seen) for segment in self.segments}
        return overlay(self.image, self.map, labels_of(self.segments, named), side=side)

    def show(self) -> None:
        """Shows the picture: in a notebook below the cell, elsewhere in the system's viewer."""
        ipython: Any = sys.modules.get("IPython")
        if ipython and ipython.get_ipython():
            ipython.display.display(self)
        else:
            self.picture().show()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the picture, in the format of the suffix, or with .json the segments (`to_coco`); returns the path."""
        path = Path(path)
        if path.suffix.lower() == ".json":
            write_text(path, json.dumps(self.to_coco(), indent=1))
            return path
        try:
            self.picture().save(path)
        except (ValueError, OSError) as error:
            raise UserError(
                f"{path} cannot be written ({error}); give a path that ends in .png, .jpg or .json"
            ) from error
        return path

    def to_coco(self, image_id: int = 1) -> dict[str, Any]:
        """COCO's JSON of instances: `images`, `categories`, and `annotations`, each with its mask as a compressed RLE,
        `bbox`, `area` and `score`."""
        from pipeline.inference.export import ImagePrediction, coco_instances

        prediction = ImagePrediction(image_id=image_id, file_name=self.file_name, ids=self.map, segments=self.segments)
        return coco_instances(prediction, self.categories)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.picture().save(file, format="PNG")
        return file.getvalue()

    def _repr_html_(self) -> str:
        from base64 import b64encode
        from html import escape

        from pipeline.report.overlay import UNSEEN

        unseen = f' style="color: {UNSEEN}; font-weight: 600"'
        rows = "".join(
            f"<tr><td{'' if s.seen else unseen}>{escape(s.name)}</td>"
            f"<td>{s.score:.2f}</td><td>{100 * s.area / self.map.size:.1f} %</td></tr>"
            for s in sorted(self.segments, key=lambda s: -s.score)
        )
        return (
            f'<div style="display: flex; flex-wrap: wrap; gap: 16px; align-items: start">'
            f'<img alt="{escape(self.file_name)}" style="max-width: min(100%, 640px)" '
            f'src="data:image/png;base64,{b64encode(self._repr_png_()).decode()}">'
            f"<table><tr><th>class</th><th>score</th><th>area</th></tr>{rows}</table></div>"
        )

    def __repr__(self) -> str:
        found = ", ".join(f"{s.name} {s.score:.2f}" for s in sorted(self.segments, key=lambda s: -s.score))
        height, width = self.map.shape
        return f"<zs_seg.Result {self.file_name}, {width} x {height}: {found or 'no segment'}>"


def _pixels(image: AnyImage) -> tuple[NDArray[np.uint8], str]:
    """The image as (H, W, 3) uint8 RGB, and its file's name."""
    if isinstance(image, bytes):
        return decode_image(image, "image"), "image.png"
    if isinstance(image, Image.Image):
        from PIL import ImageOps

        return np.array(ImageOps.exif_transpose(image).convert("RGB")), "image.png"
    if isinstance(image, np.ndarray):
        if (
            image.dtype != np.uint8
            or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3))
            or not image.size
        ):
            raise UserError(
                f"an array must be (H, W, 3) or (H, W) of uint8, not {image.shape} of {image.dtype}; convert it"
            )
        return (image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)), "image.png"
    path = Path(image)
    return read_image(path), path.name
