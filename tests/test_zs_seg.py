"""The module `zs_seg`, as a user's script or notebook calls it."""

from __future__ import annotations

import json
import subprocess
import sys
import types
import warnings
import zipfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lively import lively
from PIL import Image
from pycocotools import mask as coco_mask
from tiny import build, tiny_config

import zs_seg
from flows.cli import main
from models.segmenter import Segmenter as Network
from models.teacher import Teacher
from pipeline.data.transforms import channels_first
from pipeline.inference.maps import panoptic_map
from pipeline.inference.teacher import TeacherAtPrediction
from storage.keys import Ref
from storage.runs import RunRecord, Runs
from storage.store import Store

pytestmark = pytest.mark.slow  # the shared checkpoint
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ref(shared_store: Store) -> Ref:
    return build(shared_store, tiny_config(), until="v2c")["v2c"].recipe.ref


@pytest.fixture(scope="module")
def photo(shared_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene, not square, stored on its side."""
    scenes = build(shared_store, tiny_config(), until="scenes")["scenes"].recipe.ref
    with Image.open(next((shared_store.path(scenes) / "val2017").iterdir())) as image:
        path = tmp_path_factory.mktemp("photo") / "photo.png"
        exif = Image.Exif()
        exif[274] = 6
        image.crop((0, 0, 96, 64)).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    return path


@pytest.fixture(scope="module")
def checkpoint(shared_store: Store, ref: Ref, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively(shared_store.path(ref), tmp_path_factory.mktemp("lively"))


@pytest.fixture(scope="module")
def seg(checkpoint: Path) -> zs_seg.Segmenter:
    return zs_seg.load(checkpoint, threads=1)


def same(one: zs_seg.Result, other: zs_seg.Result) -> bool:
    return np.array_equal(one.map, other.map) and one.segments == other.segments


def test_a_run_a_key_and_a_folder_are_one_checkpoint(
    shared_store: Store, ref: Ref, photo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    store.root.mkdir()
    (store.root / "checkpoint").symlink_to(shared_store.path(ref).parent)
    with Runs(store).running(RunRecord.now(name="mine", command="", refs={"v2c": ref})):
        pass
    monkeypatch.setenv("ZS_SEG_STORE", str(store.root))
    expected = zs_seg.load("mine", threads=1)(photo)
    for what in ("mine:v2c", ref.key[:8], shared_store.path(ref)):
        assert same(zs_seg.load(what, threads=1)(photo), expected)
    with pytest.raises(zs_seg.UserError, match="no artefact and no run 'other'"):
        zs_seg.load("other")


def test_an_image_may_come_as_path_bytes_picture_or_array(seg: zs_seg.Segmenter, photo: Path) -> None:
    found = seg(photo, object_threshold=0)
    assert found.map.shape == (64, 96) and found.file_name == "photo.png" and found.segments
    with Image.open(photo) as picture:
        forms = [str(photo), photo.read_bytes(), picture, np.asarray(found.image)]
        assert all(same(result, found) for result in seg(forms, object_threshold=0))
    grey = seg(np.asarray(Image.fromarray(found.image).convert("L")))
    assert grey.image.shape == (64, 96, 3)
    wrongs: list[Any] = [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
    for wrong in wrongs:
        with pytest.raises(zs_seg.UserError, match="an array must be"):
            seg(wrong)
    with pytest.raises(zs_seg.UserError, match="image is no JPEG"):
        seg(b"no image")


def test_it_is_what_the_command_predicts(seg: zs_seg.Segmenter, checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    words = ("--names", "zebra", "--stuff", "sea", "--object-threshold", "0", "--threads", "1")
    assert (
        main(
            (
                "predict",
                "--checkpoint",
                str(checkpoint),
                "--images",
                str(photo),
                "--json",
                str(tmp_path / "a.json"),
                *words,
            )
        )
        == 0
    )
    entry = json.loads((tmp_path / "a.json").read_text())["images"][0]
    found = seg(photo, ["zebra", "sea:stuff"], object_threshold=0)
    assert entry["segments"] and [segment.plain() for segment in found.segments] == entry["segments"]


def test_other_words_do_not_run_the_network_again(
    seg: zs_seg.Segmenter, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = list[int]()
    forward = Network.forward
    monkeypatch.setattr(
        Network, "forward", lambda self, images, **o: passes.append(len(images)) or forward(self, images, **o)
    )
    picture = np.asarray(Image.open(photo).convert("RGB")).copy()
    first = seg(picture, ["zebra"], only=True, object_threshold=0)
    other = seg(picture, ["red circle", "grass:stuff"], only=True, object_threshold=0)
    assert passes == [1]
    assert {segment.name for segment in first.segments} == {"zebra"}
    assert {segment.name for segment in other.segments} <= {"red circle", "grass"}
    picture[:] = 0  # the same array, another image
    seg(picture)
    assert passes == [1, 1]


def test_the_teacher_at_prediction_encodes_a_mask_once(
    seg: zs_seg.Segmenter, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = Teacher.encode_images
    monkeypatch.setattr(
        Teacher, "encode_images", lambda self, inputs, *a: encoded.append(len(inputs)) or encode(self, inputs, *a)
    )
    predictor = seg.predictor
    options: dict[str, Any] = {"object_threshold": 0.2, "overlap_threshold": 0.1}
    found = seg(photo, with_teacher=True, **options)
    assert sum(encoded) > 1 and not same(found, seg(photo, **options))

    once = sum(encoded)
    seg(photo, ["zebra"], with_teacher=True, alpha=0.3, **options)
    seg(photo, with_teacher=True, object_threshold=0.6)
    assert sum(encoded) <= once + 1  # another threshold or name may let another query in
    encoded.clear()

    # against all queries encoded in one go
    look = predictor.look(found.image)
    chooser = predictor.chooser(with_teacher=True, **options)
    teacher = TeacherAtPrediction(
        teacher=predictor.lexicon.teacher, options=predictor.token_options, alpha=0.4, beta=0.8
    )
    logits = seg.predictor.model.logits(look.output.features, chooser.classes.text)
    q = teacher.logits(channels_first(look.image), look.output, logits, chooser.classes)
    assert sum(encoded) >= once
    ids, segments = panoptic_map(look.output, q, chooser.classes, chooser.thresholds)
    assert np.array_equal(ids, found.map)
    for segment, other in zip(segments, found.segments, strict=True):
        assert segment.category_id == other.category_id and abs(segment.score - other.score) < 1e-5
    with pytest.raises(zs_seg.UserError, match=r"--alpha and --beta must lie in 0..1"):
        seg(photo, with_teacher=True, beta=1.5)
    model = predictor.model
    architecture = {**model.meta.architecture, "projector": {"classes": 56}}
    monkeypatch.setattr(predictor, "model", replace(model, meta=replace(model.meta, architecture=architecture)))
    with pytest.raises(zs_seg.UserError, match="classifier is linear and has no class embeddings"):
        predictor.chooser(with_teacher=True)
    predictor.chooser()


def test_masks_boxes_areas_and_coco_agree(seg: zs_seg.Segmenter, photo: Path, tmp_path: Path) -> None:
    found = seg(photo, object_threshold=0, overlap_threshold=0.01)
    assert len(found.segments) > 1
    coco = found.to_coco()
    assert json.loads(found.save(tmp_path / "a.json").read_text()) == coco
    assert coco["images"] == [{"id": 1, "file_name": "photo.png", "height": 64, "width": 96}]
    names = {category["id"]: category["name"] for category in coco["categories"]}
    assert len(names) == 56
    painted = np.zeros_like(found.map)
    for segment, entry in zip(found.segments, coco["annotations"], strict=True):
        mask = found.mask(segment)
        rows, columns = np.nonzero(mask)
        assert segment.area == len(rows) == entry["area"]
        left, top, width, height = segment.bbox
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
        assert names[entry["category_id"]] == segment.name and entry["score"] == segment.score
        decoded: Any = coco_mask.decode(entry["segmentation"])
        assert np.array_equal(decoded.astype(bool), mask)
        painted[mask] = segment.id
    assert np.array_equal(painted, found.map)


def test_pictures_and_notebooks(
    seg: zs_seg.Segmenter, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = seg(photo, ["<zebra>"], only=True, object_threshold=0)
    saved = found.save(tmp_path / "a.png")
    with Image.open(saved) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(found.picture()))
    assert found._repr_png_() == saved.read_bytes()
    html = found._repr_html_()
    assert "&lt;zebra&gt;" in html and "<zebra>" not in html and "data:image/png;base64," in html
    assert "<zebra>" in repr(found) and "96 x 64" in repr(found) and "56 classes" in repr(seg)
    with pytest.raises(zs_seg.UserError, match=r"ends in .png, .jpg or .json"):
        found.save(tmp_path / "a.nothing")

    shown: list[object] = []
    display = types.SimpleNamespace(display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: True, display=display))
    found.show()
    monkeypatch.delitem(sys.modules, "IPython")
    monkeypatch.setattr(Image.Image, "show", lambda self: shown.append(self.size))
    found.show()
    assert shown == [found, found.picture().size]


def test_a_photograph_is_warned_of_where_the_teacher_knows_scenes_alone(seg: zs_seg.Segmenter, photo: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seg(photo)
        with pytest.raises(UserWarning, match="mean nothing on photographs"):
            seg(np.zeros((320, 480, 3), np.uint8))


def test_the_wheel_has_it_and_it_runs_elsewhere(checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    """The wheel, unpacked in a fresh folder, in a process that finds nothing of this one."""
    building = import_module("hatchling.builders.wheel")
    (wheel,) = building.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        assert {"zs_seg.py", "flows/cli.py", "pipeline/line.py"} <= set(archive.namelist())
        assert not [name for name in archive.namelist() if name.startswith("tests/")]
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import zs_seg\n"
        f"r = zs_seg.load({str(checkpoint)!r}, threads=1)({str(photo)!r}, ['zebra'])\n"
        "print(zs_seg.__file__, r.map.shape)"
    )
    ran = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split(maxsplit=1) == [str(tmp_path / "site/zs_seg.py"), "(64, 96)\n"]
