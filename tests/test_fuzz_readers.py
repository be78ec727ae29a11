"""Every reader of files, fed with files that were changed at random: what was written comes back, or a ValueError of
one line.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_factory import make_coco
from examples import examples
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.benchmarks import Benchmark, Category, LabelFiles, load_benchmark
from pipeline.data.coco import read_split
from pipeline.data.folder import DataFolder
from pipeline.data.images import for_shard, read_image
from pipeline.data.label_maps import read_labels
from pipeline.data.samples import panoptic_sample
from pipeline.scoring.pq import read_panoptic
from pipeline.teacher.text_bank import open_text
from pipeline.training.curves import read_curves
from storage.checkpoints import load_checkpoint, load_training_state, save_checkpoint, save_training_state
from storage.errors import UserError
from storage.keys import Recipe
from storage.queries import check_queries, read_queries, write_queries
from storage.shards import Sample, Segment, Shards, read_shard, write_index, write_shard
from storage.store import Build, Store
from storage.tokens import read_tokens, write_tokens

FUZZ = examples(
    60,
    deadline=timedelta(minutes=2),  # no file makes a reader hang
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SAMPLES = [
    Sample(image_id=i, image=bytes(range(200)) * 4, png=b"p" * 300, height=3, width=4,
           segments=(Segment(id=7 + i, category_id=1, area=12, iscrowd=False),))
    for i in range(3)
]  # fmt: skip
LABELS = Benchmark(
    name="three", categories=tuple(Category(id=i, name=f"class {i}", isthing=False) for i in (1, 2, 9)), unseen_ids=(9,),
    protocol="pixel-ignore", files=LabelFiles(images=("*.jpg",), labels=("*.png",), ignored=(0,), lists=(), roots=(".",), splits={"val": "val"}),
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=5), st.just(10**12), st.just("../x")
)  # fmt: skip
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=5)  # fmt: skip


@st.composite
def edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Up to three changes: other bytes, bytes left out, put in or said twice, an early end."""
    seeds = draw(st.lists(st.tuples(st.sampled_from(["flip", "flip", "drop", "add", "twice", "cut"]), st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.integers(1, 700)), min_size=1, max_size=3))  # fmt: skip

    def change(data: bytes) -> bytes:
        for kind, where, value, length in seeds:
            at = int(where * len(data))
            here, behind = data[at : at + length], data[at + length :]
            if kind == "flip":
                data = data[:at] + bytes(b ^ value for b in data[at : at + 1]) + data[at + 1 :]
            elif kind == "cut":
                data = data[:at]
            else:
                data = (
                    data[:at]
                    + {"drop": b"", "add": here + bytes([value]) * length, "twice": here + here}[kind]
                    + behind
                )
        return data

    return change


@st.composite
def tree_edits(draw: st.DrawFn) -> Callable[[Any], Any]:
    """A value somewhere in a JSON tree is another one, or is not there."""
    path = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=5))
    value, drop = draw(JSON), draw(st.booleans())

    def change(tree: Any) -> Any:
        tree = node = copy.deepcopy(tree)
        for number, step in enumerate(path):
            keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
            if not keys:
                break
            key = keys[step % len(keys)]
            if number == len(path) - 1 or not isinstance(node[key], dict | list):
                if drop:
                    del node[key]
                else:
                    node[key] = value
                break
            node = node[key]
        return tree

    return change


def attempt(read: Callable[[], Any]) -> Any:
    """What it reads, or None where it is refused as it should be."""
    try:
        return read()
    except UserError as error:
        assert str(error) and "\n" not in str(error), repr(error)
        return None


def write_sample_tokens(path: Path) -> None:
    rng = np.random.default_rng(0)
    kept, offsets = np.array([True, False, True]), np.array([0, 2, 2, 5])
    write_tokens(path, global_=rng.normal(size=(3, 8)) * kept[:, None], instance=rng.normal(size=(5, 8)), offsets=offsets,
                 segment_id=np.arange(5), kept=kept)  # fmt: skip


def write_sample_queries(path: Path) -> None:
    rng = np.random.default_rng(0)
    write_queries(path, feature=rng.normal(size=(3, 2, 8)), segment=np.zeros((3, 2)), category=np.zeros((3, 2)),
                  image_id=np.arange(3), view=np.zeros(3))  # fmt: skip


