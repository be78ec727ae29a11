"""Images through the frozen segmenter: for calibration, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from models.segmenter import Segmenter
from pipeline.data.config import ResizeConfig
from pipeline.data.transforms import resize_for_test
from pipeline.inference.maps import Output

Tag = TypeVar("Tag")


@torch.no_grad()
def outputs(
    segmenter: Segmenter, images: Iterable[tuple[Tag, Tensor]], resize: ResizeConfig, *, batch: int
) -> Iterator[tuple[Tag, Output]]:
    """(tag, Output) for each (tag, image (3, H, W) uint8), in order.

    At most `batch` neighbours share a forward pass, and only those of equal padded size, so that an image's result does
    not depend on padding it would not have alone.
    """
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
