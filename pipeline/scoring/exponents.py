"""`zs-seg sweep`: a finished report's rows with the teacher at other exponents alpha and beta.

It reads the cached mask tokens, so no teacher is loaded and nothing is encoded; the segmenter's masks, which would take
24 MB an image at 800 x 1200 pixels, are not kept and are computed again. Object thresholds are those of the report.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.data.benchmarks import Benchmark, Category
from pipeline.runtime import Runtime
from pipeline.scoring.config import EvaluateConfig
from pipeline.scoring.records import WITH_TEACHER, read_report
from storage import names
from storage.errors import UserError
from storage.keys import Ref
from storage.store import Store

if TYPE_CHECKING:
    from rich.table import Table


def run(
    *, report: str, alphas: Sequence[float], betas: Sequence[float], images: int, store: Store, runtime: Runtime
) -> list[dict[str, Any]]:
    """Panoptic quality at every pair of `alphas` and `betas` ((): the report's own), on the first `images` validation
    images (0: all).

    Returns a record for each pair and checkpoint: `row` (of `records.WITH_TEACHER`), `alpha`, `beta`, sPQ, uPQ and hPQ in
    percent. `report` is a run, or the key of a report.

    Raises UserError where there is no such report, or it is of a semantic benchmark, and for an exponent outside of
    0..1.
    """
    if wrong := [value for value in (*alphas, *betas) if not 0 <= value <= 1]:
        raise UserError(f"--alpha and --beta must lie in 0..1, not {wrong[0]:g}")
    artefact = store.open(names.find(store, report, kind="report"))
    written, manifest = read_report(artefact.path / "report.json"), artefact.manifest
    if written.sweeps is None:
        raise UserError(f"report {artefact.ref} is of a semantic benchmark, which has no sweeps; pass a panoptic run's")
    benchmark = _benchmark(manifest.config["benchmark"])

    from models.folding import for_inference
    from pipeline.data.samples import samples_with_tokens
    from pipeline.inference.forward import outputs
    from pipeline.inference.maps import classes_of
    from pipeline.inference.model import load_model
    from pipeline.scoring.found_masks import validation_masks
    from pipeline.scoring.rows import GroundTruth
    from pipeline.scoring.teacher_rows import TeacherPoints, teacher_rows
    from pipeline.teacher.text_bank import open_text
    from storage.shards import Shards

    device, settings = runtime.torch_device(), written.settings
    paths = {name: store.open(Ref.parse(source)).path for name, source in manifest.inputs.items()}
    bank = open_text(paths["text"], Ref.parse(manifest.inputs["text"]).key)
    models = {name: load_model(paths[name], device) for name in ("inductive", "transductive")}
    classes, shards = classes_of(bank.embedding, bank.classes(), device), Shards(paths["shards"])
    pairs = list(itertools.product(alphas or (settings.alpha,), betas or (settings.beta,)))
    rows = teacher_rows(EvaluateConfig())
    points = {
        name: TeacherPoints(
            benchmark,
            [replace(rows[name], alpha=alpha, beta=beta) for alpha, beta in pairs],
            replace(
                models["inductive"].meta.thresholds, object_threshold=getattr(settings, f"object_threshold_{name}")
            ),
        )
        for name in WITH_TEACHER
    }
    stage_1 = models["inductive"]
    samples = samples_with_tokens(shards, paths["tokens"], workers=runtime.decoders)
    every = outputs(
        for_inference(stage_1.segmenter), samples, stage_1.meta.resize, batch=manifest.config["evaluate"]["batch"]
    )
    count = min(images or settings.images, settings.images)
    with runtime.bar(count, "sweeping", "image") as bar:
        for ((sample, _), output), (_, found) in itertools.islice(
            zip(every, validation_masks(shards, paths["mask_tokens"], device), strict=True), count
        ):
            kept, gt = output.kept(), GroundTruth(sample, benchmark)
            own = {name: model.logits(kept.features, model.text) for name, model in models.items()}
            for part in points.values():
                part.update(gt, kept, own, found, classes)
            bar.update()
    return [
        {"row": name, "alpha": row.alpha, "beta": row.beta, "sPQ": point.sPQ, "uPQ": point.uPQ, "hPQ": point.hPQ}
        for name, part in points.items()
        for row, point in part.points().items()
    ]


def _benchmark(content: dict[str, Any]) -> Benchmark:
    """From `Benchmark.content`, as a manifest has it."""
    categories = tuple(Category(**category) for category in content["categories"])
    return Benchmark(**{**content, "categories": categories, "unseen_ids": tuple(content["unseen_ids"])})


def table(found: Sequence[dict[str, Any]]) -> Table:
    """The records in percent, for the terminal."""
    from rich.table import Table

    shown = Table()
    for name in found[0]:
        shown.add_column(name, justify="left" if name == "row" else "right", style="bold" if name == "hPQ" else None)
    for record in found:
        cells = (f"{value:.1f}" if name.endswith("PQ") else f"{value:g}" for name, value in list(record.items())[1:])
        shown.add_row(record["row"].replace("_", " + "), *cells)
    return shown
