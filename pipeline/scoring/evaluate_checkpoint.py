"""`zs-seg evaluate`: a trained checkpoint on a benchmark's own files, scored by the code of stage "evaluate"."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.data.benchmarks import Benchmark, CocoSplit, load_benchmark
from pipeline.data.coco import Entry, coco_split, read_split
from pipeline.data.folder import DataFolder
from pipeline.data.images import read_image
from pipeline.data.label_maps import LabelledImage, find_split, read_labels, write_labels
from pipeline.data.samples import annotated_sample
from pipeline.inference.model import checkpoint_folder
from pipeline.runtime import Runtime
from pipeline.scoring.config import EvaluateConfig
from pipeline.scoring.published import marks
from storage.errors import UserError
from storage.store import Store

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table
    from torch import Tensor

    from pipeline.inference.export import ImagePrediction
    from pipeline.inference.maps import Classes, Output, Thresholds
    from pipeline.inference.model import Model
    from pipeline.inference.teacher import TeacherAtPrediction
    from storage.shards import Sample

Tag = TypeVar("Tag")


def run(
    *,
    checkpoint: str,
    benchmark: str,
    data: str,
    split: str,
    seen_offset: float,
    with_teacher: bool,
    alpha: float,
    beta: float,
    object_threshold: float | None,
    match_names: bool,
    out: str,
    teacher_weights: str,
    store: Store,
    runtime: Runtime,
) -> dict[str, Any]:
    """Score a v2c or cpa checkpoint on the images of `benchmark` (see `load_benchmark`) in the folder `data`.

    The benchmark's classes are embedded by the checkpoint's own teacher and templates, or are the checkpoint's own rows
    where they are its classes; `teacher_weights` is the teacher's weights file where it was a local one. `seen_offset`
    is subtracted from the scores of the seen classes. `with_teacher` multiplies the class scores with those of the
    teacher, see `pipeline.inference.teacher`, with the exponents `alpha` and `beta`; `object_threshold` takes the place
    of the checkpoint's own, which was chosen without the teacher (the report's settings have those chosen with it).
    `match_names` takes a benchmark with the checkpoint's classes in
    another order or with other ids, see `vocabulary_of`. `out`, if not "", is a folder that gets the predictions: of a
    panoptic benchmark as COCO's panoptic PNGs and JSON and as RLEs, of a semantic one as PNGs of the data set's own
    values.

    Returns what was scored and how: `benchmark`, `task`, `split`, `data` (the layout found), `checkpoint` (stage, key,
    folder), `thresholds`, `seen_offset`, `teacher` (exponents and options; None without it), `marks` (warnings), `counts`, `respelled` (as of `Known`), `scores` in percent
    (`PanopticScores` or `SemanticScores`; null where no class is seen, or none unseen) and `per_class`.

    Raises UserError where an input is missing, broken or does not fit, and where every pixel is ignored.
    """
    # mistakes show before the slow imports
    folder, asked, root = checkpoint_folder(store, checkpoint), load_benchmark(benchmark), Path(data)
    if not math.isfinite(seen_offset):
        raise UserError(f"--seen-offset must be a finite number, not {seen_offset}")
    if object_threshold is not None and not 0 <= object_threshold <= 1:
        raise UserError(f"--object-threshold must lie in 0..1, not {object_threshold:g}")
    part = _panoptic(asked, root, split) if asked.task == "panoptic" else _semantic(asked, root, split)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)

    from pipeline.inference.maps import classes_of
    from pipeline.inference.model import load_model
    from pipeline.inference.teacher import load_for_prediction
    from pipeline.inference.vocabulary import vocabulary_of

    device = runtime.torch_device()
    model = load_model(folder, device)
    matched = vocabulary_of(model, asked, teacher_weights, runtime, match_names=match_names)
    known, vocabulary = matched.benchmark, matched.vocabulary
    classes = classes_of(vocabulary.embedding, vocabulary.classes, device)
    thresholds = replace(model.meta.thresholds, seen_offset=seen_offset)
    if object_threshold is not None:
        thresholds = replace(thresholds, object_threshold=object_threshold)
    teacher = None
    if with_teacher:
        teacher = load_for_prediction(
            model.meta, folder, store, runtime, weights=teacher_weights, alpha=alpha, beta=beta
        )
    predictor = _Predictor(model=model, classes=classes, thresholds=thresholds, teacher=teacher, runtime=runtime)
    scores, counts = part.score(predictor, known, Path(out) if out else None)
    if counts["ignored_percent"] == 100:
        raise UserError(
            f"{root}: no pixel of {counts['images']} images of split {split} has a class to score; add labels"
        )
    per_class = scores.pop("per_class")
    return {
        "benchmark": known.name,
        "task": known.task,
        "split": split,
        "data": part.layout,
        "checkpoint": {"stage": model.meta.stage, "key": _key(folder), "folder": str(folder)},
        "thresholds": {
            "object_threshold": thresholds.object_threshold,
            "overlap_threshold": thresholds.overlap_threshold,
        },
        "seen_offset": seen_offset,
        "teacher": {"alpha": alpha, "beta": beta, "options": asdict(teacher.options)} if teacher else None,
        "marks": marks(model.meta.classes.teacher, known),
        "counts": {**counts, "classes": len(known.seen), "seen": sum(known.seen), "unseen": len(known.unseen_ids)},
        "respelled": matched.respelled,
        "scores": _without_empty_groups(scores, known),
        "per_class": per_class,
    }


@dataclass(frozen=True, kw_only=True)
class _Predictor:
    model: Model
    classes: Classes
    thresholds: Thresholds
    teacher: TeacherAtPrediction | None
    runtime: Runtime

    def __call__(self, views: Iterable[tuple[Tag, Tensor]], count: int) -> Iterator[tuple[Tag, Output, Tensor]]:
        """(tag, output, class logits (Q, K)) for `count` pairs of tag and image (3, H, W) uint8."""
        from models.folding import for_inference
        from pipeline.data.ahead import ahead
        from pipeline.inference.forward import outputs

        resize, batch = self.model.meta.resize, EvaluateConfig().batch
        images = (((tag, image), image) for tag, image in ahead(iter(views)))
        with self.runtime.bar(count, "evaluating", "image") as bar:
            for (tag, image), found in outputs(for_inference(self.model.segmenter), images, resize, batch=batch):
                output, logits = found.kept(), self.model.logits(found.features, self.classes.text)
                if self.teacher:
                    logits = self.teacher.logits(image, output, logits, self.classes)
                yield tag, output, logits
                bar.update()


Scored = tuple[dict[str, Any], dict[str, Any]]  # scores, counts


@dataclass(frozen=True, kw_only=True)
class _Panoptic:
    """A split of annotations in COCO's format below the data `folder`."""

    folder: DataFolder
    at: CocoSplit
    entries: list[Entry]

    @property
    def layout(self) -> dict[str, str]:
        labels = self.at.pngs or self.at.json
        return {"root": str(self.folder), "images": self.at.images, "labels": labels, "list": self.at.json}

    def samples(self) -> Iterator[tuple[tuple[Entry, Sample], Tensor]]:
        from pipeline.data.transforms import channels_first
        from storage.shards import decode_image

        for entry in self.entries:
            sample = annotated_sample(self.folder, entry)
            if isinstance(sample, str):
                raise UserError(f"{self.folder}: {self.at.images} image {entry.image_id} {sample}; {entry.cure}")
            yield (entry, sample), channels_first(decode_image(sample))

    def score(self, predictor: _Predictor, benchmark: Benchmark, out: Path | None) -> Scored:
        from pipeline.inference.export import ImagePrediction, write_coco_panoptic
        from pipeline.scoring.rows import GroundTruth, Row

        row, pixels, count = Row(benchmark), _Pixels(), len(self.entries)

        def predictions() -> Iterator[ImagePrediction]:
            for (entry, sample), output, logits in predictor(self.samples(), count):
                gt = GroundTruth(sample, benchmark)
                pixels.add(gt.classes)
                ids, segments = row.predict(gt, output, logits, predictor.classes, predictor.thresholds)
                yield ImagePrediction(image_id=entry.image_id, file_name=entry.name, ids=ids, segments=segments)

        if out:
            write_coco_panoptic(out, predictions(), categories=benchmark.categories, rle=True)
        else:
            deque(predictions(), maxlen=0)
        return asdict(row.scores()), {"images": count, **pixels.counts()}


