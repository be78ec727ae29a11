"""Stage shard: good data comes through byte for byte, and a killed build goes on to the same bytes."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from children import start
from coco_factory import edit_json, make_coco
from sharding import BENCHMARK, CONFIG, JPEG, PNG, QUIET, samples, shard, tree
from stage_processes import shard_until

from pipeline import shard as stage
from pipeline.data.benchmarks import CocoFiles, Holdout
from pipeline.data.coco import CocoSource, coco_source, coco_split, fingerprint_coco
from pipeline.data.config import ShardConfig
from pipeline.line import Stage
from pipeline.shard import recipe
from storage.inputs import NOTE
from storage.keys import Recipe, Ref
from storage.shards import Shards, decode_ids, decode_image
from storage.store import Build, Store

PROJECT = Path(__file__).parents[1]
REAL = PROJECT.parent / "shared" / "coco-sample"  # real COCO files, on machines that have them


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "coco")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_good_data_comes_through(coco: Path, store: Store) -> None:
    artefact = store.open(shard(coco, store))
    shards = Shards(artefact.path)
    assert [tar.name for tar in shards.tars("train")] == [f"train-{i:06d}.tar" for i in range(3)]
    assert shards.counts("train") == [2, 2, 1] and shards.counts("val") == [2]
    for split, folder in (("train", "train2017"), ("val", "val2017")):
        data = json.loads((coco / "annotations" / f"panoptic_{folder}.json").read_text())
        images = {image["id"]: image for image in data["images"]}
        annotations = {annotation["image_id"]: annotation for annotation in data["annotations"]}
        read = samples(artefact.path, split)
        assert [sample.image_id for sample in read] == sorted(images)
        for sample in read:
            image, annotation = images[sample.image_id], annotations[sample.image_id]
            assert sample.image == (coco / folder / image["file_name"]).read_bytes()
            assert sample.png == (coco / "annotations" / f"panoptic_{folder}" / annotation["file_name"]).read_bytes()
            assert decode_image(sample).shape == (image["height"], image["width"], 3)
            segments = [
                {"id": s.id, "category_id": s.category_id, "area": s.area, "iscrowd": int(s.iscrowd)}
                for s in sample.segments
            ]
            assert segments == [{k: v for k, v in s.items() if k != "bbox"} for s in annotation["segments_info"]]
            ids = decode_ids(sample)
            assert all((ids == segment.id).sum() == segment.area for segment in sample.segments)
        things = sum(BENCHMARK.categories[BENCHMARK.index[s.category_id]].isthing for x in read for s in x.segments)
        assert artefact.manifest.counts[split] == {
            "images": len(images),
            "segments": 3 * len(images),
            "crowd": 1,
            "things": things,
            "stuff": 3 * len(images) - things,
            "beyond_limit": 0,
        }
    assert artefact.manifest.counts["skipped"] == []
    assert store.verify(artefact.ref) == []


@pytest.mark.parametrize("real", [False, True] if REAL.is_dir() else [False])
def test_counts(coco: Path, store: Store, real: bool) -> None:
    counts = store.open(shard(REAL if real else coco, store, ShardConfig())).manifest.counts
    found = [[counts[split][what] for what in ("images", "segments", "crowd")] for split in ("train", "val")]
    assert found == ([[100, 1111, 6], [40, 401, 2]] if real else [[5, 15, 1], [2, 6, 1]])
    assert counts["skipped"] == []


def test_the_same_data_gives_the_same_bytes(coco: Path, tmp_path: Path) -> None:
    first = shard(coco, Store(tmp_path / "one"))
    moved = coco.rename(tmp_path / "elsewhere")
    second = Stage.of(stage, CONFIG, source=coco_source(moved), benchmark=BENCHMARK).run(
        Store(tmp_path / "two"), replace(QUIET, threads=1)
    )
    assert first == second  # neither the folder nor the threads are in the key
    assert tree(Store(tmp_path / "one").path(first)) == tree(Store(tmp_path / "two").path(second))


def test_what_is_in_the_key_and_what_is_not(coco: Path) -> None:
    source = coco_source(coco)

    def key(config: ShardConfig = CONFIG, source: CocoSource | Ref = source, **benchmark: Any) -> str:
        return recipe(config, source=source, benchmark=replace(BENCHMARK, **benchmark)).key

    assert key() == key(unseen_ids=(), protocol="none", name="other")  # shards serve every protocol
    assert key(categories=BENCHMARK.categories[::-1]) != key()
    assert key(others="ignore") != key()
    assert key(source=replace(source, root="/elsewhere")) == key()
    assert key(source=replace(source, fingerprint="0" * 64)) != key()
    assert key(source=Ref(kind="scenes", key="0" * 16)) != key()
    for change in ({"samples_per_tar": 3}, {"limit": 1}):
        assert key(replace(CONFIG, **change)) != key()
    assert key(replace(CONFIG, skip_bad=True)) == key()  # a strict build that finishes is a skipping one


def test_the_fingerprint_sees_annotations_names_and_sizes(coco: Path) -> None:
    seen = {coco_source(coco).fingerprint}
    for file in (coco / JPEG, coco / PNG):
        file.write_bytes(file.read_bytes() + b"1")
        seen.add(coco_source(coco).fingerprint)
        file.unlink()
        seen.add(coco_source(coco).fingerprint)
    edit_json(coco, lambda data: data["annotations"][0]["segments_info"][0].update(area=1), "val2017")
    seen.add(coco_source(coco).fingerprint)
    assert len(seen) == 6


def test_the_fingerprint_is_of_what_the_annotation_lists(coco: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same as of earlier versions for a folder without other files, computed here from the folder; and other files
    do not move it, but are named, once."""
    digest = hashlib.sha256()
    for split in ("train2017", "val2017"):
        annotations = coco / "annotations" / f"panoptic_{split}.json"
        digest.update(annotations.read_bytes())
        for folder in (coco / split, annotations.with_suffix("")):
            digest.update(json.dumps(sorted((file.name, file.stat().st_size) for file in folder.iterdir())).encode())
    with caplog.at_level(logging.INFO, logger="pipeline"):
        source = coco_source(coco)
    assert (source.fingerprint, caplog.text) == (digest.hexdigest(), "")
    strays = ("train2017/.DS_Store", "train2017/Thumbs.db", "train2017/unlisted.jpg", "val2017/._000000010010.jpg",
              f"train2017/{12:012d}.png", "annotations/panoptic_val2017/desktop.ini")  # fmt: skip
    for name in strays:
        (coco / name).write_bytes(b"x" * 9)
    (coco / "train2017" / "@eaDir").mkdir()
    (coco / "val2017" / "gone.jpg").symlink_to("nowhere")
    with caplog.at_level(logging.INFO, logger="pipeline"):
        assert coco_source(coco) == source
        recipe(CONFIG, source=source, benchmark=BENCHMARK)
    assert caplog.messages == [
        f"{coco}/train2017: not listed in the annotation, and not used: .DS_Store, 000000000012.png, Thumbs.db and 1 more",
        f"{coco}/val2017: not listed in the annotation, and not used: ._000000010010.jpg",
        f"{coco}/annotations/panoptic_val2017: not listed in the annotation, and not used: desktop.ini",
    ]
    assert fingerprint_coco(coco) == source.fingerprint and len(caplog.messages) == 3


