"""Data folders: COCO's .zip files are read in place, and give the shards of the unpacked folder byte for byte."""

from __future__ import annotations

import io
import logging
import random
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from coco_factory import make_coco
from own_data import coco_instances
from sharding import BENCHMARK, shard, tree

from flows.cli import main
from pipeline.data.coco import coco_source, read_split
from pipeline.data.folder import DataFolder
from pipeline.scoring import evaluate_checkpoint
from storage.store import Store

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def pack(zip_file: Path, root: Path, *parts: str, method: int = STORED, inner: int | None = None) -> None:
    """Move parts of a folder into a .zip file; with `inner`, folders of it as .zip files of their own, as COCO's
    panoptic annotations lie in theirs."""
    with zipfile.ZipFile(zip_file, "w", method) as archive:
        for part in parts:
            files = [root / part] if (root / part).is_file() else sorted((root / part).rglob("*"))
            if inner is None or (root / part).is_file():
                for file in files:
                    archive.write(file, file.relative_to(root))
            else:
                content = io.BytesIO()
                with zipfile.ZipFile(content, "w", DEFLATED) as own:
                    for file in files:
                        own.write(file, file.relative_to((root / part).parent))
                archive.writestr(zipfile.ZipInfo(f"{part}.zip"), content.getvalue(), inner)
    for part in parts:
        shutil.rmtree(root / part) if (root / part).is_dir() else (root / part).unlink()


ANNOTATIONS = [f"annotations/panoptic_{split}2017{end}" for split in ("train", "val") for end in ("", ".json")]


def zipped(root: Path, method: int, inner: int | None) -> None:
    for split in ("train2017", "val2017"):
        pack(root / f"{split}.zip", root, split, method=method)
    pack(root / "panoptic_annotations_trainval2017.zip", root, *ANNOTATIONS, method=DEFLATED, inner=inner)
    shutil.rmtree(root / "annotations")


def half_unpacked(root: Path) -> None:
    """Images still packed, the annotations' .zip unpacked, but not those in it."""
    for split in ("train2017", "val2017"):
        pack(root / f"{split}.zip", root, split)
        pack(root / f"annotations/panoptic_{split}.zip", root / "annotations", f"panoptic_{split}", method=DEFLATED)


PACKED = {
    "as COCO publishes them": lambda root: zipped(root, STORED, STORED),
    "inner ones compressed": lambda root: zipped(root, DEFLATED, DEFLATED),
    "none inside": lambda root: zipped(root, DEFLATED, None),
    "half unpacked": half_unpacked,
}


@pytest.mark.parametrize("case", PACKED)
def test_zips_give_the_same_key_and_the_same_bytes(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    root = make_coco(tmp_path / "coco", train=7, val=3)
    unpacked = Store(tmp_path / "unpacked")
    expected = shard(root, unpacked)
    PACKED[case](root)
    assert not (root / "train2017").exists()
    with caplog.at_level(logging.INFO, logger="pipeline"):
        packed = Store(tmp_path / "packed")
        assert shard(root, packed) == expected
    assert tree(packed.path(expected)) == tree(unpacked.path(expected))
    assert f"{root}/train2017 is read in place, from train2017.zip" in caplog.messages
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == (
        ["annotations"] if case == "half unpacked" else []
    )


def test_many_threads_read_one_zip(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "coco", train=9, val=1)
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    contents = {path: (root / path).read_bytes() for path in paths}
    zipped(root, DEFLATED, STORED)
    folder = DataFolder(root)
    asked = random.Random(0).choices(paths, k=600)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(folder.read, asked)) == [contents[path] for path in asked]


def test_a_folder_that_is_there_hides_its_zip(tmp_path: Path) -> None:
    """So that what is missing from it is missed, and not taken from elsewhere."""
    root = make_coco(tmp_path / "coco")
    shutil.copytree(root / "train2017", tmp_path / "copy")
    before = coco_source(root).fingerprint
    pack(root / "train2017.zip", root, "train2017")
    shutil.copytree(tmp_path / "copy", root / "train2017")
    (root / "train2017" / f"{12:012d}.jpg").unlink()
    assert coco_source(root).fingerprint != before
    with pytest.raises(FileNotFoundError):
        DataFolder(root).read(f"train2017/{12:012d}.jpg")
    shutil.rmtree(root / "train2017")
    assert coco_source(root).fingerprint == before


def test_a_damaged_zip_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_coco(tmp_path / "coco")
    zipped(root, STORED, STORED)
    path = root / "train2017.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    words = (
        "run",
        "--preset",
        "coco-sample",
        "--coco",
        str(root),
        "--store",
        str(tmp_path / "store"),
        "--until",
        "shard",
    )
    assert main(words) == 2
    assert f"{path} is damaged (File is not a zip file); download it again" in capsys.readouterr().err
    entry = read_split(tmp_path / "coco" if path.write_bytes(whole) else root, "train", BENCHMARK)[1]
    image = DataFolder(root).read(entry.image)
    path.write_bytes(whole.replace(image[:40], bytes(40)))
    with pytest.raises(ValueError, match=rf"train2017.zip: {entry.image} cannot be read \(Bad CRC-32"):
        DataFolder(root).read(entry.image)


def test_a_zipped_folder_is_recognised_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = make_coco(tmp_path / "coco")
    zipped(root, STORED, STORED)
    assert main(("new", "mine", "--from", str(root), "--unseen", "giraffe", "--protocol", "none")) == 0
    assert "COCO panoptic (annotations/panoptic_train2017.json, " in capsys.readouterr().out
    # and one that lies beside what was unpacked of it is no second set
    own = coco_instances(tmp_path / "own")
    pack(own / "export.zip", tmp_path, "own/train", "own/valid")
    coco_instances(own)
    assert main(("new", "other", "--from", str(own), "--unseen", "green ring")) == 0
    part = evaluate_checkpoint._panoptic(BENCHMARK, root, "val")
    assert [sample.image_id for (_, sample), _ in part.samples()] == [10010, 10011]
