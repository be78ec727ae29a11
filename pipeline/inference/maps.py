"""From a segmenter's class probabilities and mask logits to panoptic and semantic maps at the image's original size.

Masks are upsampled to the padded network input, cropped to the resized image and resized to the original size, in that
order, as logits; the sigmoid comes last. That is most of the work, so it comes in two forms: `panoptic` and `semantic`
resize what they need in chunks and keep nothing, so any image needs a few hundred MB; who makes many maps of one image
calls `resize_masks` once, and `choose`, `merge` and `classify` for each map. Both give the same maps to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

CHUNK_ELEMENTS = 2**24  # values of one resized or classified chunk: 64 MB of float32


@dataclass(frozen=True, kw_only=True)
class Output:
    """What the segmenter says about one image: features (Q, C), mask logits (Q, h, w), and the sizes the masks go back through.

    `resized`: the masks at the original size, where many maps are made of this image (see `resize`); the maps are the same without.
    """

    features: Tensor
    masks: Tensor
    padded_size: tuple[int, int]
    image_size: tuple[int, int]
    original_size: tuple[int, int]
    resized: ResizedMasks | None = None

    def resize(self) -> Output:
        """The same with its masks resized once and kept."""
        return replace(self, resized=resize_masks(self.masks, **self.sizes))

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        return {"padded_size": self.padded_size, "image_size": self.image_size, "original_size": self.original_size}


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes a prediction chooses from: unit text embeddings (K, D) or (K, S, D), see `TextBank`, category ids, thing and seen flags (K,)."""

    text: Tensor
    ids: Tensor
    isthing: Tensor
    seen: Tensor

    def only(self, which: Tensor) -> Classes:
        """The classes where `which` (K,) is true."""
        return Classes(text=self.text[which], ids=self.ids[which], isthing=self.isthing[which], seen=self.seen[which])


@dataclass(frozen=True, kw_only=True)
class PredictedSegment:
    """One segment of a predicted panoptic map: the id of its pixels (positive), its category, its score in [0, 1]."""

    id: int
    category_id: int
    score: float


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What n queries stand for: their indices (n,), ascending, one class index each (n,), one score each (n,) float32."""

    queries: Tensor
    classes: Tensor
    scores: Tensor


@dataclass(frozen=True, kw_only=True)
class ResizedMasks:
    """All queries' mask probabilities (Q, H, W) float32 at the original size (123 MB for 100 queries at 480 x 640), and the
    pixels (Q,) where each is at least 0.5."""

    probabilities: Tensor
    areas: Tensor

    def of(self, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of those queries' (probabilities, areas), in order."""
        queries = queries.to(self.areas.device)
        for part in queries.split(_per_chunk(self.probabilities.shape[-2:])):
            yield self.probabilities[part], self.areas[part]


@torch.no_grad()
def choose(class_probabilities: Tensor, *, seen: Tensor, object_threshold: float, seen_offset: float = 0.0) -> Chosen:
    """The queries whose best class scores above `object_threshold`; arguments as in `panoptic`."""
    scores = class_probabilities.float()
    classes = (scores - seen_offset * seen).argmax(1)
    scores = scores.gather(1, classes[:, None])[:, 0]
    kept = (scores > object_threshold).nonzero()[:, 0]
    return Chosen(queries=kept, classes=classes[kept], scores=scores[kept])


@torch.no_grad()
def merge(
    chosen: Chosen,
    masks: Iterable[tuple[Tensor, Tensor]],
    *,
    original_size: tuple[int, int],
    isthing: Tensor,
    category_ids: Tensor,
    overlap_threshold: float,
) -> tuple[NDArray[np.int32], list[PredictedSegment]]:
    """The chosen queries' masks as one panoptic map; arguments and result as in `panoptic`.

    `masks` holds the chosen queries' masks in order, in chunks: probabilities (n, H, W) and areas (n,), see `ResizedMasks`.
    """
    count = len(chosen.queries)
    if not count:
        return np.zeros(original_size, np.int32), []
    best: Tensor | None = None
    winner = inside = torch.empty(0)
    areas: list[Tensor] = []
    start = 0
    for probabilities, own in masks:
        scores = chosen.scores[start : start + len(own)].to(probabilities.device)
        value, index = (probabilities * scores[:, None, None]).max(0)
        inner = probabilities.gather(0, index[None])[0] >= 0.5  # is the winner's mask >= 0.5 here?
        if best is None:
            best, winner, inside = value, index, inner
        else:
            better = value > best
            best = torch.where(better, value, best)
            winner = torch.where(better, index + start, winner)
            inside = torch.where(better, inner, inside)
        areas.append(own)
        start += len(own)
    assert start == count

    area = winner[inside].bincount(minlength=count)
    survives = (area > 0) & (area >= overlap_threshold * torch.cat(areas).double())
    segments: list[PredictedSegment] = []
    stuff: dict[int, int] = {}  # class -> position in `segments`
    segment_of_query = np.zeros(count + 1, np.int32)  # the last entry stands for "no query"
    classes, scores, things, ids = (t.tolist() for t in (chosen.classes, chosen.scores, isthing, category_ids))
    for query in survives.nonzero()[:, 0].tolist():
        class_, score = classes[query], scores[query]
        position = len(segments) if things[class_] else stuff.setdefault(class_, len(segments))
        if position == len(segments):
            segments.append(PredictedSegment(id=position + 1, category_id=ids[class_], score=score))
        elif score > segments[position].score:
            segments[position] = PredictedSegment(
                id=position + 1, category_id=segments[position].category_id, score=score
            )
        segment_of_query[query] = position + 1
    owner = torch.where(inside, winner, count).cpu().numpy()
    return segment_of_query[owner], segments


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
    chosen = choose(class_probabilities, seen=seen, object_threshold=object_threshold, seen_offset=seen_offset)
    sizes = padded_size, image_size, original_size
    masks = ((part, _areas(part)) for part in _resized(mask_logits[chosen.queries], *sizes))
    return merge(
        chosen, masks, original_size=original_size, isthing=isthing, category_ids=category_ids,
        overlap_threshold=overlap_threshold,
    )  # fmt: skip


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
    masks = torch.cat(list(_resized(mask_logits, padded_size, image_size, original_size)))
    return classify(class_probabilities, masks, seen=seen, seen_offset=seen_offset)


