"""Stage shard: every kind of bad data is one clear line."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_factory import edit_json, make_coco
from PIL import Image
from sharding import CONFIG, JPEG, PNG, samples, shard, tree

from pipeline.data.coco import coco_source
from storage.shards import Shards, encode_ids
from storage.store import Store


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "coco")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# ---------------------------------------------------------------------------------------------------------------------
# Bad images: each is an error without --skip-bad, and skipped and counted with it. All of them are about image 12.


def annotation(data: dict[str, Any]) -> dict[str, Any]:
    return next(item for item in data["annotations"] if item["image_id"] == 12)


def image_entry(data: dict[str, Any]) -> dict[str, Any]:
    return next(item for item in data["images"] if item["id"] == 12)


def segment(data: dict[str, Any]) -> dict[str, Any]:
    return annotation(data)["segments_info"][0]


def redraw(coco: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    rgb = np.asarray(Image.open(coco / PNG)).astype(np.int64)
    (coco / PNG).write_bytes(encode_ids(change(rgb @ np.array([1, 256, 65536]))))


def bomb(coco: Path, side: int) -> None:
    """A PNG whose header, and the JSON with it, promises side x side pixels."""
    data = (coco / PNG).read_bytes()
    header = data[12:16] + struct.pack(">II", side, side) + data[24:29]
    (coco / PNG).write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])


def resave(coco: Path, name: str, kind: str) -> None:
    image = Image.open(coco / name).convert("RGB")
    file = io.BytesIO()
    image.save(file, format=kind)
    (coco / name).write_bytes(file.getvalue())


def shrink(coco: Path, name: str, kind: str) -> None:
    image = Image.open(coco / name)
    smaller = image.crop((0, 0, image.width - 1, image.height))
    smaller.save(coco / name, format=kind)


def truncate(coco: Path, name: str, part: float) -> None:
    data = (coco / name).read_bytes()
    (coco / name).write_bytes(data[: int(len(data) * part)])


BAD_IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "jpeg missing": (lambda c: (c / JPEG).unlink(), f"lacks its file '{JPEG}'"),
    "png missing": (lambda c: (c / PNG).unlink(), f"lacks its file '{PNG}'"),
    "jpeg is a folder": (lambda c: ((c / JPEG).unlink(), (c / JPEG).mkdir()), "cannot be read"),
    "jpeg truncated": (lambda c: truncate(c, JPEG, 0.7), f"'{JPEG}' that is damaged"),
    "jpeg nearly gone": (lambda c: truncate(c, JPEG, 0.02), f"'{JPEG}' that is damaged"),
    "jpeg empty": (lambda c: truncate(c, JPEG, 0), "is no JPEG"),
    "jpeg is text": (lambda c: (c / JPEG).write_text("<html>404</html>"), "is no JPEG"),
    "jpeg of another size": (lambda c: shrink(c, JPEG, "JPEG"), r"is \d+ x \d+ pixels, but \d+ x \d+ in the JSON"),
    "png truncated": (lambda c: truncate(c, PNG, 0.6), f"'{PNG}' that is damaged"),
    "png is a jpeg": (lambda c: resave(c, PNG, "JPEG"), "is no PNG"),
    "png of another size": (lambda c: shrink(c, PNG, "PNG"), r"is \d+ x \d+ pixels"),
    "image bomb": (lambda c: bomb(c, 20_000), "has more than 89478485 pixels"),
    "smaller image bomb": (lambda c: bomb(c, 10_000), "has more than 89478485 pixels"),
    "pixels of an unlisted segment": (
        lambda c: redraw(c, lambda ids: np.where(np.arange(ids.shape[1]) == 0, 77, ids)),
        "has pixels of segments 77, which the JSON does not list",
    ),
    "a segment without pixels": (
        lambda c: redraw(c, lambda ids: np.where(ids == ids[6, 6], ids[0, 0], ids)),
        r"has no pixel of segments \d+, which the JSON lists",
    ),
    "another area": (
        lambda c: edit_json(c, lambda d: segment(d).update(area=segment(d)["area"] + 1)),
        r"shows another area than the JSON for segments \d+",
    ),
    "unknown category": (
        lambda c: edit_json(c, lambda d: segment(d).update(category_id=4242)),
        "has category 4242, which benchmark coco-panoptic-zps does not know",
    ),
    "segment listed twice": (
        lambda c: edit_json(c, lambda d: annotation(d)["segments_info"].append(segment(d))),
        r"has segment \d+ twice",
    ),
    "no annotation": (lambda c: edit_json(c, lambda d: d["annotations"].remove(annotation(d))), "has no annotation"),
    "no image entry": (
        lambda c: edit_json(c, lambda d: d["images"].remove(image_entry(d))),
        "has an annotation but no entry in images",
    ),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_stops_the_build_or_is_skipped(coco: Path, store: Store, name: str) -> None:
    spoil, reason = BAD_IMAGES[name]
    spoil(coco)
    with pytest.raises(ValueError, match=rf"train image 12 .*{reason}.*; .* --skip-bad$") as caught:
        shard(coco, store)
    assert "\n" not in str(caught.value) and str(coco) in str(caught.value)
    assert store.refs() == []

    artefact = store.open(shard(coco, store, replace(CONFIG, skip_bad=True)))
    assert [sample.image_id for sample in samples(artefact.path, "train")] == [10, 11, 13, 14]
    (skipped,) = artefact.manifest.counts["skipped"]
    assert (skipped["split"], skipped["image_id"]) == ("train", 12)
    assert re.search(reason, skipped["reason"]) and str(coco) not in skipped["reason"]
    assert artefact.manifest.counts["train"]["images"] == 4


def test_without_bad_images_a_skipping_build_is_a_strict_one(coco: Path, tmp_path: Path) -> None:
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    strict, skipping = shard(coco, one), shard(coco, two, replace(CONFIG, skip_bad=True))
    assert strict == skipping
    assert tree(one.path(strict)) == tree(two.path(skipping))
    assert one.open(strict).manifest.config == two.open(skipping).manifest.config


def test_a_strict_build_does_not_trust_what_a_skipping_one_left(coco: Path, store: Store) -> None:
    (coco / JPEG).unlink()
    for path in (coco / "val2017").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no val image"):
        shard(coco, store, replace(CONFIG, skip_bad=True))
    with pytest.raises(ValueError, match="train image 12 lacks its file"):
        shard(coco, store)


def test_a_large_jpeg_cut_after_some_bytes(coco: Path, store: Store) -> None:
    """PIL finds the end missing only when it decodes all of it."""
    size = (300, 400)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(coco / JPEG)
    (coco / PNG).write_bytes(encode_ids(np.full(size, 5)))
    edit_json(coco, lambda d: image_entry(d).update(height=size[0], width=size[1]))
    edit_json(coco, lambda d: annotation(d).update(segments_info=[{**segment(d), "id": 5, "area": size[0] * size[1]}]))
    shard(coco, store)
    (coco / JPEG).write_bytes((coco / JPEG).read_bytes()[:3000])
    with pytest.raises(ValueError, match=f"train image 12 has a file '{JPEG}' that is damaged .*--skip-bad"):
        shard(coco, store)


def test_a_tar_whose_images_are_all_bad_is_left_out(coco: Path, store: Store) -> None:
    for image_id in (12, 13):
        (coco / "train2017" / f"{image_id:012d}.jpg").unlink()
    artefact = store.open(shard(coco, store, replace(CONFIG, skip_bad=True)))
    assert [tar.name for tar in Shards(artefact.path).tars("train")] == ["train-000000.tar", "train-000002.tar"]
    assert [item["image_id"] for item in artefact.manifest.counts["skipped"]] == [12, 13]


def test_all_bad_is_an_error_even_when_skipping(coco: Path, store: Store) -> None:
    for path in (coco / "val2017").iterdir():
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match="no val image can be used, the first has a file .* is no JPEG.*; replace the files"
    ):
        shard(coco, store, replace(CONFIG, skip_bad=True))
    assert store.refs() == []


# ---------------------------------------------------------------------------------------------------------------------
# Bad annotations and folders: always an error.


def test_a_folder_whose_name_the_system_refuses() -> None:
    with pytest.raises(ValueError, match="cannot be read .*--coco") as caught:
        coco_source("x" * 300)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(coco: Path) -> None:
    (coco / "val2017").chmod(0)
    try:
        with pytest.raises(ValueError, match="val2017 cannot be read .*--coco"):
            coco_source(coco)
    finally:
        (coco / "val2017").chmod(0o700)


TRAIN_JSON = "annotations/panoptic_train2017.json"


def rename_folder(coco: Path, name: str) -> None:
    (coco / name).rename(coco.parent / "away")


BAD_DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda c: c.rename(c.parent / "away"), "COCO folder .*coco not found; pass --coco"),
    "no json": (lambda c: (c / TRAIN_JSON).unlink(), r"panoptic_train2017\.json not found; .*--coco"),
    "no image folder": (lambda c: rename_folder(c, "val2017"), r"folder .*val2017 not found; .*--coco"),
    "no png folder": (
        lambda c: rename_folder(c, "annotations/panoptic_val2017"),
        "folder .*panoptic_val2017 not found",
    ),
    "json is a brace": (lambda c: (c / TRAIN_JSON).write_text("{\n"), r"panoptic_train2017\.json: no valid JSON"),
    "json is bytes": (lambda c: (c / TRAIN_JSON).write_bytes(b"\xff\xfe\xff"), "no valid JSON"),
    "json is deep": (lambda c: (c / TRAIN_JSON).write_text("[" * 100_000), "no valid JSON"),
    "json is a list": (lambda c: (c / TRAIN_JSON).write_text("[]"), "the file lacks a valid"),
    "no images": (lambda c: edit_json(c, lambda d: d.pop("images")), "the file lacks a valid images"),
    "images is empty": (lambda c: edit_json(c, lambda d: d.update(images=[])), "holds no images"),
    "no annotations": (lambda c: edit_json(c, lambda d: d.pop("annotations")), "the file lacks a valid annotations"),
    "an image is a number": (
        lambda c: edit_json(c, lambda d: d["images"].append(3)),
        "an entry of images lacks a valid id",
    ),
    "no id": (lambda c: edit_json(c, lambda d: image_entry(d).pop("id")), "lacks a valid id"),
    "id is text": (lambda c: edit_json(c, lambda d: image_entry(d).update(id="12")), "lacks a valid id"),
    "id is negative": (lambda c: edit_json(c, lambda d: image_entry(d).update(id=-12)), "lacks a valid id"),
    "id is huge": (lambda c: edit_json(c, lambda d: image_entry(d).update(id=10**12)), "more than 12 digits"),
    "no height": (lambda c: edit_json(c, lambda d: image_entry(d).pop("height")), "image 12 lacks a valid height"),
    "height is 0": (lambda c: edit_json(c, lambda d: image_entry(d).update(height=0)), "image 12 lacks a valid height"),
    "no file name": (
        lambda c: edit_json(c, lambda d: image_entry(d).pop("file_name")),
        "image 12 lacks a valid file_name",
    ),
    "image twice": (
        lambda c: edit_json(c, lambda d: d["images"].append(image_entry(d))),
        "image 12 is listed twice in images",
    ),
    "annotation twice": (
        lambda c: edit_json(c, lambda d: d["annotations"].append(annotation(d))),
        "image 12 is listed twice in annotations",
    ),
    "no segments": (
        lambda c: edit_json(c, lambda d: annotation(d).pop("segments_info")),
        "annotation of image 12 lacks a valid segments_info",
    ),
    **{
        f"segment without {field}": (
            lambda c, field=field: edit_json(c, lambda d: segment(d).pop(field)),
            f"a segment of image 12 lacks a valid {field}",
        )
        for field in ("id", "category_id", "area", "iscrowd")
    },
    **{
        f"file name {name!r}": (
            lambda c, name=name: edit_json(c, lambda d: image_entry(d).update(file_name=name)),
            "image 12 has file_name .* must be a bare file name",
        )
        for name in ("../../../etc/passwd", "/etc/passwd", "a/b.jpg", "..", "", "a\\b.jpg", "a\0.jpg", "a/\nb")
    },
    "png name with a path": (
        lambda c: edit_json(c, lambda d: annotation(d).update(file_name="../x.png")),
        "must be a bare file name",
    ),
    "another class of the same id": (
        lambda c: edit_json(c, lambda d: d["categories"][1].update(name="aeroplane")),
        "category 3 is 'aeroplane' .*, but 'car' .* in benchmark coco-panoptic-zps",
    ),
}


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_one_line(coco: Path, store: Store, name: str, skip_bad: bool) -> None:
    spoil, message = BAD_DATA[name]
    spoil(coco)
    with pytest.raises(ValueError, match=message) as caught:
        shard(coco, store, replace(CONFIG, skip_bad=skip_bad))
    assert "\n" not in str(caught.value)
    assert store.refs() == []


def test_names_with_line_breaks_stay_on_one_line(coco: Path, store: Store) -> None:
    edit_json(coco, lambda d: image_entry(d).update(file_name="a\nb.jpg"))
    with pytest.raises(ValueError, match="lacks its file") as caught:
        shard(coco, store)
    assert "\n" not in str(caught.value)
