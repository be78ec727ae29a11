"""Stage "evaluate": a report of both checkpoints on the validation images: scores, ceilings, where quality is lost."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.data.benchmarks import Benchmark
from pipeline.data.samples import samples_with_tokens
from pipeline.runtime import Runtime
from pipeline.scoring.config import EvaluateConfig
from pipeline.scoring.published import Beyond
from pipeline.scoring.records import HEADLINE, Report
from storage.errors import UserError, counted
from storage.keys import Recipe, Ref
from storage.store import Build

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from models.segmenter import Segmenter
    from pipeline.inference.maps import Classes, Output, PredictedSegment, Thresholds
    from pipeline.inference.model import Model
    from pipeline.report.pictures import Picture
    from storage.shards import Sample

STAGE, VERSION = "evaluate", 4
log = logging.getLogger(__name__)


def recipe(
    config: EvaluateConfig,
    *,
    benchmark: Benchmark,
    threshold_slack: float,
    beyond: Sequence[Beyond],
    min_area: int,
    shards: Ref,
    tokens: Ref,
    text: Ref,
    inductive: Ref,
    generator: Ref,
    transductive: Ref,
    mask_tokens: Ref,
) -> Recipe:
    inputs = {
        "shards": shards, "tokens": tokens, "text": text, "inductive": inductive, "generator": generator,
        "transductive": transductive, "mask_tokens": mask_tokens,
    }  # fmt: skip
    content = {"evaluate": config, "benchmark": benchmark.content, "threshold_slack": threshold_slack}
    # The report depends on them as well; where there is nothing of it, a key has no entry.
    content |= {"beyond": list(beyond)} if beyond else {}
    content |= {"min_area": min_area} if min_area else {}
    return Recipe(kind="report", stage=STAGE, version=VERSION, config=content, inputs=inputs)


def build(
    build: Build,
    config: EvaluateConfig,
    runtime: Runtime,
    *,
    benchmark: Benchmark,
    threshold_slack: float,
    beyond: Sequence[Beyond],
    min_area: int,
) -> None:
    """Score every validation image, of a semantic benchmark by IoU alone, and write the report's files.

    `beyond`: what makes the run incomparable with the paper's. Segments of fewer than `min_area` pixels have no token.
    """
    from models.folding import for_inference
    from pipeline.inference.forward import outputs
    from pipeline.inference.maps import classes_of
    from pipeline.inference.model import load_model, require_same_classes
    from pipeline.report.write import write_report
    from pipeline.scoring.evaluator import Evaluator
    from pipeline.scoring.exponents import keep
    from pipeline.scoring.found_masks import validation_masks
    from pipeline.teacher.text_bank import open_text
    from pipeline.training.curves import read_curves
    from storage.shards import Shards

    device = runtime.torch_device()
    text = build.open("text")
    bank = open_text(text.path, text.ref.key)
    models = {name: load_model(build.open(name).path, device) for name in ("inductive", "transductive")}
    for model in models.values():
        require_same_classes(model.meta.classes, bank)
    stage_1 = models["inductive"]
    _require_same_segmenter(stage_1, models["transductive"])
    segmenter, resize = for_inference(stage_1.segmenter), stage_1.meta.resize
    classes = classes_of(bank.embedding, bank.classes(), device)
    pictures: list[Picture] = []
    kept: list[tuple[int, Output, dict[str, Tensor]]] = []
    shards, masks = Shards(build.open("shards").path), build.open("mask_tokens").path

    thresholds = _teacher_thresholds(build, config, runtime, models, classes, segmenter, slack=threshold_slack)
    samples = samples_with_tokens(shards, build.open("tokens").path, workers=runtime.decoders)
    with runtime.bar(sum(shards.counts("val")), "evaluating", "image") as bar:
        evaluator = Evaluator(benchmark, models, classes, config, thresholds)
        every = outputs(segmenter, samples, resize, batch=config.batch)
        for ((sample, own), output), (image, found) in zip(every, validation_masks(shards, masks, device), strict=True):
            assert image == sample.image_id, (image, sample.image_id)
            maps = evaluator.update(sample, own, output, found)
            if len(kept) < config.kept_images and benchmark.task == "panoptic":
                logits = {name: model.logits(output.features, model.text).detach() for name, model in models.items()}
                kept.append((sample.image_id, output, logits))
            if len(pictures) < config.pictures and any(
                not benchmark.seen[benchmark.index[s.category_id]] for s in sample.segments
            ):
                pictures.append(_picture(sample, maps, benchmark))
            bar.update()
    report = evaluator.report(bank.teacher, beyond)
    trained = {"v2c": "inductive", "g2s": "generator", "cpa": "transductive"}
    curves = {stage: read_curves(build.open(name).path) for stage, name in trained.items()}
    build.add(
        *(keep(build.path, kept) if kept else ()), *write_report(build.path, report, curves=curves, pictures=pictures)
    )
    left_out = report.left_out
    log.info(
        "ceilings leave out %s; segments without a query over them: %d",
        counted(left_out.crowd_segments, "crowd segment"),
        left_out.segments_without_a_query,
    )
    if left_out.segments_without_a_token:
        log.info(
            "the teacher's ceiling and accuracy leave out %s of fewer than %d pixels, which have no token",
            counted(left_out.segments_without_a_token, "segment"),
            min_area,
        )
    build.counts |= counts(report, benchmark.task)


def _teacher_thresholds(
    build: Build,
    config: EvaluateConfig,
    runtime: Runtime,
    models: Mapping[str, Model],
    classes: Classes,
    segmenter: Segmenter,
    *,
    slack: float,
) -> dict[str, Thresholds]:
    """The thresholds of each row with the teacher at prediction, chosen on the training images of stage "mask-tokens";
    of a semantic benchmark, which has none and whose maps need none, the checkpoints' own."""
    from pipeline.inference.forward import outputs
    from pipeline.scoring.found_masks import calibration_images
    from pipeline.scoring.teacher_rows import TeacherCalibration, teacher_rows
    from storage.shards import Shards

    rows, masks = teacher_rows(config), build.open("mask_tokens")
    count = masks.manifest.counts["train"]["images"]
    if not count:
        return {name: models[row.checkpoint].meta.thresholds for name, row in rows.items()}
    calibration = TeacherCalibration(rows, models, classes, slack=slack)
    images = calibration_images(
        Shards(build.open("shards").path), masks.path, classes.text.device, workers=runtime.decoders
    )
    with runtime.bar(count, "choosing the object thresholds with the teacher", "image") as bar:
        for (sample, found), output in outputs(segmenter, images, models["inductive"].meta.resize, batch=config.batch):
            calibration.update(sample, output, found)
            bar.update()
    thresholds = calibration.thresholds()
    chosen = ", ".join(f"{name} {one.object_threshold:g}" for name, one in thresholds.items())
    log.info("object thresholds with the teacher at prediction: %s", chosen)
    return thresholds


