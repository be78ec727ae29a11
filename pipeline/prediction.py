"""From a segmenter's class probabilities and mask logits to panoptic and semantic maps at the image's original size.

Masks are upsampled to the padded network input, cropped to the resized image and resized to the original size, in that
order, as logits; the sigmoid comes last. Queries are resized in chunks, so COCO-sized inputs need a few hundred MB.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.metrics import PredictedSegment
from storage.atomic import write_text
from storage.shards import encode_ids

if TYPE_CHECKING:
    from pipeline.benchmarks import Category

CHUNK_ELEMENTS = 2**24  # values of one resized or classified chunk: 64 MB of float32


@torch.no_grad()
def panoptic(
    class_probabilities: Tensor,
    mask_logits: Tensor,
    *,
    isthing: Tensor,
    category_ids: Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    original_size: tuple[int, int],
    object_threshold: float,
    overlap_threshold: float,
    seen: Tensor,
    seen_offset: float = 0.0,
) -> tuple[NDArray[np.int32], list[PredictedSegment]]:
    """The panoptic map of one image (MaskFormer's inference with sigmoid scores, D8).

    A query takes its best class and keeps it when the score is above `object_threshold`. Each pixel goes to the query
    with the highest score * mask, and to void where that mask is below 0.5. A query whose pixels are fewer than
    `overlap_threshold` of its own mask (>= 0.5) is dropped, its pixels become void. Stuff of one class is one segment.

    Args:
        class_probabilities: (Q, K) p = sigmoid(logit).
        mask_logits: (Q, h, w) over the padded input.
        isthing: (K,) bool.
        category_ids: (K,) integer, the dataset's id of every class.
        padded_size: height and width of the network's input.
        image_size: height and width of the resized image, in the input's top left corner.
        original_size: height and width of the image as stored.
        object_threshold: in [0, 1].
        overlap_threshold: in [0, 1].
        seen: (K,) bool.
        seen_offset: subtracted from the seen classes' scores when a query chooses its class (calibrated stacking); the
            chosen class keeps its own score.

    Returns:
        ids (H, W) with 0 = void, and one segment for every other id, 1, 2, ...; a merged stuff segment has the highest
        score of its queries.
    """
    scores = class_probabilities.float()
    classes = (scores - seen_offset * seen).argmax(1)
    scores = scores.gather(1, classes[:, None])[:, 0]
    kept = (scores > object_threshold).nonzero()[:, 0]
    classes, scores = classes[kept], scores[kept]

    best = mask_logits.new_full(original_size, -1, dtype=torch.float32)
    winner = mask_logits.new_zeros(original_size, dtype=torch.long)
    inside = mask_logits.new_zeros(original_size, dtype=torch.bool)  # is the winner's mask >= 0.5 here?
    own_area = torch.zeros_like(kept)
    step = _per_chunk(padded_size, original_size)
    for start in range(0, len(kept), step):
        part = slice(start, start + step)
        masks = _resize(mask_logits[kept[part]], padded_size, image_size, original_size).sigmoid_()
        own_area[part] = (masks >= 0.5).flatten(1).sum(1)
        value, index = (masks * scores[part, None, None]).max(0)
        better = value > best
        best = torch.where(better, value, best)
        winner = torch.where(better, index + start, winner)
        inside = torch.where(better, masks.gather(0, index[None])[0] >= 0.5, inside)

    area = winner[inside].bincount(minlength=len(kept))
    survives = (area > 0) & (area >= overlap_threshold * own_area.double())

    segments: list[PredictedSegment] = []
    stuff: dict[int, int] = {}  # class -> position in `segments`
    segment_of_query = np.zeros(len(kept) + 1, np.int32)  # the last entry stands for "no query"
    for query in survives.nonzero()[:, 0].tolist():
        class_, score = int(classes[query]), float(scores[query])
        position = len(segments) if isthing[class_] else stuff.setdefault(class_, len(segments))
        if position == len(segments):
            segments.append(PredictedSegment(id=position + 1, category_id=int(category_ids[class_]), score=score))
        elif score > segments[position].score:
            segments[position] = PredictedSegment(
                id=position + 1, category_id=segments[position].category_id, score=score
            )
        segment_of_query[query] = position + 1
    owner = torch.where(inside, winner, len(kept)).cpu().numpy()
    return segment_of_query[owner], segments


@torch.no_grad()
def semantic(
    class_probabilities: Tensor,
    mask_logits: Tensor,
    *,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    original_size: tuple[int, int],
    seen: Tensor,
    seen_offset: float = 0.0,
) -> NDArray[np.int32]:
    """The class index of every pixel (H, W): argmax_k of sum_q p_qk * sigmoid(m_q(x)).

    Arguments as in `panoptic`; `seen_offset` is subtracted from the seen classes' sums at every pixel.
    """
    probabilities = class_probabilities.float()
    step = _per_chunk(padded_size, original_size)
    masks = torch.cat(
        [_resize(part, padded_size, image_size, original_size).sigmoid_() for part in mask_logits.split(step)]
    ).flatten(1)  # (Q, H*W)
    offset = (seen_offset * seen.to(probabilities))[:, None]
    pixels = max(1, CHUNK_ELEMENTS // probabilities.shape[1])
    classes = torch.cat([(probabilities.T @ part - offset).argmax(0) for part in masks.split(pixels, dim=1)])
    return classes.view(original_size).cpu().numpy().astype(np.int32)


def _per_chunk(padded_size: tuple[int, int], original_size: tuple[int, int]) -> int:
    largest = max(padded_size[0] * padded_size[1], original_size[0] * original_size[1])
    return max(1, CHUNK_ELEMENTS // largest)


def _resize(
    logits: Tensor, padded_size: tuple[int, int], image_size: tuple[int, int], original_size: tuple[int, int]
) -> Tensor:
    """(n, h, w) over the padded input -> (n, H, W) over the original image, float32."""
    padded = F.interpolate(logits[None].float(), padded_size, mode="bilinear", align_corners=False)
    image = padded[..., : image_size[0], : image_size[1]]
    return F.interpolate(image, original_size, mode="bilinear", align_corners=False)[0]


@dataclass(frozen=True, kw_only=True)
class ImagePrediction:
    """The panoptic map of one image file: ids (H, W) int32 with 0 = void, and a segment for every other id."""

    image_id: int
    file_name: str
    ids: NDArray[np.int32]
    segments: Sequence[PredictedSegment]


def write_coco_panoptic(
    folder: Path, predictions: Iterable[ImagePrediction], *, categories: Sequence[Category], name: str = "panoptic"
) -> Path:
    """Writes predictions in COCO's panoptic format, `<folder>/<name>.json` and `<folder>/<name>/<image>.png`.

    The PNGs hold R + 256 G + 65536 B = segment id. The JSON comes last and at once, so it never names a missing PNG.

    Returns:
        The path of the JSON.

    Raises:
        ValueError: two images whose PNGs would have the same name.
    """
    pngs = folder / name
    pngs.mkdir(parents=True, exist_ok=True)
    images, annotations, source_of = [], [], dict[str, str]()
    for prediction in predictions:
        png = f"{Path(prediction.file_name).stem}.png"
        if png in source_of:
            raise ValueError(
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
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c.id, "name": c.name, "isthing": int(c.isthing)} for c in categories],
    }
    write_text(folder / f"{name}.json", json.dumps(content))
    return folder / f"{name}.json"


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
