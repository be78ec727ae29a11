"""One tar of samples -> one group of the teacher's tokens: the work of stage "cache-clip".

Threads decode images ahead, in order. Each image is resized once, on the device, where its masks are applied; the
teacher's inputs are packed across images into full batches, so only a tar's last batch may be short. Except for the
rows themselves, no tensor grows with the number of segments or images. The rows depend on the tar and the config alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.teacher import Teacher
from pipeline.data.benchmarks import Benchmark
from pipeline.data.transforms import channels_first
from pipeline.teacher.config import TokensConfig
from pipeline.teacher.instances import instance_box, own_patches
from pipeline.teacher.regions import Regions, find_regions
from storage.shards import Sample, decode_ids, decode_image, read_shard
from storage.tokens import region_group, write_tokens

MASK_PIXELS = 2**24  # of full-size masks at a time: 64 MB of float32
# Method "attention": an image with more instances takes several places in a batch.
INSTANCES_A_PASS = 64
# Among the ids of an image's pixels its regions come behind those of segments, which are below 2^24.
BEHIND_SEGMENTS = 2**24 - 1


def kept_for_training(sample: Sample, benchmark: Benchmark) -> bool:
    """False for an image that the image-filter protocol drops: one with any segment of an unseen class."""
    if benchmark.protocol != "image-filter":
        return True
    return not any(s.category_id in set(benchmark.unseen_ids) for s in sample.segments)


def shown_in_training(sample: Sample, benchmark: Benchmark) -> Sample:
    """The sample without segments of unseen classes under the pixel-ignore protocol, so that they get no token."""
    if benchmark.protocol != "pixel-ignore":
        return sample
    return replace(sample, segments=tuple(s for s in sample.segments if benchmark.seen[benchmark.index[s.category_id]]))


def encode_tar(
    teacher: Teacher,
    tar: Path,
    group: Path,
    config: TokensConfig,
    benchmark: Benchmark,
    *,
    hide: bool,
    progress: Callable[[int, int], object],
) -> None:
    """Encode one tar into one token group.

    `hide`: leave out what the benchmark's protocol excludes from training, and look for regions of what then has no
    label if `config` wants them. `progress(images, instances)`, regions among the latter, is called after each sample
    is left out or passed to the device. Decoding uses as many threads as torch has in this process.

    Raises UserError when the teacher does not support `config.method`.
    """
    device = next(teacher.parameters()).device
    encoder = _ByAttention(teacher, config) if config.method == "attention" else _ByPixels(teacher, config)
    segment_id, encoded, kept, counts = [], [], [], []
    looks = hide and config.regions != "none"
    found: list[Regions | None] = []
    # For each of the encoder's rows: an image, or an instance or region of the last image before it.
    kinds: list[str] = []

    def decode(sample: Sample) -> _Decoded | None:
        if hide and not kept_for_training(sample, benchmark):
            return None
        decoded = encoder.decode(sample, regions=looks)
        return decoded.pinned() if device.type == "cuda" else decoded

    samples = (shown_in_training(sample, benchmark) if hide else sample for sample in read_shard(tar))
    for sample, decoded in _ahead(samples, decode, threads=torch.get_num_threads()):
        kept.append(decoded is not None)
        segments = sample.segments if decoded else ()
        counts.append(len(segments))
        segment_id += [s.id for s in segments]
        large = [s.area >= config.min_area for s in segments]
        encoded += large
        regions = decoded.regions if decoded else None
        found.append(regions)
        if decoded:
            encoder.add(decoded.to(device))
            kinds += ["image", *["instance"] * sum(large), *["region"] * (regions.count if regions else 0)]
        progress(1, len(segments) + (regions.count if regions else 0))
    rows, kind = encoder.finish().cpu().numpy(), np.array(kinds, "U8")  # (views, images + instances + regions, D)
    kept, encoded = np.array(kept, bool), np.array(encoded, bool)
    global_ = np.zeros((config.views, len(kept), rows.shape[2]), np.float16)
    instance = np.zeros((config.views, len(encoded), rows.shape[2]), np.float16)
    global_[:, kept] = rows[:, kind == "image"]
    instance[:, encoded] = rows[:, kind == "instance"]
    write_tokens(
        group,
        global_=global_[0],
        instance=instance[0],
        mirrored_global=global_[1:],
        mirrored_instance=instance[1:],
        offsets=np.cumsum([0, *counts]),
        segment_id=np.array(segment_id),
        kept=kept,
        regions=region_group(
            rows[:, kind == "region"],
            [one.map if one and one.count else None for one in found],
            [one.count if one else 0 for one in found],
            [one.fragments if one else 0 for one in found],
        )
        if looks
        else None,
    )


def _ahead(
    samples: Iterator[Sample], decode: Callable[[Sample], _Decoded | None], *, threads: int
) -> Iterator[tuple[Sample, _Decoded | None]]:
    """Each sample with its `decode(sample)`, in order; at most 2 * `threads` decoded samples are held."""
    pending: deque[tuple[Sample, Future[_Decoded | None]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for sample in samples:
            pending.append((sample, pool.submit(decode, sample)))
            if len(pending) == 2 * threads:
                first, result = pending.popleft()
                yield first, result.result()
        for first, result in pending:
            yield first, result.result()


class _Decoded(NamedTuple):
    """A decoded sample: `image` (3, H, W) uint8, `ids` (H, W) int32, and for the k segments and regions to encode their
    ids `wanted` (k,) int32 and, where the config needs them, the `boxes` of their crops and their `own` patches (k, P)
    bool; `regions`, where they were looked for."""

    image: Tensor
    ids: Tensor
    wanted: Tensor
    boxes: list[tuple[int, int, int, int]]
    own: Tensor
    regions: Regions | None

    def pinned(self) -> _Decoded:
        return self._replace(image=self.image.pin_memory(), ids=self.ids.pin_memory(), wanted=self.wanted.pin_memory())

    def to(self, device: torch.device) -> _Decoded:
        """The sample with `image`, `ids` and `wanted` on the device."""
        image, ids, wanted = (x.to(device, non_blocking=True) for x in (self.image, self.ids, self.wanted))
        return self._replace(image=image, ids=ids, wanted=wanted)


class _ByPixels:
    """One input per image and one per instance or region; in the latter all other pixels are filled.

    `rows`, one list per view, stay on the device in float16 until the end: for each image its own row, then those of
    its instances, then those of its regions.
    """

    def __init__(self, teacher: Teacher, config: TokensConfig) -> None:
        self.teacher, self.config, self.dtype = teacher, config, getattr(torch, config.dtype)
        size = teacher.image_size
        self.inputs = torch.empty(config.batch, 3, size, size, dtype=self.dtype, device=teacher.mean.device)
        self.filled = 0
        self.rows: list[list[Tensor]] = [[] for _ in range(config.views)]

    def decode(self, sample: Sample, *, regions: bool) -> _Decoded:
        ids, image = decode_ids(sample), decode_image(sample)
        wanted = np.array([s.id for s in sample.segments if s.area >= self.config.min_area], np.int32)
        found = find_regions(ids, [s.id for s in sample.segments], self.config, image) if regions else None
        if found:
            ids = np.where(found.map > 0, found.map + np.int32(BEHIND_SEGMENTS), ids)
            wanted = np.append(wanted, np.arange(1, found.count + 1, dtype=np.int32) + BEHIND_SEGMENTS)
        crops = self.config.crop == "box"
        return _Decoded(
            image=channels_first(image),
            ids=torch.from_numpy(ids),
            wanted=torch.from_numpy(wanted),
            boxes=[instance_box(ids == i, self.config.margin) for i in wanted] if crops else [],
            own=self.patches(ids, wanted),
            regions=found,
        )

    def patches(self, ids: np.ndarray, wanted: np.ndarray) -> Tensor:
        return torch.zeros(len(wanted), 0, dtype=torch.bool)

    def add(self, sample: _Decoded) -> None:
        """Add the inputs of one image, and encode each batch that becomes full."""
        prepared = self.teacher.prepare(sample.image, self.config.resize)
        self.put(prepared[None])
        done, count = 0, len(sample.wanted)
        while done < count:
            room = min(self.config.batch - self.filled, max(MASK_PIXELS // sample.ids.numel(), 1))
            some = range(done, min(done + room, count))
            if self.config.crop == "box":
                self.put(torch.cat([self.crop(sample, i) for i in some]))
            else:
                masks = sample.ids == sample.wanted[some.start : some.stop, None, None]
                self.put(self.teacher.mask(prepared, masks, self.config.resize))
            done = some.stop

    def crop(self, sample: _Decoded, instance: int) -> Tensor:
        """The input (1, 3, S, S) of an instance, cropped to the box around it."""
        top, left, bottom, right = sample.boxes[instance]
        prepared = self.teacher.prepare(sample.image[:, top:bottom, left:right], self.config.resize)
        mask = sample.ids[top:bottom, left:right] == sample.wanted[instance]
        return self.teacher.mask(prepared, mask[None], self.config.resize)

    def put(self, inputs: Tensor) -> None:
        self.inputs[self.filled : self.filled + len(inputs)] = inputs
        self.filled += len(inputs)
        if self.filled == self.config.batch:
            self.flush()

    def flush(self) -> None:
        inputs, self.filled = self.inputs[: self.filled], 0
        for view, rows in enumerate(self.rows):
            rows.append(self.teacher.encode_images(inputs.flip(-1) if view else inputs, self.dtype).half())

    def finish(self) -> Tensor:
        """Encode the last, partial batch and return all rows (views, rows, D) float16."""
        if self.filled:
            self.flush()
        if not self.rows[0]:
            return torch.zeros(self.config.views, 0, self.teacher.dim, dtype=torch.float16)
        return torch.stack([torch.cat(rows) for rows in self.rows])


class _ByAttention(_ByPixels):
    """One input per image; its instances are further CLS tokens, each of which attends to its own patches only."""

    def __init__(self, teacher: Teacher, config: TokensConfig) -> None:
        self.grid = teacher.patches
        super().__init__(teacher, config)
        self.own: list[Tensor] = []  # (k, P) for each input of the partial batch
        # For each of these inputs: whether it yields its image's own row.
        self.shown: list[bool] = []

    def patches(self, ids: np.ndarray, wanted: np.ndarray) -> Tensor:
        place = self.teacher.place(ids.shape, self.config.resize)
        patch = self.teacher.image_size // self.grid[0]
        return torch.from_numpy(own_patches(ids, wanted, grid=self.grid, patch=patch, place=place))

    def add(self, sample: _Decoded) -> None:
        prepared = self.teacher.prepare(sample.image, self.config.resize)
        for number, own in enumerate(sample.own.split(INSTANCES_A_PASS)):
            self.own.append(own)
            self.shown.append(number == 0)
            self.put(prepared[None])

    def flush(self) -> None:
        inputs, self.filled = self.inputs[: self.filled], 0
        counts = torch.tensor([len(own) for own in self.own])
        own = torch.nn.utils.rnn.pad_sequence(self.own, batch_first=True).to(inputs.device)  # (B, O, P)
        wanted = torch.cat([torch.tensor(self.shown)[:, None], torch.arange(own.shape[1]) < counts[:, None]], 1)
        wanted = wanted.flatten().nonzero().flatten().to(inputs.device)
        self.own, self.shown = [], []
        for view, rows in enumerate(self.rows):
            if view:
                inputs, own = inputs.flip(-1), own.unflatten(-1, self.grid).flip(-1).flatten(-2)
            rows.append(self.teacher.encode_by_instance(inputs, own, self.dtype).flatten(0, 1)[wanted].half())
