"""Panoptic predictions in COCO's formats, for other tools to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from storage.atomic import write_text
from storage.errors import UserError
from storage.shards import encode_ids

if TYPE_CHECKING:
    from pipeline.data.benchmarks import Category


class Scored(Protocol):
    """A predicted segment: the id of its pixels, its category, its score in [0, 1]."""

    @property
    def id(self) -> int: ...
    @property
    def category_id(self) -> int: ...
    @property
    def score(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class ImagePrediction:
    """The panoptic map of one image file: ids (H, W) int32 with 0 = void, and a segment for every other id. `png` is
    the path of its PNG below the writer's folder; "" = the file's name without its folder."""

    image_id: int
    file_name: str
    ids: NDArray[np.int32]
    segments: Sequence[Scored]
    png: str = ""


def write_coco_panoptic(
    folder: Path,
    predictions: Iterable[ImagePrediction],
    *,
    categories: Sequence[Category],
    name: str = "panoptic",
    rle: bool = False,
) -> Path:
    """Writes predictions in COCO's panoptic format, see `PanopticWriter`; the JSON only if all of them are there.

    Returns:
        The path of the JSON.

    Raises:
        UserError: two images whose PNGs would have the same name.
    """
    writer = PanopticWriter(folder, name=name, rle=rle)
    for prediction in predictions:
        writer.add(prediction)
    return writer.finish(categories)


class PanopticWriter:
    """Predictions in COCO's panoptic format: `<folder>/<name>/<image>.png` one by one, then `<folder>/<name>.json`.

    The PNGs hold R + 256 G + 65536 B = segment id. The JSON comes last and at once, so it never names a missing PNG.
    With `rle` the same segments are written to `<folder>/<name>_rle.json` too, see `rle_results`.
    """

    def __init__(self, folder: Path, *, name: str = "panoptic", rle: bool = False) -> None:
        self.folder, self.name, self.rle = folder, name, rle
        self.images, self.annotations, self.results = [], [], []
        self.source_of: dict[str, str] = {}
        (folder / name).mkdir(parents=True, exist_ok=True)

    def add(self, prediction: ImagePrediction) -> None:
        """Writes the PNG. Raises UserError where another image's has its name."""
        png = prediction.png or f"{Path(prediction.file_name).stem}.png"
        if png in self.source_of:
            raise UserError(
                f"images {self.source_of[png]} and {prediction.file_name} would both be written to {png}; "
                f"rename one of them or predict them into different folders"
            )
        self.source_of[png] = prediction.file_name
        path = self.folder / self.name / png
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_ids(prediction.ids))
        height, width = prediction.ids.shape
        image = {"id": prediction.image_id, "file_name": prediction.file_name, "height": height, "width": width}
        segments = [_segment_info(prediction.ids == segment.id, segment) for segment in prediction.segments]
        if self.rle:
            self.results += rle_results(prediction)
        self.images.append(image)
        self.annotations.append({"image_id": prediction.image_id, "file_name": png, "segments_info": segments})

    def finish(self, categories: Sequence[Category], **more: Any) -> Path:
        """Writes the JSON, with further fields `more`, and returns its path."""
        content = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": _plain(categories),
            **more,
        }
        if self.rle:
            write_text(self.folder / f"{self.name}_rle.json", json.dumps(self.results))
        write_text(self.folder / f"{self.name}.json", json.dumps(content))
        return self.folder / f"{self.name}.json"


def rle_results(prediction: ImagePrediction) -> list[dict[str, Any]]:
    """The segments in COCO's results format for instances, in their order: `image_id`, `category_id`, `score`, `area`,
    `bbox` (left, top, width, height) and `segmentation`, the mask as a compressed RLE.

    As segments do not overlap, painting the masks gives the panoptic map again, but for the segments' ids.
    """
    from pycocotools import mask as coco_mask

    results = []
    for segment in prediction.segments:
        mask = prediction.ids == segment.id
        counts: Any = coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]  # bytes
        info = _segment_info(mask, segment)
        results.append(
            {
                "image_id": prediction.image_id,
                "segmentation": {"size": list(mask.shape), "counts": counts.decode("ascii")},
                **{field: info[field] for field in ("category_id", "score", "area", "bbox")},
            }
        )
    return results


def coco_instances(prediction: ImagePrediction, categories: Sequence[Category]) -> dict[str, Any]:
    """One image in COCO's format for instances: `images`, `annotations`, each with its mask as a compressed RLE and its
    score, and `categories`."""
    height, width = prediction.ids.shape
    image = {"id": prediction.image_id, "file_name": prediction.file_name, "height": height, "width": width}
    return {
        "images": [image],
        "annotations": [{"id": i, "iscrowd": 0, **entry} for i, entry in enumerate(rle_results(prediction), start=1)],
        "categories": _plain(categories),
    }


def _plain(categories: Sequence[Category]) -> list[dict[str, Any]]:
    return [{"id": c.id, "name": c.name, "isthing": int(c.isthing)} for c in categories]


def _segment_info(mask: NDArray[np.bool_], segment: Scored) -> dict[str, object]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    return {
        "id": segment.id,
        "category_id": segment.category_id,
        "area": int(mask.sum()),
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "iscrowd": 0,
        "score": segment.score,
    }
