"""The settings of the generated world: how many scenes of which classes, and how crowded each one is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.data.config import check_choices
from pipeline.world.names import SHAPES
from storage.errors import UserError
from storage.keys import option


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Numbers, sizes, occlusion and clutter of one scene."""

    things: tuple[int, int] = (2, 4)
    """Smallest and largest number of things per scene, from 1."""

    radius: tuple[float, float] = (0.16, 0.27)
    """Smallest and largest radius of a thing as a share of the image's side, within 0.05..0.5."""

    visible: float = 0.6
    """Share of its own area that every thing shows at least, above 0 and at most 0.9; scenes with less are drawn
    again."""

    clutter: int = 0
    """Coloured strokes over the scene that belong to no class and no segment, 0 or more."""

    def __post_init__(self) -> None:
        if not 1 <= self.things[0] <= self.things[1]:
            raise UserError(f"scenes: layout.things {self.things} must be two numbers from 1, the smaller first")
        if not 0.05 <= self.radius[0] <= self.radius[1] <= 0.5:
            raise UserError(f"scenes: layout.radius {self.radius} must lie in 0.05..0.5, the smaller first")
        if not 0 < self.visible <= 0.9 or self.clutter < 0:
            raise UserError("scenes: layout.visible must be above 0 and at most 0.9, and clutter 0 or more")


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """The generated world."""

    seed: int = 0
    """Seed of the scenes, 0 or more; every scene is a function of it and of its own number."""

    size: int = 96
    """Side of the square images in pixels, at least 32."""

    shapes: tuple[str, ...] = ("circle", "star", "ring")
    """Shapes of the things, some of circle, star, ring, square, triangle and cross; each gives 8 classes."""

    train_images: int = 2600
    """Training images to draw, at least 1."""

    val_images: int = 300
    """Validation images to draw, at least 1; they show all classes."""

    unseen_share: float = 0.1
    """Share of the training images, 0..1, that may show unseen classes; the image filter drops most of these, as in
    COCO, and under pixel-ignore they stay."""

    protocol: Literal["image-filter", "pixel-ignore"] = option("image-filter")
    """What hides unseen classes from training: image-filter drops every image that shows one, pixel-ignore keeps all
    images and makes the pixels of unseen classes unlabelled."""

    split: Literal["test", "validation"] = "test"
    """Which classes are unseen: test holds out the reported ones, validation others of the same structure, disjoint
    from them, for choosing settings."""

    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """How crowded a scene is."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.train_images < 1 or self.val_images < 1:
            raise UserError("scenes: train_images and val_images must be at least 1")
        if not self.shapes or not set(self.shapes) <= set(SHAPES):
            raise UserError(f"scenes: shapes must be some of {', '.join(SHAPES)}, not {', '.join(self.shapes)}")
        if self.size < 32 or self.seed < 0:
            raise UserError("scenes: size must be at least 32 pixels, and seed 0 or more")
        if not 0 <= self.unseen_share <= 1:
            raise UserError(f"scenes: unseen_share is a share between 0 and 1, not {self.unseen_share}")
