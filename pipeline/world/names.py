"""The class names of the generated world: every "<appearance> <shape>" for things, every "<tint> <texture>" for
stuff."""

from __future__ import annotations

APPEARANCES = {
    "red": (205, 45, 45),
    "green": (45, 165, 65),
    "blue": (50, 80, 205),
    "yellow": (225, 205, 50),
    "purple": (140, 55, 170),
    "cyan": (60, 195, 205),
    "striped": None,
    "spotted": None,
}
SHAPES = ("circle", "star", "ring", "square", "triangle", "cross")
TINTS = {"grey": (135, 135, 135), "brown": (130, 90, 55), "pink": (225, 160, 175), "olive": (125, 125, 55)}
TEXTURES = ("stripes", "dots", "checks", "fog")


def thing_names(shapes: tuple[str, ...]) -> list[str]:
    """Every "<appearance> <shape>" for `shapes`, shape by shape."""
    return [f"{appearance} {shape}" for shape in shapes for appearance in APPEARANCES]


def stuff_names() -> list[str]:
    """Every "<tint> <texture>", texture by texture."""
    return [f"{tint} {texture}" for texture in TEXTURES for tint in TINTS]
