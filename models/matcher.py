"""The assignment of segments to queries: bipartite matching, for every decoder output (sigma^ of paper Eq. 1).

Queries that no segment has can be assigned to class-less regions, by their masks alone (E3; not in the paper).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.errors import ModelError
from models.losses import at_least_float32, sample_logits, sample_masks
from models.mask_logits import MaskLogits
from models.transfer import send


@torch.no_grad()
def match(
    class_logits: Tensor,
    mask_logits: Tensor | MaskLogits,
    labels: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    class_weight: float,
    bce_weight: float,
    dice_weight: float,
    points: int,
    generators: Sequence[torch.Generator],
    alpha: float = 0.25,
    gamma: float = 2.0,
    mask_loss: Literal["points", "full"] = "points",
) -> Tensor:
    """Assign segments to queries at least cost, for all layers and images; then regions to the queries that are left.

    The cost of (query, segment) is the loss of that pair: class_weight * (focal loss of the segment's class as positive
    minus as negative) + bce_weight * BCE + dice_weight * dice, the last two over `points` uniform points that all
    layers of an image share. With `mask_loss` "full", as in MaskFormer, bce_weight is the weight of a focal loss, and
    both it and dice are over all pixels of the predicted maps, the segments resized to these (nearest). The cost of
    (query, region) is the same without its class.

    Args:
        class_logits: (L, B, Q, K), over the K seen classes. mask_logits: (L, B, Q, h, w).
        labels: B tensors (O_b,) int64 in [0, K), on the CPU. O_b may be 0.
        masks: B tensors (O_b + R_b, H, W) bool, of one size, on the logits' device: of the segments, then of the
            regions. R_b may be 0.
        points: points an image. generators: B, each draws on its own device (see `models.losses.sample_points`).
        alpha, gamma: of the focal loss.

    Returns:
        (L, B, Q) int64 on the CPU, where it is computed: the index in `masks` of the segment or region assigned to a
        query, or -1. Every segment has exactly one query in every layer while O_b <= Q, else Q of the segments have; and
        so have the regions of the Q - O_b queries that are left.

    Raises:
        ModelError: the predictions are not finite.
    """
    layers, batch, queries = class_logits.shape[:3]
    device = class_logits.device
    where = torch.stack([torch.rand(points, 2, generator=rng, device=rng.device) for rng in generators]).to(device)
    segments, counts = [len(label) for label in labels], [len(mask) for mask in masks]
    found = np.full((layers, batch, queries), -1, dtype=np.int64)
    if not any(counts):
        return torch.from_numpy(found)

    # segments and regions of all images side by side, (B, max O_b + R_b), padded at the end
    image = torch.repeat_interleave(torch.tensor(counts))
    place = torch.cat([torch.arange(count) for count in counts])
    label = torch.zeros(batch, max(counts), dtype=torch.int64)
    # Of regions the class is any: its cost is not counted.
    named = place < torch.tensor(segments)[image]
    label[image[named], place[named]] = torch.cat(list(labels))
    label = send(label, device)
    classed = None
    if segments != counts:
        classed = torch.zeros(batch, 1, max(counts))
        classed[image[named], 0, place[named]] = 1.0
        classed = send(classed, device)
    image, place = send(torch.stack((image, place)), device)
    if mask_loss == "full":
        size = (mask_logits.pixels if isinstance(mask_logits, MaskLogits) else mask_logits).shape[-2:]
        small = F.interpolate(torch.cat(list(masks))[:, None].to(torch.uint8), size=size, mode="nearest")
        shown = small.flatten(1).float()
    else:
        shown = sample_masks(torch.cat(list(masks)), torch.arange(len(image), device=device), where[image])
    truth = torch.zeros(batch, max(counts), shown.shape[1], device=device)
    truth[image, place] = shown

    with torch.autocast(device.type, enabled=False):
        # layer by layer: the sampled logits of all layers would be gigabytes at full size
        costs = []
        logits = _all_pixels(mask_logits) if mask_loss == "full" else _at_points(mask_logits, where)
        for classes, values in zip(class_logits, logits, strict=True):
            own = at_least_float32(classes).gather(2, label[:, None].expand(-1, queries, -1))
            if mask_loss == "full":
                cost = _full_mask_cost(values, truth, bce_weight, dice_weight, alpha, gamma)
            else:
                cost = _mask_cost(values, truth, bce_weight, dice_weight)
            named_cost = class_weight * _focal_cost(own, alpha, gamma)
            costs.append(cost + (named_cost if classed is None else named_cost * classed))
    # (L, B, Q, max O_b + R_b); the only time that the host waits for the device
    cost = torch.stack(costs).cpu().numpy()
    if not np.isfinite(cost).all():
        raise ModelError("predictions hold NaN or infinity: training has diverged; lower the learning rate")

    for layer in range(layers):
        for b, (first, count) in enumerate(zip(segments, counts, strict=True)):
            if first:
                query, segment = linear_sum_assignment(cost[layer, b, :, :first])
                found[layer, b, query] = segment
            free = np.flatnonzero(found[layer, b] < 0)
            if count > first and len(free):
                query, region = linear_sum_assignment(cost[layer, b, free, first:count])
                found[layer, b, free[query]] = first + region
    return torch.from_numpy(found)


def _at_points(mask_logits: Tensor | MaskLogits, where: Tensor) -> Iterator[Tensor]:
    """L x (B, Q, P) logits at points (B, P, 2)."""
    if isinstance(mask_logits, MaskLogits):
        return mask_logits.sample(where)
    return (sample_logits(at_least_float32(maps), where) for maps in mask_logits)


def _all_pixels(mask_logits: Tensor | MaskLogits) -> Iterator[Tensor]:
    """L x (B, Q, h w)."""
    return (at_least_float32(mask_logits[layer]).flatten(2) for layer in range(len(mask_logits)))


def _focal_cost(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """Elementwise focal loss with target 1 minus that with target 0 (as in Deformable DETR)."""
    positive = -alpha * torch.exp(gamma * F.logsigmoid(-logits)) * F.logsigmoid(logits)
    negative = -(1.0 - alpha) * torch.exp(gamma * F.logsigmoid(logits)) * F.logsigmoid(-logits)
    return positive - negative


def _mask_cost(logits: Tensor, truth: Tensor, bce_weight: float, dice_weight: float) -> Tensor:
    """Mask cost of every query with every segment, at the same points: (B, Q, P) and (B, O, P) -> (B, Q, O).

    BCE(x, t) = softplus(x) - x t, so its mean over the points is a sum and a matrix product; dice likewise.
    softplus(x) = max(x, 0) - log sigmoid(|x|), from the sigmoid that dice needs anyway: F.softplus took a third of the
    matcher's time.
    """
    truth = truth.to(logits.dtype).transpose(1, 2)
    score = logits.sigmoid()
    softplus = logits.clamp(min=0.0) - torch.maximum(score, 1.0 - score).log()
    bce = (softplus.sum(2, keepdim=True) - logits @ truth) / logits.shape[2]
    dice = 1.0 - (2.0 * (score @ truth) + 1.0) / (score.sum(2, keepdim=True) + truth.sum(1, keepdim=True) + 1.0)
    return bce_weight * bce + dice_weight * dice


def _full_mask_cost(
    logits: Tensor, truth: Tensor, focal_weight: float, dice_weight: float, alpha: float, gamma: float
) -> Tensor:
    """Mask cost of every query with every segment, over all pixels: (B, Q, P) and (B, O, P) -> (B, Q, O), P = h w."""
    truth = truth.to(logits.dtype).transpose(1, 2)
    background = -(1.0 - alpha) * torch.exp(gamma * F.logsigmoid(logits)) * F.logsigmoid(-logits)
    focal = _focal_cost(logits, alpha, gamma) @ truth + background.sum(2, keepdim=True)
    score = logits.sigmoid()
    dice = 1.0 - (2.0 * (score @ truth) + 1.0) / (score.sum(2, keepdim=True) + truth.sum(1, keepdim=True) + 1.0)
    return focal_weight * focal / logits.shape[2] + dice_weight * dice
