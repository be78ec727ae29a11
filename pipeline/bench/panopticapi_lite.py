"""Panoptic quality by panopticapi's algorithm, as the reference for speed: images decoded by Pillow, one `np.unique`
over the prediction and one over pairs of ids, loops over segments, one process per core.

As in panopticapi, the input is not checked.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IDS = 256**3  # above every segment id
VOID = 0
IOU, TP, FP, FN = range(4)
# By category: (4,), the sum of IoU and the numbers of TP, FP and FN.
Counts = defaultdict[int, NDArray[np.float64]]


def mean_pq(gt_json: Path, gt_folder: Path, json_file: Path, folder: Path) -> float:
    """PQ in percent, the mean over the classes that occur; 0 where none does."""
    gt = json.loads(gt_json.read_text(encoding="utf-8"))
    predicted = {item["image_id"]: item for item in json.loads(json_file.read_text(encoding="utf-8"))["annotations"]}
    pairs = [(item, predicted[item["image_id"]]) for item in gt["annotations"]]
    cores = multiprocessing.cpu_count()
    size = -(-len(pairs) // cores)
    parts = [(pairs[start : start + size], gt_folder, folder) for start in range(0, len(pairs), size)]
    total = no_counts()
    with multiprocessing.Pool(cores) as pool:
        for counts in pool.starmap(count, parts, chunksize=1):
            for category, more in counts.items():
                total[category] += more
    qualities = [
        100 * counts[IOU] / weight
        for counts in (total[category["id"]] for category in gt["categories"])
        if (weight := counts[TP] + counts[FP] / 2 + counts[FN] / 2)
    ]
    return float(sum(qualities) / max(len(qualities), 1))


def no_counts() -> Counts:
    """Counts that are zero for every category."""
    return defaultdict(partial(np.zeros, 4))


def count(pairs: list[tuple[dict[str, Any], dict[str, Any]]], gt_folder: Path, folder: Path) -> Counts:
    """The counts of these images; `pairs`: annotations of ground truth and prediction."""
    counts = no_counts()
    for gt_item, item in pairs:
        gt_ids, ids = read_ids(gt_folder / gt_item["file_name"]), read_ids(folder / item["file_name"])
        gt_segments = {segment["id"]: segment for segment in gt_item["segments_info"]}
        segments = {segment["id"]: segment for segment in item["segments_info"]}
        area = {int(i): int(n) for i, n in zip(*np.unique(ids, return_counts=True), strict=True)}
        pixels = np.unique(gt_ids.astype(np.uint64) * IDS + ids.astype(np.uint64), return_counts=True)
        common = {(int(pair) // IDS, int(pair) % IDS): int(n) for pair, n in zip(*pixels, strict=True)}

        gt_matched, matched = set(), set()
        for (gt_id, id_), both in common.items():
            if gt_id not in gt_segments or id_ not in segments:
                continue
            truth, guess = gt_segments[gt_id], segments[id_]
            if truth["iscrowd"] or truth["category_id"] != guess["category_id"]:
                continue
            iou = both / (truth["area"] + area[id_] - both - common.get((VOID, id_), 0))
            if iou > 0.5:
                counts[truth["category_id"]] += (iou, 1, 0, 0)
                gt_matched.add(gt_id)
                matched.add(id_)
        crowds = {}
        for gt_id, truth in gt_segments.items():
            if truth["iscrowd"]:
                crowds[truth["category_id"]] = gt_id
            elif gt_id not in gt_matched:
                counts[truth["category_id"]][FN] += 1
        for id_, guess in segments.items():
            if id_ not in matched:
                ignored = common.get((VOID, id_), 0) + common.get((crowds.get(guess["category_id"], -1), id_), 0)
                if ignored / area[id_] <= 0.5:
                    counts[guess["category_id"]][FP] += 1
    return counts


def read_ids(path: Path) -> NDArray[np.uint32]:
    """(H, W) segment ids of a panoptic PNG."""
    rgb = np.array(Image.open(path), dtype=np.uint32)
    return rgb[:, :, 0] + 256 * rgb[:, :, 1] + 256 * 256 * rgb[:, :, 2]
