"""The settings of evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.inference.config import ALPHA, BETA
from storage.errors import UserError
from storage.keys import option

# Stage 1 chooses its object threshold from these, and the report's curve is drawn over them.
OBJECT_THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What the report measures and shows; a semantic benchmark has no sweeps."""

    batch: int = 8
    """Images per forward pass, at least 1; only images of equal test size share one."""

    pictures: int = 8
    """Example images in the report, 0 or more: the first validation images that contain an unseen class."""

    control_offset: float = 0.1
    """Offset subtracted from the seen classes' scores in the control row: calibrated stacking of stage 1's checkpoint,
    without stages 2 and 3 (ZegFormer's constant: 0.1)."""

    sweep_images: int = 500
    """Validation images, the first ones, over which the sweeps are computed, at least 1."""

    object_thresholds: tuple[float, ...] = OBJECT_THRESHOLDS
    """Points of the sweep over the object threshold, each in 0..1; the checkpoint's own threshold (D8) is added."""

    seen_offsets: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
    """Points of the sweep over the seen offset, each in 0..1; 0 is added."""

    alpha: float = ALPHA
    """Exponent of the teacher's scores of seen classes in the rows with the teacher at prediction, in 0..1: 0 is the
    network alone, 1 the teacher alone. FC-CLIP's, taken over and not tuned."""

    beta: float = BETA
    """The same of unseen classes. FC-CLIP's, taken over and not tuned."""

    teacher_exponents: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Points of the sweeps over alpha and over beta, each in 0..1; their own values are added."""

    kept_images: int = option(0)
    """Validation images, the first ones, whose masks a panoptic report keeps for `zs-seg sweep`, 0 or more: 55 KB each on
    the demo, 25 MB with 100 queries at 800 x 1216 pixels."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.sweep_images < 1 or min(self.pictures, self.kept_images) < 0:
            raise UserError("evaluate: batch and sweep_images must be at least 1, pictures and kept_images 0 or more")
        for name in ("object_thresholds", "seen_offsets", "teacher_exponents"):
            if any(not 0 <= value <= 1 for value in getattr(self, name)):
                raise UserError(f"evaluate: {name} must lie in 0..1")
        if not (0 <= self.alpha <= 1 and 0 <= self.beta <= 1):
            raise UserError("evaluate: alpha and beta must lie in 0..1")
