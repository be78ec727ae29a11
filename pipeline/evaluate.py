"""Stage "evaluate": both checkpoints on the validation images, their ceilings, and where quality is lost, as one report."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.benchmarks import Benchmark
from pipeline.runtime import Runtime
from pipeline.views import ResizeConfig
from storage.keys import Recipe, Ref
from storage.store import Build, Store

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from pipeline.metrics import PredictedSegment
    from pipeline.model import Model
    from pipeline.pictures import Picture
    from storage.shards import Sample

STAGE, VERSION = "evaluate", 2
HEADLINE = {"panoptic": ("sPQ", "uPQ", "hPQ"), "semantic": ("sIoU", "uIoU", "hIoU")}
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`batch` images share a forward pass where sizes agree. `pictures`: overlays in the report, of the first validation images that
    show an unseen class. `control_offset`: the seen_offset of the control row, calibrated stacking of stage 1 without any training.
    `sweep_images`: the diagnostic curves are of so many validation images, the first ones; `object_thresholds`, `seen_offsets`: their
    points, to which the headline's own setting is added. Of a semantic benchmark there are no such curves."""

    batch: int = 8
    pictures: int = 8
    control_offset: float = 0.1
    sweep_images: int = 500
    object_thresholds: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    seen_offsets: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)

    def __post_init__(self) -> None:
        if self.batch < 1 or self.sweep_images < 1 or self.pictures < 0:
            raise ValueError("evaluate: batch and sweep_images must be at least 1, and pictures 0 or more")
        for name in ("object_thresholds", "seen_offsets"):
            if any(not 0 <= value <= 1 for value in getattr(self, name)):
                raise ValueError(f"evaluate: {name} must lie in 0..1")


def recipe(
    config: EvaluateConfig,
    *,
    benchmark: Benchmark,
    shards: Ref,
    tokens: Ref,
    text: Ref,
    inductive: Ref,
    generator: Ref,
    transductive: Ref,
) -> Recipe:
    inputs = {
        "shards": shards, "tokens": tokens, "text": text,
        "inductive": inductive, "generator": generator, "transductive": transductive,
    }  # fmt: skip
    return Recipe(
        kind="report",
        stage=STAGE,
        version=VERSION,
        config={"evaluate": config, "benchmark": benchmark.content},
        inputs=inputs,
    )


def run(
    config: EvaluateConfig,
    *,
    benchmark: Benchmark,
    shards: Ref,
    tokens: Ref,
    text: Ref,
    inductive: Ref,
    generator: Ref,
    transductive: Ref,
    store: Store,
    runtime: Runtime,
) -> Ref:
    """Score every validation image; report.json and report.html. Of a semantic benchmark by IoU alone."""

    def work(build: Build) -> None:
        from models.folding import for_inference
        from pipeline.inference import classes_of, outputs
        from pipeline.judge import Judge
        from pipeline.model import load_model, require_same_classes
        from pipeline.published import beside_the_paper
        from pipeline.record import read_curves
        from pipeline.report import write_report
        from pipeline.text import open_text

        device = runtime.torch_device()
        bank = open_text(store.open(text).path, text.key)
        models = {
            name: load_model(store.open(ref).path, device)
            for name, ref in (("inductive", inductive), ("transductive", transductive))
        }
        for model in models.values():
            require_same_classes(model.facts, bank)
        stage_1 = models["inductive"]
        _require_same_segmenter(stage_1, models["transductive"])
        pictures: list[Picture] = []
        samples = samples_with_tokens(store, shards, tokens)
        resize = ResizeConfig(**stage_1.facts["resize"])
        count = sum(_counts(store, shards))
        with runtime.bar(count, "evaluating", "image") as bar:
            judge = Judge(
                benchmark,
                models,
                classes_of(bank.embedding, bank.classes(), device),
                control_offset=config.control_offset,
                sweep_images=config.sweep_images,
                object_thresholds=config.object_thresholds,
                seen_offsets=config.seen_offsets,
            )
            for (sample, own), output in outputs(for_inference(stage_1.segmenter), samples, resize, batch=config.batch):
                maps = judge.update(sample, own, output)
                if len(pictures) < config.pictures and any(
                    not benchmark.seen[benchmark.index[s.category_id]] for s in sample.segments
                ):
                    pictures.append(_picture(sample, maps, benchmark))
                bar.update()
        results, warnings = judge.results(), marks(bank.teacher, benchmark)
        report = {
            "benchmark": benchmark.name,
            "marks": warnings,
            **results,
            "published": beside_the_paper(benchmark.name, results, images=count, marks=warnings),
            "settings": {
                **(
                    _thresholds(stage_1) if benchmark.task == "panoptic" else {}
                ),  # they decide nothing in a semantic map
                "seen_offset": 0.0,
                "control_offset": config.control_offset,
                "images": count,
                "teacher": f"{bank.teacher['name']} / {bank.teacher['pretrained']}",
            },
        }
        stages = (("v2c", inductive), ("g2s", generator), ("cpa", transductive))
        curves = {stage: read_curves(store.open(ref).path) for stage, ref in stages}
        write_report(build.path, report, curves=curves, pictures=pictures)
        log.info(
            "ceilings: %d crowd segments take no part; %d segments have no query over them",
            *results["left_out"].values(),
        )
        build.counts |= {
            name: {key: round(results[name][key], 3) for key in HEADLINE[benchmark.task]} for name in judge.rows
        }
        if "sweeps" in results:
            build.counts["sweep_images"] = results["sweeps"]["images"]
        build.counts |= {"images": count, "left_out": results["left_out"]}

    inputs = {
        "shards": shards,
        "tokens": tokens,
        "text": text,
        "inductive": inductive,
        "generator": generator,
        "transductive": transductive,
    }
    return store.build(recipe(config, benchmark=benchmark, **inputs), work)


