"""The two kinds of view the network gets of an image, as configs; `pipeline/transforms.py` makes them."""

from __future__ import annotations

from dataclasses import dataclass

STRIDE = 32  # the network's input is padded to a multiple of this


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Training views: `size` pixels square; the image is scaled to fit `size` times a factor drawn from `jitter`, then cropped
    at random, or padded at the right and the bottom, and mirrored half of the time (`flip`)."""

    size: int = 1024
    jitter: tuple[float, float] = (0.1, 2.0)
    flip: bool = True

    def __post_init__(self) -> None:
        if self.size < STRIDE or self.size % STRIDE:
            raise ValueError(f"augment: size must be a multiple of {STRIDE}, not {self.size}")
        if not 0 < self.jitter[0] <= self.jitter[1]:
            raise ValueError(f"augment: jitter must be a rising pair of positive factors, not {self.jitter}")


@dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """Test views: the short side becomes `short` pixels unless the long one would exceed `longest`."""

    short: int = 800
    longest: int = 1333

    def __post_init__(self) -> None:
        if not 1 <= self.short <= self.longest:
            raise ValueError(
                f"test view: short must be at least 1 and at most longest, not {self.short} and {self.longest}"
            )
