"""The one reader of image files: every mode and orientation against arrays computed here, and what is refused."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_factory import edit_json, make_coco
from image_files import png, tiff
from PIL import Image, ImageCms
from sharding import BENCHMARK, JPEG, PNG, samples, shard

from pipeline.data.coco import read_split
from pipeline.data.folder import DataFolder
from pipeline.data.images import annotation_png, check_header, for_shard, read_image
from pipeline.data.samples import panoptic_sample
from storage.errors import UserError
from storage.shards import Sample, decode_image
from storage.store import Store

HEIGHT, WIDTH = 32, 48
RNG = np.random.default_rng(0)
# Blocks of 16 pixels, so that JPEG keeps their colours within a level or two.
RGB = np.kron(RNG.integers(0, 256, (2, 3, 3)), np.ones((16, 16, 1), int)).astype(np.uint8)
RGB[:16, :16], RGB[16:, 32:] = 255, 0  # a deep image that does not reach its white could be of another
GREY = RGB[..., 0]
ALPHA = np.where(np.arange(WIDTH) < 20, 0, 200).astype(np.uint8)[None].repeat(HEIGHT, 0)
PALETTE = RNG.integers(0, 256, (6, 3)).astype(np.uint8)
INDEX = np.kron(np.arange(6).reshape(2, 3), np.ones((16, 16), int)).astype(np.uint8)
LOW = RNG.integers(0, 256, (HEIGHT, WIDTH))  # the lower byte of 16 bits


def grey(values: np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 3)."""
    return np.stack([values] * 3, axis=-1).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> Callable[[int], bytes]:
    """The image as a file that states an orientation: in EXIF, or in TIFF's own tag."""

    def write(orientation: int) -> bytes:
        file, exif = io.BytesIO(), Image.Exif()
        exif[274] = orientation
        about = {} if kind == "BMP" else {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif}
        image.save(file, format=kind, **about, **options)
        return file.getvalue()

    return write


def exif_chunk(orientation: int) -> tuple[bytes, bytes]:
    exif = Image.Exif()
    exif[274] = orientation
    return b"eXIf", exif.tobytes()[6:]


def by_hand(values: np.ndarray, bits: int) -> Callable[[int], bytes]:
    return lambda orientation: png(values, bits, chunks=(exif_chunk(orientation),))


def tiff_by_hand(values: np.ndarray, bits: int, **about: int) -> Callable[[int], bytes]:
    return lambda orientation: tiff(values, bits, orientation=orientation, **about)


def paletted(alpha: bytes | None = None) -> Image.Image:
    image = Image.fromarray(INDEX, mode="P")
    image.putpalette(PALETTE.tobytes())
    if alpha:
        image.info["transparency"] = alpha
    return image


def xmp_only(orientation: int) -> bytes:
    packet = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="{orientation}"/></x:xmpmeta>'
    return png(RGB, 8, chunks=((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet.encode()),))


