"""Stage shard: every kind of bad data is one clear line."""

from __future__ import annotations

import io
import json
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
        r"shows \d+ pixels of segment \d+, but its area is \d+ in the JSON",
    ),
    "other areas": (
        lambda c: edit_json(c, lambda d: [s.update(area=s["area"] + 1) for s in annotation(d)["segments_info"]]),
        r"shows \d+ pixels of segment \d+, but its area is \d+ in the JSON, and so for 2 more",
    ),
    "segment id 0": (
        lambda c: edit_json(c, lambda d: segment(d).update(id=0)),
        "has a segment of id 0, which marks the pixels of no segment; ids are 1 or more",
    ),
    "segment id above 2^24": (
        lambda c: edit_json(c, lambda d: segment(d).update(id=2**24 + 5)),
        r"has segment 16777221, but the colours of a panoptic PNG hold ids up to 16777215 \(2\^24 - 1\)",
    ),
    "unknown category": (
        lambda c: edit_json(c, lambda d: segment(d).update(category_id=4242)),
        r"has category 4242 \(segment \d+\), which benchmark coco-panoptic-zps does not know",
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
    # a category that the benchmark lacks is no fault of the file
    cure = "make it unlabelled with --data.others ignore" if name == "unknown category" else "correct it"
    with pytest.raises(ValueError, match=rf"train image 12 .*{reason}.*{cure}, or pass --skip-bad$") as caught:
        shard(coco, store)
    assert "\n" not in str(caught.value) and str(coco) in str(caught.value)
    assert store.refs() == []

    artefact = store.open(shard(coco, store, replace(CONFIG, skip_bad=True)))
    assert [sample.image_id for sample in samples(artefact.path, "train")] == [10, 11, 13, 14]
    (skipped,) = artefact.manifest.counts["skipped"]
    assert (skipped["split"], skipped["image_id"]) == ("train", 12)
    assert re.search(reason, skipped["reason"]) and str(coco) not in skipped["reason"]
    assert artefact.manifest.counts["train"]["images"] == 4


def test_numbers_written_otherwise_are_read(coco: Path, tmp_path: Path) -> None:
    """Floats and strings that are whole numbers, and true for 1, give the shards of the integers."""
    plain, other = Store(tmp_path / "plain"), Store(tmp_path / "other")
    expected = shard(coco, plain)

    def rewrite(data: dict[str, Any]) -> None:
        for item in data["images"]:
            item.update(id=str(item["id"]), height=float(item["height"]), width=f"{item['width']}.0")
        for item in data["annotations"]:
            item["image_id"] = float(item["image_id"])
            for one in item["segments_info"]:
                one.update(area=float(one["area"]), iscrowd=bool(one["iscrowd"]), category_id=str(one["category_id"]))
        for category in data["categories"]:
            category.update(id=str(category["id"]), isthing=str(category["isthing"]))

    edit_json(coco, rewrite)
    edit_json(coco, rewrite, "val2017")
    assert tree(other.path(shard(coco, other))) == tree(plain.path(expected))


def test_a_damaged_image_of_cocos_own_is_to_be_downloaded_again(coco: Path, store: Store) -> None:
    edit_json(coco, lambda d: d.update(info={"description": "COCO 2018 Panoptic Dataset"}))
    (coco / JPEG).unlink()
    with pytest.raises(ValueError, match=f"lacks its file '{JPEG}'; download it again, or pass --skip-bad$"):
        shard(coco, store)


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_without_any_segment_are_refused(coco: Path, store: Store, split: str) -> None:
    """One segment in the split is enough; without any the training, or the scores, would be of nothing."""
    folder = f"{split}2017"
    kept = json.loads((coco / f"annotations/panoptic_{folder}.json").read_text())["annotations"][-1]
    for left, refused in (([kept["image_id"]], False), ([], True)):

        def empty(data: dict[str, Any], left: list[int] = left) -> None:
            for item in data["annotations"]:
                if item["image_id"] not in left:
                    item["segments_info"] = []
                    png = coco / "annotations" / f"panoptic_{folder}" / item["file_name"]
                    png.write_bytes(encode_ids(np.zeros(Image.open(png).size[::-1], int)))

        edit_json(coco, empty, folder)
        if refused:
            with pytest.raises(ValueError, match=f"none of . {split} images has a segment, all their pixels are void"):
                shard(coco, store)
        else:
            shard(coco, store)


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
    with pytest.raises(ValueError, match="no val image can be used, the first has a file .* is no JPEG.*; correct it$"):
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
    "json is a list": (
        lambda c: (c / TRAIN_JSON).write_text("[]"),
        r"the file is \[\], which must be an object with images and annotations",
    ),
    "no images": (
        lambda c: edit_json(c, lambda d: d.pop("images")),
        "the file lacks images, which must be a list; correct it",
    ),
    "images is empty": (lambda c: edit_json(c, lambda d: d.update(images=[])), "holds no images"),
    "no annotations": (
        lambda c: edit_json(c, lambda d: d.pop("annotations")),
        "the file lacks annotations, which must be a list",
    ),
    "an image is a number": (
        lambda c: edit_json(c, lambda d: d["images"].append(3)),
        "entry 6 of images is 3, which must be an object with id",
    ),
    "no id": (
        lambda c: edit_json(c, lambda d: image_entry(d).pop("id")),
        "entry 3 of images lacks id, which must be a whole",
    ),
    **{
        f"id is {value!r}": (
            lambda c, value=value: edit_json(c, lambda d: image_entry(d).update(id=value)),
            f"entry 3 of images has id {re.escape(repr(value))}, which must be a whole number from 0 to 999999999999; "
            "correct it$",
        )
        for value in ("ADE_0012", "", "12.5", "0x12", "٣", 12.5, -12, "-12", 10**12, [12], None, float("inf"), "9" * 30)
    },
    "no height": (
        lambda c: edit_json(c, lambda d: image_entry(d).pop("height")),
        "image 12 lacks height, which must be a whole",
    ),
    "height is 0": (
        lambda c: edit_json(c, lambda d: image_entry(d).update(height=0)),
        "image 12 has height 0, which must be a whole number of 1 or more",
    ),
    "no file name": (
        lambda c: edit_json(c, lambda d: image_entry(d).pop("file_name")),
        "image 12 lacks file_name, which must be a bare file name",
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
        "annotation of image 12 lacks segments_info, which must be a list",
    ),
    **{
        f"segment without {field}": (
            lambda c, field=field: edit_json(c, lambda d: segment(d).pop(field)),
            rf"image 12, entry 1 of segments_info.* lacks {field}, which must be ",
        )
        for field in ("id", "category_id", "area", "iscrowd")
    },
    **{
        f"{field} {value!r}": (
            lambda c, field=field, value=value: edit_json(c, lambda d: segment(d).update({field: value})),
            rf"image 12, entry 1 of segments_info \(segment \d+\) has {field} {re.escape(repr(value))}, "
            f"which must be {bounds}; correct it$",
        )
        for field, value, bounds in (
            ("area", [400], "a whole number of 0 or more"),
            ("area", 400.5, "a whole number of 0 or more"),
            ("area", -1, "a whole number of 0 or more"),
            ("category_id", "person", "a whole number of 0 or more"),
            ("iscrowd", 2, "0 or 1"),
        )
    },
    "a segment is a number": (
        lambda c: edit_json(c, lambda d: annotation(d)["segments_info"].insert(1, 7)),
        "image 12, entry 2 of segments_info is 7, which must be an object with id",
    ),
    "isthing is a word": (
        lambda c: edit_json(c, lambda d: d["categories"][1].update(isthing="yes")),
        "category 3 has isthing 'yes', which must be 0 or 1",
    ),
    "json of COCO's own": (
        lambda c: edit_json(
            c, lambda d: (d.update(info={"description": "COCO 2018 Panoptic Dataset"}), image_entry(d).pop("height"))
        ),
        "image 12 lacks height, .*; download it again$",
    ),
    "a number of 5000 digits": (
        lambda c: (c / TRAIN_JSON).write_text(f'{{"images": [{"9" * 5000}]}}'),
        "no valid JSON .*; correct it$",
    ),
    **{
        f"file name {name!r}": (
            lambda c, name=name: edit_json(c, lambda d: image_entry(d).update(file_name=name)),
            r"image 12 has file_name .* must be a bare file name, without the folder \(train2017\)",
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
