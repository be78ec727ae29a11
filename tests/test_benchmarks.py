"""Benchmarks: the published split is what the paper says; a file at odds with itself is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.benchmarks import (
    Benchmark,
    Category,
    CocoFiles,
    CocoSplit,
    Holdout,
    LabelFiles,
    load_benchmark,
)

SHARED_FACTS = Path(__file__).parents[2] / "shared" / "facts"  # what the classes were copied from; not everywhere


def test_the_coco_panoptic_split() -> None:
    benchmark = load_benchmark("coco-panoptic-zps")
    assert benchmark.name == "coco-panoptic-zps"
    assert benchmark.protocol == "image-filter"
    assert len(benchmark.categories) == 133
    assert sum(category.isthing for category in benchmark.categories) == 80
    assert (sum(benchmark.seen), benchmark.seen.count(False)) == (119, 14)
    unseen = {name for name, seen in zip(benchmark.names, benchmark.seen, strict=True) if not seen}
    assert {"giraffe", "cow", "grass-merged"} <= unseen and "person" not in unseen
    for position, category in enumerate(benchmark.categories):
        assert benchmark.index[category.id] == position
    assert [category.id for category in benchmark.categories] == sorted(benchmark.index)


@pytest.mark.parametrize(
    ("name", "classes", "unseen", "ignored", "first", "last"),
    [
        ("coco-stuff-zss", 171, 15, (255,), (0, "person"), (181, "wood")),
        ("voc20", 20, 0, (0, 255), (1, "aeroplane"), (20, "tv")),
        ("pc59", 59, 0, (0,), (1, "aeroplane"), (59, "wood")),
        ("ade150", 150, 0, (0,), (1, "wall"), (150, "flag")),
    ],
)
def test_the_semantic_benchmarks(
    name: str, classes: int, unseen: int, ignored: tuple[int, ...], first: tuple[int, str], last: tuple[int, str]
) -> None:
    benchmark = load_benchmark(name)
    assert benchmark.task == "semantic" and benchmark.files
    assert (len(benchmark.categories), benchmark.seen.count(False)) == (classes, unseen)
    assert benchmark.files.ignored == ignored
    assert [(c.id, c.name) for c in (benchmark.categories[0], benchmark.categories[-1])] == [first, last]
    assert all(c.name == c.name.strip() for c in benchmark.categories)


@pytest.mark.skipif(not SHARED_FACTS.is_dir(), reason="the files that the classes were copied from are not here")
def test_the_classes_are_those_of_the_papers() -> None:
    stuff = json.loads((SHARED_FACTS / "coco_stuff_zss.json").read_text())
    ours = load_benchmark("coco-stuff-zss")
    rows = [(c["png_value"], c["name"], bool(c["isthing"])) for c in stuff["categories"]]
    assert [(c.id, c.name, c.isthing) for c in ours.categories] == rows
    assert list(ours.unseen_ids) == stuff["unseen_png_values"]
    cross = json.loads((SHARED_FACTS / "cross_datasets.json").read_text())
    for name in ("voc20", "pc59", "ade150"):
        assert load_benchmark(name).names == [label.strip() for label in cross[name]["classes"]]  # ADE's "bed "
    assert json.loads((SHARED_FACTS / "coco_panoptic_zps.json").read_text()) == json.loads(
        (Path(__file__).parents[1] / "pipeline" / "data" / "splits" / "coco_panoptic_zps.json").read_text()
    )


FILE: dict[str, Any] = {
    "categories": [{"id": 7, "name": "star", "isthing": 1}, {"id": 2, "name": "fog", "isthing": 0}],
    "unseen_ids": [2],
    "unseen_names": ["fog"],
    "protocol": "none: explained",
}


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(FILE))
    assert load_benchmark(str(path)) == Benchmark(
        name="mine",
        categories=(Category(id=7, name="star", isthing=True), Category(id=2, name="fog", isthing=False)),
        unseen_ids=(2,),
        protocol="none",
    )
    assert load_benchmark(str(path)).seen == [True, False]


def test_numbers_written_otherwise_are_read(tmp_path: Path) -> None:
    """As in annotations: whole numbers as strings and floats; a thing of "0" is stuff."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(FILE))
    expected = load_benchmark(str(path))
    categories = [{"id": "7", "name": "star", "isthing": True}, {"id": 2.0, "name": "fog", "isthing": "0"}]
    path.write_text(json.dumps(FILE | {"categories": categories, "unseen_ids": ["2"]}))
    assert load_benchmark(str(path)) == expected


SEMANTIC: dict[str, Any] = {
    "task": "semantic",
    "categories": [{"id": 7, "name": "star"}, {"id": 2, "name": "fog"}],
    "unseen_ids": [2],
    "protocol": "none",
    "images": "photos/*.jpg",
    "labels": ["maps/*.png", "masks/*.png"],
}