def counts(report: Report, task: str) -> dict[str, Any]:
    """The manifest's counts of a report: every row's headline in percent, and numbers of images and of left-out
    segments."""
    content: dict[str, Any] = {
        name: {key: round(getattr(row, key), 3) for key in HEADLINE[task]} for name, row in report.rows.items()
    }
    if report.sweeps is not None:
        content["sweep_images"] = report.sweeps.images
    return content | {"images": report.settings.images, "left_out": report.left_out.content()}


def _require_same_segmenter(one: Model, other: Model) -> None:
    """Stage 3 leaves the segmenter alone, so one forward pass serves both checkpoints; make sure that it did."""
    import torch

    theirs = other.segmenter.state_dict()
    if not all(torch.equal(value, theirs[name]) for name, value in one.segmenter.state_dict().items()):
        raise UserError(
            "the inductive and the transductive checkpoint hold different segmenters; "
            "run `zs-seg run --from cpa` so that stage 3 starts from this stage 1"
        )


def _picture(
    sample: Sample, maps: dict[str, tuple[np.ndarray, list[PredictedSegment]]], benchmark: Benchmark
) -> Picture:
    from pipeline.report.overlay import Label
    from pipeline.report.pictures import Picture
    from storage.shards import decode_ids, decode_image

    label_of = {
        category.id: Label(category.name, None, seen)
        for category, seen in zip(benchmark.categories, benchmark.seen, strict=True)
    }
    return Picture(
        image=decode_image(sample),
        ground_truth=(decode_ids(sample), {s.id: label_of[s.category_id] for s in sample.segments}),
        **{name: (ids, {s.id: label_of[s.category_id] for s in segments}) for name, (ids, segments) in maps.items()},
    )
