"""`zs-seg sweep`: a finished report's rows with the teacher at other exponents alpha and beta, in seconds.

It reads the masks and class logits that the report has kept (`EvaluateConfig.kept_images`) and the cached mask tokens:
neither the teacher nor the segmenter is loaded. Object thresholds are those of the report.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
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
    from torch import Tensor

    from pipeline.inference.maps import Output

KEPT = "outputs.zarr"  # in a report's folder


def keep(folder: Path, found: Sequence[tuple[int, Output, Mapping[str, Tensor]]]) -> list[Path]:
    """Write what a sweep needs of some images (id, output, the checkpoints' class logits (Q, K)) into a report's folder;
    returns the files."""
    import numpy as np

    from storage.kept_outputs import write_kept_outputs

    sizes = [(o.masks.shape[-2:], o.padded_size, o.image_size, o.original_size) for _, o, _ in found]
    logits = {
        name: np.stack([own[name].detach().float().cpu().numpy() for _, _, own in found])
        for name in ("inductive", "transductive")
    }
    return write_kept_outputs(
        folder / KEPT,
        image_id=np.array([image_id for image_id, _, _ in found]),
        sizes=np.array(sizes),
        masks=np.concatenate([output.masks.float().cpu().numpy().ravel() for _, output, _ in found]),
        **logits,
    )


@dataclass(frozen=True, kw_only=True)
class Point:
    """Panoptic quality of a row of `records.WITH_TEACHER` at a pair of exponents, in percent."""

    row: str
    alpha: float
    beta: float
    sPQ: float
    uPQ: float
    hPQ: float


def run(
    *, report: str, alphas: Sequence[float], betas: Sequence[float], images: int, store: Store, runtime: Runtime
) -> list[Point]:
    """The points of every pair of `alphas` and `betas` ((): the report's own), on the first `images` of the kept
    images (0: all). `report` is a run, or the key of a report.

    Raises UserError where there is no such report, or it has kept no image, and for an exponent outside of 0..1.
    """
    if wrong := [value for value in (*alphas, *betas) if not 0 <= value <= 1]:
        raise UserError(f"--alpha and --beta must lie in 0..1, not {wrong[0]:g}")
    artefact = store.open(names.find(store, report, kind="report"))
    if not any(name.startswith(f"{KEPT}/") for name in artefact.manifest.files):
        raise UserError(
            f"report {artefact.ref} has kept no image; run it again with --evaluate.kept-images N (panoptic runs only)"
        )

    import torch

    from pipeline.inference.maps import Output, Thresholds, classes_of
    from pipeline.scoring.found_masks import validation_masks
    from pipeline.scoring.rows import GroundTruth
    from pipeline.scoring.teacher_rows import TeacherPoints, teacher_rows
    from pipeline.teacher.text_bank import open_text
    from storage.kept_outputs import read_kept_outputs
    from storage.shards import Shards, read_shard

    device, settings = runtime.torch_device(), read_report(artefact.path / "report.json").settings
    inputs = {name: Ref.parse(source) for name, source in artefact.manifest.inputs.items()}
    benchmark = _benchmark(artefact.manifest.config["benchmark"])
    bank = open_text(store.open(inputs["text"]).path, inputs["text"].key)
    classes, shards = classes_of(bank.embedding, bank.classes(), device), Shards(store.open(inputs["shards"]).path)
    rows, points = teacher_rows(EvaluateConfig()), {}
    pairs = list(itertools.product(alphas or (settings.alpha,), betas or (settings.beta,)))
    for name in WITH_TEACHER:
        object_threshold, overlap = getattr(settings, f"object_threshold_{name}"), settings.overlap_threshold
        assert object_threshold is not None and overlap is not None
        thresholds = Thresholds(object_threshold=object_threshold, overlap_threshold=overlap)
        points[name] = TeacherPoints(
            benchmark, [replace(rows[name], alpha=alpha, beta=beta) for alpha, beta in pairs], thresholds
        )
    kept = read_kept_outputs(artefact.path / KEPT)
    count = min(images or len(kept.image_id), len(kept.image_id))
    samples = (sample for tar in shards.tars("val") for sample in read_shard(tar))
    found = validation_masks(shards, store.open(inputs["mask_tokens"]).path, device)
    with runtime.bar(count, "sweeping", "image") as bar:
        for number, sample, (image_id, tokens) in zip(range(count), samples, found, strict=False):
            assert sample.image_id == image_id == kept.image_id[number]
            _, padded, image, original = ((height, width) for height, width in kept.sizes[number].tolist())
            output = Output(
                features=torch.zeros(0), masks=torch.from_numpy(kept.masks_of(number)).to(device), padded_size=padded,
                image_size=image, original_size=original, keep=True,
            )  # fmt: skip
            own = {
                name: torch.from_numpy(getattr(kept, name)[number]).to(device) for name in ("inductive", "transductive")
            }
            gt = GroundTruth(sample, benchmark)
            for part in points.values():
                part.update(gt, output, own, tokens, classes)
            bar.update()
    return [
        Point(row=name, alpha=row.alpha, beta=row.beta, sPQ=point.sPQ, uPQ=point.uPQ, hPQ=point.hPQ)
        for name, part in points.items()
        for row, point in part.points().items()
    ]


def _benchmark(content: dict[str, Any]) -> Benchmark:
    """From `Benchmark.content`, as a manifest has it."""
    categories = tuple(Category(**category) for category in content["categories"])
    return Benchmark(**{**content, "categories": categories, "unseen_ids": tuple(content["unseen_ids"])})


def table(found: Sequence[Point]) -> Table:
    """The points in percent, for the terminal."""
    from rich.table import Table

    shown = Table()
    for name in ("row", "alpha", "beta", "sPQ", "uPQ", "hPQ"):
        shown.add_column(name, justify="left" if name == "row" else "right", style="bold" if name == "hPQ" else None)
    for point in found:
        scores = (f"{value:.1f}" for value in (point.sPQ, point.uPQ, point.hPQ))
        shown.add_row(point.row.replace("_", " + "), f"{point.alpha:g}", f"{point.beta:g}", *scores)
    return shown
