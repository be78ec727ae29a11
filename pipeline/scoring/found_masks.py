"""What stage "mask-tokens" has made, beside the images that it is of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pipeline.data.ahead import mapped
from pipeline.data.transforms import channels_first
from pipeline.inference.teacher import MaskTokens
from storage.mask_tokens import MaskTokenGroup, read_mask_tokens
from storage.shards import Sample, Shards, decode_image, read_shard


def validation_masks(shards: Shards, folder: Path, device: torch.device) -> Iterator[tuple[int, MaskTokens]]:
    """(image id, its tokens) of every validation image, in the order of the tars; `folder` is the artefact's."""
    for tar in shards.tars("val"):
        group = read_mask_tokens(folder / f"{tar.stem}.zarr")
        for row, image_id in enumerate(group.image_id.tolist()):
            yield image_id, _found(group, row, device)


def calibration_images(
    shards: Shards, folder: Path, device: torch.device, *, workers: int
) -> Iterator[tuple[tuple[Sample, MaskTokens], Tensor]]:
    """((training sample, its tokens), image (3, H, W) uint8) of every training image that has tokens, decoded ahead by
    `workers` threads."""

    def undecoded() -> Iterator[tuple[Sample, MaskTokens]]:
        for tar in shards.tars("train"):
            if not (path := folder / f"{tar.stem}.zarr").exists():
                continue
            group = read_mask_tokens(path)
            rows = {image_id: row for row, image_id in enumerate(group.image_id.tolist())}
            for sample in read_shard(tar):
                if sample.image_id in rows:
                    yield sample, _found(group, rows[sample.image_id], device)

    def decoded(pair: tuple[Sample, MaskTokens]) -> tuple[tuple[Sample, MaskTokens], Tensor]:
        return pair, channels_first(decode_image(pair[0]))

    return mapped(decoded, undecoded(), workers=workers, count=4 * workers)


def _found(group: MaskTokenGroup, row: int, device: torch.device) -> MaskTokens:
    queries, tokens = group.of(row)
    return MaskTokens(
        queries=torch.from_numpy(queries).long().to(device),
        tokens=torch.from_numpy(tokens).float().to(device),
        scale=float(group.scale[0]),
    )
