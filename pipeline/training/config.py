"""The part of a training stage's config that all three share: how long, how fast, in what order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from pipeline.data.config import AugmentConfig, ResizeConfig
from storage.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A training schedule.

    `steps` of `batch` images each; AdamW at `lr`, `weight_decay` on everything but norms, embeddings and scalars. `warmup` steps rise
    linearly; then `decay` "cosine" falls to 0, "step" multiplies by 0.1 at 8/9 and again at 26/27 of the steps, "constant" stays.
    `clip`: largest gradient norm of all parameters together, 0 = none. `ema`: the result is the running average of the weights that
    keeps this share a step, 0 = the last weights. `seed` decides weights, order, views and every draw.
    """

    seed: int = 0
    steps: int = 1
    batch: int = 16
    lr: float = 1e-4
    weight_decay: float = 0.05
    warmup: int = 0
    decay: Literal["cosine", "step", "constant"] = "cosine"
    clip: float = 0.01
    ema: float = 0.0

    def __post_init__(self) -> None:
        name = type(self).__name__.removesuffix("Config").lower()
        if self.steps < 1 or self.batch < 1:
            raise UserError(f"{name}: steps and batch must be at least 1, not {self.steps} and {self.batch}")
        if self.seed < 0:
            raise UserError(f"{name}: seed must be 0 or more, not {self.seed}")
        if not 0 <= self.ema < 1:
            raise UserError(f"{name}: ema must be at least 0 and below 1, not {self.ema}")
        if self.lr <= 0:
            raise UserError(f"{name}: lr must be above 0, not {self.lr}")

    def factor(self, step: int) -> float:
        """What the learning rates are multiplied by at step `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        if self.decay == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if self.decay == "step":
            return 0.1 ** (int(step >= self.steps * 8 / 9) + int(step >= self.steps * 26 / 27))
        return 1.0


def require_sampling(stage: str, sampling: str) -> None:
    """Raises UserError for a way to draw cached queries that there is not."""
    if sampling not in ("natural", "balanced"):
        raise UserError(f"{stage}: sampling {sampling!r} is not one of 'natural' and 'balanced'; choose one of them")


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """The segmenter's parts; the defaults are the published R50 Mask2Former, `MASKFORMER` the published R50 MaskFormer. `backbone` is a
    timm name, `backbone_weights` None for random, "imagenet", "shipped" (the small one for generated scenes), or a local file. Weights
    trained on COCO have seen the unseen classes; a file that shows it is refused. `encoder_points`: Mask2Former's alone."""

    architecture: Literal["mask2former", "maskformer"] = "mask2former"
    backbone: str = "resnet50"
    backbone_weights: str | None = "imagenet"
    frozen_batchnorm: bool = True
    queries: int = 100
    dim: int = 256
    heads: int = 8
    encoder_layers: int = 6
    encoder_ffn: int = 1024
    encoder_points: int = 4
    decoder_layers: int = 9
    decoder_ffn: int = 2048

    def __post_init__(self) -> None:
        if self.architecture not in ("mask2former", "maskformer"):
            raise UserError(
                f"segmenter: architecture {self.architecture!r} is not one of 'mask2former' and 'maskformer'; choose one of them"
            )
        if self.dim % self.heads or self.dim % 8:
            raise UserError(
                f"segmenter: dim {self.dim} must be a multiple of heads {self.heads} and of 8; change one of them"
            )


