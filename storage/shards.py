"""Shards: webdataset tars of undecoded samples, `{image_id:012d}.jpg/.json/.png` each, or `.image.png/.json/.png`.

The image is a JPEG or an 8-bit RGB PNG, upright as its ids. JPEG has no checksum of its own, so every JSON holds one
over its sample (tars of an older version: none).
The same samples always give the same bytes (mtime 0, one owner, members in order). A tar is read front to back.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from webdataset.tariterators import group_by_keys
from webdataset.writer import TarWriter

from storage.atomic import replacing, write_text
from storage.errors import UserError, anew
from storage.id_colours import colours_of, ids_of
from storage.images import open_image
from storage.through import opened

INDEX = "index.json"
_TAR = re.compile(r"(train|val)-\d{6}\.tar")
_IMAGES = ("jpg", "image.png")
_PNG = b"\x89PNG\r\n\x1a\n"
_MEMBER = re.compile(r"\d{12}\.(jpg|image\.png|json|png)")
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One segment of an image: `id` as in the id map, `category_id` as in the annotations, `area` in pixels."""

    id: int
    category_id: int
    area: int
    iscrowd: bool


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image, undecoded: its `image` file (a JPEG or an 8-bit RGB PNG), the `png` of its ids (as it was, or made of
    a label map), size in pixels, segments in the annotations' order."""

    image_id: int
    image: bytes
    png: bytes
    height: int
    width: int
    segments: tuple[Segment, ...]


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write a tar of the samples in the order given; it appears whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        _write(file, samples)


def check_shard(path: Path) -> None:
    """Read every byte of a tar. Raises UserError as `read_shard`, and when it is not what writing its samples makes."""
    file = io.BytesIO()
    _write(file, read_shard(path))
    if file.getvalue() != path.read_bytes():
        raise UserError(f"{path} is not what was written")


def _write(file: Any, samples: Iterable[Sample]) -> None:
    with TarWriter(file, user="zs-seg", group="zs-seg", mtime=0, encoder=False) as tar:
        for sample in samples:
            about: dict[str, Any] = {
                "image_id": sample.image_id,
                "height": sample.height,
                "width": sample.width,
                "segments": [asdict(segment) for segment in sample.segments],
            }
            about["crc32"] = _checksum(about, sample.image, sample.png)
            tar.write(
                {
                    "__key__": f"{sample.image_id:012d}",
                    "image.png" if sample.image.startswith(_PNG) else "jpg": sample.image,
                    "json": _dumps(about),
                    "png": sample.png,
                }
            )


def read_shard(path: Path, rows: Collection[int] | None = None) -> Iterator[Sample]:
    """The samples of a tar in its order, or those at `rows`, counted from 0; the rest of the tar is then not read,
    except for its headers.

    Raises UserError, naming the tar, when it is missing, cut off or damaged, or holds anything but samples; a tar cut
    between two samples shows only after the last of them.
    """
    try:
        stream = opened(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {anew()}") from error
    try:
        with stream:
            for files in group_by_keys(_members(stream, path, rows)):
                if not {"json", "png"} <= files.keys() or len(files.keys() & set(_IMAGES)) != 1:
                    raise UserError(f"sample {files['__key__']} lacks its image, json or png")
                yield _sample(files)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; {anew()}") from error


def _members(stream: IO[bytes], path: Path, rows: Collection[int] | None) -> Iterator[dict[str, Any]]:
    """The tar's files, or those of the samples at `rows`, for webdataset's `group_by_keys`.

    Raises UserError for a foreign name or a missing end.
    """
    end, row, key = 0, -1, ""
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            if not _MEMBER.fullmatch(member.name):
                raise UserError(f"member {member.name!r} is no {{image id}}.jpg, .image.png, .json or .png")
            # What is no plain file, and sizes that no file has, would lead past the next header.
            if not member.isreg() or member.offset_data != end + _BLOCK or member.size < 0:
                raise UserError(f"the header of member {member.name!r} is broken")
            end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            if (prefix := member.name.partition(".")[0]) != key:
                row, key = row + 1, prefix
            if rows is None or row in rows:
                stream.seek(member.offset_data)
                if len(data := stream.read(member.size)) < member.size:
                    raise UserError("the archive is cut off")
                yield {"fname": member.name, "data": data, "__url__": str(path)}
        # tarfile takes a cut or damaged header for the end of the archive; the end is two blocks of zeros, nothing
        # behind
        stream.seek(end)
        rest = stream.read()
    if len(rest) < 2 * _BLOCK or any(rest):
        raise UserError("the archive is cut off or a header is broken")


def _dumps(about: dict[str, Any]) -> bytes:
    return json.dumps(about, separators=(",", ":")).encode()


def _checksum(about: dict[str, Any], image: bytes, png: bytes) -> int:
    return zlib.crc32(png, zlib.crc32(image, zlib.crc32(_dumps(about))))


def _sample(files: dict[str, Any]) -> Sample:
    try:
        about = json.loads(files["json"])
        checksum = about.pop("crc32", None)
        sample = Sample(
            image_id=about["image_id"],
            image=next(files[kind] for kind in _IMAGES if kind in files),
            png=files["png"],
            height=about["height"],
            width=about["width"],
            segments=tuple(Segment(**segment) for segment in about["segments"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"sample {files['__key__']} has a broken json") from error
    if checksum not in (None, _checksum(about, sample.image, sample.png)):
        raise UserError(f"sample {files['__key__']} is not what its checksum says")
    return sample


def decode_image(sample: Sample) -> np.ndarray:
    """The image, (H, W, 3) uint8 RGB. Raises OSError, SyntaxError or ValueError when the file is damaged."""
    return np.array(open_image(io.BytesIO(sample.image), ("JPEG", "PNG")).convert("RGB"))


def decode_ids(sample: Sample) -> np.ndarray:
    """The segment id of each pixel, (H, W) int32: R + 256 G + 65536 B, 0 = void. Raises as `decode_image`."""
    return ids_of(np.asarray(open_image(io.BytesIO(sample.png), ("PNG",)).convert("RGB")))


def encode_ids(ids: np.ndarray) -> bytes:
    """The inverse of `decode_ids`: (H, W) integers from 0 to 2^24 - 1 -> PNG."""
    assert ids.ndim == 2, ids.shape
    file = io.BytesIO()
    Image.fromarray(colours_of(ids)).save(file, format="PNG")
    return file.getvalue()


def write_index(folder: Path, index: dict[str, list[dict[str, Any]]]) -> None:
    """Write index.json: split -> [{"tar": file name, "samples": n, "segments": n}, ...] in order."""
    write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")


class Shards:
    """A shards artefact opened for reading: which tars each split ("train", "val") has, and what they hold.

    Raises UserError when the folder has no readable index.json.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            index: dict[str, list[dict[str, Any]]] = json.loads((folder / INDEX).read_bytes())
            self._tars = {split: [folder / tar["tar"] for tar in tars] for split, tars in index.items()}
            self._counts = {split: [int(tar["samples"]) for tar in tars] for split, tars in index.items()}
            if strange := [tar["tar"] for tars in index.values() for tar in tars if not _TAR.fullmatch(tar["tar"])]:
                raise UserError(f"{strange[0]!r} is no name of a tar")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise UserError(f"{folder / INDEX} is missing or damaged; {anew()}") from error

    def tars(self, split: str) -> list[Path]:
        """The split's tars, in image-id order."""
        return self._tars[split]

    def counts(self, split: str) -> list[int]:
        """Samples in each of the split's tars."""
        return self._counts[split]
