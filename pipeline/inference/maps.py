"""From a segmenter's output and class logits to panoptic and semantic maps at the image's original size.

Masks are upsampled to the padded network input, cropped to the resized image and resized to the original size, in that
order, as logits; the sigmoid comes last. That is most of the work and of the memory. A panoptic map resizes the masks
of the queries it keeps, chunk by chunk, and holds none, so that an image of any size needs a few hundred MB. For
several maps of one image, `Output.kept` resizes every mask once and holds them. Both give the same maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.teacher.text_bank import ClassList

CHUNK_ELEMENTS = 2**24  # values of one resized or classified chunk: 64 MB of float32


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The three numbers of a panoptic map (D8).

    Attributes:
        object_threshold: a query is kept if its class score, in [0, 1], is above this.
        overlap_threshold: a segment is kept if it wins at least this share, in [0, 1], of its mask's pixels.
        seen_offset: subtracted from the seen classes' scores when a query chooses its class (calibrated stacking). The
            chosen class keeps its own score.
    """

    object_threshold: float
    overlap_threshold: float
    seen_offset: float = 0.0


class _Resized(NamedTuple):
    probabilities: Tensor  # (Q, H, W) float32
    areas: Tensor  # (Q,) pixels of at least 0.5


@dataclass(frozen=True, kw_only=True)
class Output:
    """The segmenter's output for one image.

    Attributes:
        features: (Q, C).
        masks: (Q, h, w) mask logits over the padded input.
        padded_size: height and width of the network's input.
        image_size: height and width of the resized image, in the input's top left corner.
        original_size: height H and width W of the image as stored.
        keep: hold the resized masks once they were made, see `kept`.
    """

    features: Tensor
    masks: Tensor
    padded_size: tuple[int, int]
    image_size: tuple[int, int]
    original_size: tuple[int, int]
    keep: bool = False

    def kept(self) -> Output:
        """The same output for several maps of the image: its masks are resized at the first use and held as long as it
        is, 4 Q H W bytes (123 MB for 100 queries at 480 x 640)."""
        return self if self.keep else replace(self, keep=True)

    @torch.no_grad()
    def probabilities(self) -> Tensor:
        """Every mask at the original size, (Q, H, W) float32 in [0, 1]."""
        return self._held.probabilities if self.keep else torch.cat(list(self._resize(self.masks)))

    @torch.no_grad()
    def chunks(self, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The masks of `queries` (n >= 1,) at the original size, in their order, a chunk at a time:
        probabilities (m, H, W) float32, and areas (m,), each mask's pixels of at least 0.5."""
        if not self.keep:
            yield from ((part, _areas(part)) for part in self._resize(self.masks[queries]))
            return
        for part in queries.to(self._held.areas.device).split(_per_chunk(self.original_size)):
            yield self._held.probabilities[part], self._held.areas[part]

    @cached_property
    def _held(self) -> _Resized:
        masks = torch.cat(list(self._resize(self.masks)))
        areas = torch.cat([_areas(part) for part in masks.split(_per_chunk(self.original_size))])
        return _Resized(probabilities=masks, areas=areas)

    def _resize(self, logits: Tensor) -> Iterator[Tensor]:
        """(n, h, w) logits over the padded input -> chunks (m, H, W) of probabilities over the original image."""
        for part in logits.split(_per_chunk(self.padded_size, self.original_size)):
            padded = F.interpolate(part[None].float(), self.padded_size, mode="bilinear", align_corners=False)
            image = padded[..., : self.image_size[0], : self.image_size[1]]
            yield F.interpolate(image, self.original_size, mode="bilinear", align_corners=False)[0].sigmoid_()


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes a prediction chooses from: unit text embeddings (K, D) or (K, S, D), see `TextBank`, category ids
    (K,) of the data set, thing and seen flags (K,) bool."""

    text: Tensor
    ids: Tensor
    isthing: Tensor
    seen: Tensor

    def only(self, which: Tensor) -> Classes:
        """The classes where `which` (K,) is true."""
        return Classes(text=self.text[which], ids=self.ids[which], isthing=self.isthing[which], seen=self.seen[which])


def classes_of(text: Tensor, classes: ClassList, device: torch.device) -> Classes:
    """The listed classes with their text embeddings, on `device`."""
    return Classes(
        text=text.to(device),
        ids=torch.tensor(classes.ids, device=device),
        isthing=torch.tensor(classes.isthing, device=device),
        seen=torch.tensor(classes.seen, device=device),
    )


@dataclass(frozen=True, kw_only=True)
class PredictedSegment:
    """One segment of a predicted panoptic map: the id of its pixels (positive), its category, its score in [0, 1]."""

    id: int
    category_id: int
    score: float


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The n queries that a panoptic map is merged from: indices (n,), ascending, a class index each (n,), and that
    class's score (n,) float32."""

    queries: Tensor
    classes: Tensor
    scores: Tensor


def panoptic_map(
    output: Output, logits: Tensor, classes: Classes, thresholds: Thresholds
) -> tuple[NDArray[np.int32], list[PredictedSegment]]:
    """The panoptic map of one image (MaskFormer's inference with sigmoid scores, D8).

    A query takes its best class and keeps it when the score is above `object_threshold`. Each pixel goes to the query
    with the highest score * mask, and to void where that mask is below 0.5. A query whose pixels are fewer than
    `overlap_threshold` of its own mask (>= 0.5) is dropped, its pixels become void. Stuff of one class is one segment.

    Args:
        output: the segmenter's, Q queries.
        logits: (Q, K) class logits; the score is their sigmoid.
        classes: K of them.
        thresholds: see `Thresholds`.

    Returns:
        ids (H, W) with 0 = void, and one segment for every other id, 1, 2, ...; a merged stuff segment has the highest
        score of its queries.
    """
    chosen = choose(logits.sigmoid(), classes.seen, thresholds)
    return merge(output, chosen, classes, overlap_threshold=thresholds.overlap_threshold)


@torch.no_grad()
def semantic_map(output: Output, logits: Tensor, classes: Classes, *, seen_offset: float = 0.0) -> NDArray[np.int32]:
    """The class index of every pixel (H, W): argmax_k of sum_q sigmoid(logits_qk) * sigmoid(m_q(x)), of logits (Q, K).

    `seen_offset` is subtracted from the seen classes' sums at every pixel.
    """
    scores, masks = logits.sigmoid().float(), output.probabilities()
    offset = (seen_offset * classes.seen.to(scores))[:, None]
    pixels = max(1, CHUNK_ELEMENTS // scores.shape[1])
    parts = masks.flatten(1).split(pixels, dim=1)
    found = torch.cat([(scores.T @ part - offset).argmax(0) for part in parts])
    return found.view(masks.shape[1:]).cpu().numpy().astype(np.int32)


@torch.no_grad()
def choose(scores: Tensor, seen: Tensor, thresholds: Thresholds) -> Chosen:
    """The queries whose best class scores above `object_threshold`: scores (Q, K) in [0, 1], `seen` (K,) bool."""
    scores = scores.float()
    classes = (scores - thresholds.seen_offset * seen).argmax(1)
    scores = scores.gather(1, classes[:, None])[:, 0]
    kept = (scores > thresholds.object_threshold).nonzero()[:, 0]
    return Chosen(queries=kept, classes=classes[kept], scores=scores[kept])


@torch.no_grad()
def merge(
    output: Output, chosen: Chosen, classes: Classes, *, overlap_threshold: float
) -> tuple[NDArray[np.int32], list[PredictedSegment]]:
    """The chosen queries' masks as one panoptic map; see `panoptic_map`."""
    count = len(chosen.queries)
    if not count:
        return np.zeros(output.original_size, np.int32), []
    best: Tensor | None = None
    winner = inside = torch.empty(0)
    areas: list[Tensor] = []
    start = 0
    for probabilities, own in output.chunks(chosen.queries):
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
    indices, scores, things, ids = (t.tolist() for t in (chosen.classes, chosen.scores, classes.isthing, classes.ids))
    for query in survives.nonzero()[:, 0].tolist():
        class_, score = indices[query], scores[query]
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


def _areas(probabilities: Tensor) -> Tensor:
    return (probabilities >= 0.5).flatten(1).sum(1)


def _per_chunk(*sizes: tuple[int, ...]) -> int:
    """Masks a chunk, when the largest of their sizes is one of `sizes`."""
    return max(1, CHUNK_ELEMENTS // max(height * width for height, width in sizes))
