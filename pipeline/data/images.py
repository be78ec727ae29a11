"""Image files to pixels: the one reader of photographs and of annotation PNGs. README.md has its rules as tables."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from storage.errors import UserError
from storage.images import open_image

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# Some of PIL's other formats start external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_DEEP_GREYS = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
# What orientation 2 to 8 asks for, in PIL's names.
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_ORIENTATION, _BITS, _PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip


def check_header(path: Path) -> None:
    """Raises UserError as `read_image` does, for what the header shows: no image, too large, frames, another mode."""
    try:
        with path.open("rb") as file:
            _opened(file, FORMATS)
    except (OSError, UserError) as error:
        raise _named(path, error) from error


def read_image(path: Path, annotated: tuple[int, int] | None = None, where: str = "") -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB.

    Args:
        annotated: (width, height) of its annotation, which decides whether the pixels are taken as stored or as the
            file's orientation shows them (see `for_shard`). None: as shown.
        where: the annotation's name in a message, "in the JSON".

    Raises:
        UserError: naming the file, if it cannot be read, has frames, holds values whose white is not known, or does not
            fit its annotation.
    """
    import numpy as np

    try:
        data = path.read_bytes()
        image, stated = _loaded(data, FORMATS)
        turn = stated if annotated is None else _turn(image, stated, annotated, where)
        return np.array(_upright(image, data, turn))
    except (OSError, UserError) as error:
        raise _named(path, error) from error


def decode_image(data: bytes, name: str) -> np.ndarray:
    """The content of an image file as `read_image` gives it. Raises UserError as that does, with `name` for the file."""
    import numpy as np

    try:
        image, stated = _loaded(data, FORMATS)
        return np.array(_upright(image, data, stated))
    except UserError as error:
        raise _named(name, error) from error


def for_shard(data: bytes, annotated: tuple[int, int], where: str) -> bytes:
    """What a shard holds of the image file `data`: the same bytes if they are a JPEG, or a PNG of 8-bit RGB, and its
    pixels are annotated as they are stored; else a PNG of the pixels. All of them are decoded once.

    `annotated` is the annotation's (width, height), `where` its name in a message. A file that states an orientation is
    read as stored or as shown, whichever has the annotation's size.

    Raises UserError, with a message that continues the file's name: as `read_image` does, for another size, and for an
    orientation that leaves the size as it is, so that the size does not decide.
    """
    image, stated = _loaded(data, FORMATS)
    turn = _turn(image, stated, annotated, where)
    plain = image.format in ("JPEG", "MPO") or (image.format == "PNG" and image.mode == "RGB" and data[24] == 8)
    if plain and turn == 1:
        return data
    file = io.BytesIO()
    _upright(image, data, turn).save(file, format="PNG")
    return file.getvalue()


def check_size(file: IO[bytes], annotated: tuple[int, int], where: str) -> None:
    """Raises UserError as `for_shard` does, for what the header shows; of a TIFF the pixels are decoded."""
    image = _opened(file, FORMATS)
    with _refusing(FORMATS):
        stated = _orientation(image)
        if image.format == "TIFF":
            image.load()
    _turn(image, stated, annotated, where)


def annotation_png(data: bytes) -> Image.Image:
    """A panoptic PNG or a label map, decoded, in the mode in which it is stored.

    Raises UserError, with a message that continues the file's name: no PNG, damaged, too large, animated, or with an
    orientation, as an annotation's pixels are where they are stored.
    """
    image, stated = _loaded(data, ("PNG",))
    if stated != 1:
        raise UserError(f"states orientation {stated}, which a map of labels must not have (remove the tag)")
    return image


