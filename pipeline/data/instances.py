"""Instance annotations in COCO's format, as CVAT, Roboflow and Label Studio export them: polygons and run lengths,
drawn into one map of segments.

Where instances overlap, the smaller one lies on top, by the pixels of its own mask; of equal ones the one that the file
lists first. Crowd regions lie below all others. Pixels of no instance are unlabelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.data.benchmarks import whole
from storage.errors import UserError

if TYPE_CHECKING:
    import numpy as np


def draw(annotations: Sequence[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """The map (height, width) int32 of instances 1, 2, ... in the order given, 0 = none of them.

    Each has `id`, `iscrowd` and `segmentation`: polygons, run lengths in column order, or nothing (None, []), which
    draws nothing. One without a pixel, or below others, is not in the map.

    Raises UserError, with a message that continues "image 42 ", for a segmentation that is none of these, or has
    another size than the image.
    """
    import numpy as np
    from pycocotools import mask as coco_mask

    # as COCO's run lengths, which take little memory
    masks = {number: mask for number, one in enumerate(annotations, 1) if (mask := _mask(one, height, width))}
    ids = np.zeros((height, width), np.int32)

    def depth(number: int) -> tuple[bool, int, int]:
        return not annotations[number - 1]["iscrowd"], -int(coco_mask.area(masks[number])), -number

    # the last one drawn lies on top
    for number in sorted(masks, key=depth):
        ids[coco_mask.decode(masks[number]).astype(bool)] = number
    return ids


def has_mask(annotation: dict[str, Any]) -> bool:
    """Whether there is anything to draw, right or wrong: exporters leave `segmentation` empty where only a box was
    drawn."""
    found = annotation.get("segmentation")
    return bool(_outlines(found)) if isinstance(found, list | None) else True


def _outlines(found: list[Any] | None) -> list[list[Any]]:
    """The polygons of at least three points, which alone have an area; also of one that is not in a list of its own."""
    if found and all(isinstance(number, int | float) for number in found):
        found = [found]
    return [part for part in found or [] if isinstance(part, list) and len(part) >= 6]


def _mask(annotation: dict[str, Any], height: int, width: int) -> Any:
    """The mask as pycocotools' run lengths; None where there is nothing to draw."""
    found, where = annotation["segmentation"], f"has annotation {annotation['id']}"
    if not isinstance(found, list | dict | None):
        raise UserError(f"{where} whose segmentation is {found!r:.60}, which must be polygons or run lengths")
    if not has_mask(annotation):
        return None
    if isinstance(found, dict):
        return _runs(found, height, width, where)
    return _polygons(_outlines(found), height, width, where)


def _polygons(outlines: list[list[Any]], height: int, width: int, where: str) -> Any:
    """The union of polygons [x, y, x, y, ...], as COCO's own tools draw them."""
    import numpy as np
    from pycocotools import mask as coco_mask

    try:
        points = [np.array(part, np.float64) for part in outlines]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} with a polygon that holds no numbers ({error})") from error
    for part in points:
        if part.ndim != 1 or len(part) % 2 or not np.isfinite(part).all() or np.abs(part).max() > 1e6:
            raise UserError(f"{where} with a polygon that is no list of finite x, y, x, y, ... in pixels")
    return coco_mask.merge(coco_mask.frPyObjects([part.tolist() for part in points], height, width))


def _runs(found: dict[str, Any], height: int, width: int, where: str) -> Any:
    """The mask of run lengths: pixels outside, inside, outside, ... down the columns; a list, or COCO's text of it."""
    import numpy as np
    from pycocotools import mask as coco_mask

    size, counts = found.get("size"), found.get("counts")
    if not isinstance(size, list) or [float(side) for side in size if isinstance(side, int | float)] != [height, width]:
        raise UserError(
            f"{where} with a mask of size {size!r:.40} (height, width), but the image is {height} x {width}"
        )
    given = _unpacked(counts) if isinstance(counts, str) else counts if isinstance(counts, list) else []
    lengths = [number for number in map(whole, given) if number is not None and number >= 0]
    if len(lengths) < len(given) or sum(lengths) != height * width:
        raise UserError(f"{where} with run lengths that do not add up to the image's {height * width} pixels")
    values = np.arange(len(lengths)) % 2 == 1
    inside = np.repeat(values, lengths).reshape(width, height).T
    return coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))


def _unpacked(text: str) -> list[int]:
    """The run lengths in COCO's text: each number in groups of five bits, lowest first, as characters from "0" on, of
    which bit 6 means that more follow and bit 5 of the last one is the sign; from the third on, a number is the
    difference to the one two before it. Nothing where the text is cut off or has other characters."""
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64 or shift > 60:
            return []
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            if group & 16:
                value -= 1 << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    return [] if shift else lengths