MASKFORMER = SegmenterConfig(architecture="maskformer", encoder_ffn=2048, decoder_layers=6)


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The class projector P, an MLP of `layers` linear layers of width `hidden` from C to D."""

    hidden: int = 512
    layers: int = 3


@dataclass(frozen=True, kw_only=True)
class V2CConfig(Schedule):
    """Stage 1. L_v2c = L_match + w_g L_g + w_l L_l (paper Eq. 5); a weight of 0 switches a loss off.

    `class_weight`, `bce_weight`, `dice_weight`, `points`: L_match and the matcher. `mask_loss` "points" is Mask2Former's, BCE and dice at
    `points` points; "full" MaskFormer's, focal (weighed by `bce_weight`, published 20) and dice (1) over all pixels. `gamma`, `tau`, `bank`: Eq. 2 and 3 (D3), not in
    the paper. `target_attention` off = plain mean over the queries (table 5's first row). `text_centering`: D1.
    `backbone_lr`, `scale_lr`: factors on the learning rates of the backbone, and of the logit scale and bias (D1). `augment`: training
    views; `resize`: test views. `calibration_images`: training images on which object_threshold is chosen, `threshold_slack`: in PQ
    points, see `choose_threshold` (D8). `precision`: of the network's forward and backward pass (autocast); weights, losses and matching
    stay float32. `accumulate`: equal parts a process takes its share of a batch in, for less memory and the same result.
    """

    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    class_weight: float = 2.0
    bce_weight: float = 5.0
    dice_weight: float = 5.0
    points: int = 12544
    mask_loss: Literal["points", "full"] = "points"
    global_weight: float = 1.0
    instance_weight: float = 1.0
    target_attention: bool = True
    gamma: float = 1.0
    tau: float = 0.1
    bank: int = 4096
    instance_negatives: Literal["image", "batch"] = "image"
    text_centering: bool = False
    backbone_lr: float = 0.1
    scale_lr: float = 10.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    resize: ResizeConfig = field(default_factory=ResizeConfig)
    overlap_threshold: float = 0.8
    calibration_images: int = 500
    threshold_slack: float = 0.5
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    accumulate: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in ("float32", "bfloat16", "float16"):
            raise UserError(
                f"v2c: precision {self.precision!r} is not one of 'float32', 'bfloat16' and 'float16'; choose one"
            )
        if self.accumulate < 1 or self.batch % self.accumulate:
            raise UserError(
                f"v2c: batch {self.batch} cannot be cut into {self.accumulate} parts; choose a divisor of it"
            )
        if self.accumulate > 1 and not self.segmenter.frozen_batchnorm:
            raise UserError(
                "v2c: BatchNorm would see one part at a time; accumulate needs segmenter.frozen_batchnorm, or pass 1"
            )
        if self.mask_loss not in ("points", "full"):
            raise UserError(f"v2c: mask_loss {self.mask_loss!r} is not one of 'points' and 'full'; choose one of them")
        if self.tau <= 0 or self.bank < 1 or self.points < 1 or self.calibration_images < 1:
            raise UserError("v2c: tau must be above 0; bank, points and calibration_images at least 1")


@dataclass(frozen=True, kw_only=True)
class QueriesConfig:
    """`views`: 1 = the plain image at test size; more add passes with stage 1's training augmentation, drawn from `seed` (D9).
    `batch` views share a forward pass where their sizes agree."""

    seed: int = 0
    views: int = 1
    batch: int = 16

    def __post_init__(self) -> None:
        if self.views < 1 or self.batch < 1 or self.seed < 0:
            raise UserError("queries: views and batch must be at least 1, and seed 0 or more")


@dataclass(frozen=True, kw_only=True)
class G2SConfig(Schedule):
    """Stage 2. L_g2s = L_mmd + lambda_s L_div + lambda_v L_gv2s + beta KL (paper Eq. 8, D6).

    `generator`: "vae", the paper's, or "primitives", the vision-centric comparison's, which is trained by L_mmd alone.
    `mmd_weight` is 1 in the paper, `diversity_weight` is lambda_s, `semantic_weight` lambda_v, `kl_weight` beta; 0 switches a loss off. `hidden`: width of the
    generator's layers. `text_scale`: see `Generator`. `tau`: Eq. 7's temperature. `batch`: images a step. `sampling`: "natural" or, rare classes
    as often as frequent ones, "balanced".

    The paper gives none of these. With text rows of length 1 (`text_scale` 1 / sqrt(D)) and beta 0 the generated features of unseen
    classes had nothing to do with their names; these defaults come from the ablations' validation split. README, "Does the
    method do what the paper claims?", has the sweep and figure 4's numbers.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    generator: Literal["vae", "primitives"] = "vae"
    hidden: int = 512
    text_scale: float = 2.0
    mmd_weight: float = 1.0
    diversity_weight: float = 0.01
    semantic_weight: float = 0.01
    kl_weight: float = 1.0
    tau: float = 0.1
    sampling: Literal["natural", "balanced"] = "natural"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau <= 0 or self.text_scale <= 0:
            raise UserError(f"g2s: tau and text_scale must be above 0, not {self.tau} and {self.text_scale}")
        if self.generator not in ("vae", "primitives"):
            raise UserError(f"g2s: generator {self.generator!r} is not one of 'vae' and 'primitives'; choose one")
        if self.batch < 2:
            raise UserError("g2s: batch must be at least 2, for the generator's BatchNorm")
        require_sampling("g2s", self.sampling)


@dataclass(frozen=True, kw_only=True)
class CPAConfig(Schedule):
    """Stage 3. L_f of paper Eq. 9. `synthetic`: U, made-up unseen features a step; `real_weight` and `synthetic_weight`:
    weights of the two losses, 1 in the paper, whose U and learning rate nobody knows; `noise_into`: where the generator's noise goes in (D7). `batch`: images a step; `sampling`:
    see G2SConfig. `classifier`: "projector", stage 1's, or "linear", the vision-centric comparison's, which begins anew and knows no
    other names than these classes'."""

    lr: float = 1e-4
    clip: float = 1.0
    synthetic: int = 24
    real_weight: float = 1.0
    synthetic_weight: float = 10.0
    noise_into: Literal["encoder", "latent"] = "encoder"
    sampling: Literal["natural", "balanced"] = "natural"
    classifier: Literal["projector", "linear"] = "projector"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.synthetic < 1:
            raise UserError(f"cpa: synthetic must be at least 1, not {self.synthetic}")
        require_sampling("cpa", self.sampling)
        if self.classifier not in ("projector", "linear"):
            raise UserError(f"cpa: classifier {self.classifier!r} is not one of 'projector' and 'linear'; choose one")
