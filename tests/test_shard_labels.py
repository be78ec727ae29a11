"""Stage shard on label maps: each class of a map becomes one segment, and bad files are one clear line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label_factory import NAMES, UNLABELLED, make_stuff, save_labels, write_stuff_benchmark
from PIL import Image
from sharding import CONFIG, QUIET, samples, tree

from pipeline import shard as stage
from pipeline.data.benchmarks import Benchmark, load_benchmark
from pipeline.data.config import ShardConfig
from pipeline.data.label_maps import image_ids, label_source, read_labels, training_splits
from pipeline.line import Stage
from pipeline.scoring.metrics import class_map
from pipeline.shard import recipe
from storage.keys import Ref
from storage.shards import Shards, decode_ids
from storage.store import Store

JPEG, PNG = f"train2017/{12:012d}.jpg", f"stuffthingmaps/train2017/{12:012d}.png"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_stuff(tmp_path / "data")


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    return load_benchmark(str(write_stuff_benchmark(tmp_path / "tiny.json")))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def shard(data: Path, benchmark: Benchmark, store: Store, config: ShardConfig = CONFIG) -> Ref:
    return Stage.of(stage, config, source=label_source(data, benchmark), benchmark=benchmark).run(store, QUIET)


def values_of(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


def test_a_map_becomes_a_segment_a_class(data: Path, benchmark: Benchmark, store: Store) -> None:
    artefact = store.open(shard(data, benchmark, store))
    assert Shards(artefact.path).counts("train") == [2, 2, 2] and Shards(artefact.path).counts("val") == [2, 1]
    for split, first, count in (("train", 10, 6), ("val", 10010, 3)):
        read = samples(artefact.path, split)
        assert [sample.image_id for sample in read] == list(range(first, first + count))
        for sample in read:
            name = f"{split}2017/{sample.image_id:012d}"
            assert sample.image == (data / f"{name}.jpg").read_bytes()
            values, ids = values_of(data / "stuffthingmaps" / f"{name}.png"), decode_ids(sample)
            assert (sample.height, sample.width) == values.shape
            np.testing.assert_array_equal(ids == 0, values == UNLABELLED)
            shown = sorted({*values.ravel().tolist()} - {UNLABELLED})
            assert [segment.category_id for segment in sample.segments] == shown
            for segment in sample.segments:
                np.testing.assert_array_equal(ids == segment.id, values == segment.category_id)
                assert segment.area == (values == segment.category_id).sum() and not segment.iscrowd
            np.testing.assert_array_equal(
                class_map(ids, sample.segments, benchmark.index, image=1),
                read_labels(data / "stuffthingmaps" / f"{name}.png", benchmark),
            )
        counts = artefact.manifest.counts[split]
        assert counts["images"] == count and counts["crowd"] == 0
        assert counts["segments"] == sum(len(sample.segments) for sample in read)


def test_a_map_without_any_label_is_an_image_without_segments(data: Path, benchmark: Benchmark, store: Store) -> None:
    save_labels(data / PNG, np.full_like(values_of(data / PNG), UNLABELLED).astype(np.uint8))
    (sample,) = [s for s in samples(store.path(shard(data, benchmark, store)), "train") if s.image_id == 12]
    assert sample.segments == () and not decode_ids(sample).any()


def test_neither_the_folder_nor_its_layout_is_in_the_key(data: Path, benchmark: Benchmark, tmp_path: Path) -> None:
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    first = shard(data, benchmark, one)
    moved = data.rename(tmp_path / "elsewhere")
    (moved / "images").mkdir()
    for split in ("train2017", "val2017"):
        (moved / split).rename(moved / "images" / split)
    (moved / "stuffthingmaps").rename(moved / "stuffthingmaps_trainval2017")
    assert shard(moved, benchmark, two) == first
    assert tree(two.path(first)) == tree(one.path(first))


def test_what_moves_the_key(data: Path, benchmark: Benchmark) -> None:
    source = label_source(data, benchmark)

    def key(**change: Any) -> str:
        return recipe(CONFIG, source=label_source(data, benchmark), benchmark=replace(benchmark, **change)).key

    before = key()
    assert key(unseen_ids=(0,), protocol="none", name="other") == before  # shards serve every protocol
    assert benchmark.files
    assert key(files=replace(benchmark.files, ignored=())) != before
    found = {source.fingerprint}
    (data / PNG).write_bytes((data / PNG).read_bytes() + b"\0")
    found.add(label_source(data, benchmark).fingerprint)
    (data / JPEG).rename(data / "train2017" / f"{99:012d}.jpg")
    found.add(label_source(data, benchmark).fingerprint)
    (data / "stuffthingmaps" / "val2017" / f"{10010:012d}.png").unlink()
    found.add(label_source(data, benchmark).fingerprint)
    assert len(found) == 4
    with pytest.raises(ValueError, match="no longer, the one that was planned with"):
        Stage.of(stage, CONFIG, source=source, benchmark=benchmark).run(Store(data / "store"), QUIET)


def test_hidden_files_and_folders_are_not_data(data: Path, benchmark: Benchmark, store: Store) -> None:
    """Such as a notebook's copies of images: they would be images without a label map."""
    source = label_source(data, benchmark)
    for folder in (data / "train2017" / ".ipynb_checkpoints", data / "stuffthingmaps" / "train2017" / ".thumbnails"):
        folder.mkdir()
    (data / "train2017" / ".ipynb_checkpoints" / "a-checkpoint.jpg").write_bytes((data / JPEG).read_bytes())
    (data / "train2017" / "._a.jpg").write_bytes(b"x")
    (data / "train2017" / "Thumbs.db").write_bytes(b"x")
    (data / "stuffthingmaps" / "train2017" / ".thumbnails" / "a.png").write_bytes(b"x")
    assert label_source(data, benchmark) == source
    shard(data, benchmark, store)


