"""Training batches from tars and their token groups, in an order that depends on seed and epoch alone.

An epoch permutes the tars, takes them in windows, and permutes the samples of each window; each sample occurs exactly
once. Batches are cut from the endless stream of epochs, so batch s always starts at sample s * batch, and resuming
skips to it without decoding. Threads decode ahead of the training and keep the order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data.config import AugmentConfig, ResizeConfig
from pipeline.data.transforms import augment, place_ids, resize_for_test
from pipeline.teacher.text_bank import TextBank
from pipeline.training.distributed import ALONE, Ranks
from storage.errors import UserError
from storage.shards import Sample, Shards, decode_ids, decode_image, read_shard
from storage.tokens import read_tokens

WINDOW = 4  # tars whose undecoded samples are shuffled together, and held in memory


@dataclass(frozen=True, kw_only=True)
class Item:
    """One view: image (3, H, W), and of its O targets class indices and indices among the image's segments (O,), masks
    (O, H, W) bool and tokens (O, D) float32."""

    image_id: int
    image: Tensor
    labels: Tensor
    segments: Tensor
    masks: Tensor
    instance_tokens: Tensor
    global_row: int  # of the image's global token in `TrainingData.global_tokens`


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B items: images (B, 3, S, S), global rows (B,), and lists of B tensors of labels, masks and instance tokens."""

    image_ids: list[int]
    images: Tensor
    global_rows: Tensor
    labels: list[Tensor]
    masks: list[Tensor]
    instance_tokens: list[Tensor]

    def split(self, parts: int) -> list[Batch]:
        """The batch in `parts` equal parts, in order."""
        size = len(self.image_ids) // parts
        cuts = [slice(i, i + size) for i in range(0, len(self.image_ids), size)]
        return [Batch(**{field.name: getattr(self, field.name)[cut] for field in fields(self)}) for cut in cuts]

    def to(self, device: torch.device) -> Batch:
        def move(tensors: list[Tensor]) -> list[Tensor]:
            return [t.to(device) for t in tensors]

        return Batch(
            image_ids=self.image_ids,
            images=self.images.to(device),
            global_rows=self.global_rows.to(device),
            labels=move(self.labels),
            masks=move(self.masks),
            instance_tokens=move(self.instance_tokens),
        )


