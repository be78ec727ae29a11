"""Training views computed the plain way: the whole image normalised, resized, mirrored, cut and padded on the CPU, and one
comparison of the id map for each segment. Slow; the loader must make the same bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.config import AugmentConfig, ResizeConfig
from pipeline.data.transforms import PIXEL_MEAN, PIXEL_STD
from pipeline.training.loader import WINDOW, Item, TrainingData
from storage.shards import Sample, decode_ids, decode_image, read_shard


def whole_view(
    image: Tensor, ids: Tensor, config: AugmentConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor, bool]:
    """An image (3, H, W) uint8 and its ids (H, W) -> the view (3, S, S) float32, its ids (S, S), whether mirrored."""
    height, width = ids.shape
    factor = rng.uniform(*config.jitter) * config.size / max(height, width)
    size = (max(round(height * factor), 1), max(round(width * factor), 1))
    scaled = (image.float() - PIXEL_MEAN) / PIXEL_STD
    if (height, width) != size:
        scaled = F.interpolate(scaled[None], size=size, mode="bilinear", antialias=True)[0]
        rows, columns = (
            ((torch.arange(new) + 0.5) * old / new).long() for new, old in zip(size, ids.shape, strict=True)
        )
        ids = ids[rows[:, None], columns]
    mirrored = config.flip and bool(rng.random() < 0.5)
    if mirrored:
        scaled, ids = scaled.flip(-1), ids.flip(-1)
    top, left = (int(rng.integers(max(s - config.size, 0) + 1)) for s in size)
    crop = (slice(top, top + config.size), slice(left, left + config.size))
    scaled, ids = scaled[:, *crop], ids[crop]
    padding = (0, config.size - ids.shape[1], 0, config.size - ids.shape[0])
    return F.pad(scaled, padding), F.pad(ids, padding), mirrored


def whole_test_view(image: Tensor, ids: Tensor, resize: ResizeConfig) -> tuple[Tensor, Tensor]:
    """The same two of the test view, padded to multiples of 32."""
    height, width = ids.shape
    factor = min(resize.short / min(height, width), resize.longest / max(height, width))
    size = (max(round(height * factor), 1), max(round(width * factor), 1))
    scaled = F.interpolate(((image.float() - PIXEL_MEAN) / PIXEL_STD)[None], size=size, mode="bilinear", antialias=True)
    rows, columns = (((torch.arange(new) + 0.5) * old / new).long() for new, old in zip(size, ids.shape, strict=True))
    padding = (0, -size[1] % 32, 0, -size[0] % 32)
    return F.pad(scaled[0], padding), F.pad(ids[rows[:, None], columns], padding)


def whole_items(data: TrainingData, *, window: int = WINDOW) -> Iterator[Item]:
    """The endless stream of training items, every window read as a whole, in one thread."""
    epoch = 0
    while True:
        rng = np.random.default_rng([data.seed, epoch])
        tars = rng.permutation(len(data.tars))
        for some in (tars[i : i + window] for i in range(0, len(tars), window)):
            entries = [(int(t), int(r)) for t in some for r in data.kept[t]]
            samples = {(int(t), r): s for t in some for r, s in enumerate(read_shard(data.tars[t]))}
            for place in rng.permutation(len(entries)):
                tar, row = entries[place]
                yield whole_item(data, epoch, tar, row, samples[tar, row])
        epoch += 1


def whole_item(data: TrainingData, epoch: int, tar: int, row: int, sample: Sample) -> Item:
    """The training item of one sample."""
    rng = np.random.default_rng([data.seed, epoch, sample.image_id])
    image, ids = torch.from_numpy(decode_image(sample)).permute(2, 0, 1), torch.from_numpy(decode_ids(sample))
    group = data.groups[tar]
    regions = group.regions if data.regions else None
    count = int(regions.counts[row]) if regions else 0
    if regions and count:
        drawn = torch.from_numpy(regions.map(row).astype(np.int32))
        ids = torch.where(drawn > 0, drawn + 2**24, ids)
    image, ids, mirrored = whole_view(image, ids, data.augment, rng)
    tokens = group.view(mirrored=mirrored)[1]
    own = group.rows(row)
    token_row = {int(segment): i for i, segment in enumerate(group.segment_id[own], own.start)}
    labels = [data.class_index[segment.category_id] for segment in sample.segments]
    places = [i for i, s in enumerate(sample.segments) if not s.iscrowd and data.seen[labels[i]]]
    wanted = [sample.segments[i].id for i in places] + [2**24 + 1 + number for number in range(count)]
    masks = ids == torch.tensor(wanted, dtype=ids.dtype).view(-1, 1, 1)
    every = masks.flatten(1).any(1)
    visible = every[: len(places)]
    region_tokens = torch.from_numpy(regions.of(row, mirrored=mirrored) if regions else tokens[:0]).float()
    first_row = data.first_row[tar] + (len(data) if mirrored and data.token_views == 2 else 0)
    return Item(
        image_id=sample.image_id,
        image=image,
        labels=torch.tensor([labels[i] for i in places], dtype=torch.int64)[visible],
        segments=torch.tensor(places, dtype=torch.int64)[visible],
        masks=masks[every],
        instance_tokens=torch.from_numpy(tokens[[token_row[sample.segments[i].id] for i in places]]).float()[visible],
        region_tokens=region_tokens[every[len(places) :]],
        global_row=int(first_row + np.searchsorted(data.kept[tar], row)),
    )
