"""Every loss of the three training stages, as pure functions: tensors in, scalar tensors out.

"The paper" is "Semantic-Centric Alignment for Zero-Shot Panoptic and Semantic Segmentation" (anonymous, under review),
"Paper Eq. n" an equation in it, "Dn" a decision on what it leaves open; models/README.md has the table of decisions.
The paper prints the contrastive losses (Eq. 3, 4, 7) without their -log; here they are InfoNCE. All are computed in
float32 or better, under autocast too, and return a zero that keeps the graph when there is nothing to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MMD_BANDWIDTHS = (2.0, 5.0, 10.0, 20.0, 40.0, 80.0)
PIXELS = 2**25  # of full-size masks compared at a time: a float32 map of them has 128 MB

_P = ParamSpec("_P")
_R = TypeVar("_R")


def at_least_float32(value: Any) -> Any:
    """A half-precision tensor as float32; everything else unchanged."""
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value


def _full_precision(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Disable autocast: a cosine rounded to bfloat16 and divided by tau = 0.1 is off by some hundredths."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(device.type, enabled=False):
            raised: Any = {name: at_least_float32(value) for name, value in kwargs.items()}
            return function(*map(at_least_float32, args), **raised)  # pyright: ignore[reportCallIssue]

    return run


# ---------------------------------------------------------------------------------------------------- matching (V2S)


@_full_precision
def focal_loss(
    logits: Tensor, targets: Tensor, *, normaliser: float | Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017; the L_focal of paper Eq. 1, 8 and 9), summed and divided by `normaliser`.

    With p the predicted probability of the target's value, elementwise: -alpha_t (1 - p)^gamma log p, alpha_t = alpha
    where the target is 1, 1 - alpha where it is 0. D2: a query without a segment has an all-zero target row; there is
    no void class.

    Args:
        logits: (..., K), any leading shape.
        targets: the same shape, 0 or 1 (bool, integer or float).
        normaliser: the number of matched segments of the global batch, at least 1 (synthetic features: their number U).
        alpha: in [0, 1]. gamma: 0 or more.

    Returns:
        A scalar.
    """
    positive = targets.to(torch.bool)
    z = torch.where(positive, -logits, logits)  # logit of 1 - p
    weight = torch.where(positive, alpha, 1.0 - alpha).to(z.dtype)
    # exp(gamma log sigmoid) and not sigmoid^gamma: its gradient stays finite where the sigmoid underflows and gamma < 1
    loss = -weight * torch.exp(gamma * F.logsigmoid(z)) * F.logsigmoid(-z)
    return loss.sum() / normaliser