def test_images_are_numbered_by_name_or_by_place(data: Path, benchmark: Benchmark, store: Store) -> None:
    assert image_ids(training_splits(data, benchmark)["val"]) == [10010, 10011, 10012]
    for folder, kind in (("val2017", "jpg"), ("stuffthingmaps/val2017", "png")):
        (data / folder / f"{10011:012d}.{kind}").rename(data / folder / f"2007_000032.{kind}")
    assert image_ids(training_splits(data, benchmark)["val"]) == [1, 2, 3]
    for folder, kind in (("val2017", "jpg"), ("stuffthingmaps/val2017", "png")):
        (data / folder / f"2007_000032.{kind}").rename(data / folder / f"10012.{kind}")
    assert image_ids(training_splits(data, benchmark)["val"]) == [1, 2, 3]  # 10012 twice
    assert [sample.image_id for sample in samples(store.path(shard(data, benchmark, store)), "val")] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------ bad files


def stretch(path: Path) -> None:
    """To 16 bits, as an image program does it: every value times 257."""
    Image.fromarray((values_of(path) * 257).astype(np.uint16)).save(path)


def redraw(path: Path, value: int) -> None:
    values = values_of(path)
    values[10, 10:12] = value
    save_labels(path, values.astype(np.uint8))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "label out of range": (
        lambda d: redraw(d / PNG, 181),
        rf"has a file '{PNG}' that has pixels of value 181 \(2 of them\), which is neither a class of benchmark tiny nor ignored",
    ),
    "16 bits": (lambda d: stretch(d / PNG), f"'{PNG}' that has pixels of value "),
    "wrong size": (
        lambda d: save_labels(d / PNG, values_of(d / PNG)[1:].astype(np.uint8)),
        rf"'{JPEG}' that is \d+ x \d+ pixels, but \d+ x \d+ in its label map",
    ),
    "map missing": (lambda d: (d / PNG).unlink(), f"lacks its file '{PNG}'"),
    "image missing": (lambda d: (d / JPEG).unlink(), f"lacks its file '{JPEG}'"),
    "map in colours": (
        lambda d: Image.open(d / PNG).convert("RGB").save(d / PNG),
        r"is a PNG in colours \(mode RGB\)",
    ),
    "map truncated": (lambda d: (d / PNG).write_bytes((d / PNG).read_bytes()[:60]), f"'{PNG}' that is damaged"),
    "map is text": (lambda d: (d / PNG).write_text("<html>404</html>"), f"'{PNG}' that is no PNG"),
    "map is a folder": (lambda d: ((d / PNG).unlink(), (d / PNG).mkdir()), f"lacks its file '{PNG}'|cannot be read"),
    "image truncated": (
        lambda d: (d / JPEG).write_bytes((d / JPEG).read_bytes()[:400]),
        f"'{JPEG}' that is damaged",
    ),
    "image is a gif": (lambda d: Image.open(d / JPEG).save(d / JPEG, format="GIF"), f"'{JPEG}' that is no JPEG"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_stops_the_build_or_is_skipped(data: Path, benchmark: Benchmark, store: Store, name: str) -> None:
    spoil, reason = BAD[name]
    spoil(data)
    with pytest.raises(ValueError, match=rf"train image 12 .*({reason}).*; .* --skip-bad$") as caught:
        shard(data, benchmark, store)
    assert "\n" not in str(caught.value) and str(data) in str(caught.value)
    assert store.refs() == []

    artefact = store.open(shard(data, benchmark, store, replace(CONFIG, skip_bad=True)))
    assert [sample.image_id for sample in samples(artefact.path, "train")] == [10, 11, 13, 14, 15]
    (skipped,) = artefact.manifest.counts["skipped"]
    assert (skipped["split"], skipped["image_id"]) == ("train", 12)
    assert re.search(reason, skipped["reason"]) and str(data) not in skipped["reason"]


def test_16_bits_with_values_as_they_are_do(data: Path, benchmark: Benchmark, store: Store) -> None:
    Image.fromarray(values_of(data / PNG).astype(np.uint16)).save(data / PNG)
    (sample,) = [s for s in samples(store.path(shard(data, benchmark, store)), "train") if s.image_id == 12]
    assert {s.category_id for s in sample.segments} <= NAMES.keys()


WRONG: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no folder": (lambda d: d.rename(d.parent / "away"), ["data not found", "--coco"]),
    "no images": (
        lambda d: (d / "train2017").rename(d / "away"),
        ["no images found as", "data/train2017/*.jpg or ", "data/images/train2017/*.jpg", "--coco"],
    ),
    "no maps": (
        lambda d: (d / "stuffthingmaps" / "val2017").rename(d / "away"),
        ["no label maps found as", "data/stuffthingmaps_trainval2017/val2017/*.png or ", "/stuffthingmaps/val2017/*.png"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_layout_is_said_before_anything_runs(data: Path, benchmark: Benchmark, name: str) -> None:
    spoil, message = WRONG[name]
    spoil(data)
    with pytest.raises(ValueError) as caught:
        label_source(data, benchmark)
    assert "\n" not in str(caught.value)
    for part in message:
        assert part in str(caught.value)


def test_a_benchmark_without_training_files(data: Path, tmp_path: Path) -> None:
    file = write_stuff_benchmark(tmp_path / "tiny.json", splits={"val": "val2017"})
    with pytest.raises(ValueError, match="benchmark tiny names no files to train on and is for `zs-seg evaluate`"):
        label_source(data, load_benchmark(str(file)))
