"""Panoptic quality of any result in COCO's panoptic format, from its files: `zs-seg pq`.

hotcoco (compiled, all cores) reads the PNGs and counts; the tests hold it to `PanopticQuality` and to a slow reference.
What it accepts without a message is checked here.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.benchmarks import Category
from storage.errors import UserError
from storage.id_colours import MAX_SEGMENT_ID

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.scoring.metrics import PanopticMean, PanopticResult

MAX_PIXELS = 89_478_485  # of an image, PIL's limit


@dataclass(frozen=True, kw_only=True)
class Panoptic:
    """One side's JSON, checked: categories (none where the file names none) and annotations by image id.

    The annotations have just `file_name` and, of every segment, `id`, `category_id` and `iscrowd`.
    """

    path: Path
    categories: dict[int, dict[str, Any]]
    annotations: dict[int | str, dict[str, Any]]


def evaluate(
    gt_json: Path,
    gt_folder: Path,
    json_file: Path,
    folder: Path,
    *,
    unseen: Collection[int] = (),
    check_ground_truth: bool = False,
) -> dict[str, Any]:
    """Scores of a panoptic result, in percent, as `summary` has them.

    Segments match as in `pipeline.scoring.metrics.PanopticQuality`, and areas are counted from the pixels: the JSONs'
    `area` is not read. `iscrowd` of a prediction is ignored. A prediction may be all void, but there must be one for
    every annotated image and for no other one.

    Args:
        gt_json: the ground truth's annotations, with categories.
        gt_folder: its PNGs.
        json_file: the predicted annotations; categories, if there are any, must be the ground truth's.
        folder: its PNGs.
        unseen: category ids that count in uPQ; all others count in sPQ.
        check_ground_truth: compare the ground truth's pixels with its JSON too, which takes as long again. panopticapi
            does not either; COCO's own files agree.

    Raises:
        UserError: files that are missing, damaged or at odds, named in the message with the image.
    """
    truth, guess = read_panoptic(gt_json), read_panoptic(json_file)
    categories = _categories(truth)
    _check_categories(truth, guess)
    if strange := sorted(set(unseen) - truth.categories.keys()):
        raise UserError(f"--unseen: category {strange[0]} is not in {gt_json}; leave it out")
    for missing, there, what in ((guess, truth, "prediction for image"), (truth, guess, "ground truth for image")):
        for image_id in there.annotations:
            if image_id not in missing.annotations:
                raise UserError(f"{missing.path} has no {what} {image_id}, which is in {there.path}; make them agree")
    result = _count(truth, gt_folder, guess, folder, check_ground_truth=check_ground_truth)
    seen = [category.id not in unseen for category in categories]
    return {"images": len(truth.annotations)} | summary(result, categories=categories, seen=seen)


def summary(result: PanopticResult, *, categories: list[Category], seen: list[bool]) -> dict[str, Any]:
    """What `--json` writes: qualities in percent, None where no class is to be averaged, and a row per class.

    PQ, SQ and RQ, and those of things (`_th`) and stuff (`_st`), leave out absent classes, as panopticapi does. In sPQ
    and uPQ they count 0. `absent`, `absent_seen` and `absent_unseen` are the numbers of classes without any segment
    that counts. Without unseen classes sPQ is over all of them, and uPQ and hPQ are None.
    """
    import numpy as np

    from pipeline.scoring.metrics import harmonic_mean

    known, isthing = np.array(seen, bool), np.array([category.isthing for category in categories], bool)
    content: dict[str, Any] = {}
    for suffix, subset in (("", isthing | True), ("_th", isthing), ("_st", ~isthing)):
        mean = result.mean(subset, absent="skip")
        for name in ("pq", "sq", "rq"):
            content[f"{name.upper()}{suffix}"] = _filled(mean, name)
    seen_mean, unseen_mean = result.mean(known), result.mean(~known)
    content["sPQ"], content["uPQ"] = _filled(seen_mean, "pq"), _filled(unseen_mean, "pq")
    both = seen_mean.classes and unseen_mean.classes
    content["hPQ"] = harmonic_mean(seen_mean.pq, unseen_mean.pq) if both else None
    content["absent"] = int(result.absent.sum())
    content["absent_seen"], content["absent_unseen"] = seen_mean.absent, unseen_mean.absent
    columns = (result.pq, result.sq, result.rq, result.tp, result.fp, result.fn)
    content["per_class"] = [
        {"id": category.id, "name": category.name, "isthing": category.isthing, "seen": is_seen}
        | dict(zip(("PQ", "SQ", "RQ", "tp", "fp", "fn"), (column[k].item() for column in columns), strict=True))
        for k, (category, is_seen) in enumerate(zip(categories, seen, strict=True))
    ]
    return content


def _filled(mean: PanopticMean, name: str) -> float | None:
    return getattr(mean, name) if mean.classes else None


def table(scores: Mapping[str, Any]) -> Table:
    """The means of `summary` for the terminal."""
    from rich.table import Table

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    shown = Table("", "PQ", "SQ", "RQ", "classes", "absent", title=f"{scores['images']} images, percent")
    classes = scores["per_class"]
    for name, suffix, members in (
        ("all", "", classes),
        ("things", "_th", [row for row in classes if row["isthing"]]),
        ("stuff", "_st", [row for row in classes if not row["isthing"]]),
    ):
        absent = sum(row["tp"] + row["fp"] + row["fn"] == 0 for row in members)
        cells = [cell(scores[f"{quality}{suffix}"]) for quality in ("PQ", "SQ", "RQ")]
        shown.add_row(name, *cells, str(len(members) - absent), str(absent))
    shown.add_section()
    for name, key, absent in (("seen", "sPQ", "absent_seen"), ("unseen", "uPQ", "absent_unseen")):
        count = sum(row["seen"] == (name == "seen") for row in classes)
        shown.add_row(f"{name} (absent = 0)", cell(scores[key]), "", "", str(count), str(scores[absent]))
    shown.add_row("harmonic", cell(scores["hPQ"]))
    return shown


def csv_text(scores: Mapping[str, Any]) -> str:
    """The classes of `summary` as CSV, a head and a row per class."""
    rows = scores["per_class"]
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _count(
    truth: Panoptic, gt_folder: Path, guess: Panoptic, folder: Path, *, check_ground_truth: bool
) -> PanopticResult:
    import numpy as np
    from hotcoco.panoptic import PanopticEval

    from pipeline.scoring.metrics import PanopticResult

    for where in (gt_folder, folder):
        if not where.is_dir():
            raise UserError(f"folder {where} not found; pass the folder of the PNGs")
    _refuse_bombs(truth, gt_folder)
    _refuse_bombs(guess, folder)
    image_ids = list(truth.annotations)
    categories = list(truth.categories.values())
    gt, predicted = (
        {
            "annotations": [{"image_id": i, **side.annotations[image]} for i, image in enumerate(image_ids)],
            "categories": categories,
        }
        for side in (truth, guess)
    )
    try:
        evaluation = PanopticEval(gt, predicted, gt_folder=str(gt_folder), pred_folder=str(folder))
        evaluation.evaluate()
    except (ValueError, OSError) as error:
        raise UserError(f"{_message(error, image_ids)}; mend {guess.path} or the PNG") from error
    if check_ground_truth:  # hotcoco compares pixels and JSON of the prediction only: let the two swap roles
        try:
            PanopticEval(predicted, gt, gt_folder=str(folder), pred_folder=str(gt_folder)).evaluate()
        except ValueError as error:
            message = _message(error, image_ids).replace("predicted", "ground truth's")
            raise UserError(f"{message}; mend {truth.path} or the PNG") from error
    per_class = evaluation.results()["per_class"]
    counts = [per_class[category] for category in truth.categories]
    tp, fp, fn = (np.array([count[name] for count in counts], np.int64) for name in ("tp", "fp", "fn"))
    iou_sum = np.array([count["iou"] for count in counts], np.float64)
    return PanopticResult(category_ids=tuple(truth.categories), iou_sum=iou_sum, tp=tp, fp=fp, fn=fn)


def _refuse_bombs(side: Panoptic, folder: Path) -> None:
    """hotcoco allocates what a PNG's header announces. Missing and damaged files are hotcoco's to find."""
    for annotation in side.annotations.values():
        path = folder / annotation["file_name"]
        try:
            with path.open("rb") as file:
                header = file.read(24)
        except OSError:
            continue
        width, height = int.from_bytes(header[16:20]), int.from_bytes(header[20:24])
        if header.startswith(b"\x89PNG") and width * height > MAX_PIXELS:
            raise UserError(f"{path} has {width} x {height} pixels, more than {MAX_PIXELS}; write it again")


def _message(error: Exception, image_ids: list[int | str]) -> str:
    """hotcoco's message, with the image's own id for the number that it was given."""
    return re.sub(r"^image (\d+)", lambda found: f"image {image_ids[int(found[1])]}", str(error))


def read_panoptic(path: Path) -> Panoptic:
    """Reads and checks a JSON in COCO's panoptic format; image ids are integers or, as ADE20K's, strings.

    Raises UserError naming file and image: no JSON, an entry that lacks something, an image, segment or category
    twice, a segment id that pixels cannot hold.
    """
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); write it again") from error
    categories: dict[int, dict[str, Any]] = {}
    for item in _field(data, "categories", list, path) if isinstance(data, dict) and "categories" in data else []:
        category = _integer(item, "id", f"{path}: a category", least=0)
        if category in categories:
            raise UserError(f"{path}: category {category} is listed twice; remove one")
        categories[category] = item
    annotations: dict[int | str, dict[str, Any]] = {}
    for item in _field(data, "annotations", list, path):
        image_id = _field(item, "image_id", int | str, f"{path}: an annotation")
        where = f"{path}: image {image_id}"
        if image_id in annotations:
            raise UserError(f"{where} is annotated twice; remove one annotation")
        segments = _segments(_field(item, "segments_info", list, where), where)
        name = _field(item, "file_name", str, where)
        if name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise UserError(f"{where} has file_name {name!r}; it must be a bare file name")
        annotations[image_id] = {"file_name": name, "segments_info": segments}
    if not annotations:
        raise UserError(f"{path} holds no annotations; pass another file")
    return Panoptic(path=path, categories=categories, annotations=annotations)


def _segments(items: list[Any], where: str) -> list[dict[str, int]]:
    segments: dict[int, dict[str, int]] = {}
    for item in items:
        id_ = _integer(item, "id", f"{where}: a segment", least=1)
        if id_ > MAX_SEGMENT_ID:
            raise UserError(f"{where}: segment id {id_} is above {MAX_SEGMENT_ID}, the most a PNG can hold; renumber")
        if id_ in segments:
            raise UserError(f"{where}: segment {id_} is listed twice; give every segment an id of its own")
        category = _integer(item, "category_id", f"{where}: segment {id_}", least=0)
        segments[id_] = {"id": id_, "category_id": category, "iscrowd": int(bool(item.get("iscrowd", 0)))}
    return list(segments.values())


def _categories(truth: Panoptic) -> list[Category]:
    if not truth.categories:
        raise UserError(f"{truth.path} has no categories; pass a ground truth that lists them")
    return [
        Category(
            id=id_,
            name=_field(item, "name", str, f"{truth.path}: category {id_}"),
            isthing=bool(_field(item, "isthing", int, f"{truth.path}: category {id_}")),
        )
        for id_, item in truth.categories.items()
    ]


def _check_categories(truth: Panoptic, guess: Panoptic) -> None:
    """Every category that either file uses is the ground truth's, under one name."""
    for id_, item in guess.categories.items():
        known = truth.categories.get(id_)
        if known is None:
            raise UserError(f"{guess.path}: category {id_} is not in {truth.path}; predict the ground truth's classes")
        for field in ("name", "isthing"):
            if item.get(field, known[field]) != known[field]:
                raise UserError(
                    f"{guess.path}: category {id_} has {field} {item[field]!r}, but {known[field]!r} in {truth.path}; "
                    f"predict the ground truth's classes"
                )
    for side in (truth, guess):
        for image_id, annotation in side.annotations.items():
            for segment in annotation["segments_info"]:
                if segment["category_id"] not in truth.categories:
                    raise UserError(
                        f"{side.path}: image {image_id}: segment {segment['id']} is of category "
                        f"{segment['category_id']}, which {truth.path} does not list; correct its category_id"
                    )


def _field(item: Any, name: str, kind: Any, where: object) -> Any:
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, kind):
        raise UserError(f"{where} lacks a valid {name}; write it in COCO's panoptic format")
    return value


def _integer(item: Any, name: str, where: str, *, least: int) -> int:
    value = _field(item, name, int, where)
    if value < least:
        raise UserError(f"{where} has {name} {value}, which is below {least}; renumber")
    return value
