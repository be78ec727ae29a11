"""Training batches from tars and their token groups, in an order that depends on seed and epoch alone.

An epoch permutes the tars, takes them in windows, and permutes the samples of each window; each sample occurs exactly
once. Batches are cut from the endless stream of epochs, so batch s always starts at sample s * batch, and resuming
skips to it without decoding.

Threads read the next window and decode while the training computes. What leaves the CPU for
another device is a `View`: the image as decoded and one map of its segments, about 1.3 MB for a COCO image, where the
normalised view of 1024 x 1024 pixels with its masks has 24 MB. The device computes one from the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.data.ahead import ahead, mapped
from pipeline.data.colours import distort_colours
from pipeline.data.config import AugmentConfig, ResizeConfig, SemanticAugmentConfig
from pipeline.data.sizes import grouped
from pipeline.data.transforms import Placement, channels_first, place_for_test, place_for_training
from pipeline.teacher.text_bank import TextBank
from pipeline.training.distributed import ALONE, Ranks
from storage import through
from storage.shards import Sample, Shards, decode_ids, decode_image, read_shard
from storage.tokens import read_tokens

# Tars whose undecoded samples are shuffled together, and held in memory; while they are in use the next are read.
WINDOW = 4
CPU = torch.device("cpu")

E = TypeVar("E")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One view: image (3, H, W), and of its O targets class indices and indices among the image's segments (O,), masks
    (O, H, W) bool and tokens (O, D) float32.

    With R candidate regions: their masks behind those of the targets, (O + R, H, W), and their tokens (R, D) float32.
    """

    image_id: int
    image: Tensor
    labels: Tensor
    segments: Tensor
    masks: Tensor
    instance_tokens: Tensor
    region_tokens: Tensor
    global_row: int  # of the image's global token in `TrainingData.global_tokens`


@dataclass(frozen=True, kw_only=True)
class View:
    """A view that is still to be computed: the image (3, h, w) uint8, and where it will lie.

    `targets` (h, w) uint8, or int32 for more than 255 of them, is the number of each pixel's target or, behind these,
    candidate region, or 0; `rows` and `columns` are those of it that the view shows, see `Placement.sources`. `numbers`
    (O + R,) are the visible ones, in the order of the rest, which is an `Item`'s.
    """

    image_id: int
    placement: Placement
    image: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    numbers: Tensor
    labels: Tensor
    segments: Tensor
    instance_tokens: Tensor
    region_tokens: Tensor
    global_row: int

    def item(self) -> Item:
        """The item, image and masks computed on the view's device."""
        targets = self.placement.ids(self.targets, self.rows, self.columns)
        return Item(
            image_id=self.image_id,
            image=self.placement.image(self.image),
            labels=self.labels,
            segments=self.segments,
            masks=targets == self.numbers.view(-1, 1, 1),
            instance_tokens=self.instance_tokens,
            region_tokens=self.region_tokens,
            global_row=self.global_row,
        )

    def to(self, device: torch.device) -> View:
        """The view with image and masks still to be computed on `device`; labels and tokens stay where they are."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True), *SHIPPED)

    def pinned(self) -> View:
        """The view in page-locked memory, which a GPU reads beside its computations."""
        return self._each(Tensor.pin_memory, *SHIPPED, "labels", "instance_tokens", "region_tokens")

    def _each(self, change: Callable[[Tensor], Tensor], *names: str) -> View:
        return replace(self, **{name: change(getattr(self, name)) for name in names})


SHIPPED = ("image", "targets", "rows", "columns", "numbers")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B items: images (B, 3, S, S), global rows (B,), and lists of B tensors of labels, masks, instance tokens and, as
    far as there are candidate regions, whose masks follow those of the targets, region tokens.

    As the loader makes it, images and masks lie on the training's device and the rest on the CPU, where its counts are
    known without waiting for the device; `to` moves the rest.
    """

    image_ids: list[int]
    images: Tensor
    global_rows: Tensor
    labels: list[Tensor]
    masks: list[Tensor]
    instance_tokens: list[Tensor]
    region_tokens: list[Tensor] = field(default_factory=list)

    def split(self, parts: int) -> list[Batch]:
        """The batch in `parts` equal parts, in order."""
        size = len(self.image_ids) // parts
        cuts = [slice(i, i + size) for i in range(0, len(self.image_ids), size)]
        return [Batch(**{field.name: getattr(self, field.name)[cut] for field in fields(self)}) for cut in cuts]

    def to(self, device: torch.device) -> Batch:
        def move(tensors: list[Tensor]) -> list[Tensor]:
            return [t.to(device, non_blocking=True) for t in tensors]

        images, global_rows = move([self.images, self.global_rows])
        return Batch(
            image_ids=self.image_ids,
            images=images,
            global_rows=global_rows,
            labels=move(self.labels),
            masks=move(self.masks),
            instance_tokens=move(self.instance_tokens),
            region_tokens=move(self.region_tokens),
        )