def _panoptic(benchmark: Benchmark, root: Path, split: str) -> _Panoptic:
    folder, at = DataFolder(root), coco_split(benchmark.annotations, split)
    # images without any label have nothing to be scored by
    entries = [entry for entry in read_split(folder, split, benchmark) if not entry.blank]
    return _Panoptic(folder=folder, at=at, entries=entries)


@dataclass(frozen=True, kw_only=True)
class _Semantic:
    """A split of images with label PNGs."""

    images: tuple[LabelledImage, ...]
    layout: dict[str, str]

    def score(self, predictor: _Predictor, benchmark: Benchmark, out: Path | None) -> Scored:
        from pipeline.data.transforms import channels_first
        from pipeline.inference.maps import semantic_map
        from pipeline.scoring.metrics import ConfusionMatrix, semantic_scores

        confusion, pixels = ConfusionMatrix(len(benchmark.categories)), _Pixels()

        def views() -> Iterator[tuple[tuple[LabelledImage, np.ndarray], Tensor]]:
            for item in self.images:
                labels = read_labels(item.label, benchmark)
                where = f"in its label map {item.label}"
                yield (item, labels), channels_first(read_image(item.image, labels.shape[::-1], where))

        for (item, labels), output, logits in predictor(views(), len(self.images)):
            guess = semantic_map(output, logits, predictor.classes, seen_offset=predictor.thresholds.seen_offset)
            confusion.update(labels, guess, image=item.name)
            pixels.add(labels)
            if out:
                write_labels(out / f"{item.name}.png", guess, benchmark)
        scores = semantic_scores(confusion, categories=benchmark.categories, seen=benchmark.seen)
        return asdict(scores), {"images": len(self.images), **pixels.counts()}


