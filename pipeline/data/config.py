"""The settings of what is read: real images, tars, and the two kinds of view that the network gets of an image.

Also `check_choices`, which every config of the tree calls: this is the lowest of the wings' configs.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from storage.errors import UserError, did_you_mean
from storage.keys import option

STRIDE = 32  # the network's input is padded to a multiple of this


def check_choices(config: Any) -> None:
    """Compare every field whose type is a Literal, alone, in a tuple or beside None, with what the Literal lists.

    Raises UserError that names the config and the field and lists the choices.
    """
    owner = type(config).__name__.removesuffix("Config").lower()
    for field, hint in get_type_hints(type(config)).items():
        if not (choices := choices_of(hint)):
            continue
        value = getattr(config, field)
        for one in value if isinstance(value, tuple) else (value,):
            # 1, 1.0 and True are equal, but give different keys
            if not any(one == choice and type(one) is type(choice) for choice in choices):
                listed = ", ".join(map(str, choices))
                close = did_you_mean(str(one), map(str, choices))
                raise UserError(f"{owner}: {field} must be one of {listed}, not {one!r}{close}")


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values that the Literals in a type hint list, and None where the hint allows it beside them; () without
    Literals."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    choices = tuple(choice for part in get_args(hint) for choice in choices_of(part))
    return (*choices, None) if choices and NoneType in get_args(hint) else choices


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How images and annotations are packed into tars."""

    samples_per_tar: int = 256
    """Listed images per tar, at least 1; the last tar of a split may hold fewer."""

    skip_bad: bool = False
    """Leave out images that are missing, damaged or at odds with their annotation, and list them in the manifest,
    instead of stopping at the first; not part of the key."""

    limit: int = 0
    """Use only the first so many images of each split, by image id; 0 uses all."""

    def __post_init__(self) -> None:
        if self.samples_per_tar < 1:
            raise UserError(f"samples_per_tar must be 1 or more, not {self.samples_per_tar}")
        if self.limit < 0:
            raise UserError(f"limit must be 0 (all images) or more, not {self.limit}")


@dataclass(frozen=True, kw_only=True)
class CocoConfig:
    """Real images: where they are, and which classes they have; a semantic benchmark's file also lists where in the
    folder images and label maps lie."""

    root: str = ""
    """Folder of the images, in COCO's own layout; usually given as --coco or COCO_ROOT; annotations, file names and
    sizes are in the keys, the path is not."""

    benchmark: str = "coco-panoptic-zps"
    """Classes, seen and unseen: those of coco-panoptic-zps or coco-stuff-zss, or of a JSON file such as `zs-seg new`
    writes."""

    unseen: tuple[str, ...] = option(())
    """Names of the classes to be unseen, such as person,car,sky, in place of the benchmark's own."""

    classes: tuple[str, ...] = option(())
    """Names of the only classes to be used, seen and unseen, such as person,car,sky,tree; all by default."""

    others: Literal["refuse", "ignore"] | None = option(None)
    """What becomes of categories that are not among the classes: refuse their image, or ignore, which makes their pixels
    unlabelled; None: as the benchmark has it, which is refuse in those that are shipped."""

    protocol: Literal["own", "image-filter", "pixel-ignore", "none"] = option("own")
    """What hides unseen classes from training: the benchmark's own protocol, or another in its place."""

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Training views: scaled at random, then cropped at random, or padded at the right and the bottom."""

    size: int = 1024
    """Side of the square training views in pixels, a multiple of 32."""

    jitter: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest scale: the longer side of the image becomes size times a factor drawn uniformly between them
    (Mask2Former: 0.1 to 2.0)."""

    flip: bool = True
    """Mirror each training view with probability 0.5."""

    def __post_init__(self) -> None:
        if self.size < STRIDE or self.size % STRIDE:
            raise UserError(f"augment: size must be a multiple of {STRIDE}, not {self.size}")
        if not 0 < self.jitter[0] <= self.jitter[1]:
            raise UserError(f"augment: jitter must be a rising pair of positive factors, not {self.jitter}")


@dataclass(frozen=True, kw_only=True)
class SemanticAugmentConfig(AugmentConfig):
    """Training views as Mask2Former makes them for semantic segmentation.

    Source: the released configurations of Mask2Former and of MMSegmentation, the paper's code base for semantic
    segmentation, with crops of 640 pixels (both are for ADE20K). ZegFormer's and PADing's for COCO-Stuff are the same,
    but end at 1.5.
    """

    size: int = 640
    """Side of the square training views in pixels, a multiple of 32."""

    jitter: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest scale, tenths: the shorter side of the image becomes size times one of the tenths from the
    first to the second, unless the longer one would exceed 4 times size (published: 0.5 to 2.0)."""

    colours: bool = True
    """Distort brightness, contrast, saturation and hue of each training view at random, as SSD does (published)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(abs(10 * factor - round(10 * factor)) > 1e-9 for factor in self.jitter):
            raise UserError(f"augment: jitter must be a pair of tenths, such as 0.5 and 2.0, not {self.jitter}")


@dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """Test views: scaled as a whole, then padded at the right and the bottom to multiples of 32 pixels."""

    short: int = 800
    """Length of the shorter side in pixels, unless the longer one would exceed longest (Mask2Former: 800)."""

    longest: int = 1333
    """Largest length of the longer side in pixels, at least short (Mask2Former: 1333)."""

    def __post_init__(self) -> None:
        if not 1 <= self.short <= self.longest:
            raise UserError(
                f"test view: short must be at least 1 and at most longest, not {self.short} and {self.longest}"
            )