def test_the_fingerprint_has_how_annotations_are_read(coco: Path) -> None:
    """COCO's own layout, written out, has the fingerprint that it has without; another way of reading has another."""
    own = CocoFiles(kind="panoptic", splits={split: coco_split(None, split) for split in ("train", "val")})
    plain = fingerprint_coco(coco)
    assert fingerprint_coco(coco, own) == plain
    ways: list[dict[str, Any]] = [
        {"kind": "instances"}, {"bgr": True}, {"bare": True}, {"holdout": Holdout(share=0.2)},
        {"holdout": Holdout(share=0.3)}, {"holdout": Holdout(share=0.2, seed=1)},
    ]  # fmt: skip
    others = {fingerprint_coco(coco, replace(own, **way)) for way in ways}
    assert len(others) == len(ways) and plain not in others


def test_data_that_changed_since_planning(coco: Path, store: Store) -> None:
    source = coco_source(coco)
    (coco / "train2017" / f"{11:012d}.jpg").unlink()
    with pytest.raises(ValueError, match="no longer, the one that was planned with"):
        Stage.of(stage, CONFIG, source=source, benchmark=BENCHMARK).run(store, QUIET)


def test_generated_scenes_are_a_source(coco: Path, store: Store) -> None:
    def make(build: Build) -> None:
        for part in make_coco(build.path / "coco").iterdir():
            part.rename(build.path / part.name)
        build.add(*(file for file in build.path.rglob("*") if file.is_file() and file.name != NOTE))

    scenes = store.build(Recipe(kind="scenes", stage="scenes", version=1, config=None, inputs={}), make)
    made = Stage.of(stage, CONFIG, source=scenes, benchmark=BENCHMARK).run(store, QUIET)
    assert store.open(made).manifest.inputs == {"scenes": str(scenes)}
    assert tree(store.path(made)) == tree(store.path(shard(coco, store)))


