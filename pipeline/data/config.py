"""The two kinds of view the network gets of an image, as configs; `pipeline/data/transforms.py` makes them."""

from __future__ import annotations

from dataclasses import dataclass

from storage.errors import UserError

STRIDE = 32  # the network's input is padded to a multiple of this


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """`samples_per_tar` of the listed images go into a tar; the last tar of a split may hold fewer.

    `skip_bad` goes on without images that are missing, damaged or at odds with their annotation, and lists them in the
    manifest; without it the first one stops the build. It is not in the key: a build that finishes without it is the
    one with it. `limit` takes the first so many images by id of each split, 0 = all.
    """

    samples_per_tar: int = 256
    skip_bad: bool = False
    limit: int = 0

    def __post_init__(self) -> None:
        if self.samples_per_tar < 1:
            raise UserError(f"samples_per_tar must be 1 or more, not {self.samples_per_tar}")
        if self.limit < 0:
            raise UserError(f"limit must be 0 (all images) or more, not {self.limit}")


@dataclass(frozen=True, kw_only=True)
class CocoConfig:
    """Real images: `root` is a folder in COCO's own layout (not in any key; its content is). `benchmark` names the classes and the
    split: one of the package's own, or a JSON file in the same format; a semantic one says itself where in the folder its images and
    label maps lie."""

    root: str = ""
    benchmark: str = "coco-panoptic-zps"


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Training views: `size` pixels square; the image is scaled to fit `size` times a factor drawn from `jitter`, then cropped
    at random, or padded at the right and the bottom, and mirrored half of the time (`flip`)."""

    size: int = 1024
    jitter: tuple[float, float] = (0.1, 2.0)
    flip: bool = True

    def __post_init__(self) -> None:
        if self.size < STRIDE or self.size % STRIDE:
            raise UserError(f"augment: size must be a multiple of {STRIDE}, not {self.size}")
        if not 0 < self.jitter[0] <= self.jitter[1]:
            raise UserError(f"augment: jitter must be a rising pair of positive factors, not {self.jitter}")


@dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """Test views: the short side becomes `short` pixels unless the long one would exceed `longest`."""

    short: int = 800
    longest: int = 1333

    def __post_init__(self) -> None:
        if not 1 <= self.short <= self.longest:
            raise UserError(
                f"test view: short must be at least 1 and at most longest, not {self.short} and {self.longest}"
            )
