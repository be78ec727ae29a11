"""The settings of evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from storage.errors import UserError

# Stage 1 chooses its object threshold from these, and the report's curve is drawn over them.
OBJECT_THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`batch` images share a forward pass where sizes agree. `pictures`: overlays in the report, of the first validation images that
    show an unseen class. `control_offset`: the seen_offset of the control row, calibrated stacking of stage 1 without any training.
    `sweep_images`: the diagnostic curves are of so many validation images, the first ones; `object_thresholds`, `seen_offsets`: their
    points, to which the headline's own setting is added. Of a semantic benchmark there are no such curves."""

    batch: int = 8
    pictures: int = 8
    control_offset: float = 0.1
    sweep_images: int = 500
    object_thresholds: tuple[float, ...] = OBJECT_THRESHOLDS
    seen_offsets: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)

    def __post_init__(self) -> None:
        if self.batch < 1 or self.sweep_images < 1 or self.pictures < 0:
            raise UserError("evaluate: batch and sweep_images must be at least 1, and pictures 0 or more")
        for name in ("object_thresholds", "seen_offsets"):
            if any(not 0 <= value <= 1 for value in getattr(self, name)):
                raise UserError(f"evaluate: {name} must lie in 0..1")
