"""Semantic data sets: every layout people have is found, whatever is missing is named, label PNGs are read value by
value.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from label_factory import EVERY, HEIGHT, LAYOUTS, VALUES, WIDTH, make_layout, save_labels, stripes
from PIL import Image

from pipeline.data.benchmarks import Benchmark, Category, LabelFiles, load_benchmark
from pipeline.data.label_maps import LabelledSplit, find_split, read_labels, write_labels

OWN = LabelFiles(images=("photos/*_photo.jpg", "photos/*.png"), labels=("maps/*_map.png",), splits={"val": "val"})
THREE = Benchmark(
    name="three",
    categories=tuple(Category(id=i, name=name, isthing=False) for i, name in ((4, "sky"), (2, "sea"), (300, "sand"))),
    unseen_ids=(),
    protocol="none",
    files=LabelFiles(images=("*.jpg",), labels=("*.png",), ignored=(0, 255), splits={}),
)


def find(name: str, data: Path, split: str = "val") -> LabelledSplit:
    files = load_benchmark(name).files
    assert files
    return find_split(files, data, split)


# ------------------------------------------------------------------------------------------------ finding the files


@pytest.mark.parametrize(("name", "layout"), EVERY)
def test_every_layout_is_found(tmp_path: Path, name: str, layout: tuple[str, str, str]) -> None:
    found = find(name, make_layout(tmp_path, layout, VALUES[name][:3]))
    images, labels, listed = layout
    order = ["b_2", "a_1"] if listed else ["a_1", "b_2"]  # a list decides the order
    assert [image.name for image in found.images] == order
    for image in found.images:
        assert image.image == tmp_path / images / f"{image.name}.jpg"
        assert image.label == tmp_path / labels / f"{image.name}.png"
    root = Path(found.layout["root"])
    assert root / found.layout["images"] == tmp_path / images / "*.jpg"
    assert root / found.layout["labels"] == tmp_path / labels / "*.png"
    assert (root / found.layout["list"] == tmp_path / listed) if listed else found.layout["list"] == ""


def test_the_list_decides_which_images_and_which_folder_of_labels(tmp_path: Path) -> None:
    """SegmentationClassAug is taken only where it has every image of the list."""
    images, aug, listed = LAYOUTS["voc20"][0]
    make_layout(tmp_path, (images, aug, ""), (1,), ["a", "b", "unlisted"])
    make_layout(tmp_path, (images, "SegmentationClass", listed), (1,), ["a", "b"])
    found = find("voc20", tmp_path)
    assert [image.name for image in found.images] == ["a", "b"]
    assert found.layout["labels"] == "SegmentationClassAug/*.png"
    (tmp_path / aug / "b.png").unlink()
    assert find("voc20", tmp_path).layout["labels"] == "SegmentationClass/*.png"


def test_the_split_names_the_folders(tmp_path: Path) -> None:
    make_layout(tmp_path, ("images/training", "annotations/training", ""), (1,), ["only"])
    assert [image.name for image in find("ade150", tmp_path, "train").images] == ["only"]
    with pytest.raises(ValueError, match="split 'validation' is unknown; --split is one of train, val"):
        find("ade150", tmp_path, "validation")


def test_names_may_hold_subfolders_and_endings(tmp_path: Path) -> None:
    for name in ("north/a", "north/b", "south/a"):
        image, label = tmp_path / f"photos/{name}_photo.jpg", tmp_path / f"maps/{name}_map.png"
        save_labels(label, stripes((4,)))
        save_labels(image, stripes((4,)))
    (tmp_path / "maps" / "north" / "._a_map.png").write_bytes(b"what macOS leaves behind")
    found = find_split(OWN, tmp_path, "val")
    assert [image.name for image in found.images] == ["north/a", "north/b", "south/a"]
    assert found.images[1].label == tmp_path / "maps/north/b_map.png"


def test_a_suffix_stands_for_all_its_spellings(tmp_path: Path) -> None:
    """Cameras and Windows mix them; a name's own dots and the rest of its spelling stay."""
    names = ("a.JPG", "b.jpeg", "c.v1.2.jpg", "D.JpEg")
    for name in names:
        save_labels(tmp_path / "maps" / f"{Path(name).stem}_map.{'PNG' if name == 'a.JPG' else 'png'}", stripes((4,)))
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{Path(name).stem}_photo{Path(name).suffix}").write_bytes(b"")
    (tmp_path / "photos" / "e_photo.png").write_bytes(b"")
    (tmp_path / "photos" / "f_PHOTO.jpg").write_bytes(b"")
    found = find_split(OWN, tmp_path, "val")
    assert {image.name: image.image.suffix for image in found.images} == {
        "D": ".JpEg", "a": ".JPG", "b": ".jpeg", "c.v1.2": ".jpg"
    }  # fmt: skip
    assert found.images[1].label == tmp_path / "maps/a_map.PNG"
    (tmp_path / "photos" / "b_photo.jpg").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"b_photo\.\w+ and .*b_photo\.\w+ are two images of one name; remove or rename"
    ):
        find_split(OWN, tmp_path, "val")