@contextmanager
def _refusing(formats: tuple[str, ...]) -> Iterator[None]:
    """What PIL raises, as a UserError whose message continues the file's name."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError as error:  # its text holds a memory address
        known = ", ".join(formats[:-1]) + " or " * (len(formats) > 1) + formats[-1]
        raise UserError(f"is no {known}, or its header is damaged") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"has more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except _BROKEN as error:
        raise UserError(f"is damaged ({' '.join(str(error).split()) or type(error).__name__})") from error


def _named(path: Path | str, error: OSError | UserError) -> UserError:
    problem = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
    return UserError(f"{path} {problem}; replace it or leave it out")


def _opened(file: IO[bytes], formats: tuple[str, ...]) -> Image.Image:
    """The image with its header read and checked, its pixels not decoded."""
    with _refusing(formats):
        image = open_image(file, formats)
        # The further frames of an MPO, a JPEG as phones and stereo cameras write it, are previews or other views.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise UserError(f"has {frames} frames (save the one that is meant as a file of its own)")
    if image.mode not in (*_EIGHT_BITS, *_DEEP_GREYS):
        raise UserError(f"has colours of mode {image.mode} (save it as RGB)")
    return image


def _loaded(data: bytes, formats: tuple[str, ...]) -> tuple[Image.Image, int]:
    """The decoded image and the orientation that its file states, 1 to 8. PIL has already turned a TIFF."""
    image = _opened(io.BytesIO(data), formats)
    with _refusing(formats):
        if image.format == "TIFF":
            stated = _orientation(image)
            image.load()
        else:
            image.load()
            stated = _orientation(image)
    return image, stated


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8. As for other readers, none or another value is 1, and so is EXIF in disorder."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(image: Image.Image, stated: int, annotated: tuple[int, int], where: str) -> int:
    """The orientation to apply so that the pixels lie as the annotation's: `stated`, or 1 for as they are stored."""
    across = (image.height, image.width) if stated >= 5 else image.size
    shown, stored = (image.size, image.size) if image.format == "TIFF" else (across, image.size)
    if annotated not in (shown, stored):
        as_shown = f", {shown[0]} x {shown[1]} as its orientation {stated} shows it," if shown != stored else ","
        sizes = f"{stored[0]} x {stored[1]} pixels{as_shown} but {annotated[0]} x {annotated[1]}"
        raise UserError(f"is {sizes} {where}")
    if stated != 1 and across == image.size:
        raise UserError(
            f"states orientation {stated}, and its size does not tell whether it was annotated as stored or as shown "
            f"(turn its pixels or leave them, and remove the tag)"
        )
    return stated if annotated == shown else 1


def _upright(image: Image.Image, data: bytes, turn: int) -> Image.Image:
    """The image in RGB, turned by the orientation `turn`."""
    from PIL.Image import Transpose

    rgb = _rgb(image, data)
    return rgb if turn == 1 or image.format == "TIFF" else rgb.transpose(Transpose[_TURNS[turn - 2]])


def _rgb(image: Image.Image, data: bytes) -> Image.Image:
    from PIL import Image

    tags = getattr(image, "tag_v2", {})
    bits = max(tags.get(_BITS, (8,))) if tags else data[24] if image.format == "PNG" else 8
    if image.mode in _DEEP_GREYS:
        if tags.get(_PHOTOMETRIC) == 0:
            raise UserError(f"is a grey of {bits} bits in which 0 is white (save it with 8 bits)")
        return Image.fromarray(_eight_bits(image, bits)).convert("RGB")
    # PIL keeps the upper byte of 16 bits.
    if bits == 16 and (most := _largest(image)) < 64:
        raise _unknown_white(f"the upper byte of the largest value is {most} of 255")
    image.info.pop("transparency", None)  # of a palette: PIL warns, and gives the same colours
    return image.convert("RGB")


def _largest(image: Image.Image) -> int:
    """The largest value of all bands but alpha."""
    import numpy as np

    colours = [i for i, name in enumerate(image.getbands()) if name != "A"]
    return int(np.asarray(image)[..., colours].max())


def _eight_bits(image: Image.Image, bits: int) -> np.ndarray:
    """A grey of more than 8 bits, as (H, W) uint8: an integer's upper 8 bits, a float times 255, rounded."""
    import numpy as np

    values = np.asarray(image)
    low, high = values.min(), values.max()
    white = 1.0 if image.mode == "F" else 2 ** min(bits, 16) - 1
    if not (low >= 0 and high <= white):  # NaN included
        raise UserError(f"is a grey with values from {low:g} to {high:g}, beyond 0 to {white:g} (save it with 8 bits)")
    if high < white / 4:
        raise _unknown_white(f"the largest value is {high:g} of {white:g}")
    return (np.rint(values * 255) if image.mode == "F" else values >> (min(bits, 16) - 8)).astype(np.uint8)


def _unknown_white(why: str) -> UserError:
    return UserError(
        f"is very dark ({why}), or its white is another, such as a camera's of 12 bits (save it with 8 bits)"
    )
