"""The speed of training data: the loader alone, the cores that feed a GPU, waiting for data per step, stages 2 and 3
against a pass over images.

Images are those of the folder `COCO_ROOT`, if that is set, else generated scenes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from models.folding import for_inference
from models.generator import Generator
from models.projector import Projector
from models.segmenter import build_segmenter
from models.teacher import Teacher
from pipeline.bench.harness import Row, machine, numbered_bank
from pipeline.data.config import AugmentConfig, CocoConfig, ShardConfig
from pipeline.data.transforms import place_for_training
from pipeline.line import Config, line
from pipeline.runtime import Runtime
from pipeline.teacher.config import TeacherConfig
from pipeline.teacher.text_bank import TextBank, open_text
from pipeline.training.config import CPAConfig, G2SConfig, SegmenterConfig, V2CConfig
from pipeline.training.criteria import CPACriterion, G2SCriterion, freeze
from pipeline.training.curves import read_curves
from pipeline.training.distributed import launch
from pipeline.training.loader import TrainingData
from pipeline.training.loop import parameter_groups, train
from pipeline.training.query_loader import query_batches
from pipeline.v2c import train_model
from pipeline.world.config import ScenesConfig
from storage.queries import read_queries, write_queries
from storage.shards import Sample
from storage.store import Store

COCO_IMAGES = 118_287  # COCO's training images
FED = 25  # images a second that a GPU may take at 1024 px, an estimate
QUERIES, DIM, TEXT_DIM = 100, 256, 512
SEEN, UNSEEN = 119, 14


def rows(runtime: Runtime, *, full: bool = False) -> Iterator[Row]:
    """Default: few images and steps. `full`: 100 images, and an epoch of stages 2 and 3 at COCO's size (6 GB)."""
    with tempfile.TemporaryDirectory() as folder:
        shards, tokens, text = _cached(Path(folder), runtime)
        yield _loading(shards, tokens, text, runtime, images=100 if full else 8)
        yield from _preparing(shards, tokens, text, images=200 if full else 16)
        yield _waiting(shards, tokens, text, Path(folder), runtime, steps=10 if full else 4)
        yield from epochs(Path(folder), runtime, views=COCO_IMAGES if full else 2000, steps=0 if full else 100)


def feeding_rows(runtime: Runtime, *, steps: int) -> Iterator[Row]:
    """Stage 1 as `_waiting` measures it, in batches of 16 and over scenes of COCO's size."""
    with tempfile.TemporaryDirectory() as folder:
        yield _waiting(*_cached(Path(folder), runtime, size=640), Path(folder), runtime, steps=steps, batch=16)


def _cached(folder: Path, runtime: Runtime, *, size: int = 96) -> tuple[Path, Path, Path]:
    """Shards, of scenes of `size` pixels, tokens of the small teacher, and its text embeddings."""
    root = os.environ.get("COCO_ROOT", "")
    config = Config(
        preset="bench",
        data=CocoConfig(root=root) if root else ScenesConfig(train_images=100, val_images=4, size=size),
        shard=ShardConfig(samples_per_tar=50),
        teacher=TeacherConfig(name="small", pretrained="shipped", fill="mean"),
    )
    store, paths = Store(folder / "store"), {}
    for step in line(config):
        if step.name == "v2c":
            break
        paths[step.name] = store.open(step.run(store=store, runtime=replace(runtime, dask="none"))).path
    return paths["shard"], paths["cache-clip"], paths["text"]