class TrainingData:
    """The training images that the protocol leaves, with their teacher tokens.

    Segments of unseen classes and crowds are no targets; a segment outside the crop loses its mask and token row, and
    so does a candidate region. With `regions`, which the tokens must have, views show these, too.
    """

    def __init__(
        self,
        shards: Path,
        tokens: Path,
        bank: TextBank,
        augment_config: AugmentConfig,
        *,
        seed: int,
        workers: int,
        regions: bool = False,
    ):
        self.tars = Shards(shards).tars("train")
        self.groups = [read_tokens(tokens / f"{tar.stem}.zarr") for tar in self.tars]
        assert not regions or all(group.regions for group in self.groups)
        self.kept = [np.flatnonzero(group.kept) for group in self.groups]
        self.first_row = np.concatenate([[0], np.cumsum([len(kept) for kept in self.kept])])
        self.class_index = {i: k for k, i in enumerate(bank.ids)}
        self.seen = bank.seen
        self.augment, self.seed, self.workers, self.regions = augment_config, seed, workers, regions
        # All groups were made with one config, so their views agree.
        self.token_views = min(group.views for group in self.groups)

    def __len__(self) -> int:
        return int(self.first_row[-1])

    def beyond(self, most: int) -> dict[int, int]:
        """Image id -> number of targets of each image that has more than `most`, before views are cropped.

        Only tars with an image of more token rows are read.
        """
        found = {}
        for tar, group in zip(self.tars, self.groups, strict=True):
            if (np.diff(group.offsets) > most).any():
                for row, sample in enumerate(read_shard(tar)):
                    targets = len(self._targets_of(sample)) if group.kept[row] else 0
                    if targets > most:
                        found[sample.image_id] = targets
        return found

    def _targets_of(self, sample: Sample) -> list[int]:
        """The positions of the segments that are targets: of seen classes, no crowds."""
        return [
            i
            for i, segment in enumerate(sample.segments)
            if not segment.iscrowd and self.seen[self.class_index[segment.category_id]]
        ]

    def global_tokens(self) -> Tensor:
        """(views * N, D) float32: global tokens of all kept images, then of their mirrored versions where these were
        encoded.

        An item's `global_row` is an index into them; they also serve as the bank of negatives (D3).
        """
        pairs = list(zip(self.groups, self.kept, strict=True))
        rows = [group.view(mirrored=bool(v))[0][kept] for v in range(self.token_views) for group, kept in pairs]
        return torch.from_numpy(np.concatenate(rows)).float()

    def plain_samples(self) -> Iterator[tuple[Sample, Tensor]]:
        """Every kept image once, in tar order, decoded ahead: the sample and its image (3, H, W) uint8."""
        kept = (read_shard(tar, set(rows.tolist())) for tar, rows in zip(self.tars, self.kept, strict=True))
        return mapped(
            lambda sample: (sample, _image(sample)),
            chain.from_iterable(kept),
            workers=self.workers,
            count=4 * self.workers,
        )

    def batches(self, size: int, *, start: int, ranks: Ranks = ALONE, device: torch.device = CPU) -> Iterator[Batch]:
        """Endless global batches of `size` samples, from batch `start` on; each rank reads, decodes and gets its own
        part of each, `size` / `ranks.world` samples, for which `size` must be a multiple of it.

        Images and masks are computed on `device`: on a CPU by the threads that decode, elsewhere from views that are
        copied to it.
        """
        share, rest = divmod(size, ranks.world)
        assert rest == 0, (size, ranks)
        own = chain.from_iterable(ahead(self._read(size, start, ranks)))
        items = self._computed(lambda entry: self._view(*entry), own, repeat(share), device, count=2 * share)
        # On a CPU a thread for this alone takes more from the training than it saves.
        return map(collate, items)

    def _read(self, size: int, start: int, ranks: Ranks) -> Iterator[list[tuple[int, int, int, Sample]]]:
        """(epoch, tar, row, sample) of a rank's part of every batch, window by window, endlessly."""
        share, place = size // ranks.world, 0
        for epoch, window in self._order(start * size):
            own = [entry for at, entry in enumerate(window, place) if at % size // share == ranks.rank]
            place += len(window)
            samples: dict[tuple[int, int], Sample] = {}
            through.ahead(self.tars[tar] for tar in {tar for tar, _ in own})
            for tar in {tar for tar, _ in own}:
                rows = sorted(row for other, row in own if other == tar)
                samples |= zip(((tar, row) for row in rows), read_shard(self.tars[tar], set(rows)), strict=True)
            yield [(epoch, *entry, samples[entry]) for entry in own]

    def _order(self, skip: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Window by window its epoch and its samples as (tar, row), endlessly, without the first `skip` samples."""
        epoch, skip = divmod(skip, len(self))
        while True:
            rng = np.random.default_rng([self.seed, epoch])
            tars = rng.permutation(len(self.tars))
            for window in (tars[i : i + WINDOW] for i in range(0, len(tars), WINDOW)):
                entries = [(int(t), int(r)) for t in window for r in self.kept[t]]
                order = rng.permutation(len(entries))
                if skip < len(entries):
                    yield epoch, [entries[place] for place in order[skip:]]
                skip = max(skip - len(entries), 0)
            epoch += 1

    def items(
        self, tar: int, *, view: int, resize: ResizeConfig, most: int, device: torch.device = CPU, window: int = 1
    ) -> Iterator[list[tuple[int, Item]]]:
        """One tar's kept images: view 0 is the test view, view v > 0 the training view of epoch v.

        They come with their places among the tar's kept images, in groups of at most `most` of one size: neighbours,
        after every `window` images were sorted by it. Images and masks are computed on `device`, as in `batches`.
        """

        def size(entry: tuple[int, tuple[int, Sample]]) -> tuple[int, int]:
            _, (_, sample) = entry
            if view:
                return self.augment.size, self.augment.size
            return place_for_test(sample.height, sample.width, resize).view

        def placed(entry: tuple[int, tuple[int, Sample]]) -> View:
            _, (row, sample) = entry
            if view:
                return self._view(view, tar, row, sample)
            return self._placed(tar, row, sample, _image(sample), place_for_test(sample.height, sample.width, resize))

        rows = self.kept[tar].tolist()
        samples = enumerate(zip(rows, read_shard(self.tars[tar], set(rows)), strict=True))
        groups = list(grouped(samples, size, most=most, window=window))
        computed = self._computed(placed, chain.from_iterable(groups), map(len, groups), device, count=2 * self.workers)
        for group, items in zip(groups, computed, strict=True):
            yield [(place, item) for (place, _), item in zip(group, items, strict=True)]

    def _computed(
        self,
        view: Callable[[E], View],
        entries: Iterable[E],
        lengths: Iterable[int],
        device: torch.device,
        *,
        count: int,
    ) -> Iterator[list[Item]]:
        """Lists of the entries' items, in order and of these `lengths`, of which threads make up to `count` ahead.

        On a CPU the threads that decode compute the items, elsewhere the device does, from views copied to it.
        """
        if device.type == "cpu":
            return _lists(mapped(lambda entry: view(entry).item(), entries, workers=self.workers, count=count), lengths)
        views = _lists(mapped(view, entries, workers=self.workers, count=count), lengths)
        if device.type == "cuda":
            sent = _on_gpu(views, device)
        else:
            sent = ([view.to(device) for view in group] for group in ahead(views))
        return ([view.item() for view in group] for group in sent)

    def _view(self, epoch: int, tar: int, row: int, sample: Sample) -> View:
        """The training view of a sample in an epoch; random draws depend on seed, epoch and image id alone."""
        rng = np.random.default_rng([self.seed, epoch, sample.image_id])
        image = _image(sample)
        placement = place_for_training(image.shape[-2], image.shape[-1], self.augment, rng)
        if isinstance(self.augment, SemanticAugmentConfig) and self.augment.colours:
            image = distort_colours(image, rng)
        return self._placed(tar, row, sample, image, placement)

    def _placed(self, tar: int, row: int, sample: Sample, image: Tensor, placement: Placement) -> View:
        """The view with its visible targets: segments of seen classes that are no crowds, with tokens of the mirrored
        image if the view is mirrored, and its visible candidate regions. Under pixel-ignore only segments of seen
        classes have tokens."""
        group = self.groups[tar]
        first_row = self.first_row[tar] + (len(self) if placement.mirrored and self.token_views == 2 else 0)
        tokens = group.view(mirrored=placement.mirrored)[1]
        own = group.rows(row)
        token_row = {int(segment): i for i, segment in enumerate(group.segment_id[own], own.start)}
        labels = [self.class_index[segment.category_id] for segment in sample.segments]
        places = self._targets_of(sample)
        token_rows = [token_row[sample.segments[i].id] for i in places]
        targets = _targets(decode_ids(sample), [sample.segments[i].id for i in places])
        regions = group.regions if self.regions else None
        region_tokens = regions.of(row, mirrored=placement.mirrored) if regions else tokens[:0]
        if regions and len(region_tokens):
            targets = _and_regions(targets, len(places), regions.map(row), len(region_tokens))
        rows, columns = placement.sources(*targets.shape)
        shown = np.zeros(len(places) + len(region_tokens) + 1, bool)
        shown[targets[np.ix_(np.unique(rows), np.unique(columns))]] = True
        every = shown[1:].nonzero()[0]
        visible = every[every < len(places)]
        return View(
            image_id=sample.image_id,
            placement=placement,
            image=image,
            targets=torch.from_numpy(targets),
            rows=rows,
            columns=columns,
            numbers=torch.from_numpy((every + 1).astype(targets.dtype)),
            labels=torch.tensor([labels[places[i]] for i in visible], dtype=torch.int64),
            segments=torch.tensor([places[i] for i in visible], dtype=torch.int64),
            instance_tokens=torch.from_numpy(tokens[[token_rows[i] for i in visible]]).float(),
            region_tokens=torch.from_numpy(region_tokens[every[len(visible) :] - len(places)]).float(),
            global_row=int(first_row + np.searchsorted(self.kept[tar], row)),
        )


def _and_regions(targets: np.ndarray, count: int, regions: np.ndarray, more: int) -> np.ndarray:
    """The map (H, W) of `count` targets with that of `more` regions, which have no pixel in common: they are numbered
    behind the targets."""
    targets = targets.astype(np.uint8 if count + more < 256 else np.int32)
    return np.where(regions > 0, regions.astype(targets.dtype) + targets.dtype.type(count), targets)


def _image(sample: Sample) -> Tensor:
    """(3, H, W) uint8."""
    return channels_first(decode_image(sample))


def _targets(ids: np.ndarray, targets: list[int]) -> np.ndarray:
    """(H, W): 1 + the index in `targets` of each pixel's segment id, or 0; uint8, or int32 for more than 255 targets."""
    # A table of all ids up to the largest, 16 MB for COCO's: the system gives memory where it is read or written.
    number = np.zeros(max([int(ids.max()), *targets]) + 1, np.uint8 if len(targets) < 256 else np.int32)
    number[targets] = np.arange(1, len(targets) + 1)
    return number.take(ids)


def _lists(values: Iterator[T], lengths: Iterable[int]) -> Iterator[list[T]]:
    """The values, in lists of these lengths."""
    return (list(islice(values, length)) for length in lengths)


def _on_gpu(groups: Iterator[list[View]], device: torch.device) -> Iterator[list[View]]:
    """The views on a GPU, copied by a thread on a stream of its own while the batch before is computed."""
    stream = torch.cuda.Stream(device)

    def copied(group: list[View]) -> tuple[list[View], torch.cuda.Event]:
        with torch.cuda.stream(stream):
            views, done = [view.pinned().to(device) for view in group], torch.cuda.Event()
            done.record()
        return views, done

    for views, done in ahead(map(copied, groups)):
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        for view in views:
            for name in SHIPPED:
                # Its memory is not used for another copy before the work that reads it has run.
                getattr(view, name).record_stream(current)
        yield views


def collate(items: Sequence[Item]) -> Batch:
    return Batch(
        image_ids=[i.image_id for i in items],
        images=torch.stack([i.image for i in items]),
        global_rows=torch.tensor([i.global_row for i in items]),
        labels=[i.labels for i in items],
        masks=[i.masks for i in items],
        instance_tokens=[i.instance_tokens for i in items],
        region_tokens=[i.region_tokens for i in items],
    )