def _thresholds(model: Model) -> dict[str, Any]:
    return {
        "object_threshold": model.facts["object_threshold"],
        "object_threshold_chosen_on": "seen classes of training images",
        "overlap_threshold": model.facts["overlap_threshold"],
    }


def marks(teacher: dict[str, Any], benchmark: Benchmark) -> list[str]:
    """What a reader must know before reading a number: a teacher that knows nothing of these classes."""
    if teacher["pretrained"] == "random":
        return [
            "The teacher has RANDOM weights: every number here is noise, a proof that the pipeline runs and nothing else."
        ]
    if teacher["name"] == "small" and benchmark.name not in ("scenes-test", "scenes-validation"):
        return [
            "STAND-IN TEACHER: the small CLIP that ships with the package was trained on generated scenes and knows nothing of these "
            "classes. These numbers prove that the pipeline runs on these files, and nothing about the method."
        ]
    return []


def _require_same_segmenter(one: Model, other: Model) -> None:
    """Stage 3 leaves the segmenter alone, so one forward pass serves both checkpoints; make sure that it did."""
    import torch

    theirs = other.segmenter.state_dict()
    if not all(torch.equal(value, theirs[name]) for name, value in one.segmenter.state_dict().items()):
        raise ValueError(
            "the inductive and the transductive checkpoint hold different segmenters; "
            "run `zs-seg run --from cpa` so that stage 3 starts from this stage 1"
        )


def _counts(store: Store, shards: Ref) -> list[int]:
    from storage.shards import Shards

    return Shards(store.open(shards).path).counts("val")


def samples_with_tokens(store: Store, shards: Ref, tokens: Ref) -> Iterator[tuple[tuple[Sample, Tensor], Tensor]]:
    """((sample, its instance tokens (O, D)), image (3, H, W) uint8), tars and token groups in step."""
    import torch

    from storage.shards import Shards, decode_image, read_shard
    from storage.tokens import read_tokens

    folder = store.open(tokens).path
    for tar in Shards(store.open(shards).path).tars("val"):
        group = read_tokens(folder / f"{tar.stem}.zarr")
        for row, sample in enumerate(read_shard(tar)):
            own = torch.from_numpy(group.instance[group.rows(row)]).float()
            yield (sample, own), torch.from_numpy(decode_image(sample)).permute(2, 0, 1)


def _picture(
    sample: Sample, maps: dict[str, tuple[np.ndarray, list[PredictedSegment]]], benchmark: Benchmark
) -> Picture:
    from pipeline.pictures import Picture
    from storage.shards import decode_ids, decode_image

    def labels(segments: Any) -> dict[int, tuple[str, bool]]:
        return {
            s.id: (benchmark.names[i], benchmark.seen[i]) for s in segments for i in (benchmark.index[s.category_id],)
        }

    return Picture(
        image=decode_image(sample),
        ground_truth=(decode_ids(sample), labels(sample.segments)),
        inductive=(maps["inductive"][0], labels(maps["inductive"][1])),
        transductive=(maps["transductive"][0], labels(maps["transductive"][1])),
    )