def _loading(shards: Path, tokens: Path, text: Path, runtime: Runtime, *, images: int) -> Row:
    """Seconds to load an image. Ours: tar, tokens, and a training view at 1024 px, in one thread. Reference: loose
    files, the same view, and the teacher run on the fly, one call per image and per instance, with all threads."""
    device = runtime.torch_device()
    data = TrainingData(shards, tokens, open_text(text, ""), AugmentConfig(), seed=0, workers=1)
    teacher = TeacherConfig(pretrained="random").load(runtime)
    kept = [sample for sample, _ in islice(data.plain_samples(), images)]
    with tempfile.TemporaryDirectory() as loose:
        for sample in kept:
            (Path(loose) / f"{sample.image_id}.jpg").write_bytes(sample.image)
            (Path(loose) / f"{sample.image_id}.png").write_bytes(sample.png)
        started = time.perf_counter()
        for _ in islice(data.batches(1, start=0), len(kept)):
            pass
        ours = time.perf_counter() - started
        started = time.perf_counter()
        for sample in kept:
            _load_online(Path(loose), sample, teacher, device)
        theirs = time.perf_counter() - started
    return Row(
        name=f"loading an image ({len(kept)} of them), against loose files and ViT-B/16 on the way",
        ours=ours / len(kept),
        reference=theirs / len(kept),
        unit="s",
        device=machine(device),
        dtype="float32",
    )


def _preparing(shards: Path, tokens: Path, text: Path, *, images: int) -> Iterator[Row]:
    """Seconds of one core, over all threads, to prepare a training view at 1024 px: of the CPU's part where a GPU computes
    the view, and of the whole view. Reference: the time a GPU takes for an image at `FED` images a second; the ratio is
    the number of cores that feed it.
    """
    data = TrainingData(shards, tokens, open_text(text, ""), AugmentConfig(), seed=0, workers=1)
    for what, device in (("for a GPU", torch.device("meta")), ("on the CPU alone", torch.device("cpu"))):
        batches = data.batches(1, start=0, device=device)
        next(batches)
        started = time.process_time()
        for _ in islice(batches, images):
            pass
        yield Row(
            name=f"preparing a view at 1024 px {what}, one core, against {FED} images a second ({images} of them)",
            ours=(time.process_time() - started) / images,
            reference=1 / FED,
            unit="s",
            device=machine(torch.device("cpu")),
            dtype="float32",
        )


def _load_online(folder: Path, sample: Sample, teacher: Teacher, device: torch.device) -> Tensor:
    image = torch.from_numpy(np.array(Image.open(folder / f"{sample.image_id}.jpg").convert("RGB"))).permute(2, 0, 1)
    colours = np.array(Image.open(folder / f"{sample.image_id}.png").convert("RGB"), np.int32)
    ids = torch.from_numpy(colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2])
    placement = place_for_training(ids.shape[0], ids.shape[1], AugmentConfig(), np.random.default_rng(0))
    placement.ids(ids, *placement.sources(*ids.shape))
    view = placement.image(image)
    prepared = teacher.prepare(image.to(device))
    teacher.encode_images(prepared[None])
    for segment in sample.segments:
        teacher.encode_images(teacher.mask(prepared, (ids == segment.id)[None].to(device)))
    return view


def _waiting(
    shards: Path, tokens: Path, text: Path, folder: Path, runtime: Runtime, *, steps: int, batch: int = 2
) -> Row:
    """Stage 1 with the published network, at 1024 px on a GPU and 256 px on a CPU: seconds per step spent waiting for
    data, against all seconds per step."""
    device = runtime.torch_device()
    size = 1024 if device.type == "cuda" else 256
    config = V2CConfig(
        segmenter=SegmenterConfig(backbone_weights=None),
        steps=10 * steps,
        batch=batch,
        augment=AugmentConfig(size=size),
        precision="bfloat16" if device.type == "cuda" else "float32",
    )
    out = folder / "v2c"
    out.mkdir()
    launched = replace(runtime, checkpoint_every=10**9)
    launch(train_model, config, shards, tokens, text, "", out, runtime=launched)
    later = read_curves(out)[1:]  # the first row includes the start-up
    seconds = sum(row["seconds"] for row in later) / len(later)
    waited = sum(row["seconds"] * row["waiting"] for row in later) / len(later)
    return Row(
        name=f"waiting for data in a step of stage 1, {size} px, batch {batch}",
        ours=waited,
        reference=seconds,
        unit="s",
        device=machine(device),
        dtype=config.precision,
    )


