"""Images through the frozen segmenter, and what it says turned into panoptic maps: for queries, calibration, evaluation, prediction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from models.segmenter import Segmenter
from pipeline.metrics import PredictedSegment
from pipeline.prediction import Chosen, ResizedMasks, choose, classify, merge, panoptic, resize_masks, semantic
from pipeline.transforms import resize_for_test
from pipeline.views import ResizeConfig

Tag = TypeVar("Tag")


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


@torch.no_grad()
def outputs(
    segmenter: Segmenter, images: Iterable[tuple[Tag, Tensor]], resize: ResizeConfig, *, batch: int
) -> Iterator[tuple[Tag, Output]]:
    """(tag, Output) for (tag, image (3, H, W) uint8), in order. Neighbours of equal padded size share a forward pass, so that an
    image's result does not depend on padding it would not have alone."""
    device = next(segmenter.parameters()).device
    group: list[tuple[Tag, Tensor, tuple[int, int], tuple[int, int]]] = []

    def flush() -> Iterator[tuple[Tag, Output]]:
        if not group:
            return
        result = segmenter(torch.stack([view for _, view, _, _ in group]).to(device), dense=False)
        features, masks = result.features[-1], result.masks[-1]
        for i, (tag, view, size, original) in enumerate(group):
            height, width = view.shape[-2:]
            yield (
                tag,
                Output(
                    features=features[i],
                    masks=masks[i],
                    padded_size=(height, width),
                    image_size=size,
                    original_size=original,
                ),
            )
        group.clear()

    for tag, image in images:
        view, size = resize_for_test(image, resize)
        if group and (len(group) == batch or group[0][1].shape != view.shape):
            yield from flush()
        height, width = image.shape[-2:]
        group.append((tag, view, size, (height, width)))
    yield from flush()


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
