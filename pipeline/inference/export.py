"""Panoptic predictions in COCO's formats, for other tools to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.inference.maps import PredictedSegment
from storage.atomic import write_text
from storage.errors import UserError
from storage.shards import encode_ids

if TYPE_CHECKING:
    from pipeline.data.benchmarks import Category


@dataclass(frozen=True, kw_only=True)
class ImagePrediction:
    """The panoptic map of one image file: ids (H, W) int32 with 0 = void, and a segment for every other id."""

    image_id: int
    file_name: str
    ids: NDArray[np.int32]
    segments: Sequence[PredictedSegment]


def write_coco_panoptic(
    folder: Path,
    predictions: Iterable[ImagePrediction],
    *,
    categories: Sequence[Category],
    name: str = "panoptic",
    rle: bool = False,
) -> Path:
    """Writes predictions in COCO's panoptic format, `<folder>/<name>.json` and `<folder>/<name>/<image>.png`.

    The PNGs hold R + 256 G + 65536 B = segment id. The JSON comes last and at once, so it never names a missing PNG.
    With `rle` the same segments are written to `<folder>/<name>_rle.json` too, see `rle_results`.

    Returns:
        The path of the JSON.

    Raises:
        UserError: two images whose PNGs would have the same name.
    """
    pngs = folder / name
    pngs.mkdir(parents=True, exist_ok=True)
    images, annotations, results, source_of = [], [], [], dict[str, str]()
    for prediction in predictions:
        png = f"{Path(prediction.file_name).stem}.png"
        if png in source_of:
            raise UserError(
                f"images {source_of[png]} and {prediction.file_name} would both be written to {png}; "
                f"rename one of them or predict them into different folders"
            )
        source_of[png] = prediction.file_name
        (pngs / png).write_bytes(encode_ids(prediction.ids))
        height, width = prediction.ids.shape
        images.append({"id": prediction.image_id, "file_name": prediction.file_name, "height": height, "width": width})
        annotations.append(
            {
                "image_id": prediction.image_id,
                "file_name": png,
                "segments_info": [
                    _segment_info(prediction.ids == segment.id, segment) for segment in prediction.segments
                ],
            }
        )
        if rle:
            results += rle_results(prediction)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c.id, "name": c.name, "isthing": int(c.isthing)} for c in categories],
    }
    if rle:
        write_text(folder / f"{name}_rle.json", json.dumps(results))
    write_text(folder / f"{name}.json", json.dumps(content))
    return folder / f"{name}.json"


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


def _segment_info(mask: NDArray[np.bool_], segment: PredictedSegment) -> dict[str, object]:
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