def epochs(
    folder: Path, runtime: Runtime, *, views: int, steps: int, size: tuple[int, int] = (800, 1088)
) -> Iterator[Row]:
    """An epoch of stages 2 and 3 over COCO's training images from cached queries, against a pass of the frozen R50
    segmenter over the same images (one of `size`, times their number). `steps` 0 = the whole epoch, else the
    time is extrapolated from so many steps."""
    device = runtime.torch_device()
    bank = _bank()
    _write_queries(folder / "queries", views)
    cached = read_queries(sorted((folder / "queries").glob("*.zarr")))
    projector = Projector(dim=DIM, text_dim=TEXT_DIM, hidden=512, layers=3).to(device)
    generator = Generator(dim=DIM, text_dim=TEXT_DIM, hidden=512, text_scale=1.0).to(device)
    segmenter = for_inference(build_segmenter(**asdict(SegmenterConfig(backbone_weights=None))).to(device).eval())
    image = torch.randn(1, 3, *size, device=device)
    passes = []
    with torch.inference_mode():
        for _ in range(4):
            started = time.perf_counter()
            segmenter(image, dense=False).features[-1].cpu()
            passes.append(time.perf_counter() - started)
    over_images = COCO_IMAGES * min(passes[1:])
    known: Any = {"reference": over_images, "unit": "s", "device": machine(device), "dtype": "float32"}
    for stage, config, module, step in (
        ("2", G2SConfig(), generator, lambda c: G2SCriterion(generator, freeze(projector), bank, c)),
        (
            "3",
            CPAConfig(),
            projector,
            lambda c: CPACriterion(projector, freeze(generator), bank, c, text=bank.embedding),
        ),
    ):
        module.train().requires_grad_(True)
        epoch = -(-COCO_IMAGES // config.batch)
        schedule: Any = replace(config, steps=steps or epoch)
        out = folder / f"stage {stage}"
        out.mkdir()
        started = time.perf_counter()
        train(
            f"stage {stage}",
            folder=out,
            schedule=schedule,
            modules={"module": module},
            groups=parameter_groups({"module": module}, schedule),
            batches=lambda start, c=schedule: query_batches(cached, c, start, matched=True),
            losses=step(schedule),
            runtime=runtime,
        )
        taken = (time.perf_counter() - started) / schedule.steps * epoch
        how = "" if not steps else f", from {steps} steps"
        yield Row(
            name=f"an epoch of stage {stage} of COCO's size{how}, against a pass over the images", ours=taken, **known
        )
    if not steps:
        cached_bytes = sum(file.stat().st_size for file in (folder / "queries").rglob("*") if file.is_file())
        yield Row(
            name="memory of the process after these epochs, against the cached queries",
            ours=_resident(),
            reference=cached_bytes / 1e6,
            unit="MB",
            device=machine(device),
            dtype="float16",
        )


def _bank() -> TextBank:
    classes = SEEN + UNSEEN
    rows = torch.randn(classes, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    return numbered_bank(normalize(rows, dim=-1), seen=SEEN)


def _write_queries(folder: Path, views: int, *, a_group: int = 1000, found: int = 11) -> None:
    """Write random queries of `views` images, `found` per view matched to a segment of a seen class, in groups of a
    tar's size, `a_group`."""
    rng = np.random.default_rng(0)
    for number, first in enumerate(range(0, views, a_group)):
        n = min(a_group, views - first)
        segment = np.full((n, QUERIES), -1)
        segment[:, :found] = np.arange(found)
        category = np.where(segment >= 0, rng.integers(0, SEEN, segment.shape), -1)
        feature = rng.standard_normal((n, QUERIES, DIM), np.float32)
        image_id = np.arange(first, first + n)
        path = folder / f"train-{number:06d}.zarr"
        write_queries(path, feature=feature, segment=segment, category=category, image_id=image_id, view=np.zeros(n))


def _resident() -> float:
    """MB of this process's own memory, without pages of mapped files, which the system can drop at any time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1.024e-3
