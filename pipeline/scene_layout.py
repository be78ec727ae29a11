"""How crowded the generated world is: numbers, sizes, occlusion and clutter of a scene."""

from __future__ import annotations

from dataclasses import dataclass


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
            raise ValueError(f"scenes: layout.things {self.things} must be two numbers from 1, the smaller first")
        if not 0.05 <= self.radius[0] <= self.radius[1] <= 0.5:
            raise ValueError(f"scenes: layout.radius {self.radius} must lie in 0.05..0.5, the smaller first")
        if not 0 < self.visible <= 0.9 or self.clutter < 0:
            raise ValueError("scenes: layout.visible must be above 0 and at most 0.9, and clutter 0 or more")