@torch.no_grad()
def classify(
    class_probabilities: Tensor, mask_probabilities: Tensor, *, seen: Tensor, seen_offset: float = 0.0
) -> NDArray[np.int32]:
    """`semantic` from mask probabilities (Q, H, W) at the original size."""
    probabilities = class_probabilities.float()
    offset = (seen_offset * seen.to(probabilities))[:, None]
    pixels = max(1, CHUNK_ELEMENTS // probabilities.shape[1])
    parts = mask_probabilities.flatten(1).split(pixels, dim=1)
    classes = torch.cat([(probabilities.T @ part - offset).argmax(0) for part in parts])
    return classes.view(mask_probabilities.shape[1:]).cpu().numpy().astype(np.int32)


@torch.no_grad()
def resize_masks(
    mask_logits: Tensor,
    *,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    original_size: tuple[int, int],
) -> ResizedMasks:
    """Every query's mask at the original size; arguments as in `panoptic`."""
    masks = torch.cat(list(_resized(mask_logits, padded_size, image_size, original_size)))
    return ResizedMasks(
        probabilities=masks, areas=torch.cat([_areas(part) for part in masks.split(_per_chunk(original_size))])
    )


def _areas(probabilities: Tensor) -> Tensor:
    return (probabilities >= 0.5).flatten(1).sum(1)


def _per_chunk(*sizes: tuple[int, ...]) -> int:
    """Masks a chunk, when the largest of their sizes is one of `sizes`."""
    return max(1, CHUNK_ELEMENTS // max(height * width for height, width in sizes))


def _resized(
    logits: Tensor, padded_size: tuple[int, int], image_size: tuple[int, int], original_size: tuple[int, int]
) -> Iterator[Tensor]:
    """(Q, h, w) logits over the padded input -> chunks (n, H, W) of probabilities over the original image, float32."""
    for part in logits.split(_per_chunk(padded_size, original_size)):
        padded = F.interpolate(part[None].float(), padded_size, mode="bilinear", align_corners=False)
        image = padded[..., : image_size[0], : image_size[1]]
        yield F.interpolate(image, original_size, mode="bilinear", align_corners=False)[0].sigmoid_()


def panoptic_map(
    output: Output,
    logits: Tensor,
    classes: Classes,
    *,
    object_threshold: float,
    overlap_threshold: float,
    seen_offset: float = 0.0,
) -> tuple[np.ndarray, list[PredictedSegment]]:
    """Ids (H, W) and segments from class logits (Q, K); see `prediction.panoptic`."""
    probabilities = logits.sigmoid()
    if output.resized is not None:
        chosen = choose(probabilities, seen=classes.seen, object_threshold=object_threshold, seen_offset=seen_offset)
        return merged_map(output, chosen, classes, overlap_threshold=overlap_threshold)
    return panoptic(
        probabilities,
        output.masks,
        isthing=classes.isthing,
        category_ids=classes.ids,
        seen=classes.seen,
        object_threshold=object_threshold,
        overlap_threshold=overlap_threshold,
        seen_offset=seen_offset,
        **output.sizes,
    )


def merged_map(
    output: Output, chosen: Chosen, classes: Classes, *, overlap_threshold: float
) -> tuple[np.ndarray, list[PredictedSegment]]:
    """Ids (H, W) and segments of the chosen queries; `output` must be resized, see `Output.resize`."""
    assert output.resized is not None
    return merge(
        chosen,
        output.resized.of(chosen.queries),
        original_size=output.original_size,
        isthing=classes.isthing,
        category_ids=classes.ids,
        overlap_threshold=overlap_threshold,
    )


def semantic_map(output: Output, logits: Tensor, classes: Classes, *, seen_offset: float = 0.0) -> np.ndarray:
    """Class indices (H, W) from class logits (Q, K); see `prediction.semantic`."""
    probabilities = logits.sigmoid()
    if output.resized is not None:
        return classify(probabilities, output.resized.probabilities, seen=classes.seen, seen_offset=seen_offset)
    return semantic(probabilities, output.masks, seen=classes.seen, seen_offset=seen_offset, **output.sizes)


def classes_of(text: Tensor, facts: dict[str, Any], device: torch.device) -> Classes:
    """The classes a checkpoint or text bank lists (`ids`, `isthing`, `seen`), on `device`."""
    return Classes(
        text=text.to(device),
        ids=torch.tensor(facts["ids"], device=device),
        isthing=torch.tensor(facts["isthing"], device=device),
        seen=torch.tensor(facts["seen"], device=device),
    )