def test_limit_takes_the_first_by_id_and_is_counted(coco: Path, store: Store) -> None:
    (coco / "train2017" / f"{14:012d}.jpg").write_bytes(b"bad, but beyond the limit")
    artefact = store.open(shard(coco, store, replace(CONFIG, limit=3)))
    assert [sample.image_id for sample in samples(artefact.path, "train")] == [10, 11, 12]
    assert artefact.manifest.counts["train"]["images"] == 3
    assert artefact.manifest.counts["train"]["beyond_limit"] == 2
    assert artefact.manifest.counts["val"]["beyond_limit"] == 0


@pytest.mark.parametrize("wrong", [{"samples_per_tar": 0}, {"limit": -1}])
def test_wrong_config(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ShardConfig(**wrong)  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------------------------------------------------------------
# Killed builds


@pytest.mark.slow
def test_a_killed_build_goes_on_to_the_same_bytes(coco: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (coco / "train2017" / f"{11:012d}.jpg").write_bytes(b"bad")
    config = replace(CONFIG, skip_bad=True)
    undisturbed, killed = Store(tmp_path / "undisturbed"), Store(tmp_path / "killed")
    ref = shard(coco, undisturbed, config)

    partial = killed.root / "shards" / f".{ref.key}.partial"
    child = start(shard_until, coco, killed.root, 14)
    child.until((partial / "train-000001.tar").exists)
    child.kill()
    assert killed.state(ref) == "partial"
    (partial / ".train-000002.tar.writing").write_bytes(b"torn")
    kept = (partial / "train-000001.tar").stat()

    with caplog.at_level(logging.INFO):
        assert shard(coco, killed, config) == ref
    assert "going on with" in caplog.text
    assert tree(killed.path(ref)) == tree(undisturbed.path(ref))
    assert killed.open(ref).manifest.counts == undisturbed.open(ref).manifest.counts
    after = (killed.path(ref) / "train-000001.tar").stat()
    assert (after.st_mtime_ns, after.st_ino) == (kept.st_mtime_ns, kept.st_ino)  # not written again


def test_a_failed_build_goes_on_once_the_data_is_mended(coco: Path, store: Store) -> None:
    """The mended file has its old size, so that it is the same recipe that goes on."""
    good = (coco / JPEG).read_bytes()
    (coco / JPEG).write_bytes(b"\0" * len(good))
    with pytest.raises(ValueError, match="image 12"):
        shard(coco, store)
    (coco / JPEG).write_bytes(good)
    artefact = store.open(shard(coco, store))
    assert artefact.manifest.provenance["resumed"] is True
    assert artefact.manifest.counts["train"]["images"] == 5


def test_the_stage_module_is_light() -> None:
    heavy = {"torch", "zarr", "prefect", "webdataset", "numpy"}
    code = f"import sys, pipeline.shard, storage.store; print(*{heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=PROJECT)
    assert done.stdout.strip() == ""


def test_counts_are_logged(coco: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pipeline.shard"):
        shard(coco, store)
    assert "train 5 images, 15 segments" in caplog.text
