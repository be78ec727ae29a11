"""Our Mask2Former against transformers', R50, with equal weights and input: forward pass, training step, memory.

A training step is forward pass, matching, losses on all ten outputs, backward pass and AdamW, each side with its own
code: ours matches at points with the projector's logits, the reference with its class head. In half precision both run
under autocast.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from models.folding import for_inference
from models.projector import Projector
from pipeline.bench.harness import Row, alternate, machine, numbered_bank
from pipeline.bench.reference import build_mask2former, ours_of_mask2former
from pipeline.runtime import Runtime
from pipeline.training.config import V2CConfig
from pipeline.training.criteria import V2CCriterion
from pipeline.training.loader import Batch

CLASSES, SEGMENTS, TEXT_DIM = 133, 12, 512


def rows(runtime: Runtime, *, full: bool = False) -> Iterator[Row]:
    """Default: batch 1 at 512 px eager. `full`: 512 and 1024 px, batch 1 and 2 (a GPU: up to 8), eager and compiled."""
    device = runtime.torch_device()
    gpu = device.type == "cuda"
    batches = ((1, 2, 4, 8) if gpu else (1, 2)) if full else (1,)
    for size in (512, 1024) if full or gpu else (512,):
        for batch in batches:
            for compiled in (False, True) if full else (False,):
                yield from times(device, size, batch, compiled=compiled)
            yield memory(device, size, batch)


def times(device: torch.device, size: int, batch: int, *, compiled: bool) -> Iterator[Row]:
    """Seconds of inference and of a training step, each against transformers' and, eager, against its floor."""
    what = f"{size} px, batch {batch}" + ", compiled" * compiled
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    repeat = 20 if device.type == "cuda" else 5
    images = _images(size, batch, device)
    for name, make, times in (("inference", _inference, repeat), ("training step", _training, max(repeat // 2, 3))):
        ours, reference = make(images, compiled=compiled)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            taken = alternate(ours, reference, repeat=times, warmup=3 if compiled else 1, device=device)
        known: Any = {"unit": "s", "device": machine(device), "dtype": str(dtype)[6:]}
        yield Row(name=f"{name}, {what}", ours=taken[0], reference=taken[1], **known)
        if not compiled:
            with (
                FlopCounterMode(display=False) as counter,
                torch.autocast(device.type, dtype, enabled=dtype is torch.bfloat16),
            ):
                ours()
            flop, limit = counter.get_total_flops(), rate(device, dtype)
            floor = f"{name} against its floor, {what}: {flop / 1e9:.0f} GFLOP at {limit / 1e9:.0f} GFLOP/s"
            yield Row(name=floor, ours=taken[0], reference=flop / limit, **known)


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, an upper bound for convolutions and products on this device."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds, _ = alternate(lambda: a @ b, lambda: None, repeat=10, device=device)
    return 2 * size**3 / seconds


def _images(size: int, batch: int, device: torch.device) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)


def _compile(network: nn.Module, compiled: bool) -> Callable[..., Any]:
    return torch.compile(network) if compiled else network


def _inference(images: Tensor, *, compiled: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Features and masks of the last output; the reference always computes those of all ten."""
    built = build_mask2former(classes=CLASSES)
    segmenter = ours_of_mask2former(built).to(images.device)
    ours = _compile(segmenter, True) if compiled else for_inference(segmenter)
    theirs = _compile(built.to(images.device), compiled)  # pyright: ignore[reportArgumentType]

    @torch.inference_mode()
    def run_ours() -> Any:
        output = ours(images, dense=False)
        return output.features[-1], output.masks[-1]

    @torch.inference_mode()
    def run_theirs() -> Any:
        return theirs(pixel_values=images)

    return run_ours, run_theirs


def _training(images: Tensor, *, compiled: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    return _our_training(images, compiled=compiled), _their_training(images, compiled=compiled)


def _targets(images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """A grid of SEGMENTS boxes on every image: labels (O,) and masks (O, H, W)."""
    size = images.shape[-1]
    place = torch.arange(size, device=images.device)
    ids = (place[:, None] * 3 // size) * 4 + place[None] * 4 // size
    masks = torch.stack([ids == i for i in range(SEGMENTS)])
    labels = torch.arange(SEGMENTS, device=images.device)
    return [labels] * len(images), [masks] * len(images)


def _frozen_batchnorm(network: nn.Module) -> nn.Module:
    network.train()
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval().requires_grad_(False)
    return network


def _optimizer(*networks: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-6, fused=True)


def _our_training(images: Tensor, *, compiled: bool) -> Callable[[], None]:
    """A training step of stage 1 without the alignment losses, which the reference does not have."""
    device = images.device
    segmenter = _frozen_batchnorm(ours_of_mask2former(build_mask2former(classes=CLASSES)).to(device))
    projector = Projector(dim=256, text_dim=TEXT_DIM, hidden=512, layers=3).to(device)
    optimizer = _optimizer(segmenter, projector)
    text = normalize(torch.randn(CLASSES, TEXT_DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    bank = numbered_bank(text, seen=CLASSES)
    network: Any = _compile(segmenter, compiled)
    precision: Any = "bfloat16" if images.is_cuda else "float32"
    config = V2CConfig(steps=1, batch=len(images), lr=1e-6, global_weight=0.0, instance_weight=0.0, precision=precision)
    stage_1 = V2CCriterion(network, projector, bank, torch.zeros(1, TEXT_DIM, device=device), config)
    labels, masks = _targets(images)
    batch = Batch(
        image_ids=list(range(len(images))),
        images=images,
        global_rows=torch.zeros(len(images), dtype=torch.int64),
        labels=[label.cpu() for label in labels],
        masks=masks,
        instance_tokens=[torch.zeros(SEGMENTS, TEXT_DIM)] * len(images),
    )
    steps = itertools.count()

    def step() -> None:
        optimizer.zero_grad()
        for terms in stage_1(batch, next(steps)):
            torch.stack(list(terms.values())).sum().backward()
        optimizer.step()

    return step


def _their_training(images: Tensor, *, compiled: bool) -> Callable[[], None]:
    built: Any = _frozen_batchnorm(build_mask2former(classes=CLASSES)).to(images.device)
    optimizer = _optimizer(built)
    network = _compile(built, compiled)
    labels, masks = _targets(images)
    truth = [mask.float() for mask in masks]

    def step() -> None:
        loss = network(pixel_values=images, mask_labels=truth, class_labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def memory(device: torch.device, size: int, batch: int) -> Row:
    """Peak memory of two training steps, weights and optimiser included, each side in a process of its own."""
    found = []
    for which in ("ours", "reference"):
        reader, writer = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("spawn").Process(
            target=_peak, args=(which, size, batch, str(device), torch.get_num_threads(), writer)
        )
        child.start()
        writer.close()
        found.append(json.loads(reader.recv()))
        child.join()
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    return Row(
        name=f"peak memory of training, {size} px, batch {batch}",
        ours=found[0],
        reference=found[1],
        unit="MB",
        device=machine(device),
        dtype=dtype,
    )


def _peak(which: str, size: int, batch: int, device: str, threads: int, writer: Any) -> None:
    """Send peak memory in MB: on a GPU torch's allocations, on a CPU the growth of the process beyond its imports."""
    torch.set_num_threads(threads)
    images = _images(size, batch, torch.device(device))
    import transformers.models.mask2former.modeling_mask2former  # noqa: F401  its import is no part of the growth

    before = _resident("VmRSS")
    step = (_our_training if which == "ours" else _their_training)(images, compiled=False)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        for _ in range(2):
            step()
    peak = torch.cuda.max_memory_allocated() / 1e6 if images.is_cuda else _resident("VmHWM") - before
    writer.send(json.dumps(peak))


def _resident(which: str) -> float:
    """MB of this process in memory: now (VmRSS) or at most so far (VmHWM). `resource.getrusage` would count the
    parent's, which a child inherits."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(which))
    return int(kilobytes) * 1.024e-3
