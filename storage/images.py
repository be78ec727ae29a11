"""Opening image files of known formats, for all readers. Imports no torch, so that every command may import it."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def open_image(file: IO[bytes], formats: tuple[str, ...]) -> Image.Image:
    """An image whose header is read and whose pixels are not; a file of another format than `formats` is refused.

    Raises OSError or SyntaxError for what is no such image, and Image.DecompressionBombError where the header promises
    more pixels than PIL's limit; PIL itself only warns, up to twice the limit.
    """
    from PIL import Image

    image = Image.open(file, formats=formats)
    if image.width * image.height > (limit := Image.MAX_IMAGE_PIXELS or 0):
        raise Image.DecompressionBombError(f"it has {image.width} x {image.height} pixels, more than {limit}")
    return image