def sample_logits(mask_logits: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps at points: (N, R, h, w) and (N, P, 2) -> (N, R, P).

    Points are (x, y) in [0, 1] over the whole map (align_corners False, zeros outside), so maps of different sizes are
    sampled at the same place.
    """
    grid = (2.0 * points[:, :, None].to(mask_logits.dtype)).sub_(1.0)
    return F.grid_sample(mask_logits, grid, align_corners=False).squeeze(3)


def sample_masks(masks: Tensor, rows: Tensor, points: Tensor) -> Tensor:
    """`sample_logits` for bool masks: row n samples masks[rows[n]] at points[n].

    (S, H, W), (N,) and (N, P, 2) -> (N, P) float32.

    Reads only the four neighbours of each point. Neither a float copy of the masks nor one copy per row is made: at
    1024 x 1024 pixels and ten decoder outputs these would be gigabytes.
    """
    height, width = masks.shape[-2:]
    flat = masks.reshape(-1)
    columns, lines = _neighbours(points[..., 0], width), _neighbours(points[..., 1], height)
    first = (rows * (height * width))[:, None]
    value = torch.zeros_like(points[..., 0])
    for y, y_share in lines:
        start = first + y * width
        for x, x_share in columns:
            # index_select on one flat axis is several times faster than flat[...]
            value += flat.index_select(0, (start + x).view(-1)).view_as(value) * (x_share * y_share)
    return value


def _neighbours(coordinate: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The two pixels of an axis around coordinates in [0, 1], each with its bilinear share (0 for a pixel outside)."""
    position = coordinate * size - 0.5
    low = position.floor()
    share = position - low
    low, high = low.long(), low.long() + 1
    return [(low.clamp(min=0), (1.0 - share) * (low >= 0)), (high.clamp(max=size - 1), share * (high < size))]


@torch.no_grad()
def sample_points(
    mask_logits: Tensor,
    *,
    points: int,
    oversample: float,
    importance: float,
    draws: Sequence[tuple[torch.Generator, int]],
) -> Tensor:
    """The points at which each predicted mask is supervised (PointRend, as in Mask2Former).

    (N, h, w) -> (N, points, 2), (x, y) in [0, 1]. Of `oversample * points` uniform draws a row, the `importance *
    points` with logits nearest to 0 are kept; the rest of the points are new uniform draws.

    Args:
        draws: generators, each with the number of rows, in order, that it draws for; N together. One an image, so that
            an image's points depend on no other image. Each draws on its own device: on the CPU the same points on
            every machine, on the GPU faster for 12,544 points a mask.
    """
    drawn, uncertain = int(points * oversample), int(points * importance)
    # one draw for both, so that the sequence of draws does not depend on how points are split
    size = (drawn + points - uncertain, 2)
    uniform = torch.cat([torch.rand(rows, *size, generator=rng, device=rng.device) for rng, rows in draws])
    uniform = uniform.to(mask_logits.device)
    candidates, rest = uniform[:, :drawn], uniform[:, drawn:]
    distance = sample_logits(mask_logits[:, None], candidates)[:, 0].abs()
    nearest = distance.topk(uncertain, dim=1, largest=False, sorted=False).indices
    return torch.cat((candidates.gather(1, nearest[:, :, None].expand(-1, -1, 2)), rest), dim=1)


@_full_precision
def mask_losses(
    mask_logits: Tensor,
    masks: Tensor,
    *,
    rows: Tensor | None = None,
    points: int,
    oversample: float = 3.0,
    importance: float = 0.75,
    normaliser: float | Tensor,
    draws: Sequence[tuple[torch.Generator, int]],
) -> tuple[Tensor, Tensor]:
    """Mask2Former's point-sampled mask losses (L_mask of Eq. 1), all matched (layer, image, segment) rows at once.

    Per row, x the logits and t the mask at the same P points, s = sigmoid(x): bce = mean_p BCE(x_p, t_p),
    dice = 1 - (2 s.t + 1) / (sum s + sum t + 1); each summed over the rows and divided by `normaliser`.

    Args:
        mask_logits: (N, h, w) predictions of the matched queries.
        masks: (N, H, W) bool ground truth of the same rows; or, with `rows`, (S, H, W), each segment once.
        rows: (N,) int64, the index in `masks` of each prediction's segment. So many decoder outputs are supervised
            without copies of the masks.
        points: points a row. oversample: 1 or more. importance: in [0, 1].
        normaliser: the number of matched segments of the global batch, at least 1.
        draws: see `sample_points`.

    Returns:
        (bce, dice), scalars; zeros that keep the graph when N = 0.
    """
    if mask_logits.shape[0] == 0:
        nothing = mask_logits.sum() * 0.0
        return nothing, nothing
    if rows is None:
        rows = torch.arange(len(masks), device=masks.device)
    where = sample_points(mask_logits, points=points, oversample=oversample, importance=importance, draws=draws)
    truth = sample_masks(masks, rows, where).to(mask_logits.dtype)
    logits = sample_logits(mask_logits[:, None], where)[:, 0]
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / points
    score = logits.sigmoid()
    dice = 1.0 - (2.0 * (score * truth).sum(1) + 1.0) / (score.sum(1) + truth.sum(1) + 1.0)
    return bce / normaliser, dice.sum() / normaliser


@_full_precision
def full_mask_losses(
    mask_logits: Tensor,
    masks: Tensor,
    *,
    rows: Tensor,
    normaliser: float | Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """MaskFormer's mask losses, over every pixel of predictions resized to the masks: focal and dice.

    Per row focal = mean over the pixels, dice as in `mask_losses`; each summed over the rows and divided by
    `normaliser`.

    Memory: some ten float maps of `PIXELS` pixels at most, however many rows there are. The rows are compared in groups
    of so many pixels, and the backward pass computes each group's maps again instead of keeping them; groups change
    the sums by rounding alone.

    Args:
        mask_logits: (N, h, w) predictions of the matched queries. masks: (S, H, W) bool, each segment once.
        rows: (N,) int64, the index in `masks` of each prediction's segment.
        normaliser: the number of matched segments of the global batch, at least 1.
        alpha, gamma: as in `focal_loss`.

    Returns:
        (focal, dice), scalars; zeros that keep the graph when N = 0.
    """
    if mask_logits.shape[0] == 0:
        nothing = mask_logits.sum() * 0.0
        return nothing, nothing
    size = (masks.shape[-2], masks.shape[-1])

    def sums(mask_logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.interpolate(mask_logits[:, None], size=size, mode="bilinear", align_corners=False).flatten(1)
        truth = masks[rows].flatten(1)
        focal = focal_loss(logits, truth, normaliser=logits.shape[1], alpha=alpha, gamma=gamma)
        score = logits.sigmoid()
        dice = 1.0 - (2.0 * (score * truth).sum(1) + 1.0) / (score.sum(1) + truth.sum(1) + 1.0)
        return focal, dice.sum()

    group = max(PIXELS // (size[0] * size[1]), 1)
    pairs = zip(mask_logits.split(group), rows.split(group), strict=True)
    found: Any = [checkpoint(sums, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
    focal, dice = (torch.stack(values).sum() for values in zip(*found, strict=True))
    return focal / normaliser, dice / normaliser


# ---------------------------------------------------------------------------------------------------- contrast (V2T)


def _info_nce(
    positive: Tensor, negatives: Tensor, allowed: Tensor | None = None, normaliser: float | Tensor | None = None
) -> Tensor:
    """-log(e^positive / (e^positive + sum of e^negatives)), mean over the rows that have a negative; 0 when none has.

    Args:
        positive: (N,). negatives: (N, K). Both are similarities already divided by tau.
        allowed: (N, K) bool, False where a column is no negative of that row; None = all are.
        normaliser: divisor of the sum in place of the number of rows, where these are a part of a larger batch.
    """
    if allowed is not None:
        negatives = negatives.masked_fill(~allowed, -torch.inf)
    # a row without negatives is log(e^p / e^p): exactly 0, as is its gradient
    loss = torch.cat((positive[:, None], negatives), dim=1).logsumexp(1) - positive
    if normaliser is None:
        normaliser = max(len(loss), 1) if allowed is None else allowed.any(1).sum().clamp(min=1)
    return loss.sum() / normaliser


@_full_precision
def target_attention(global_token: Tensor, v: Tensor, matched: Tensor, *, gamma: float, enabled: bool = True) -> Tensor:
    """One vector for an image from its queries (paper Eq. 2), with larger weights for those matched to a segment.

    W = softmax over the Q queries of cos(C_g, v_q) (gamma 1[q in V_s] + 1); V_a = W^T V.

    Args:
        global_token: (B, D), the teacher's embedding of the whole image (C_g).
        v: (B, Q, D), projected queries (V), of any length.
        matched: (B, Q) bool, True where a query is assigned to a segment.
        gamma: 0 or more; at 0 the weights do not depend on `matched`.
        enabled: False = plain mean over all Q queries (table 5's first row).

    Returns:
        (B, D), not normalised.
    """
    if not enabled:
        return v.mean(1)
    cosine = torch.einsum("bd,bqd->bq", F.normalize(global_token, dim=-1), F.normalize(v, dim=-1))
    weight = (cosine * (gamma * matched.to(v.dtype) + 1.0)).softmax(1)
    return torch.einsum("bq,bqd->bd", weight, v)


@_full_precision
def global_loss(
    v_a: Tensor, global_token: Tensor, bank: Tensor, *, tau: float, normaliser: float | Tensor | None = None
) -> Tensor:
    """L_g (paper Eq. 3): InfoNCE of each image's aggregate against its own global token, mean over the images.

    L_g = -log(e^{cos(v_a, c_i) / tau} / (e^{cos(v_a, c_i) / tau} + sum over the bank of e^{cos(v_a, c_j) / tau})).

    Args:
        v_a: (B, D), from `target_attention`. global_token: (B, D).
        bank: (B, T, D), or (T, D) shared by the batch: global tokens of OTHER images. D3: drawn uniformly from the
            cached tokens of a frozen teacher; the caller leaves out the image's own row.
        tau: temperature, above 0. normaliser: number of images of the global batch, where these are a part of it.

    Returns:
        A scalar.
    """
    anchor = F.normalize(v_a, dim=-1)
    positive = (anchor * F.normalize(global_token, dim=-1)).sum(-1)
    bank = F.normalize(bank, dim=-1)
    negatives = anchor @ bank.T if bank.ndim == 2 else torch.einsum("bd,btd->bt", anchor, bank)
    return _info_nce(positive / tau, negatives / tau, normaliser=normaliser)


@_full_precision
def instance_loss(
    v: Tensor,
    tokens: Tensor,
    image: Tensor,
    *,
    tau: float,
    negatives: Literal["image", "batch"] = "image",
    elsewhere: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> Tensor:
    """L_l (paper Eq. 4): InfoNCE of each matched query against its own instance's token, others' tokens as negatives.

    L_l = mean_i -log(e^{cos(v_i, c_i) / tau} / sum_j e^{cos(v_i, c_j) / tau}), j over the instances of i's image (or
    of the batch). The paper writes a sum over the image's instances; the mean is over all instances of the batch that
    have a negative, so that the loss grows neither with the number of objects nor with the batch. An instance alone
    in its image counts neither in the sum nor in its divisor.

    Args:
        v: (N, D), projected queries assigned to a segment (V_s), one row an instance.
        tokens: (N, D), the teacher's embeddings of the masked instances (C_m), in the same order.
        image: (N,) integer, the image each row belongs to.
        tau: temperature, above 0.
        negatives: "image" (the paper) or "batch", all other instances of the batch.
        elsewhere: (M, D), with "batch": tokens of the global batch's instances that are not among these N.
        normaliser: number of instances of the global batch with a negative, where these N are a part of them.

    Returns:
        A scalar.
    """
    anchor = F.normalize(v, dim=-1)
    similarity = anchor @ F.normalize(tokens, dim=-1).T / tau
    positive = similarity.diagonal()
    other = ~torch.eye(len(v), dtype=torch.bool, device=v.device)
    if negatives == "image":
        other &= image[:, None] == image[None]
    elif elsewhere is not None:
        similarity = torch.cat((similarity, anchor @ F.normalize(elsewhere, dim=-1).T / tau), dim=1)
        other = torch.cat((other, other.new_ones(len(v), len(elsewhere))), dim=1)
    return _info_nce(positive, similarity, other, normaliser)


# ---------------------------------------------------------------------------------------------------- generator (G2S)


@_full_precision
def mmd_loss(generated: Tensor, real: Tensor, *, bandwidths: tuple[float, ...] = MMD_BANDWIDTHS) -> Tensor:
    """L_mmd (paper Eq. 6, minus sign and normalisation restored): squared maximum mean discrepancy, as in GMMN.

    MMD^2 = mean k(f', f') + mean k(f, f) - 2 mean k(f', f), the biased estimate (pairs i = j included); k(a, b) = mean
    over the bandwidths sigma of exp(-|a - b|^2 / (2 sigma^2)). No square root is taken.

    Args:
        generated: (N, C) with N >= 1. real: (M, C) with M >= 1. Numbers and order of the two may differ.
        bandwidths: sigma, in the features' unit.

    Returns:
        A scalar, 0 or more up to rounding.
    """
    both = torch.cat((generated, real))
    # distances do not change, and |a|^2 + |b|^2 - 2 a.b loses fewer digits near the origin
    both = both - both.mean(0).detach()
    square = both.square().sum(1)
    distance = (square[:, None] + square[None] - 2.0 * both @ both.T).clamp(min=0.0)
    kernel = torch.stack([torch.exp(distance / (-2.0 * sigma**2)) for sigma in bandwidths]).mean(0)
    n, m = len(generated), len(real)
    share = torch.cat((both.new_full((n,), 1 / n), both.new_full((m,), -1 / m)))
    return share @ kernel @ share


@_full_precision
def diversity_loss(
    generated: Tensor, real: Tensor, image: Tensor, unmatched: Tensor, unmatched_image: Tensor, *, tau: float
) -> Tensor:
    """L_div (paper Eq. 7, read with -log and f'_i.f_i in the numerator): keeps generated features apart.

    InfoNCE of each generated feature with the real one it reconstructs; negatives are the other generated features of
    its image and the image's queries without a segment.

    L_div = mean_i -log(e^{s(f'_i, f_i)} / (e^{s(f'_i, f_i)} + sum_{j != i} e^{s(f'_i, f'_j)} + sum_k e^{s(f'_i,
    f0_k)})), s = cos / tau, j and k over i's image only; mean over the rows that have a negative (the paper writes a
    sum).

    Args:
        generated, real: (N, C), row i of one made from row i of the other. image: (N,) integer.
        unmatched: (M, C), real features of queries without a segment. unmatched_image: (M,) integer.
        tau: temperature, above 0.

    Returns:
        A scalar.
    """
    anchor = F.normalize(generated, dim=-1)
    positive = (anchor * F.normalize(real, dim=-1)).sum(-1)
    negatives = anchor @ torch.cat((anchor, F.normalize(unmatched, dim=-1))).T
    same_image = image[:, None] == torch.cat((image, unmatched_image))[None]
    same_image.diagonal().fill_(False)  # the anchor itself
    return _info_nce(positive / tau, negatives / tau, same_image)


@_full_precision
def kl_loss(mu: Tensor, log_var: Tensor) -> Tensor:
    """KL divergence of N(mu, e^log_var), (N, D) each, from N(0, I): sum over D, mean over N (D6: not in the paper)."""
    return 0.5 * (mu.square() + log_var.exp() - 1.0 - log_var).sum() / max(len(mu), 1)
