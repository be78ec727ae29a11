"""The speed of the evaluation: panoptic quality from files on disk, and inference from image to panoptic map."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.bench.harness import Row, alternate
from pipeline.runtime import Runtime
from storage.errors import UserError

if TYPE_CHECKING:
    import numpy as np

HEIGHT, WIDTH = 480, 640  # most of COCO's images
CATEGORIES = 133


def rows(runtime: Runtime, *, full: bool = False) -> Iterator[Row]:
    """Every row of `zs-seg bench evaluate`."""
    from pipeline.bench.inference import inference_rows

    yield from panoptic_quality_rows(runtime)
    yield from inference_rows(runtime)


def panoptic_quality_rows(runtime: Runtime, *, images: int = 200) -> Iterator[Row]:
    """PQ of a synthetic result, read from disk: `pipeline.scoring.pq` against panopticapi's algorithm and bare hotcoco.

    Neither checks whether the ground truth's PNGs fit its JSON, so ours does not either in the first two rows. Every
    evaluator uses all cores. Raises UserError if they disagree.
    """
    from hotcoco.panoptic import PanopticEval

    from pipeline.bench import panopticapi_lite
    from pipeline.scoring import pq

    def ours(check: bool) -> float:
        return pq.evaluate(*files, check_ground_truth=check)["PQ"]

    def hotcoco() -> float:
        gt_json, gt_folder, json_file, folder = map(str, files)
        evaluation = PanopticEval(gt_json, json_file, gt_folder=gt_folder, pred_folder=folder)
        evaluation.evaluate()
        return 100 * evaluation.results()["All"]["pq"]

    with tempfile.TemporaryDirectory() as folder:
        files = write_panoptic_pair(Path(folder), images, seed=0)
        found = (ours(False), ours(True), panopticapi_lite.mean_pq(*files), hotcoco())
        if max(found) - min(found) > 1e-9:
            raise UserError(f"the evaluators disagree on one result: PQ {found}; report it")
        what = f"PQ, {images} images at COCO size"
        for name, call, reference in (
            (
                f"{what}, against panopticapi's algorithm",
                partial(ours, False),
                partial(panopticapi_lite.mean_pq, *files),
            ),
            (f"{what}, against hotcoco", partial(ours, False), hotcoco),
            (
                f"{what}, ground truth checked, against panopticapi's algorithm",
                partial(ours, True),
                partial(panopticapi_lite.mean_pq, *files),
            ),
        ):
            taken, theirs = alternate(call, reference, repeat=3)
            yield Row(
                name=name, ours=taken, reference=theirs, unit="s", device=f"CPU, {os.cpu_count()} cores", dtype="uint8"
            )


def write_panoptic_pair(folder: Path, images: int, *, seed: int) -> tuple[Path, Path, Path, Path]:
    """Write ground truth and an imperfect prediction of it in COCO's panoptic format.

    Each image has 2 to 5 wavy bands of stuff and things of 20 to 40 corners over them (5 to 25 segments in all); every
    second image has a frame of void, and every fifth a crowd. In the prediction every outline is jittered, one segment
    in ten is missing, one in ten is joined with the one before it, and one in six gets a random class.

    Returns:
        JSON and PNG folder of the ground truth, JSON and PNG folder of the prediction.
    """
    import numpy as np

    from pipeline.data.benchmarks import Category
    from pipeline.inference.export import ImagePrediction, write_coco_panoptic
    from pipeline.inference.maps import PredictedSegment

    categories = [Category(id=i, name=f"class {i}", isthing=i <= 80) for i in range(1, CATEGORIES + 1)]
    pairs: dict[str, list[ImagePrediction]] = {"gt": [], "predicted": []}
    for image in range(1, images + 1):
        rng = np.random.default_rng([seed, image])
        outlines = _outlines(rng)
        count = len(outlines)
        ids, classes = rng.choice(256**3 - 1, count, replace=False) + 1, rng.integers(1, CATEGORIES + 1, count)
        truth = _paint(outlines, ids)
        if image % 2 == 0:
            truth[:, :8] = truth[:, -8:] = truth[:8] = truth[-8:] = 0

        trembling = [outline + rng.normal(0, 4, 2) + rng.normal(0, 2, outline.shape) for outline in outlines]
        guessed = np.where(rng.random(count) < 1 / 6, rng.integers(1, CATEGORIES + 1, count), classes)
        numbers = np.arange(1, count + 1)
        joined = rng.random(count) < 0.1
        joined[0] = False
        painted = np.where(rng.random(count) < 0.1, 0, numbers - joined)
        guess = _paint(trembling, painted)
        for which, labels, names, owners in (("gt", truth, ids, classes), ("predicted", guess, numbers, guessed)):
            present = set(np.unique(labels).tolist())
            segments = [
                PredictedSegment(id=name, category_id=owner, score=1.0)
                for name, owner in zip(names.tolist(), owners.tolist(), strict=True)
                if name in present
            ]
            pairs[which].append(
                ImagePrediction(image_id=image, file_name=f"{image:012d}.jpg", ids=labels, segments=segments)
            )
    truth_json, prediction = (
        write_coco_panoptic(folder, images, categories=categories, name=which) for which, images in pairs.items()
    )
    content = json.loads(truth_json.read_text(encoding="utf-8"))
    for item in content["annotations"][::5]:
        item["segments_info"][-1]["iscrowd"] = 1
    truth_json.write_text(json.dumps(content), encoding="utf-8")
    return truth_json, truth_json.with_suffix(""), prediction, prediction.with_suffix("")


def _outlines(rng: np.random.Generator) -> list[np.ndarray]:
    """The corners (n, 2), x and y, of every segment, from back to front."""
    import numpy as np

    bands, things = int(rng.integers(2, 6)), int(rng.integers(3, 21))
    x = np.linspace(0, WIDTH, 30)
    outlines = []
    for top in np.linspace(0, HEIGHT, bands, endpoint=False):
        edge = np.stack([x, top + rng.normal(0, 6, len(x)).cumsum()], 1)
        outlines.append(np.concatenate([edge, [[WIDTH, HEIGHT], [0, HEIGHT]]]))
    for _ in range(things):
        corners = int(rng.integers(20, 41))
        angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
        radius = rng.uniform(8, 110) * rng.uniform(0.6, 1.2, corners)
        centre = rng.uniform(0, (WIDTH, HEIGHT))
        outlines.append(centre + radius[:, None] * np.stack([np.cos(angle), rng.uniform(0.4, 1.4) * np.sin(angle)], 1))
    return outlines


def _paint(outlines: list[np.ndarray], ids: np.ndarray) -> np.ndarray:
    """An id map (H, W) int32 with later segments over earlier ones."""
    import numpy as np
    from PIL import Image, ImageDraw

    image = Image.new("I", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(image)
    for outline, id_ in zip(outlines, ids, strict=True):
        draw.polygon([tuple(point) for point in outline.tolist()], fill=int(id_))
    return np.array(image, np.int32)