class TrainingData:
    """The training images that the protocol leaves, with their teacher tokens.

    Segments of unseen classes and crowds are no targets; a segment outside the crop loses its mask and token row.
    """

    def __init__(
        self, shards: Path, tokens: Path, bank: TextBank, augment_config: AugmentConfig, *, seed: int, workers: int
    ):
        self.tars = Shards(shards).tars("train")
        self.groups = [read_tokens(tokens / f"{tar.stem}.zarr") for tar in self.tars]
        self.kept = [np.flatnonzero(group.kept) for group in self.groups]
        self.first_row = np.concatenate([[0], np.cumsum([len(kept) for kept in self.kept])])
        self.class_index = {i: k for k, i in enumerate(bank.ids)}
        self.seen = bank.seen
        self.augment, self.seed, self.workers = augment_config, seed, workers
        # All groups were made with one config, so their views agree.
        self.token_views = min(group.views for group in self.groups)

    def __len__(self) -> int:
        return int(self.first_row[-1])

    def global_tokens(self) -> Tensor:
        """(views * N, D) float32: global tokens of all kept images, then of their mirrored versions where these were
        encoded.

        An item's `global_row` is an index into them; they also serve as the bank of negatives (D3).
        """
        pairs = list(zip(self.groups, self.kept, strict=True))
        rows = [group.view(mirrored=bool(v))[0][kept] for v in range(self.token_views) for group, kept in pairs]
        return torch.from_numpy(np.concatenate(rows)).float()

    def plain_samples(self) -> Iterator[tuple[Sample, Tensor]]:
        """Every kept image once, in tar order: the sample and its image (3, H, W) uint8."""
        for tar, group in zip(self.tars, self.groups, strict=True):
            for row, sample in enumerate(read_shard(tar)):
                if group.kept[row]:
                    yield sample, _image(sample)

    def batches(self, size: int, *, start: int, ranks: Ranks = ALONE) -> Iterator[Batch]:
        """Endless global batches of `size` samples, from batch `start` on; each rank decodes and gets its own part of
        each.

        Raises UserError when `size` is no multiple of the number of ranks.
        """
        if size % ranks.world:
            raise UserError(f"v2c: batch {size} cannot be split over {ranks.world} devices; choose a multiple of it")
        share = size // ranks.world
        with self._pool() as pool:
            pending: deque[Future[Item]] = deque()
            ready: list[Item] = []
            for place, (epoch, tar, row, sample) in enumerate(self._stream(start * size)):
                if place % size // share == ranks.rank:
                    pending.append(pool.submit(self._item, epoch, tar, row, sample))
                if len(pending) > 2 * share:
                    ready.append(pending.popleft().result())
                if len(ready) == share:
                    yield collate(ready)
                    ready = []

    def _stream(self, skip: int) -> Iterator[tuple[int, int, int, Sample]]:
        """Endless (epoch, tar, row, sample) without the first `skip`; wholly skipped windows are not read."""
        epoch, skip = divmod(skip, len(self))
        while True:
            rng = np.random.default_rng([self.seed, epoch])
            tars = rng.permutation(len(self.tars))
            for window in (tars[i : i + WINDOW] for i in range(0, len(tars), WINDOW)):
                entries = [(int(t), int(r)) for t in window for r in self.kept[t]]
                order = rng.permutation(len(entries))
                if skip >= len(entries):
                    skip -= len(entries)
                    continue
                samples = {
                    (int(t), r): s
                    for t in window
                    for r, s in enumerate(read_shard(self.tars[t]))
                    if self.groups[t].kept[r]
                }
                for place in order[skip:]:
                    yield epoch, *entries[place], samples[entries[place]]
                skip = 0
            epoch += 1

    def items(self, tar: int, *, view: int, resize: ResizeConfig) -> Iterator[Item]:
        """One tar's kept images in order: view 0 is the test view, view v > 0 the training view of epoch v."""

        def item(row: int, sample: Sample) -> Item:
            if view:
                return self._item(view, tar, row, sample)
            image, size = resize_for_test(_image(sample), resize)
            return self._targets(tar, row, sample, image, place_ids(_ids(sample), size, image.shape[-2:]))

        samples = [(row, s) for row, s in enumerate(read_shard(self.tars[tar])) if self.groups[tar].kept[row]]
        with self._pool() as pool:
            # A few at a time, so that memory stays bounded.
            for start in range(0, len(samples), 4 * self.workers):
                yield from pool.map(lambda pair: item(*pair), samples[start : start + 4 * self.workers])

    def _pool(self) -> ThreadPoolExecutor:
        """Decoding threads with one torch thread each: a view is small, and nested threads would only contend."""
        return ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))

    def _item(self, epoch: int, tar: int, row: int, sample: Sample) -> Item:
        """The training view of a sample in an epoch; random draws depend on seed, epoch and image id alone."""
        rng = np.random.default_rng([self.seed, epoch, sample.image_id])
        return self._targets(tar, row, sample, *augment(_image(sample), _ids(sample), self.augment, rng))

    def _targets(self, tar: int, row: int, sample: Sample, image: Tensor, ids: Tensor, mirrored: bool = False) -> Item:
        """The view with its visible targets: segments of seen classes that are no crowds, with tokens of the mirrored
        image if the view is mirrored. Under pixel-ignore only segments of seen classes have tokens."""
        group = self.groups[tar]
        first_row = self.first_row[tar] + (len(self) if mirrored and self.token_views == 2 else 0)
        tokens = group.view(mirrored=mirrored)[1]
        own = group.rows(row)
        token_row = {int(segment): i for i, segment in enumerate(group.segment_id[own], own.start)}
        labels = [self.class_index[segment.category_id] for segment in sample.segments]
        places = [i for i, s in enumerate(sample.segments) if not s.iscrowd and self.seen[labels[i]]]
        rows = [token_row[sample.segments[i].id] for i in places]
        masks = ids == torch.tensor([sample.segments[i].id for i in places], dtype=ids.dtype).view(-1, 1, 1)
        visible = masks.flatten(1).any(1)
        return Item(
            image_id=sample.image_id,
            image=image,
            labels=torch.tensor([labels[i] for i in places], dtype=torch.int64)[visible],
            segments=torch.tensor(places, dtype=torch.int64)[visible],
            masks=masks[visible],
            instance_tokens=torch.from_numpy(tokens[rows]).float()[visible],
            global_row=int(first_row + np.searchsorted(self.kept[tar], row)),
        )


def _image(sample: Sample) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(decode_image(sample)).permute(2, 0, 1)


def _ids(sample: Sample) -> Tensor:
    """(H, W) int32."""
    return torch.from_numpy(decode_ids(sample))


def collate(items: list[Item]) -> Batch:
    return Batch(
        image_ids=[i.image_id for i in items],
        images=torch.stack([i.image for i in items]),
        global_rows=torch.tensor([i.global_row for i in items]),
        labels=[i.labels for i in items],
        masks=[i.masks for i in items],
        instance_tokens=[i.instance_tokens for i in items],
    )
