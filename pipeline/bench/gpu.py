"""What only a GPU can show, in one run of minutes: correctness first, then speed and memory, then a profile.

`python -m pipeline.bench.gpu --minutes 10 --json FILE`. The sections run in the order of `SECTIONS`; none starts after
the minutes are over, and FILE holds all rows so far after every row, so that a run that is cut off leaves what it has.
A section that fails leaves its traceback and the others run; the exit status is then 1. On a CPU every section runs at
toy size, which shows that it works and nothing else.

In a row named "error of ..." the reference is the error allowed, so a ratio above 1 is a fault.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from models import deformable_torch
from models.deformable import sample_levels
from models.projector import Projector
from models.segmenter import build_segmenter
from pipeline.bench import cache, inference, segmenter, train
from pipeline.bench.harness import Row, machine, numbered_bank, table, write_rows
from pipeline.inference.maps import Classes, Output, Thresholds, panoptic_map
from pipeline.runtime import Runtime
from pipeline.teacher.text_bank import TextBank
from pipeline.training.config import MASKFORMER, SegmenterConfig, V2CConfig
from pipeline.training.criteria import V2CCriterion
from pipeline.training.loader import Batch
from pipeline.training.loop import image_generator, parameter_groups
from pipeline.training.loop import train as training_loop

SEGMENTS, TEXT_DIM, SEEN = 11, 512, 119
TINY = SegmenterConfig(
    backbone="resnet18", backbone_weights=None, queries=10, dim=32, heads=4, encoder_layers=1, encoder_ffn=64,
    decoder_layers=2, decoder_ffn=64,
)  # fmt: skip
# Stage 1 of the COCO presets with an R50; the presets themselves lie above this package.
PRESETS = {
    "coco-zps-r50": V2CConfig(decay="step", precision="bfloat16"),
    "coco-zps-maskformer-r50": V2CConfig(
        segmenter=MASKFORMER,
        mask_loss="full",
        class_weight=1.0,
        bce_weight=20.0,
        dice_weight=1.0,
        weight_decay=1e-4,
        decay="step",
        precision="bfloat16",
    ),
}
MEMORY_LIMIT = 72.0  # GB a card of 80 GB leaves, other processes and fragmentation deducted


@dataclass(frozen=True, kw_only=True)
class Card:
    """The device, and whether sections run at full size or, on a CPU, at toy size."""

    runtime: Runtime
    device: torch.device

    @property
    def full(self) -> bool:
        return self.device.type == "cuda"

    def row(self, name: str, ours: float, reference: float, unit: str, dtype: str = "float32") -> Row:
        return Row(name=name, ours=ours, reference=reference, unit=unit, device=machine(self.device), dtype=dtype)

    def synchronize(self) -> None:
        if self.full:
            torch.cuda.synchronize(self.device)


def sampling_is_right(card: Card) -> Iterator[Row]:
    """Deformable sampling and its four gradients in float32 against float64 in PyTorch: relative errors in the 2-norm,
    at the pixel decoder's sizes for 1024 px."""
    sides = (32, 64, 128) if card.full else (4, 8)
    shapes = tuple((side, side) for side in sides)
    cells, heads, width, points = sum(side * side for side in sides), 8, 32, 4
    rng = torch.Generator().manual_seed(0)
    value = torch.randn(2, cells, heads, width, generator=rng)
    places = [torch.rand(2, cells, heads, len(sides), points, generator=rng) for _ in range(3)]
    scale = torch.tensor(sides)[:, None]
    # a tenth of the samples beyond the border
    inputs = [value, places[0] * 1.1 * scale - 0.1 * scale, places[1] * 1.1 * scale - 0.1 * scale, places[2]]
    grad = torch.randn(2, cells, heads * width, generator=rng)

    def run(dtype: torch.dtype, sample: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [tensor.to(card.device, dtype).requires_grad_() for tensor in inputs]
        out = sample(leaves[0], shapes, *leaves[1:])
        out.backward(grad.to(card.device, dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    exact, ours = run(torch.float64, _plain_sampling), run(torch.float32, sample_levels)
    names = ("samples", "the gradient of values", "of x", "of y", "of weights")
    for name, one, other in zip(names, ours, exact, strict=True):
        yield card.row(f"error of deformable sampling: {name}", _error(one, other), 1e-5, "relative")
    if torch.cuda.device_count() > 1:
        other = torch.device("cuda", 1)
        moved = sample_levels(inputs[0].to(other), shapes, *(tensor.to(other) for tensor in inputs[1:]))
        yield card.row(
            "error of deformable sampling on cuda:1", _error(moved.to(card.device), exact[0]), 1e-5, "relative"
        )


class _Plain(torch.autograd.Function):
    """`deformable_torch`'s two functions as one differentiable one."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, shapes: Any, *places: Tensor) -> Tensor:
        ctx.shapes = shapes
        ctx.save_for_backward(value, *places)
        return deformable_torch.sample(value, shapes, *places)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        value, *places = ctx.saved_tensors
        d_value, *d_places = deformable_torch.sample_backward(grads[0], value, ctx.shapes, *places)
        return d_value, None, *d_places


def _plain_sampling(value: Tensor, shapes: Any, *places: Tensor) -> Tensor:
    return _Plain.apply(value, shapes, *places)  # pyright: ignore[reportReturnType]


def _error(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other| in the 2-norm."""
    difference = one.double().cpu() - other.double().cpu()
    return float(difference.norm() / other.double().cpu().norm())


@contextmanager
def _full_precision() -> Iterator[None]:
    """Without TF32, so that float32 on a GPU means what it means on a CPU."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def a_step_is_right(card: Card) -> Iterator[Row]:
    """Losses and gradient of one part of stage 1 in float32, device against CPU, same weights, images and points."""
    for architecture in ("mask2former", "maskformer"):
        config = V2CConfig(
            segmenter=replace(TINY, architecture=architecture, frozen_batchnorm=True),
            mask_loss="points" if architecture == "mask2former" else "full",
            batch=2,
        )
        found = []
        with _full_precision():
            for device in (torch.device("cpu"), card.device):
                stage = _Stage.of(config, 64, device)
                criterion = stage.criterion()
                rngs = [image_generator(0, 0, i) for i in range(2)]
                terms = criterion.terms(stage.batch, rngs, totals=criterion.totals(stage.batch))
                torch.stack(list(terms.values())).sum().backward()
                gradient = torch.cat([p.grad.flatten() for p in stage.parameters() if p.grad is not None])
                found.append((torch.stack(list(terms.values())).detach(), gradient))
        (losses, gradient), (our_losses, our_gradient) = found
        yield card.row(
            f"error of {architecture}'s losses against the CPU", _error(our_losses, losses), 1e-5, "relative"
        )
        yield card.row(
            f"error of {architecture}'s gradient against the CPU", _error(our_gradient, gradient), 1e-3, "relative"
        )


def maps_are_right(card: Card) -> Iterator[Row]:
    """Share of the pixels with another segment in the panoptic map, device against CPU, float32 without TF32, and
    with it in convolutions, which is torch's default and what the frozen segmenter's passes do."""
    size = 512 if card.full else 64
    config = SegmenterConfig(backbone_weights=None) if card.full else TINY
    torch.manual_seed(0)
    network, projector = build_segmenter(**asdict(config)).eval(), _projector(config).eval()
    images = torch.randn(1, 3, size, size)
    text = normalize(torch.randn(SEEN, TEXT_DIM), dim=-1)

    @torch.inference_mode()
    def run(device: torch.device, threshold: float) -> tuple[Tensor, Tensor]:
        classes = Classes(
            text=text.to(device),
            ids=torch.arange(1, SEEN + 1, device=device),
            isthing=torch.arange(SEEN, device=device) < 80,
            seen=torch.ones(SEEN, dtype=torch.bool, device=device),
        )
        result = network.to(device)(images.to(device), dense=False)
        output = Output(
            features=result.features[-1][0], masks=result.masks[-1][0],
            padded_size=(size, size), image_size=(size, size), original_size=(size, size),
        )  # fmt: skip
        logits = projector.to(device).logits(projector(output.features), classes.text)
        thresholds = Thresholds(object_threshold=threshold, overlap_threshold=0.0)
        return torch.as_tensor(panoptic_map(output, logits, classes, thresholds)[0]), logits.sigmoid().amax(1)

    with _full_precision():
        scores = run(torch.device("cpu"), 0.0)[1].sort().values
        # in the widest gap between the queries' scores, so that rounding keeps and drops the same ones
        gap = int(scores.diff().argmax())
        threshold = float(scores[gap : gap + 2].mean())
        expected, exact = (run(device, threshold)[0] for device in (torch.device("cpu"), card.device))
    for name, found in (("float32", exact), ("TF32 in convolutions, torch's default", run(card.device, threshold)[0])):
        share = float((found.cpu() != expected).float().mean())
        yield card.row(f"error of the panoptic map, {name}", share, 1e-2, "share of pixels")


def rows_in_half_precision(card: Card) -> Iterator[Row]:
    """The teacher's rows in bfloat16 against float32: 1 - cosine, the largest of 64 inputs; random weights."""
    from models.teacher import load_teacher

    teacher = load_teacher(
        name=cache.MODEL if card.full else "small", pretrained="random", fill="zero", device=card.device
    )
    size = teacher.image_size
    inputs = torch.randn(64 if card.full else 2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(
        card.device
    )
    rows = [teacher.encode_images(inputs, dtype) for dtype in (torch.float32, torch.bfloat16)]
    distance = float((1 - (rows[0].double() * rows[1].double()).sum(1)).max())
    yield card.row("error of the teacher's rows in bfloat16, 1 - cosine", distance, 5e-3, "1 - cosine", "bfloat16")


def presets(card: Card) -> Iterator[Row]:
    """A training step of the COCO presets with an R50: its floor, and its peak memory, optimiser included.

    The batch lies in host memory and is copied in every step; decoding is not part of it. The floor is the step's FLOPs
    at the rate of a large matrix product in the same precision.
    """
    for name, config in PRESETS.items():
        size = config.augment.size
        if not card.full:
            config, size = replace(config, segmenter=TINY, batch=2, accumulate=1, precision="float32"), 64
        yield from _step_rows(card, name, config, size)


def _step_rows(card: Card, name: str, config: V2CConfig, size: int) -> Iterator[Row]:
    what = f"{name}, batch {config.batch} of {size} px" + f" in {config.accumulate} parts" * (config.accumulate > 1)
    stage = _Stage.of(config, size, card.device)
    if card.full:
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = statistics.median(stage.train(card, steps=10 if card.full else 3)[1:])
    except torch.cuda.OutOfMemoryError:
        available = torch.cuda.get_device_properties(card.device).total_memory / 1e9
        yield card.row(f"peak memory of {what}: more than", available, MEMORY_LIMIT, "GB", config.precision)
        return
    if card.full:
        peak = torch.cuda.max_memory_allocated() / 1e9
        yield card.row(f"peak memory of {what}", peak, MEMORY_LIMIT, "GB", config.precision)
    with FlopCounterMode(display=False) as counter:
        stage.train(card, steps=1)
    rate = segmenter.rate(card.device, getattr(torch, config.precision))
    floor = f"a step of {what} ({config.batch / seconds:.1f} images/s), against its floor, "
    floor += f"{counter.get_total_flops() / 1e12:.1f} TFLOP at {rate / 1e12:.0f} TFLOP/s"
    yield card.row(floor, seconds, counter.get_total_flops() / rate, "s", config.precision)


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """Stage 1 with random weights, and a batch of random images with a grid of segments, all tokens random."""

    config: V2CConfig
    network: Any
    projector: Projector
    bank: TextBank
    global_tokens: Tensor
    batch: Batch

    @classmethod
    def of(cls, config: V2CConfig, size: int, device: torch.device) -> _Stage:
        torch.manual_seed(0)
        settings = replace(config.segmenter, backbone_weights=None)
        network, projector = build_segmenter(**asdict(settings)), _projector(settings)
        tokens = normalize(torch.randn(config.bank + config.batch, TEXT_DIM), dim=-1)
        text = normalize(torch.randn(SEEN, TEXT_DIM), dim=-1)
        place = torch.arange(size)
        ids = (place[:, None] * 3 // size) * 4 + place[None] * 4 // size
        masks = torch.stack([ids == i for i in range(SEGMENTS)])
        batch = Batch(
            image_ids=list(range(config.batch)),
            images=torch.randn(config.batch, 3, size, size),
            global_rows=torch.arange(config.batch),
            labels=[torch.randint(SEEN, (SEGMENTS,)) for _ in range(config.batch)],
            masks=[masks.roll(i, 1) for i in range(config.batch)],
            instance_tokens=[normalize(torch.randn(SEGMENTS, TEXT_DIM), dim=-1) for _ in range(config.batch)],
        )
        bank = numbered_bank(text, seen=SEEN)
        return cls(
            config=config,
            network=network.to(device).train(),
            projector=projector.to(device).train(),
            bank=bank,
            global_tokens=tokens.to(device),
            batch=batch,
        )

    def criterion(self) -> V2CCriterion:
        return V2CCriterion(self.network, self.projector, self.bank, self.global_tokens, self.config)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        yield from (p for module in (self.network, self.projector) for p in module.parameters() if p.requires_grad)

    def train(self, card: Card, *, steps: int) -> list[float]:
        """`steps` steps of the training loop, from no saved state: the seconds of each but the last, whose end is the
        end of saving. The loop waits for the device in every step, so that the clock needs no further wait."""
        schedule = replace(self.config, steps=steps, lr=1e-6)
        modules = {"segmenter": self.network, "projector": self.projector}
        runtime = replace(card.runtime, progress=False, checkpoint_every=10**9)
        began: list[float] = []

        def batches(start: int) -> Iterator[Batch]:
            while True:
                began.append(time.perf_counter())
                yield self.batch

        with tempfile.TemporaryDirectory() as folder:
            training_loop(
                "v2c",
                folder=Path(folder),
                schedule=schedule,
                modules=modules,
                groups=parameter_groups(modules, schedule),
                batches=batches,
                losses=self.criterion(),
                runtime=runtime,
                precision=self.config.precision,
            )
        return np.diff(began).tolist()


def _projector(config: SegmenterConfig) -> Projector:
    return Projector(dim=config.dim, text_dim=TEXT_DIM, hidden=512, layers=3)


def against_transformers(card: Card, *, compiled: bool) -> Iterator[Row]:
    """Training step, inference and memory of Mask2Former R50 at 1024 px against transformers', in bfloat16."""
    if not card.full:
        return
    for batch in (1, 4):
        yield from segmenter.times(card.device, 1024, batch, compiled=compiled)
    if not compiled:
        yield segmenter.memory(card.device, 1024, 4)


def teacher(card: Card) -> Iterator[Row]:
    """Tokens of a tar against bare encode_image, both methods."""
    if card.full:
        yield from cache.encoding_rows(card.device, images=300, batches=(128, 256, 512))


def feeding(card: Card) -> Iterator[Row]:
    """A whole training of stage 1 from tars: seconds a step, and how many of them wait for data."""
    if card.full:
        yield from train.feeding_rows(card.runtime, steps=4)


def later_stages(card: Card) -> Iterator[Row]:
    """Stages 2 and 3 over cached queries, from 200 steps."""
    settings: dict[str, Any] = (
        {"views": 2000, "steps": 200} if card.full else {"views": 40, "steps": 2, "size": (64, 64)}
    )
    with tempfile.TemporaryDirectory() as folder:
        yield from train.epochs(Path(folder), card.runtime, **settings)


def prediction(card: Card) -> Iterator[Row]:
    """From a decoded image to its panoptic map."""
    if card.full:
        yield from inference.inference_rows(card.runtime)


def profile(card: Card, *, text: Path | None) -> Iterator[Row]:
    """Where a step of coco-zps-r50 waits for the device, and its kernels by time, written to `text`."""
    from torch.profiler import ProfilerActivity

    config = PRESETS["coco-zps-r50"]
    size = config.augment.size
    if not card.full:
        config, size = replace(config, segmenter=TINY, batch=2, precision="float32"), 64
    stage = _Stage.of(config, size, card.device)
    stage.train(card, steps=2)
    if card.full:
        places = _waits(partial(stage.train, card, steps=1))
        for place, count in places.most_common():
            print(f"waits {count}: {place}", file=sys.stderr)
        yield card.row("waits for the device in a step, against two", places.total(), 2, "waits", config.precision)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * card.full]) as found:
        stage.train(card, steps=1)
        card.synchronize()
    by = "self_device_time_total" if card.full else "self_cpu_time_total"
    shown = found.key_averages().table(sort_by=by, row_limit=45, max_name_column_width=90)
    if text:
        text.write_text(shown, encoding="utf-8")


def _waits(step: Callable[[], object]) -> Counter[str]:
    """File and line of every operation that waits for the device, by torch's own warnings."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = (f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message).lower())
    # the state that is saved after the step
    return Counter(place for place in places if not place.startswith("checkpoints.py"))


SECTIONS: dict[str, Callable[[Card], Iterator[Row]]] = {
    "sampling": sampling_is_right,
    "step": a_step_is_right,
    "maps": maps_are_right,
    "half": rows_in_half_precision,
    "presets": presets,
    "profile": partial(profile, text=None),
    "transformers": partial(against_transformers, compiled=False),
    "feeding": feeding,
    "teacher": teacher,
    "later": later_stages,
    "prediction": prediction,
    "compiled": partial(against_transformers, compiled=True),
}


def main(words: list[str] | None = None) -> int:
    """Run the sections; returns the exit status: 1 when a section failed or an error is above its limit."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="no section starts after this time")
    parser.add_argument("--json", type=Path, help="write the rows to this file, and the profile beside it")
    parser.add_argument("--device", default="auto", help="auto, or a torch device")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="SECTION",
        help="run only these, in this order: " + ", ".join(SECTIONS),
    )
    options = parser.parse_args(words)
    runtime = Runtime(device=options.device, progress=False)
    card = Card(runtime=runtime, device=runtime.torch_device())
    sections = dict(SECTIONS)
    if options.json:
        sections["profile"] = partial(profile, text=options.json.with_suffix(".profile.txt"))
    began, rows, failed = time.perf_counter(), [], []
    for name in options.only:
        passed = time.perf_counter() - began
        if passed > 60 * options.minutes:
            print(f"{name}: not run, the {options.minutes:g} minutes are over", file=sys.stderr, flush=True)
            continue
        print(f"{name}: at {passed:.0f} s", file=sys.stderr, flush=True)
        try:
            for row in sections[name](card):
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
                if options.json:
                    write_rows(options.json, rows)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        gc.collect()
        torch.cuda.empty_cache()
    from rich.console import Console

    Console(width=200).print(table(rows))
    failed += [row.name for row in rows if row.name.startswith("error of") and not row.ratio <= 1]
    print(f"failed: {', '.join(failed) or 'nothing'}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