MISSING: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "no folder": ("voc20", lambda d: d.rename(d.parent / "away"), ["--data", "data not found"]),
    "voc images": (
        "voc20",
        lambda d: (d / "JPEGImages").rename(d / "away"),
        ["data/JPEGImages/*.jpg or ", "data/VOC2012/JPEGImages/*.jpg or ", "data/VOCdevkit/VOC2012/JPEGImages/*.jpg"],
    ),
    "voc labels": (
        "voc20",
        lambda d: (d / "SegmentationClassAug").rename(d / "away"),
        ["no label maps found as ", "data/SegmentationClassAug/*.png or ", "data/SegmentationClass/*.png"],
    ),
    "voc list": (
        "voc20",
        lambda d: (d / "ImageSets/Segmentation/val.txt").unlink(),
        ["no list", "data/ImageSets/Segmentation/val.txt"],
    ),
    "voc empty list": (
        "voc20",
        lambda d: (d / "ImageSets/Segmentation/val.txt").write_text("\n"),
        ["data/ImageSets/Segmentation/val.txt names no image"],
    ),
    "voc image twice": (
        "voc20",
        lambda d: (d / "ImageSets/Segmentation/val.txt").write_text("a_1\nb_2\nb_2\n"),
        ["data/ImageSets/Segmentation/val.txt names 'b_2' twice"],
    ),
    "voc one label": (
        "voc20",
        lambda d: (d / "SegmentationClassAug/a_1.png").unlink(),
        ["1 of 2 images lack their label map, the first 'a_1'", "data/SegmentationClassAug/a_1.png or ", "/SegmentationClass/a_1.png"],
    ),
    "voc one image": (
        "voc20",
        lambda d: (d / "JPEGImages/a_1.jpg").unlink(),
        ["1 of 2 images lack their image, the first 'a_1'", "data/JPEGImages/a_1.jpg"],
    ),
    "context list": (
        "pc59",
        lambda d: (d / "ImageSets/SegmentationContext/val.txt").unlink(),
        ["data/ImageSets/SegmentationContext/val.txt"],
    ),
    "context labels": (
        "pc59",
        lambda d: (d / "SegmentationClassContext").rename(d / "away"),
        ["data/SegmentationClassContext/*.png"],
    ),
    "coco images": (
        "coco-stuff-zss",
        lambda d: (d / "val2017").rename(d / "away"),
        ["data/val2017/*.jpg or ", "data/images/val2017/*.jpg"],
    ),
    "coco labels": (
        "coco-stuff-zss",
        lambda d: (d / "stuffthingmaps_trainval2017").rename(d / "away"),
        ["data/stuffthingmaps_trainval2017/val2017/*.png or ", "data/stuffthingmaps/val2017/*.png"],
    ),
    "ade labels": (
        "ade150",
        lambda d: (d / "annotations").rename(d / "away"),
        ["data/annotations/validation/*.png"],
    ),
    "ade images": (
        "ade150",
        lambda d: (d / "images").rename(d / "away"),
        ["data/images/validation/*.jpg or ", "data/ADEChallengeData2016/images/validation/*.jpg"],
    ),
    "ade one label": (
        "ade150",
        lambda d: (d / "annotations/validation/a_1.png").unlink(),
        ["1 of 2 images lack their label map, the first 'a_1'", "data/annotations/validation/a_1.png"],
    ),
    "ade one image": (
        "ade150",
        lambda d: (d / "images/validation/b_2.jpg").unlink(),
        ["1 of 2 label maps have no image", "annotations/validation/b_2.png", "data/images/validation/b_2.jpg"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_named(tmp_path: Path, case: str) -> None:
    name, harm, message = MISSING[case]
    data = make_layout(tmp_path / "data", LAYOUTS[name][0], VALUES[name][:3])
    harm(data)
    with pytest.raises(ValueError) as caught:
        find(name, data)
    message = str(caught.value)
    assert "\n" not in message
    for part in message:
        assert part in message


# ------------------------------------------------------------------------------------------------ label PNGs


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_mean_what_the_data_set_says(tmp_path: Path, name: str) -> None:
    ignored, first, last, strange = VALUES[name]
    benchmark = load_benchmark(name)
    save_labels(tmp_path / "a.png", stripes((ignored, first, last)))
    labels = read_labels(tmp_path / "a.png", benchmark)
    assert labels.dtype == np.int32 and labels.shape == (HEIGHT, WIDTH)
    assert [labels[0, x].item() for x in (0, WIDTH // 2, WIDTH - 1)] == [-1, 0, len(benchmark.categories) - 1]
    save_labels(tmp_path / "b.png", stripes((first, strange)))
    with pytest.raises(
        ValueError, match=rf"b\.png has pixels of value {strange} \({HEIGHT * WIDTH // 2} of them\)"
    ) as message:
        read_labels(tmp_path / "b.png", benchmark)
    assert f"benchmark {name}" in str(message.value) and "\n" not in str(message.value)


def test_a_voc_png_has_its_values_as_palette_indices(tmp_path: Path) -> None:
    values = stripes((0, 15, 20, 255))
    image = Image.fromarray(values, mode="P")
    image.putpalette([(37 * i) % 256 for i in range(768)])
    image.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    expected = np.where(np.isin(values, (0, 255)), -1, values.astype(np.int32) - 1)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png", load_benchmark("voc20")), expected)


def grey_png(values: list[int], bits: int) -> bytes:
    """One row of a grey PNG, written by hand: Pillow writes none of 2 or 4 bits."""
    row = int("".join(f"{value:0{bits}b}" for value in values), 2).to_bytes(len(values) * bits // 8, "big")
    header = struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_grey_pngs_of_other_depths(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[300, 2, 0, 4]], np.uint16)).save(path)
    np.testing.assert_array_equal(read_labels(path, THREE), [[2, 1, -1, 0]])
    path.write_bytes(grey_png([4, 2, 0, 2], 8))
    np.testing.assert_array_equal(read_labels(path, THREE), [[0, 1, -1, 1]])
    path.write_bytes(grey_png([4, 2, 0, 2], 4))
    with pytest.raises(ValueError, match=r"a\.png is a grey PNG of 4 bits"):
        read_labels(path, THREE)


def test_files_that_are_no_label_maps(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"a\.png not found"):
        read_labels(path, THREE)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"a\.png is a PNG in colours \(mode RGB\)"):
        read_labels(path, THREE)
    save_labels(path, stripes((2, 4)))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"a\.png is damaged"):
        read_labels(path, THREE)
    Image.fromarray(stripes((2, 4))).save(path, format="JPEG")
    with pytest.raises(ValueError, match=r"a\.png is no PNG"):
        read_labels(path, THREE)


def test_written_label_maps_are_read_back(tmp_path: Path) -> None:
    for benchmark in (THREE, load_benchmark("voc20")):
        classes = np.random.default_rng(0).integers(0, len(benchmark.categories), (9, 7)).astype(np.int32)
        path = tmp_path / benchmark.name / "deep" / "a.png"
        write_labels(path, classes, benchmark)
        np.testing.assert_array_equal(read_labels(path, benchmark), classes)
        stored = np.array(Image.open(path))
        assert stored[0, 0] == benchmark.categories[classes[0, 0]].id
