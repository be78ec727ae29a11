"""The settings of the three training stages, v2c, g2s and cpa, and of the queries cached between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from pipeline.data.config import STRIDE, AugmentConfig, ResizeConfig, SemanticAugmentConfig, check_choices
from storage.errors import UserError
from storage.keys import option


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the three training stages share: length, optimiser (AdamW) and seed."""

    seed: int = 0
    """Seed of initial weights, order of images, training views and every other draw, 0 or more."""

    steps: int = 1
    """Training steps, at least 1."""

    batch: int = 16
    """Images per step, over all processes, at least 1."""

    lr: float = 1e-4
    """Learning rate at its peak, above 0."""

    weight_decay: float = 0.05
    """AdamW's weight decay; none on norms, embeddings and scalars (Mask2Former: 0.05)."""

    warmup: int = 0
    """Steps over which the learning rate rises linearly to its peak."""

    decay: Literal["cosine", "step", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine falls to 0, step falls to a tenth at 8/9 and again at 26/27 of the steps
    (Mask2Former), constant stays."""

    clip: float = 0.01
    """Largest norm of the gradient, over all parameters together; 0 does not clip (Mask2Former: 0.01)."""

    ema: float = 0.0
    """Decay per step of a running average of the weights, which is the result, at least 0 and below 1; 0 takes the last
    weights."""

    def __post_init__(self) -> None:
        check_choices(self)
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


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """The segmenter's parts; the defaults are the published R50 Mask2Former, `MASKFORMER` the published R50
    MaskFormer."""

    architecture: Literal["mask2former", "maskformer"] = "mask2former"
    """Mask2Former (the paper's main results), or MaskFormer (the paper's ablations)."""

    backbone: str = "resnet50"
    """timm name of a network with feature maps at strides 4, 8, 16 and 32 (the paper: resnet50 and resnet101c)."""

    backbone_weights: str | None = "imagenet"
    """imagenet (of resnet50 torchvision's first, else timm's default), None for random ones, shipped (for generated
    scenes), or a local file; files that show training on COCO are refused: they saw unseen classes."""

    frozen_batchnorm: bool = True
    """Keep the backbone's BatchNorm statistics and affine parameters as loaded (published)."""

    queries: int = 100
    """Q, number of queries (published: 100)."""

    dim: int = 256
    """C, width of queries and mask features, a multiple of heads and of 8, above 256 of 32 (published: 256)."""

    heads: int = 8
    """Attention heads in both decoders (published: 8)."""

    encoder_layers: int = 6
    """Transformer layers of the pixel decoder (published: 6)."""

    encoder_ffn: int = 1024
    """Hidden width of the pixel decoder's feed-forward layers (Mask2Former: 1024, MaskFormer: 2048)."""

    encoder_points: int = 4
    """Points per head and level of the pixel decoder's deformable attention; MaskFormer has none (Mask2Former: 4)."""

    decoder_layers: int = 9
    """Layers of the query decoder (Mask2Former: 9, MaskFormer: 6)."""

    decoder_ffn: int = 2048
    """Hidden width of the query decoder's feed-forward layers (published: 2048)."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.dim % self.heads or self.dim % 8:
            raise UserError(
                f"segmenter: dim {self.dim} must be a multiple of heads {self.heads} and of 8; change one of them"
            )


MASKFORMER = SegmenterConfig(architecture="maskformer", encoder_ffn=2048, decoder_layers=6)


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The class projector P, an MLP from query features (C) to the teacher's space (D); the paper gives neither
    size."""

    hidden: int = 512
    """Width of the MLP between its linear layers; not used with one layer."""

    layers: int = 3
    """Number of linear layers, at least 1; 1 is a linear map."""


@dataclass(frozen=True, kw_only=True)
class V2CConfig(Schedule):
    """Stage 1, vision-to-CLIP alignment: L_v2c = L_match + w_g L_g + w_l L_l (paper Eq. 5)."""

    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    """The network that makes query features F and mask logits M."""

    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    """The class projector P, from query features to the teacher's space."""

    class_weight: float = 2.0
    """Weight of the focal classification loss in L_match (Eq. 1) and in the matching cost (Mask2Former: 2)."""

    bce_weight: float = 5.0
    """Weight of the per-pixel mask loss, cross-entropy or with mask_loss full focal, in L_match (Eq. 1) and in the
    matching cost (Mask2Former: 5, MaskFormer: 20)."""

    dice_weight: float = 5.0
    """Weight of the dice loss in L_match (Eq. 1) and in the matching cost (Mask2Former: 5, MaskFormer: 1)."""

    points: int = 12544
    """With mask_loss points, the points at which masks are compared, per mask in the loss and per image in the matching
    cost, at least 1 (Mask2Former: 12544)."""

    mask_loss: Literal["points", "full"] = "points"
    """Mask losses: cross-entropy and dice at sampled points (Mask2Former), or focal and dice over all pixels
    (MaskFormer)."""

    global_weight: float = 1.0
    """w_g, weight of L_g, between target attention and the image's global token (Eq. 3); 0 switches it off (the paper:
    1)."""

    instance_weight: float = 1.0
    """w_l, weight of L_l, between matched queries and their instance tokens (Eq. 4); 0 switches it off (the paper:
    1)."""

    target_attention: bool = True
    """Weigh queries by target attention (Eq. 2) before L_g; off takes their plain mean (first row of the paper's table
    5)."""

    gamma: float = 1.0
    """Additional weight of matched queries in target attention (Eq. 2), 0 treats all alike; the paper gives no
    value."""

    tau: float = 0.1
    """Temperature of L_g and L_l (Eq. 3, 4), above 0; the paper gives no value."""

    bank: int = 4096
    """T, global tokens of other images that L_g takes as negatives, drawn per image and step from the cached ones (D3),
    at least 1; the paper gives no value."""

    instance_negatives: Literal["image", "batch"] = "image"
    """Negatives of an instance in L_l: the other instances of its image (Eq. 4), or of the whole batch."""

    candidate_mask_weight: float = option(0.0)
    """w_c, weight of the mask losses of queries without a segment that are matched to class-less regions of what has no
    label, 0 or more; not in the paper (E3)."""

    candidate_token_weight: float = option(0.0)
    """w_r, weight of L_l between these queries and the tokens of their regions, against all other tokens of the batch,
    0 or more; not in the paper (E3)."""

    text_centering: bool = False
    """Subtract the mean of the seen classes' text embeddings from all of them before the class logits (D1)."""

    backbone_lr: float = 0.1
    """Factor on the learning rate for the backbone (Mask2Former: 0.1)."""

    scale_lr: float = 10.0
    """Factor on the learning rate for the scale and the bias of the class logits (D1)."""

    augment: AugmentConfig | SemanticAugmentConfig = field(default_factory=AugmentConfig)
    """How training views are made: with large-scale jitter, or as for semantic segmentation."""

    resize: ResizeConfig = field(default_factory=ResizeConfig)
    """How test views are made."""

    overlap_threshold: float = 0.8
    """Share of a query's own mask that must be left to its segment in the panoptic map, else the segment is dropped
    (published: 0.8)."""

    calibration_images: int = 500
    """Training images, the first ones, on which the object threshold is chosen, at least 1 (D8)."""

    threshold_slack: float = 0.5
    """Points of seen PQ that an object threshold may lose against the best one; the lowest such threshold is taken
    (D8)."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network's forward and backward pass (autocast); weights, losses and matching stay in float32."""

    accumulate: int = 1
    """Parts in which a process computes its share of a batch, for less memory with the same gradient; divides batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate < 1 or self.batch % self.accumulate:
            raise UserError(
                f"v2c: batch {self.batch} cannot be cut into {self.accumulate} parts; choose a divisor of it"
            )
        if self.accumulate > 1 and not self.segmenter.frozen_batchnorm:
            raise UserError(
                "v2c: BatchNorm would see one part at a time; accumulate needs segmenter.frozen_batchnorm, or pass 1"
            )
        if not self.segmenter.frozen_batchnorm and self.batch * self.augment.size**2 < 2 * STRIDE**2:
            raise UserError(
                f"v2c: with batch {self.batch} and views of {self.augment.size} pixels the backbone's BatchNorm has one "
                f"value a channel at stride {STRIDE}; pass a larger batch or augment.size, or segmenter.frozen_batchnorm"
            )
        if self.tau <= 0 or self.bank < 1 or self.points < 1 or self.calibration_images < 1:
            raise UserError("v2c: tau must be above 0; bank, points and calibration_images at least 1")
        if self.candidate_mask_weight < 0 or self.candidate_token_weight < 0:
            raise UserError("v2c: candidate_mask_weight and candidate_token_weight must be 0 or more")

    @property
    def candidates(self) -> bool:
        """Whether candidate regions take part in the training."""
        return bool(self.candidate_mask_weight or self.candidate_token_weight)

    def share(self, devices: int) -> int:
        """Images of a batch for each of `devices` devices, which computes them in `accumulate` parts.

        Raises UserError where these are no whole numbers, with ones that would be.
        """
        share, rest = divmod(self.batch, devices)
        if rest:
            raise UserError(
                f"v2c: batch {self.batch} cannot be split over {devices} devices; choose a multiple of it with "
                f"--v2c.batch, or pass --devices {_divisor(self.batch, devices)}"
            )
        if share % self.accumulate:
            raise UserError(
                f"v2c: batch {self.batch} over {devices} devices gives each {share} of its images, which cannot be cut "
                f"into {self.accumulate} parts; pass --v2c.accumulate {_divisor(share, self.accumulate)}"
            )
        return share


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is not above `most`."""
    return max(n for n in range(1, most + 1) if number % n == 0)


@dataclass(frozen=True, kw_only=True)
class QueriesConfig:
    """The cached queries of the training images, which stages 2 and 3 learn from."""

    seed: int = 0
    """Seed of the training views and of the points that the matching compares, 0 or more."""

    views: int = 1
    """Views of each training image, at least 1: its test view, and beyond it views with stage 1's augmentation (D9)."""

    batch: int = 16
    """Views per forward pass, at least 1; only views of equal size share one."""

    def __post_init__(self) -> None:
        if self.views < 1 or self.batch < 1 or self.seed < 0:
            raise UserError("queries: views and batch must be at least 1, and seed 0 or more")


@dataclass(frozen=True, kw_only=True)
class G2SConfig(Schedule):
    """Stage 2, generation-to-semantic alignment: L_g2s = L_mmd + lambda_s L_div + lambda_v L_gv2s + beta KL (paper Eq.
    8, D6).

    The paper gives no value of these settings but mmd_weight's. With text rows of length 1 (`text_scale` 1 / sqrt(D))
    and beta 0 the generated features of unseen classes had nothing to do with their names; the defaults come from a
    sweep on the ablations' validation split.
    """

    lr: float = 1e-3
    """Learning rate at its peak, above 0."""

    weight_decay: float = 0.0
    """AdamW's weight decay; none on norms."""

    clip: float = 1.0
    """Largest norm of the gradient, over all parameters together; 0 does not clip."""

    generator: Literal["vae", "primitives"] = "vae"
    """The paper's conditional VAE, or the vision-centric comparison's attention over learned primitives."""

    hidden: int = 512
    """Width of the generator's hidden layers; a multiple of 4 for primitives."""

    text_scale: float = 2.0
    """Length of the text embedding that conditions the generator, above 0, in units of sqrt(D), the length of a
    standard normal latent (D5)."""

    mmd_weight: float = 1.0
    """Weight of L_mmd, between generated and real features of the batch (Eq. 6; the paper: 1)."""

    diversity_weight: float = 0.01
    """lambda_s, weight of L_div, which keeps an image's generated features apart (Eq. 7); 0 switches it off."""

    semantic_weight: float = 0.01
    """lambda_v, weight of L_gv2s, the focal loss of generated features over the seen classes (Eq. 8); 0 switches it
    off."""

    kl_weight: float = 1.0
    """beta, weight of the VAE's KL divergence, which the paper does not have (D6); 0 switches it off."""

    tau: float = 0.1
    """Temperature of L_div (Eq. 7), above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau <= 0 or self.text_scale <= 0:
            raise UserError(f"g2s: tau and text_scale must be above 0, not {self.tau} and {self.text_scale}")
        if self.batch < 2:
            raise UserError("g2s: batch must be at least 2, for the generator's BatchNorm")


@dataclass(frozen=True, kw_only=True)
class CPAConfig(Schedule):
    """Stage 3, class projector adaptation: L_f (paper Eq. 9)."""

    lr: float = 1e-4
    """Learning rate at its peak, above 0; the paper gives no value."""

    clip: float = 1.0
    """Largest norm of the gradient, over all parameters together; 0 does not clip."""

    synthetic: int = 24
    """U, generated features of unseen classes per step, at least 1; the paper gives no value."""

    real_weight: float = 1.0
    """Weight of the focal loss of real features over the seen classes (Eq. 9; the paper: 1)."""

    synthetic_weight: float = 10.0
    """Weight of the focal loss of generated features over all classes (Eq. 9; the paper: 1)."""

    noise_into: Literal["encoder", "latent"] = "encoder"
    """Where the generator's noise goes in: through the VAE's encoder, as a feature of size C (the paper), or as the
    latent itself (D7)."""

    classifier: Literal["projector", "linear"] = "projector"
    """What is trained: stage 1's projector, or the vision-centric comparison's new linear classifier, which knows no
    names beyond the benchmark's classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.synthetic < 1:
            raise UserError(f"cpa: synthetic must be at least 1, not {self.synthetic}")