def test_a_semantic_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(SEMANTIC))
    assert load_benchmark(str(path)) == Benchmark(
        name="mine",
        categories=(Category(id=7, name="star", isthing=False), Category(id=2, name="fog", isthing=False)),
        unseen_ids=(2,),
        protocol="none",
        files=LabelFiles(images=("photos/*.jpg",), labels=("maps/*.png", "masks/*.png"), splits={"val": "val"}),
    )
    more = {"ignored": [0, 255], "lists": "lists/{split}.txt", "roots": ["a", "b"], "splits": {"test": "t"}}
    path.write_text(json.dumps(SEMANTIC | more))
    assert load_benchmark(str(path)).files == LabelFiles(
        images=("photos/*.jpg",),
        labels=("maps/*.png", "masks/*.png"),
        ignored=(0, 255),
        lists=("lists/{split}.txt",),
        roots=("a", "b"),
        splits={"test": "t"},
    )


def test_a_file_that_names_its_annotations(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    splits = {"train": {"json": "a.json", "images": "a", "pngs": "p"}, "test": {"json": "b.json", "images": "."}}
    more = {"annotations": {"kind": "panoptic", "splits": splits, "bgr": True}, "holdout": {"share": 0.25, "seed": "3"}}
    path.write_text(json.dumps(FILE | more | {"others": "ignore"}))
    benchmark = load_benchmark(str(path))
    train = CocoSplit(json="a.json", images="a", pngs="p")
    assert benchmark.task == "panoptic" and benchmark.others == "ignore"
    assert benchmark.annotations and benchmark.annotations == CocoFiles(
        kind="panoptic", bgr=True, holdout=Holdout(share=0.25, seed=3),
        splits={"train": train, "test": CocoSplit(json="b.json", images=".")},
    )  # fmt: skip
    assert benchmark.annotations.split("val") == train
    with pytest.raises(ValueError, match="split 'dev' is unknown; --split is one of train, test, val"):
        benchmark.annotations.split("dev")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"others": "keep"}, "others is 'keep', which must be refuse or ignore"),
        ({"holdout": {"share": 1.5}}, "holdout: share must be above 0 and below 1, not 1.5"),
        ({"holdout": {}}, "'share' is missing"),
        ({"task": "depth"}, "task 'depth' is unknown; use one of panoptic, semantic"),
        ({"task": "panoptic"}, "'isthing' is missing"),
        ({"labels": 3}, "missing or malformed"),
        ({"images": "photos/a.jpg"}, r"benchmark mine: images \['photos/a\.jpg'\] must be paths with one \* each"),
        ({"labels": ["*/*.png"]}, r"labels \['\*/\*\.png'\] must be paths with one \* each"),
        ({"ignored": [0, 7]}, r"values \[7\] are categories and ignored"),
        ({"categories": [{"id": -1, "name": "star"}], "unseen_ids": []}, "value -1 is negative"),
        ({"ignored": [-1]}, "value -1 is negative"),
    ],
)
def test_a_semantic_file_at_odds_with_itself(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(SEMANTIC | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_benchmark(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(protocol="maybe"), "protocol 'maybe' is unknown"),
        (lambda f: f.update(unseen_ids=[3]), r"unseen_ids \[3\] are no category ids"),
        (lambda f: f.update(unseen_ids=[2, 2]), "unseen id 2 is listed twice"),
        (lambda f: f.update(unseen_names=["star"]), "unseen_names are not the names"),
        (lambda f: f.update(categories=[]), "categories is empty"),
        (lambda f: f["categories"].append({"id": 7, "name": "x", "isthing": 1}), "category id 7 is listed twice"),
        (
            lambda f: f["categories"].append({"id": 8, "name": "star", "isthing": 1}),
            "category name 'star' is listed twice",
        ),
        (lambda f: f["categories"][0].pop("isthing"), "'isthing' is missing"),
        (lambda f: f.pop("unseen_ids"), "'unseen_ids' is missing"),
        (lambda f: f.update(categories=3), "missing or malformed"),
        (
            lambda f: f["categories"][1].update(id="two"),
            "id of entry 2 of categories is 'two', which must be a whole number",
        ),
        (
            lambda f: f["categories"][1].update(id=2.5),
            "id of entry 2 of categories is 2.5, which must be a whole number",
        ),
        (lambda f: f["categories"][0].update(isthing="no"), "isthing of entry 1 of categories is 'no'"),
        (lambda f: f.update(unseen_ids=["fog"]), "an entry of unseen_ids is 'fog', which must be a whole number"),
        (lambda f: f.update(protocol=3), "missing or malformed"),
        (lambda f: f.update(annotations={"kind": "boxes", "splits": {}}), "annotations: kind 'boxes' is unknown"),
        (lambda f: f.update(annotations={"splits": {}}), "'kind' is missing"),
        (
            lambda f: f.update(annotations={"kind": "panoptic", "splits": {"train": {"json": "a"}}}),
            "'images' is missing",
        ),
    ],
)
def test_a_file_at_odds_with_itself(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    data = json.loads(json.dumps(FILE))
    change(data)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as caught:
        load_benchmark(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_and_broken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'coco-zps' not found; use one of .*coco-panoptic-zps"):
        load_benchmark("coco-zps")
    with pytest.raises(ValueError, match="not found"):
        load_benchmark(str(tmp_path / "mine.json"))
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        load_benchmark(str(tmp_path / "mine.json"))
