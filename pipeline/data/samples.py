"""One image with its annotation, checked and ready for a shard: from a panoptic PNG and its JSON, or a label map."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.benchmarks import Benchmark
from pipeline.data.coco import Entry
from pipeline.data.label_maps import LabelledImage, decode_labels
from storage.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from storage.shards import Sample, Shards


# Some of PIL's other formats start external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")


def panoptic_sample(root: Path, folder: str, entry: Entry) -> Sample | str:
    """The image's sample, checked; or the problem, as text that continues "image 42 "."""
    from storage.shards import Sample, Segment, decode_ids

    if entry.problem:
        return entry.problem
    jpeg_name, png_name = f"{folder}/{entry.image}", f"annotations/panoptic_{folder}/{entry.png}"
    files = _read(root, jpeg_name, png_name)
    if isinstance(files, str):
        return files
    jpeg, png = files
    size = entry.width, entry.height
    for name, data, kind in ((jpeg_name, jpeg, "JPEG"), (png_name, png, "PNG")):
        if problem := _decoding_problem(data, kind, size):
            return f"has a file {name!r} that {problem}"
    sample = Sample(
        image_id=entry.image_id,
        jpeg=jpeg,
        png=png,
        height=entry.height,
        width=entry.width,
        segments=tuple(
            Segment(id=s["id"], category_id=s["category_id"], area=s["area"], iscrowd=bool(s["iscrowd"]))
            for s in entry.segments
        ),
    )
    if problem := _segments_problem(decode_ids(sample), sample):
        return f"has a file {png_name!r} that {problem}"
    return sample


def labelled_sample(root: Path, item: LabelledImage, image_id: int, benchmark: Benchmark) -> Sample | str:
    """The image with its label map as a sample, checked; or the problem, as text that continues "image 42 ".

    Every class in the map is one segment, thing or stuff: its id is the map's value + 1, in the order of values; id 0
    marks ignored pixels. There are no crowds.
    """
    import numpy as np

    from storage.shards import Sample, Segment, encode_ids, open_image

    jpeg_name, png_name = (path.relative_to(root).as_posix() for path in (item.image, item.label))
    files = _read(root, jpeg_name, png_name)
    if isinstance(files, str):
        return files
    jpeg, png = files
    if problem := _decoding_problem(jpeg, "JPEG"):
        return f"has a file {jpeg_name!r} that {problem}"
    try:
        classes = decode_labels(png, benchmark)
    except UserError as error:
        return f"has a file {png_name!r} that {error}"
    width, height = open_image(jpeg, "JPEG").size
    if classes.shape != (height, width):
        size = f"{classes.shape[1]} x {classes.shape[0]}"
        return f"has a file {png_name!r} that is {size} pixels, but its image is {width} x {height}"
    values = np.array([category.id for category in benchmark.categories] + [-1])[classes]  # class -1 is the last
    found = zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True)
    return Sample(
        image_id=image_id,
        jpeg=jpeg,
        png=encode_ids(values + 1),
        height=height,
        width=width,
        segments=tuple(
            Segment(id=value + 1, category_id=value, area=area, iscrowd=False) for value, area in found if value >= 0
        ),
    )


def _read(root: Path, *names: str) -> list[bytes] | str:
    """The files' contents; or the first that cannot be read, and why."""
    files = []
    for name in names:
        try:
            files.append((root / name).read_bytes())
        except FileNotFoundError:
            return f"lacks its file {name!r}"
        except OSError as error:
            return f"has a file {name!r} that cannot be read ({error.strerror})"
    return files


def _decoding_problem(data: bytes, kind: str, expected: tuple[int, int] | None = None) -> str:
    """What is wrong with the file's bytes, "" for nothing. `expected`: (width, height) in the JSON."""
    from PIL import Image, UnidentifiedImageError

    from storage.shards import open_image

    try:
        image = open_image(data, kind)
        if expected and image.size != expected:
            return f"is {image.width} x {image.height} pixels, but {expected[0]} x {expected[1]} in the JSON"
        image.load()
    except UnidentifiedImageError:  # its text holds a memory address
        return f"is no {kind}"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return f"has more than {Image.MAX_IMAGE_PIXELS} pixels"
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as error:
        return f"is damaged ({' '.join(str(error).split())})"
    return ""


def _segments_problem(ids: np.ndarray, sample: Sample) -> str:
    """How the id map (H, W) differs from the JSON's segments or their areas, "" for not at all."""
    import numpy as np

    drawn = dict(zip(*(part.tolist() for part in np.unique(ids, return_counts=True)), strict=True))
    drawn.pop(0, None)  # void
    areas = {segment.id: segment.area for segment in sample.segments}
    if strange := sorted(drawn.keys() - areas.keys()):
        return f"has pixels of segments {_some(strange)}, which the JSON does not list"
    if lost := sorted(areas.keys() - drawn.keys()):
        return f"has no pixel of segments {_some(lost)}, which the JSON lists"
    if wrong := sorted(i for i in areas if areas[i] != drawn[i]):
        return f"shows another area than the JSON for segments {_some(wrong)}"
    return ""


def _some(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def read_image(path: Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB. Raises UserError, naming the file, if it is no image or damaged."""
    import numpy as np
    from PIL import Image

    from storage.shards import refuse_bomb

    try:
        with Image.open(path, formats=FORMATS) as image:
            refuse_bomb(image)
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as an image ({reason}); replace it or leave it out") from error


def samples_with_tokens(shards: Shards, tokens: Path) -> Iterator[tuple[tuple[Sample, Tensor], Tensor]]:
    """((validation sample, its instance tokens (O, D) float32), image (3, H, W) uint8) for every validation sample.

    Reads each tar together with its token group in the folder `tokens`.
    """
    import torch

    from pipeline.data.transforms import channels_first
    from storage.shards import decode_image, read_shard
    from storage.tokens import read_tokens

    for tar in shards.tars("val"):
        group = read_tokens(tokens / f"{tar.stem}.zarr")
        for row, sample in enumerate(read_shard(tar)):
            own = torch.from_numpy(group.instance[group.rows(row)]).float()
            yield (sample, own), channels_first(decode_image(sample))