def _semantic(benchmark: Benchmark, root: Path, split: str) -> _Semantic:
    assert benchmark.files
    found = find_split(benchmark.files, root, split)
    return _Semantic(images=found.images, layout=found.layout)


class _Pixels:
    """How many pixels the ground truth has, and how many of them count nowhere."""

    def __init__(self) -> None:
        self.all = self.ignored = 0

    def add(self, classes: np.ndarray) -> None:
        self.all += classes.size
        self.ignored += int((classes < 0).sum())

    def counts(self) -> dict[str, Any]:
        return {"pixels": self.all, "ignored_percent": 100 * self.ignored / self.all}


def _without_empty_groups(scores: dict[str, Any], benchmark: Benchmark) -> dict[str, Any]:
    """A mean over no class is no score: None where no class is seen, or none unseen."""
    empty = {"h", "s" if not any(benchmark.seen) else "u"} if len(set(benchmark.seen)) == 1 else set()
    return {name: None if name[0] in empty else value for name, value in scores.items()}


def _key(folder: Path) -> str | None:
    """The checkpoint's key, if it is an artefact's folder."""
    manifest = folder / "manifest.json"
    return json.loads(manifest.read_bytes())["key"] if manifest.is_file() else None


def table(result: dict[str, Any]) -> Table:
    """The scores in percent, for the terminal."""
    from rich.table import Table

    shown = Table(title=result["benchmark"])
    names = [name for name in result["scores"] if not name.startswith("absent")]
    for name in names:
        shown.add_column(name, justify="right", style="bold" if name.startswith("h") else None)
    values = (result["scores"][name] for name in names)
    shown.add_row(*("-" if value is None else f"{value:.1f}" for value in values))
    return shown


def about(result: dict[str, Any]) -> str:
    """What the scores are of, a line for each fact."""
    counts, scores, checkpoint, data = (result[part] for part in ("counts", "scores", "checkpoint", "data"))
    lines = (
        f"checkpoint: {checkpoint['stage']} {checkpoint['key'] or checkpoint['folder']}",
        f"data: {counts['images']} images, {counts['ignored_percent']:.1f} % of their pixels ignored "
        f"({data['images']} and {data['labels']} in {data['root']})",
        f"classes: {counts['seen']} seen, of which {scores['absent_seen']} neither occur nor are predicted; "
        f"{counts['unseen']} unseen, of which {scores['absent_unseen']}",
    )
    if teacher := result["teacher"]:
        chosen = ", ".join(f"{name} {teacher['options'][name]}" for name in ("method", "crop", "resize"))
        lines = (*lines, f"teacher: alpha {teacher['alpha']:g}, beta {teacher['beta']:g}; {chosen}")
    names = [f"{ours!r} for {theirs!r}" for theirs, ours in result["respelled"].items()]
    respelled = [f"names: the checkpoint has {len(names)} in another spelling, such as {names[0]}"] if names else []
    return "\n".join([*lines, *respelled, *result["marks"]])
