"""Inference from a decoded image to its panoptic map: ours against transformers' Mask2Former with its own processing.

Both have the same random R50 weights, so class scores are meaningless: each side's threshold is set to keep the same
number of queries, since their number determines the cost of post-processing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.folding import for_inference
from models.projector import Projector
from pipeline.bench.harness import Row, alternate, machine
from pipeline.bench.reference import build_mask2former, ours_of_mask2former
from pipeline.data.config import ResizeConfig
from pipeline.inference.forward import outputs
from pipeline.inference.maps import Classes, Thresholds, panoptic_map
from pipeline.runtime import Runtime

CLASSES, TEXT_DIM, KEPT = 133, 512, 20
HEIGHT, WIDTH = 480, 640  # COCO's commonest size
VIEWS = (ResizeConfig(short=512, longest=853), ResizeConfig(short=800, longest=1333))


def inference_rows(runtime: Runtime) -> Iterator[Row]:
    """Seconds an image, one image at a time, at the test sizes of `VIEWS`."""
    device = runtime.torch_device()
    image = torch.from_numpy(_image())
    with torch.inference_mode():
        for resize in VIEWS:
            ours, reference = _ours(image, resize, device), _reference(image, resize, device)
            seconds = alternate(ours, reference, repeat=5 if device.type == "cpu" else 30, device=device)
            yield Row(
                name=f"panoptic map of a {WIDTH}x{HEIGHT} image, short side {resize.short}",
                ours=seconds[0],
                reference=seconds[1],
                unit="s",
                device=machine(device),
                dtype="float32",
            )


def _image() -> np.ndarray:
    """(3, HEIGHT, WIDTH) uint8, smooth colours with noise on them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH] / 60
    smooth = np.stack([np.sin(x + i) * np.cos(y - i) for i in range(3)]) * 80 + 128
    return (smooth + rng.normal(0, 10, smooth.shape)).clip(0, 255).astype(np.uint8)


def _ours(image: Tensor, resize: ResizeConfig, device: torch.device) -> Any:
    segmenter = for_inference(ours_of_mask2former(build_mask2former(classes=CLASSES)).to(device))
    torch.manual_seed(0)
    projector = Projector(dim=256, text_dim=TEXT_DIM, hidden=512, layers=3).to(device).eval()
    classes = Classes(
        text=normalize(torch.randn(CLASSES, TEXT_DIM), dim=-1).to(device),
        ids=torch.arange(1, CLASSES + 1, device=device),
        isthing=torch.arange(CLASSES, device=device) < 80,
        seen=torch.ones(CLASSES, dtype=torch.bool, device=device),
    )

    def run(threshold: float) -> Any:
        ((_, output),) = outputs(segmenter, [(None, image)], resize, batch=1)
        logits = projector.logits(projector(output.features), classes.text)
        panoptic_map(output, logits, classes, Thresholds(object_threshold=threshold, overlap_threshold=0.8))
        return logits.sigmoid().amax(1)

    threshold = float(run(1.0).topk(KEPT + 1).values[-1])
    return lambda: run(threshold)


def _reference(image: Tensor, resize: ResizeConfig, device: torch.device) -> Any:
    from transformers import Mask2FormerImageProcessor

    built = build_mask2former(classes=CLASSES)
    network: Any = built.to(device)  # pyright: ignore[reportArgumentType]
    processor = Mask2FormerImageProcessor(
        size={"shortest_edge": resize.short, "longest_edge": resize.longest}, size_divisor=32
    )
    stuff = set(range(80, CLASSES))

    def run(threshold: float) -> Tensor:
        inputs = processor(images=image, return_tensors="pt", device=str(device))
        found: Any = network(pixel_values=inputs["pixel_values"])
        processor.post_process_panoptic_segmentation(
            found, threshold=threshold, label_ids_to_fuse=stuff, target_sizes=[(HEIGHT, WIDTH)]
        )
        scores, labels = found.class_queries_logits[0].softmax(-1).max(-1)
        return scores.masked_fill(labels == CLASSES, 0)

    threshold = float(run(1.0).topk(KEPT + 1).values[-1])
    return lambda: run(threshold)
