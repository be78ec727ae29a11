"""How crowded the generated world is: numbers, sizes, occlusion and clutter of a scene."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.world.names import SHAPES
from storage.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """`things`: fewest and most things a scene. `radius`: smallest and largest, as shares of the image's side. `visible`: the share of
    its own area that every thing shows at least; scenes with less are drawn again. `clutter`: strokes of ink and colour over the
    finished scene, of no class and in no annotation."""

    things: tuple[int, int] = (2, 4)
    radius: tuple[float, float] = (0.16, 0.27)
    visible: float = 0.6
    clutter: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.things[0] <= self.things[1]:
            raise UserError(f"scenes: layout.things {self.things} must be two numbers from 1, the smaller first")
        if not 0.05 <= self.radius[0] <= self.radius[1] <= 0.5:
            raise UserError(f"scenes: layout.radius {self.radius} must lie in 0.05..0.5, the smaller first")
        if not 0 < self.visible <= 0.9 or self.clutter < 0:
            raise UserError("scenes: layout.visible must be above 0 and at most 0.9, and clutter 0 or more")


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """The generated world.

    `split` "test" holds out the reported unseen classes, "validation" others of the same structure, disjoint from them: use it to
    choose settings. A share `unseen_share` of the training images is drawn from all classes, and mostly falls
    to the image filter as in COCO; the others hold seen classes only. Validation images hold all classes. `size` in pixels.
    """

    seed: int = 0
    size: int = 96
    shapes: tuple[str, ...] = ("circle", "star", "ring")
    train_images: int = 2600
    val_images: int = 300
    unseen_share: float = 0.1
    split: Literal["test", "validation"] = "test"
    layout: LayoutConfig = field(default_factory=LayoutConfig)

    def __post_init__(self) -> None:
        if self.train_images < 1 or self.val_images < 1:
            raise UserError("scenes: train_images and val_images must be at least 1")
        if not self.shapes or not set(self.shapes) <= set(SHAPES):
            raise UserError(f"scenes: shapes must be some of {', '.join(SHAPES)}, not {', '.join(self.shapes)}")
        if self.size < 32 or self.seed < 0:
            raise UserError("scenes: size must be at least 32 pixels, and seed 0 or more")
        if not 0 <= self.unseen_share <= 1:
            raise UserError(f"scenes: unseen_share is a share between 0 and 1, not {self.unseen_share}")
