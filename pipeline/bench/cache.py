"""The speed of caching the teacher's tokens, from a tar of images to a group of rows.

Images are generated at COCO's commonest size or, with `COCO_ROOT` set, are the first of COCO's val2017. The teacher is
a ViT-B/16 with random weights, since only speed is measured.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from models.teacher import Teacher, load_teacher
from pipeline.bench.harness import Row, alternate, machine
from pipeline.data.benchmarks import Benchmark, Category
from pipeline.runtime import Runtime
from pipeline.teacher.config import TokensConfig
from pipeline.teacher.encode import encode_tar
from pipeline.world.draw import draw_scene
from pipeline.world.names import SHAPES, stuff_names, thing_names
from storage.shards import Sample, Segment, decode_ids, decode_image, encode_ids, read_shard, write_shard

HEIGHT, WIDTH = 480, 640
MODEL = "ViT-B-16-quickgelu"  # of the COCO presets
EVERYTHING = Benchmark(
    name="all", categories=(Category(id=1, name="thing", isthing=True),), unseen_ids=(), protocol="none"
)


def rows(runtime: Runtime, *, full: bool = False) -> Iterator[Row]:
    """Every row of `zs-seg bench cache`: seconds to cache a tar, and to decode an image."""
    device = runtime.torch_device()
    gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        work = _work(Path(folder), device, images=(600 if gpu else 5) * (4 if full else 1))
        work = work.fastest((64, 128, 256, 512) if gpu else (1, 4, 8, 16, 32, 64) if full else (8, 32))
        about: dict[str, Any] = {"unit": "s", "device": machine(device), "dtype": work.config.dtype}
        yield from _encoding(work, about, repeat=3 if gpu or full else 2)
        ours, script = alternate(work.cache, work.script, repeat=1, warmup=0, device=device)
        yield Row(name=f"{work}, against PIL and a call an input", ours=ours, reference=script, **about)
        images = len(work.samples)
        ours, theirs = alternate(work.decode, work.decode_with_torchvision, repeat=3)
        yield Row(
            name="decoding of an image and its segment ids, one core, against torchvision",
            ours=ours / images,
            reference=theirs / images,
            unit="s",
            device="CPU, 1 core",
            dtype="uint8",
        )


def encoding_rows(device: torch.device, *, images: int, batches: Sequence[int]) -> Iterator[Row]:
    """Seconds to cache a tar of `images`, by pixels against bare encode_image and by attention against by pixels, in
    the fastest of `batches`."""
    with tempfile.TemporaryDirectory() as folder:
        work = _work(Path(folder), device, images=images).fastest(batches)
        yield from _encoding(work, {"unit": "s", "device": machine(device), "dtype": work.config.dtype}, repeat=3)


def _encoding(work: _Work, about: Mapping[str, Any], *, repeat: int) -> Iterator[Row]:
    device = work.teacher.mean.device
    ours, bare = alternate(work.cache, work.bare, repeat=repeat, device=device)
    yield Row(
        name=f"{work}, against bare encode_image, batches of {work.config.batch}", ours=ours, reference=bare, **about
    )
    ours, pixels = alternate(work.by_attention, work.cache, repeat=1, warmup=int(device.type == "cuda"), device=device)
    yield Row(name=f"{work}, by attention against by pixels", ours=ours, reference=pixels, **about)


def _work(folder: Path, device: torch.device, *, images: int) -> _Work:
    tar = folder / "bench.tar"
    write_shard(tar, _samples(images))
    return _Work(
        tar=tar,
        teacher=load_teacher(name=MODEL, pretrained="random", fill="zero", device=device),
        config=TokensConfig(dtype="bfloat16" if device.type == "cuda" else "float32"),
    )


@dataclass(frozen=True, kw_only=True)
class _Work:
    """The timed functions, all on the tar's inputs: one per image and one per instance."""

    tar: Path
    teacher: Teacher
    config: TokensConfig

    def __str__(self) -> str:
        images = len(self.samples)
        return f"tokens of {images} images and {self.inputs - images} instances, {MODEL}"

    def fastest(self, batches: Sequence[int]) -> _Work:
        """The same with the batch of `batches` that encodes an input fastest."""
        return replace(self, config=replace(self.config, batch=min(batches, key=self.seconds_an_input)))

    @cached_property
    def samples(self) -> list[Sample]:
        return list(read_shard(self.tar))

    @property
    def inputs(self) -> int:
        return sum(1 + len(sample.segments) for sample in self.samples)

    @cached_property
    def ready(self) -> Tensor:
        """Random inputs (N, 3, S, S) in the device's memory, as many as the tar has."""
        size = self.teacher.image_size
        return torch.randn(self.inputs, 3, size, size, device=self.teacher.mean.device).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.config.dtype)

    def bare(self) -> None:
        self._bare(self.ready, self.config.batch)

    def _bare(self, ready: Tensor, batch: int) -> None:
        for inputs in ready.split(batch):
            self.teacher.encode_images(inputs, self.dtype)

    def seconds_an_input(self, batch: int) -> float:
        """Seconds per input of bare encode_image, in full batches."""
        ready = self.ready[: max(len(self.ready) // batch, 1) * batch]
        ours, _ = alternate(
            lambda: self._bare(ready, batch), lambda: None, repeat=1, warmup=0, device=self.teacher.mean.device
        )
        return ours / len(ready)

    def cache(self) -> None:
        self._encode(self.config)

    def by_attention(self) -> None:
        self._encode(replace(self.config, method="attention"))

    def _encode(self, config: TokensConfig) -> None:
        group = self.tar.with_suffix(".zarr")
        encode_tar(
            self.teacher, self.tar, group, config, EVERYTHING, hide=False, progress=lambda images, instances: None
        )

    @torch.no_grad()
    def script(self) -> None:
        """The straightforward script: open_clip's own preprocessing, and one call per image and per instance."""
        settings = self.teacher.clip.visual.preprocess_cfg | {"resize_mode": "squash"}
        prepare: Any = image_transform_v2(PreprocessCfg(**settings), is_train=False)
        clip, device = self.teacher._clip(self.dtype), self.teacher.mean.device
        for sample in self.samples:
            image, ids = decode_image(sample), decode_ids(sample)
            shown = [image, *(np.where((ids == s.id)[..., None], image, 0) for s in sample.segments)]
            for picture in shown:
                prepared = prepare(Image.fromarray(picture.astype(np.uint8)))[None]
                clip.encode_image(prepared.to(device, self.dtype)).float().cpu()

    def decode(self) -> None:
        for sample in self.samples:
            decode_image(sample)
            decode_ids(sample)

    def decode_with_torchvision(self) -> None:
        for sample in self.samples:
            jpeg, png = (torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in (sample.image, sample.png))
            decode_jpeg(jpeg, ImageReadMode.RGB)
            red, green, blue = decode_png(png, ImageReadMode.RGB).int()
            _ = red + 256 * green + 65536 * blue


def _samples(count: int) -> Iterator[Sample]:
    """`count` samples, one at a time in memory; generated ones repeat after 32."""
    root = os.environ.get("COCO_ROOT", "")
    if root:
        yield from coco_samples(Path(root), count)
        return
    names: dict[str, Any] = {"things": list(thing_names(SHAPES)), "stuff": list(stuff_names())}
    drawn = []
    for number in range(min(count, 32)):
        scene = draw_scene(np.random.default_rng(number), size=WIDTH, **names)
        ids, image = scene.ids[:HEIGHT], scene.image[:HEIGHT]
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=92)
        segments = tuple(
            Segment(id=int(i), category_id=1, area=int(area), iscrowd=False)
            for i, area in zip(*np.unique(ids, return_counts=True), strict=True)
            if i
        )
        drawn.append((file.getvalue(), encode_ids(ids), segments))
    for number in range(count):
        jpeg, png, segments = drawn[number % len(drawn)]
        yield Sample(image_id=number + 1, image=jpeg, png=png, height=HEIGHT, width=WIDTH, segments=segments)


def coco_samples(root: Path, count: int) -> Iterator[Sample]:
    """The first samples of val2017 in a folder of COCO's layout, all segments of one class."""
    content = json.loads((root / "annotations" / "panoptic_val2017.json").read_bytes())
    images = {image["id"]: image for image in content["images"]}
    for annotation in content["annotations"][:count]:
        image = images[annotation["image_id"]]
        segments = tuple(
            Segment(id=s["id"], category_id=1, area=s["area"], iscrowd=False) for s in annotation["segments_info"]
        )
        yield Sample(
            image_id=image["id"],
            image=(root / "val2017" / image["file_name"]).read_bytes(),
            png=(root / "annotations" / "panoptic_val2017" / annotation["file_name"]).read_bytes(),
            height=image["height"],
            width=image["width"],
            segments=segments,
        )
