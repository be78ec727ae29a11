"""Makes random panoptic cases and their files, and scores them slowly: the reference of the tests of panoptic
quality.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.benchmarks import Category
from pipeline.inference.maps import PredictedSegment
from storage.shards import Segment

CATEGORIES = (
    Category(id=1, name="cat", isthing=True),
    Category(id=4, name="dog", isthing=True),
    Category(id=200, name="sky", isthing=False),
)
IDS = tuple(category.id for category in CATEGORIES)


@dataclass(frozen=True)
class Case:
    gt_ids: NDArray[np.int32]
    gt_segments: list[Segment]
    ids: NDArray[np.int32]
    segments: list[PredictedSegment]


def make_case(seed: int, *, height: int, width: int, gt_count: int, count: int, crowd: float, void: float) -> Case:
    """Rectangles painted over each other: later ones hide or shrink earlier ones, the prediction is a moved copy."""
    rng = np.random.default_rng(seed)

    def paint(ids: NDArray[np.int32], number: int) -> NDArray[np.int32]:
        for value in rng.choice(2**24 - 1, number, replace=False) + 1:
            top, left = rng.integers(height), rng.integers(width)
            ids[top : top + rng.integers(1, height + 1), left : left + rng.integers(1, width + 1)] = value
        return ids

    gt_ids = paint(np.zeros((height, width), np.int32), gt_count)
    gt_segments = [
        Segment(
            id=int(i),
            category_id=int(rng.choice(IDS)),
            area=int((gt_ids == i).sum()),
            iscrowd=bool(rng.random() < crowd),
        )
        for i in np.unique(gt_ids[gt_ids > 0])
    ]
    category_of = {segment.id: segment.category_id for segment in gt_segments}
    ids = paint(np.roll(gt_ids, rng.integers(-1, 2, 2), (0, 1)), count)
    ids[rng.random(ids.shape) < void] = 0
    segments = [
        PredictedSegment(
            id=int(i),
            category_id=category_of[int(i)] if int(i) in category_of and rng.random() < 0.8 else int(rng.choice(IDS)),
            score=float(rng.random()),
        )
        for i in np.unique(ids[ids > 0])
    ]
    rng.shuffle(gt_segments)
    rng.shuffle(segments)
    return Case(gt_ids, gt_segments, ids, segments)


cases = st.builds(
    make_case,
    st.integers(0, 2**32 - 1),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    gt_count=st.integers(0, 5),
    count=st.integers(0, 3),
    crowd=st.sampled_from([0.0, 0.3, 0.7]),
    void=st.sampled_from([0.0, 0.2, 0.6]),
)


def slow_quality(many: Sequence[Case]) -> dict[int, tuple[float, int, int, int]]:
    """Category id -> (sum of IoU, TP, FP, FN), pixel sets and plain loops."""
    iou_sum, tp, fp, fn = ({i: 0.0 for i in IDS}, *({i: 0 for i in IDS} for _ in range(3)))
    for case in many:

        def pixels(ids: NDArray[np.int32], value: int) -> set[tuple[int, int]]:
            return {(y, x) for y in range(ids.shape[0]) for x in range(ids.shape[1]) if ids[y, x] == value}

        void = pixels(case.gt_ids, 0)
        truth = {g.id: pixels(case.gt_ids, g.id) for g in case.gt_segments}
        guess = {p.id: pixels(case.ids, p.id) for p in case.segments}
        matched_gt, matched = set(), set()
        for g in case.gt_segments:
            for p in case.segments:
                if g.iscrowd or g.category_id != p.category_id:
                    continue
                common = len(truth[g.id] & guess[p.id])
                iou = common / (len(truth[g.id]) + len(guess[p.id]) - common - len(guess[p.id] & void))
                if iou > 0.5:
                    matched_gt.add(g.id)
                    matched.add(p.id)
                    tp[g.category_id] += 1
                    iou_sum[g.category_id] += iou
        crowd_of = {g.category_id: g.id for g in case.gt_segments if g.iscrowd}
        for g in case.gt_segments:
            if g.id not in matched_gt and not g.iscrowd:
                fn[g.category_id] += 1
        for p in case.segments:
            if p.id in matched:
                continue
            ignored = len(guess[p.id] & void)
            if p.category_id in crowd_of:
                ignored += len(guess[p.id] & truth[crowd_of[p.category_id]])
            if ignored / len(guess[p.id]) <= 0.5:
                fp[p.category_id] += 1
    return {i: (iou_sum[i], tp[i], fp[i], fn[i]) for i in IDS}


def write_panoptic(
    folder: Path,
    name: str,
    maps: Sequence[NDArray[np.int32]],
    segments: Sequence[Sequence[Segment] | Sequence[PredictedSegment]],
) -> Path:
    (folder / name).mkdir()
    annotations = []
    for image, (ids, found) in enumerate(zip(maps, segments, strict=True), start=1):
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        Image.fromarray(colours).save(folder / name / f"{image}.png")
        infos = [
            {
                "id": s.id,
                "category_id": s.category_id,
                "area": int((ids == s.id).sum()),
                "iscrowd": int(getattr(s, "iscrowd", False)),
                "bbox": [0, 0, 1, 1],
            }
            for s in found
        ]
        annotations.append({"image_id": image, "file_name": f"{image}.png", "segments_info": infos})
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": ids.shape[0], "width": ids.shape[1]}
            for i, ids in enumerate(maps, start=1)
        ],
        "annotations": annotations,
        "categories": [{"id": c.id, "name": c.name, "isthing": int(c.isthing)} for c in CATEGORIES],
    }
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / f"{name}.json"
