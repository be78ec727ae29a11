"""Images through the frozen segmenter: for calibration, evaluation and prediction.

In float32; `pipeline/README.md` has what TF32 and bfloat16 change in the maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from models.segmenter import Segmenter
from pipeline.data.config import ResizeConfig
from pipeline.data.sizes import grouped, in_turn
from pipeline.data.transforms import place_for_test, resize_for_test
from pipeline.inference.maps import Output

WINDOW = 128  # images sorted by size at a time, on a GPU

Tag = TypeVar("Tag")


def outputs(
    segmenter: Segmenter,
    images: Iterable[tuple[Tag, Tensor]],
    resize: ResizeConfig,
    *,
    batch: int,
    window: int | None = None,
) -> Iterator[tuple[Tag, Output]]:
    """(tag, Output) for each (tag, image (3, H, W) uint8), in order.

    At most `batch` images share a forward pass, and only those of equal padded size, so that an image's result does not
    depend on padding it would not have alone. They are neighbours, after every `window` images were sorted by size, and
    `window` + `batch` outputs at most wait for their turn: 22 MB each of 100 queries at 800 x 1088.

    `window` is 128 on a GPU, and 1 on a CPU: there the seconds of an image hardly depend on the batch, but the last
    bits of its result do.
    """
    device = next(segmenter.parameters()).device
    if window is None:
        window = WINDOW if batch > 1 and device.type != "cpu" else 1
    return in_turn(_unordered(segmenter, images, resize, device, batch=batch, window=window))


@torch.no_grad()
def _unordered(
    segmenter: Segmenter,
    images: Iterable[tuple[Tag, Tensor]],
    resize: ResizeConfig,
    device: torch.device,
    *,
    batch: int,
    window: int,
) -> Iterator[tuple[int, tuple[Tag, Output]]]:
    """`outputs` in the order of the passes, with each image's number."""

    def padded(entry: tuple[int, tuple[Tag, Tensor]]) -> tuple[int, int]:
        height, width = entry[1][1].shape[-2:]
        return place_for_test(height, width, resize).view

    for group in grouped(enumerate(images), padded, most=batch, window=window):
        views, sizes = zip(*(resize_for_test(image.to(device), resize) for _, (_, image) in group), strict=True)
        result = segmenter(torch.stack(views), dense=False)
        features, masks = result.features[-1], result.masks[-1]
        for i, (number, (tag, image)) in enumerate(group):
            (height, width), (padded_height, padded_width) = image.shape[-2:], views[i].shape[-2:]
            yield (
                number,
                (
                    tag,
                    Output(
                        features=features[i],
                        masks=masks[i],
                        padded_size=(padded_height, padded_width),
                        image_size=sizes[i],
                        original_size=(height, width),
                    ),
                ),
            )
