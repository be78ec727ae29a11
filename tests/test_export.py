"""The exported files hold the prediction, and other tools read the same from each of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import pytest
from panoptic_factory import CATEGORIES, IDS, Case, make_case, write_panoptic
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from pipeline.data.benchmarks import Category
from pipeline.inference.export import ImagePrediction, write_coco_panoptic
from pipeline.inference.maps import PredictedSegment
from pipeline.scoring.metrics import PanopticQuality, PanopticResult
from pipeline.scoring.pq import evaluate


def test_coco_files_hold_the_prediction(tmp_path: Path) -> None:
    from PIL import Image

    categories = [Category(id=1, name="cat", isthing=True), Category(id=90, name="sky", isthing=False)]
    ids = np.zeros((4, 6), np.int32)
    ids[1:3, 2:5], ids[3] = 70001, 3
    segments = [
        PredictedSegment(id=70001, category_id=1, score=0.75),
        PredictedSegment(id=3, category_id=90, score=0.5),
    ]
    prediction = ImagePrediction(image_id=12, file_name="street/view.jpg", ids=ids, segments=segments)
    path = write_coco_panoptic(tmp_path / "out", [prediction], categories=categories)

    content = json.loads(path.read_text())
    assert path == tmp_path / "out" / "panoptic.json"
    assert content["images"] == [{"id": 12, "file_name": "street/view.jpg", "height": 4, "width": 6}]
    assert content["categories"] == [
        {"id": 1, "name": "cat", "isthing": 1},
        {"id": 90, "name": "sky", "isthing": 0},
    ]
    assert content["annotations"] == [
        {
            "image_id": 12,
            "file_name": "view.png",
            "segments_info": [
                {"id": 70001, "category_id": 1, "area": 6, "bbox": [2, 1, 3, 2], "iscrowd": 0, "score": 0.75},
                {"id": 3, "category_id": 90, "area": 6, "bbox": [0, 3, 6, 1], "iscrowd": 0, "score": 0.5},
            ],
        }
    ]
    pixels = np.asarray(Image.open(tmp_path / "out" / "panoptic" / "view.png").convert("RGB")).astype(np.int32)
    assert (pixels @ np.array([1, 256, 65536]) == ids).all()


def test_coco_files_refuse_two_images_of_one_name(tmp_path: Path) -> None:
    blank = np.zeros((2, 2), np.int32)
    many = [
        ImagePrediction(image_id=i, file_name=name, ids=blank, segments=[])
        for i, name in enumerate(("a/x.jpg", "b/x.png"))
    ]
    with pytest.raises(ValueError, match="a/x.jpg and b/x.png"):
        write_coco_panoptic(tmp_path, many, categories=[])
    assert not (tmp_path / "panoptic.json").exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Case], list[ImagePrediction]]:
    """Random predictions with void, single pixels and an empty one, exported with their ground truth."""
    folder, sizes = tmp_path_factory.mktemp("export"), [(12, 17), (1, 9), (23, 8), (30, 40), (6, 6)]
    many = [
        make_case(seed, height=h, width=w, gt_count=5, count=seed % 4, crowd=0.2, void=0.1)
        for seed, (h, w) in enumerate(sizes * 4)
    ]
    many.append(Case(many[0].gt_ids, many[0].gt_segments, np.zeros_like(many[0].ids), []))
    predictions = [
        ImagePrediction(image_id=image, file_name=f"{image}.jpg", ids=case.ids, segments=case.segments)
        for image, case in enumerate(many, start=1)
    ]
    write_panoptic(folder, "gt", [case.gt_ids for case in many], [case.gt_segments for case in many])
    write_coco_panoptic(folder, predictions, categories=CATEGORIES, rle=True)
    return folder, many, predictions


def quality_of(many: Sequence[Case], maps: Sequence[tuple[np.ndarray, Sequence[PredictedSegment]]]) -> PanopticResult:
    quality = PanopticQuality(IDS)
    for image, (case, (ids, segments)) in enumerate(zip(many, maps, strict=True)):
        quality.update(case.gt_ids, case.gt_segments, ids, segments, image=image)
    return quality.result()


def painted(masks: Sequence[np.ndarray], results: Sequence[dict[str, Any]], size: tuple[int, ...]):
    """The panoptic map that the masks of one image make, with segment ids 1, 2, ..."""
    assert sum(masks, np.zeros(size, np.int64)).max() <= 1  # they do not overlap
    ids = sum((i * mask.astype(np.int32) for i, mask in enumerate(masks, start=1)), np.zeros(size, np.int32))
    segments = [
        PredictedSegment(id=i, category_id=result["category_id"], score=result["score"])
        for i, result in enumerate(results, start=1)
    ]
    return ids, segments


def same(left: PanopticResult, right: PanopticResult) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ("iou_sum", "tp", "fp", "fn"))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools on numpy 2
@pytest.mark.parametrize("decode", [coco_mask.decode, hotcoco.mask.decode], ids=["pycocotools", "hotcoco"])
def test_rle_makes_the_same_maps_in_other_tools(exported: Any, decode: Callable[[Any], np.ndarray]) -> None:
    folder, many, predictions = exported
    results = json.loads((folder / "panoptic_rle.json").read_text())
    maps = []
    for prediction, case in zip(predictions, many, strict=True):
        own = [result for result in results if result["image_id"] == prediction.image_id]
        masks = [decode(result["segmentation"]) for result in own]
        for segment, result, mask in zip(case.segments, own, masks, strict=True):
            assert (result["category_id"], result["score"]) == (segment.category_id, segment.score)
            assert np.array_equal(mask, case.ids == segment.id)
            assert result["area"] == mask.sum() == coco_mask.area(result["segmentation"])
            assert result["bbox"] == coco_mask.toBbox(result["segmentation"]).tolist()
        maps.append(painted(masks, own, case.ids.shape))
    assert same(quality_of(many, maps), quality_of(many, [(case.ids, case.segments) for case in many]))


def test_quality_of_the_export_is_that_of_the_maps_in_memory(exported: Any) -> None:
    folder, many, _ = exported
    memory = quality_of(many, [(case.ids, case.segments) for case in many])
    rows = evaluate(folder / "gt.json", folder / "gt", folder / "panoptic.json", folder / "panoptic")["per_class"]
    assert 0 < memory.mean().pq < 100
    assert [(row["tp"], row["fp"], row["fn"]) for row in rows] == list(
        zip(memory.tp.tolist(), memory.fp.tolist(), memory.fn.tolist(), strict=True)
    )
    assert [row["PQ"] for row in rows] == pytest.approx(memory.pq.tolist(), abs=1e-12)


def test_rle_loads_as_results_of_the_coco_tools(exported: Any, tmp_path: Path) -> None:
    folder, many, predictions = exported
    images = [{"id": p.image_id, "file_name": p.file_name, "height": 1, "width": 1} for p in predictions]
    categories = [{"id": category.id, "name": category.name} for category in CATEGORIES]
    (tmp_path / "gt.json").write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    for tool in (COCO, hotcoco.COCO):
        loaded = tool(str(tmp_path / "gt.json")).loadRes(str(folder / "panoptic_rle.json"))
        assert len(loaded.getAnnIds()) == sum(len(case.segments) for case in many)


def test_rle_is_written_on_demand_alone(tmp_path: Path) -> None:
    blank = ImagePrediction(image_id=1, file_name="1.jpg", ids=np.zeros((2, 2), np.int32), segments=[])
    write_coco_panoptic(tmp_path, [blank], categories=[])
    assert not (tmp_path / "panoptic_rle.json").exists()
    write_coco_panoptic(tmp_path, [blank], categories=[], rle=True)
    assert json.loads((tmp_path / "panoptic_rle.json").read_text()) == []