@FUZZ
@given(change=edits())
def test_shard(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    write_shard(tmp_path / "a.tar", SAMPLES)
    (tmp_path / "a.tar").write_bytes(change((tmp_path / "a.tar").read_bytes()))
    assert attempt(lambda: list(read_shard(tmp_path / "a.tar"))) in (None, SAMPLES)


@FUZZ
@given(change=edits(), tree=tree_edits())
def test_index_of_shards(tmp_path: Path, change: Callable[[bytes], bytes], tree: Callable[[Any], Any]) -> None:
    index = {"train": [{"tar": "train-000000.tar", "samples": 3, "segments": 9}], "val": []}
    write_index(tmp_path, index)
    whole = (tmp_path / "index.json").read_bytes()
    for damaged in (change(whole), json.dumps(tree(index)).encode()):
        (tmp_path / "index.json").write_bytes(damaged)
        shards = attempt(lambda: Shards(tmp_path))
        for tars in shards._tars.values() if shards else ():
            assert all(tar.parent == tmp_path for tar in tars)


def fuzz_group(folder: Path, change: Callable[[bytes], bytes], which: int) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = files[which % len(files)]
    file.write_bytes(change(file.read_bytes()))


@FUZZ
@given(change=edits(), which=st.integers(0, 100))
def test_tokens(tmp_path: Path, change: Callable[[bytes], bytes], which: int) -> None:
    path = tmp_path / "a.zarr"
    write_sample_tokens(path)
    whole = read_tokens(path).arrays()
    fuzz_group(path, change, which)
    if found := attempt(lambda: read_tokens(path)):
        assert all(np.array_equal(array, whole[name]) for name, array in found.arrays().items())


@FUZZ
@given(change=edits(), which=st.integers(0, 100))
def test_queries(tmp_path: Path, change: Callable[[bytes], bytes], which: int) -> None:
    path = tmp_path / "train-000000.zarr"
    write_sample_queries(path)
    whole = read_queries([path])
    fuzz_group(path, change, which)
    attempt(lambda: read_queries([path]).feature[np.arange(3)])
    if attempt(lambda: check_queries(path) or True):
        found = read_queries([path])
        assert np.array_equal(found.feature[np.arange(3)], whole.feature[np.arange(3)])
        assert all(np.array_equal(getattr(found, n), getattr(whole, n)) for n in ("segment", "category", "image_id", "view"))  # fmt: skip


@FUZZ
@given(change=edits(), tree=tree_edits(), file=st.sampled_from(["weights.safetensors", "meta.json"]))
def test_checkpoint(tmp_path: Path, change: Callable[[bytes], bytes], tree: Callable[[Any], Any], file: str) -> None:
    """safetensors has no checksum: a changed weight passes here, and is found by the hashes in the manifest."""
    meta = {"ids": [1], "names": ["a"], "isthing": [True], "seen": [True], "teacher": {}, "templates": ["{}"]}
    save_checkpoint(tmp_path, {"embedding": torch.ones(1, 8)}, meta)
    (tmp_path / file).write_bytes(change((tmp_path / file).read_bytes()))
    attempt(lambda: load_checkpoint(tmp_path))
    attempt(lambda: open_text(tmp_path, "key"))
    save_checkpoint(tmp_path, {"embedding": torch.ones(1, 8)}, meta)
    (tmp_path / "meta.json").write_text(json.dumps(tree(meta)))
    attempt(lambda: open_text(tmp_path, "key"))


@FUZZ
@given(change=edits())
def test_training_state(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    state = {
        "step": 7,
        "weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)},
        "rng": [1, None, "x", (2.5,)],
    }
    save_training_state(tmp_path, state)
    file = tmp_path / "training.safetensors"
    file.write_bytes(change(file.read_bytes()))
    if found := attempt(lambda: load_training_state(tmp_path)):
        assert repr(found) == repr(state)


@FUZZ
@given(change=edits(), tree=tree_edits())
def test_manifest(tmp_path: Path, change: Callable[[bytes], bytes], tree: Callable[[Any], Any]) -> None:
    store = Store(tmp_path)

    def work(build: Build) -> None:
        (build.path / "a.txt").write_text("a")
        build.add(build.path / "a.txt")
        build.counts["images"] = 3

    ref = store.build(Recipe(kind="text", stage="text", version=1, config={"a": [1, 2]}, inputs={}), work)
    path, manifest = store.path(ref) / "manifest.json", store.open(ref).manifest
    whole = path.read_bytes()
    for damaged in (change(whole), json.dumps(tree(json.loads(whole))).encode()):
        path.write_bytes(damaged)
        assert attempt(lambda: store.open(ref).manifest) in (None, manifest)
        assert store.verify(ref) or damaged == whole
        assert attempt(lambda: store.find(ref.key[:4])) == ref
    path.write_bytes(whole)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco(tmp_path_factory.mktemp("fuzz") / "coco", train=2, val=1)


@FUZZ
@given(change=edits(), tree=tree_edits())
def test_annotations(coco: Path, tmp_path: Path, change: Callable[[bytes], bytes], tree: Callable[[Any], Any]) -> None:
    source = coco / "annotations" / "panoptic_train2017.json"
    whole = source.read_bytes()
    target = tmp_path / "annotations" / source.name
    target.parent.mkdir(exist_ok=True)
    for damaged in (change(whole), json.dumps(tree(json.loads(whole))).encode()):
        target.write_bytes(damaged)
        entries = attempt(lambda: read_split(tmp_path, "train2017", load_benchmark("coco-panoptic-zps")))
        for entry in entries or ():
            found = panoptic_sample(DataFolder(coco), entry)
            assert not isinstance(found, str) or "\n" not in found
        attempt(lambda: read_panoptic(target))


@FUZZ
@given(change=edits(), tree=tree_edits())
def test_benchmark(tmp_path: Path, change: Callable[[bytes], bytes], tree: Callable[[Any], Any]) -> None:
    facts = {"task": "semantic", "protocol": "none", "images": "photos/*.jpg", "labels": "masks/*.png", "ignored": [0, 255],
             "unseen_ids": [2], "categories": [{"id": 1, "name": "zebra"}, {"id": 2, "name": "grass"}]}  # fmt: skip
    path = tmp_path / "mine.json"
    for damaged in (change(json.dumps(facts).encode()), json.dumps(tree(facts)).encode()):
        path.write_bytes(damaged)
        attempt(lambda: load_benchmark(str(path)))


@FUZZ
@given(change=edits())
def test_images_and_label_maps(coco: Path, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    Image.fromarray(np.array([[0, 1], [2, 9]], np.uint8)).save(tmp_path / "label.png")
    shutil.copy(next((coco / "train2017").iterdir()), tmp_path / "image.jpg")
    for name, read in (("label.png", lambda path: read_labels(path, LABELS)), ("image.jpg", read_image)):
        path = tmp_path / name
        path.write_bytes(change(path.read_bytes()))
        attempt(lambda path=path, read=read: read(path))


PHOTO = np.kron(np.random.default_rng(0).integers(0, 256, (4, 5, 3)), np.ones((2, 3, 1))).astype(np.uint8)


@FUZZ
@given(change=edits(), kind=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "TIFF", "TIFF packed", "TIFF 16"]))
def test_images_of_every_format(tmp_path: Path, change: Callable[[bytes], bytes], kind: str) -> None:
    """With EXIF of a turned photo and its thumbnail's place, as cameras write it."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[274], exif[305] = 6, "camera"
    exif.get_ifd(0x8769)[0x9003] = "2026:11:26 10:00:00"
    picture = Image.fromarray(PHOTO[..., 0].astype(np.uint16) * 257 if kind == "TIFF 16" else PHOTO)
    packed = {"compression": "tiff_lzw"} if kind == "TIFF packed" else {}
    picture.save(file, format=kind.split(maxsplit=1)[0], exif=exif, **packed)
    path = tmp_path / "image"
    path.write_bytes(change(file.getvalue()))
    attempt(lambda: read_image(path))
    attempt(lambda: for_shard(path.read_bytes(), (8, 15), "in the JSON"))


@FUZZ
@given(change=edits())
def test_curves(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    (tmp_path / "curves.jsonl").write_bytes(change(b'{"step": 10, "total": 1.5}\n' * 3))
    attempt(lambda: read_curves(tmp_path))