def in_cmyk(rgb: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """A CMYK image, and its colours as (1 - ink) (1 - black)."""
    cmyk = np.dstack([255 - rgb, np.full(rgb.shape[:2], 40)]).astype(np.uint8)
    return Image.fromarray(cmyk, mode="CMYK"), np.rint(rgb * (215 / 255)).astype(np.uint8)


CMYK, OF_CMYK = in_cmyk(RGB)
IMAGE, PICTURE = Image.fromarray(RGB), Image.fromarray(GREY)
FOUR_BITS = (GREY >> 4).astype(int)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

# mode: (file that states an orientation, its pixels as stored (H, W, 3), levels that a lossy format may be off)
MODES: dict[str, tuple[Callable[[int], bytes], np.ndarray, int]] = {
    "jpeg": (saved(IMAGE, "JPEG", quality=100, subsampling=0), RGB, 2),
    "jpeg progressive": (saved(IMAGE, "JPEG", quality=100, subsampling=0, progressive=True), RGB, 2),
    "jpeg grey": (saved(PICTURE, "JPEG", quality=100), grey(GREY), 2),
    "jpeg cmyk": (saved(CMYK, "JPEG", quality=100), OF_CMYK, 4),
    "jpeg with a colour profile": (saved(IMAGE, "JPEG", quality=100, subsampling=0, icc_profile=SRGB), RGB, 2),
    "png": (saved(IMAGE, "PNG"), RGB, 0),
    "png rgba": (saved(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG"), RGB, 0),
    "png palette": (saved(paletted(), "PNG"), PALETTE[INDEX], 0),
    "png palette, transparent": (saved(paletted(b"\0\xff\x80"), "PNG"), PALETTE[INDEX], 0),
    "png grey": (saved(PICTURE, "PNG"), grey(GREY), 0),
    "png grey + alpha": (saved(Image.fromarray(np.dstack([GREY, ALPHA]), mode="LA"), "PNG"), grey(GREY), 0),
    "png 1 bit": (saved(Image.fromarray(GREY > 127), "PNG"), grey(np.where(GREY > 127, 255, 0)), 0),
    "png grey 4 bits": (by_hand(FOUR_BITS, 4), grey(FOUR_BITS * 17), 0),
    "png grey 16 bits": (by_hand(GREY.astype(int) * 256 + LOW, 16), grey(GREY), 0),
    "png rgb 16 bits": (by_hand(RGB.astype(int) * 257, 16), RGB, 0),
    "png rgba 16 bits": (by_hand(np.dstack([RGB, ALPHA]).astype(int) * 257, 16), RGB, 0),
    "png grey + alpha 16 bits": (by_hand(np.dstack([GREY, ALPHA]).astype(int) * 257, 16), grey(GREY), 0),
    "png, orientation in XMP alone": (xmp_only, RGB, 0),
    "webp": (saved(IMAGE, "WEBP", lossless=True), RGB, 0),
    "webp rgba": (saved(Image.fromarray(np.dstack([RGB, ALPHA])), "WEBP", lossless=True, exact=True), RGB, 0),
    "tiff": (saved(IMAGE, "TIFF"), RGB, 0),
    "tiff deflated": (saved(IMAGE, "TIFF", compression="tiff_adobe_deflate"), RGB, 0),
    "tiff palette": (saved(paletted(), "TIFF"), PALETTE[INDEX], 0),
    "tiff cmyk": (saved(CMYK, "TIFF"), OF_CMYK, 1),
    "tiff 1 bit": (saved(Image.fromarray(GREY > 127), "TIFF"), grey(np.where(GREY > 127, 255, 0)), 0),
    "tiff grey, 0 is white": (tiff_by_hand(255 - GREY, 8, photometric=0), grey(GREY), 0),
    "tiff grey 12 bits": (tiff_by_hand(GREY.astype(int) * 16 + LOW % 16, 12, photometric=1), grey(GREY), 0),
    "tiff grey 16 bits": (saved(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), grey(GREY), 0),
    "tiff grey 16 bits signed": (tiff_by_hand(GREY.astype(int) * 128, 16, photometric=1, kind=2), grey(GREY // 2), 0),
    "tiff grey int32": (saved(Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"), grey(GREY), 0),
    "tiff grey float": (saved(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), grey(GREY), 0),
    "tiff rgb 16 bits": (tiff_by_hand(RGB.astype(int) * 257, 16, photometric=2), RGB, 0),
    "bmp": (saved(IMAGE, "BMP"), RGB, 0),
    "bmp palette": (saved(paletted(), "BMP"), PALETTE[INDEX], 0),
}  # fmt: skip
# EXIF 2.32, table 6: which stored pixel is shown in row i, column j.
SHOWN: dict[int, Callable[[Any, Any], tuple[Any, Any]]] = {
    1: lambda i, j: (i, j),
    2: lambda i, j: (i, WIDTH - 1 - j),
    3: lambda i, j: (HEIGHT - 1 - i, WIDTH - 1 - j),
    4: lambda i, j: (HEIGHT - 1 - i, j),
    5: lambda i, j: (j, i),
    6: lambda i, j: (HEIGHT - 1 - j, i),
    7: lambda i, j: (HEIGHT - 1 - j, WIDTH - 1 - i),
    8: lambda i, j: (j, WIDTH - 1 - i),
}


def as_shown(stored: np.ndarray, orientation: int) -> np.ndarray:
    size = stored.shape[:2] if orientation < 5 else stored.shape[1::-1]
    return stored[SHOWN[orientation](*np.indices(size))]


def near(found: np.ndarray, expected: np.ndarray, levels: int) -> None:
    assert found.shape == expected.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= levels


def from_shard(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """What training decodes, of an image whose annotation has this shape."""
    height, width = shape[:2]
    kept = for_shard(data, (width, height), "in the JSON")
    return decode_image(Sample(image_id=1, image=kept, png=b"", height=height, width=width, segments=()))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("mode", "orientation"),
    [(mode, o) for mode in MODES for o in SHOWN if o == 1 or not mode.startswith("bmp")],  # BMP states none
)
def test_modes_and_orientations(tmp_path: Path, mode: str, orientation: int) -> None:
    """Read alone: as shown. With an annotation: as shown or as stored, whichever has its size."""
    write, stored, levels = MODES[mode]
    data, shown = write(orientation), as_shown(stored, orientation)
    path = tmp_path / "image"
    path.write_bytes(data)
    check_header(path)
    pixels = read_image(path)
    near(pixels, shown, levels)
    if orientation == 1:
        np.testing.assert_array_equal(from_shard(data, stored.shape), pixels)
    elif orientation < 5:
        with pytest.raises(UserError, match=rf"^states orientation {orientation}, and its size does not tell"):
            from_shard(data, stored.shape)
    else:
        np.testing.assert_array_equal(from_shard(data, shown.shape), pixels)
        if mode.startswith("tiff"):
            with pytest.raises(UserError, match=r"^is 32 x 48 pixels, but 48 x 32 in the JSON"):
                from_shard(data, stored.shape)
        else:
            near(from_shard(data, stored.shape), stored, levels)
            np.testing.assert_array_equal(
                read_image(path, (WIDTH, HEIGHT), "in the JSON"), from_shard(data, stored.shape)
            )


@pytest.mark.parametrize("mode", ["jpeg", "jpeg grey", "jpeg cmyk", "png"])
def test_plain_files_are_kept_byte_for_byte(mode: str) -> None:
    write = MODES[mode][0]
    for orientation in (1, 6):
        assert for_shard(write(orientation), (WIDTH, HEIGHT), "") == write(orientation)
    assert for_shard(write(6), (HEIGHT, WIDTH), "") != write(6)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_square_image_that_is_turned_is_refused(orientation: int) -> None:
    data = saved(IMAGE.crop((0, 0, 32, 32)), "JPEG")(orientation)
    with pytest.raises(UserError, match=f"states orientation {orientation}, and its size does not tell"):
        for_shard(data, (32, 32), "")


@pytest.mark.parametrize("value", [0, 9, 99])
def test_other_orientations_are_none(tmp_path: Path, value: int) -> None:
    (tmp_path / "a.png").write_bytes(MODES["png"][0](value))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), RGB)
    assert for_shard(MODES["png"][0](value), (WIDTH, HEIGHT), "") == MODES["png"][0](value)


def test_exif_in_disorder_states_nothing(tmp_path: Path) -> None:
    data = saved(IMAGE, "JPEG", quality=100)(6)
    assert data.count(b"MM\0*") == 1
    (tmp_path / "a.jpg").write_bytes(data.replace(b"MM\0*", b"XX\0*"))
    assert read_image(tmp_path / "a.jpg").shape == (HEIGHT, WIDTH, 3)


def test_of_a_phones_mpo_the_first_frame_counts(tmp_path: Path) -> None:
    IMAGE.save(
        tmp_path / "a.jpg",
        format="MPO",
        save_all=True,
        append_images=[PICTURE.convert("RGB")],
        quality=100,
        subsampling=0,
    )
    near(read_image(tmp_path / "a.jpg"), RGB, 2)
    data = (tmp_path / "a.jpg").read_bytes()
    assert for_shard(data, (WIDTH, HEIGHT), "") == data
    near(from_shard(data, RGB.shape), RGB, 2)


def frames(kind: str) -> bytes:
    file = io.BytesIO()
    IMAGE.save(file, format=kind, save_all=True, append_images=[PICTURE.convert("RGB")])
    return file.getvalue()


def only(image: Image.Image, kind: str) -> bytes:
    return saved(image, kind)(1)


def floats(change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    return only(Image.fromarray(change(GREY.astype(np.float32) / 255).astype(np.float32)), "TIFF")


BEYOND = "is a grey with values from"
NO_WHITE = r"is very dark \(.*\), or its white is another, such as a camera's of 12 bits \(save it with 8 bits\)"
REFUSED: dict[str, tuple[bytes, str]] = {
    "12 bits in 16": (png(GREY.astype(int) * 16, 16), NO_WHITE),
    "14 bits in 16": (png(GREY.astype(int) * 64, 16), NO_WHITE),
    "8 bits in 16": (png(GREY.astype(int), 16), NO_WHITE),
    "12 bits in a TIFF of 16": (tiff(GREY.astype(int) * 16, 16, photometric=1), NO_WHITE),
    "12 bits in 16, colours": (png(RGB.astype(int) * 16, 16), NO_WHITE),
    "12 bits in 16, colours with alpha": (png(np.dstack([RGB // 16, ALPHA]).astype(int) * 256 + 255, 16), NO_WHITE),
    "8 bits in a TIFF of 16, colours": (tiff(RGB, 16, photometric=2), NO_WHITE),
    "8 bits in an int32": (tiff(GREY, 32, photometric=1, kind=2), NO_WHITE),
    "a large int32": (tiff(GREY.astype(int) << 23, 32, photometric=1), f"{BEYOND} 0 to .*, beyond 0 to 65535"),
    "a negative int16": (tiff(GREY.astype(int) - 200, 16, photometric=1, kind=2), f"{BEYOND} -200 to 55, beyond"),
    "a float to 255": (floats(lambda values: values * 255), f"{BEYOND} 0 to 255, beyond 0 to 1"),
    "a float around 0": (floats(lambda values: values - 0.5), f"{BEYOND} -0.5 to 0.5, beyond 0 to 1"),
    "a float with NaN": (floats(lambda values: np.where(values == 1, np.nan, values)), f"{BEYOND} nan to nan, beyond"),
    "a float of metres": (floats(lambda values: values / 100), NO_WHITE),
    "deep, 0 is white": (tiff(GREY.astype(int) * 257, 16, photometric=0), "is a grey of 16 bits in which 0 is white"),
    "float, 0 is white": (tiff(GREY / 255, 32, photometric=0, kind=3), "is a grey of 32 bits in which 0 is white"),
    "pages": (frames("TIFF"), r"has 2 frames \(save the one"),
    "an animated WebP": (frames("WEBP"), "has 2 frames"),
    "an animated PNG": (frames("PNG"), "has 2 frames"),
    "a GIF": (only(PICTURE, "GIF"), "is no JPEG, PNG, WEBP, BMP or TIFF"),
    "LAB": (only(Image.fromarray(RGB, mode="LAB"), "TIFF"), "has colours of mode LAB"),
    "text": (b"<html>404</html>", "is no JPEG, PNG, WEBP, BMP or TIFF"),
    "nothing": (b"", "is no JPEG"),
    "a cut JPEG": (MODES["jpeg"][0](1)[:600], "is damaged"),
    "a cut PNG": (MODES["png grey 16 bits"][0](1)[:900], "is damaged"),
    "a cut TIFF": (MODES["tiff"][0](6)[:900], "is damaged|is no"),
    "a cut WebP": (MODES["webp"][0](1)[:60], "is damaged|is no"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_rightly_is_refused_by_name(tmp_path: Path, name: str) -> None:
    data, message = REFUSED[name]
    path = tmp_path / "image.tif"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path} ") and str(caught.value).endswith("; replace it or leave it out")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"^({message})") as caught:
        for_shard(data, (WIDTH, HEIGHT), "in the JSON")
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("name", ["pages", "an animated WebP", "an animated PNG", "LAB", "text", "nothing", "a GIF"])
def test_a_header_is_enough(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.png").write_bytes(REFUSED[name][0])
    with pytest.raises(UserError, match=REFUSED[name][1]):
        check_header(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"b\.png cannot be read \(No such file"):
        check_header(tmp_path / "b.png")


# ------------------------------------------------------------------------------------------------ in training


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "coco")


def rewrite(coco: Path, kind: str, name: str, orientation: int = 1, turn: Image.Transpose | None = None) -> np.ndarray:
    """Image 12 as another file, its pixels turned before they are stored; returns how it was shown."""
    with Image.open(coco / JPEG) as image:
        before = image.convert("RGB")
    (coco / JPEG).unlink()
    stored = before.transpose(turn) if turn is not None else before
    (coco / "train2017" / name).write_bytes(
        saved(stored, kind, **({"lossless": True} if kind == "WEBP" else {}))(orientation)
    )
    edit_json(coco, lambda d: next(i for i in d["images"] if i["id"] == 12).update(file_name=name))
    return np.asarray(before)


def entry(coco: Path) -> Any:
    return next(e for e in read_split(coco, "train2017", BENCHMARK) if e.image_id == 12)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_images_of_other_formats_train_as_they_evaluate(coco: Path, tmp_path: Path, kind: str) -> None:
    before = rewrite(coco, kind, "twelve.JPEG")  # the content decides, not the name
    (sample,) = (s for s in samples(Store(tmp_path).path(shard(coco, Store(tmp_path))), "train") if s.image_id == 12)
    np.testing.assert_array_equal(decode_image(sample), before)
    np.testing.assert_array_equal(read_image(coco / "train2017" / "twelve.JPEG"), before)
    assert (sample.image == (coco / "train2017" / "twelve.JPEG").read_bytes()) == (kind == "PNG")


def test_a_phones_photo_is_trained_on_as_it_was_annotated(coco: Path) -> None:
    before = rewrite(coco, "PNG", "a.png", 6, Image.Transpose.ROTATE_90)
    sample = panoptic_sample(DataFolder(coco), entry(coco))
    assert isinstance(sample, Sample)
    np.testing.assert_array_equal(decode_image(sample), before)
    assert (sample.height, sample.width) == before.shape[:2]


def test_pixels_that_were_annotated_as_stored_stay(coco: Path) -> None:
    before = rewrite(coco, "PNG", "a.png", 6)
    sample = panoptic_sample(DataFolder(coco), entry(coco))
    assert isinstance(sample, Sample)
    np.testing.assert_array_equal(decode_image(sample), before)


def test_an_orientation_that_the_size_does_not_settle_is_refused(coco: Path, tmp_path: Path) -> None:
    rewrite(coco, "JPEG", "a.jpg", 3, Image.Transpose.ROTATE_180)
    with pytest.raises(
        UserError, match="train image 12 has a file 'train2017/a.jpg' that states orientation 3, .*--skip-bad$"
    ):
        shard(coco, Store(tmp_path))


def test_neither_size_fits(coco: Path) -> None:
    rewrite(coco, "JPEG", "a.jpg", 6)
    edit_json(coco, lambda d: next(i for i in d["images"] if i["id"] == 12).update(width=7))
    found = panoptic_sample(DataFolder(coco), entry(coco))
    assert isinstance(found, str) and "as its orientation 6 shows it, but 7 x " in found


# ------------------------------------------------------------------------------------------------ annotation PNGs


def test_a_grey_panoptic_png_is_called_that(coco: Path) -> None:
    with Image.open(coco / PNG) as image:
        image.convert("L").save(coco / PNG)
    found = panoptic_sample(DataFolder(coco), entry(coco))
    assert (
        found == f"has a file '{PNG}' that is grey (mode L), but a panoptic PNG is RGB, with id = R + 256 G + 65536 B"
    )


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_panoptic_pngs_of_other_modes_hold_the_same_ids(coco: Path, mode: str) -> None:
    before = panoptic_sample(DataFolder(coco), entry(coco))
    with Image.open(coco / PNG) as image:
        other = image.convert("RGBA") if mode == "RGBA" else image.quantize(256)
    other.save(coco / PNG)
    after = panoptic_sample(DataFolder(coco), entry(coco))
    assert isinstance(before, Sample) and isinstance(after, Sample)
    assert replace(after, png=before.png) == before


def test_a_map_of_labels_has_no_orientation_and_no_frames(coco: Path) -> None:
    shutil.copy(coco / PNG, coco / "before.png")
    with Image.open(coco / "before.png") as image:
        (coco / PNG).write_bytes(saved(image, "PNG")(1))
        annotation_png((coco / PNG).read_bytes())
        (coco / PNG).write_bytes(saved(image, "PNG")(6))
        found = panoptic_sample(DataFolder(coco), entry(coco))
        assert isinstance(found, str) and f"'{PNG}' that states orientation 6, which a map of labels must not" in found
        image.save(coco / PNG, save_all=True, append_images=[image.transpose(Image.Transpose.ROTATE_180)])
    found = panoptic_sample(DataFolder(coco), entry(coco))
    assert isinstance(found, str) and f"'{PNG}' that has 2 frames" in found
