"""Stage "evaluate": both checkpoints and the teacher's ceiling on the validation images, as one report."""

from __future__ import annotations

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

    from pipeline.inference import Classes, Output
    from pipeline.metrics import PredictedSegment
    from pipeline.model import Model
    from pipeline.pictures import Picture
    from storage.shards import Sample

STAGE, VERSION = "evaluate", 1


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`batch` images share a forward pass where sizes agree. `pictures`: overlays in the report, of the first validation images that
    show an unseen class. `control_offset`: the seen_offset of the control row, calibrated stacking of stage 1 without any training."""

    batch: int = 8
    pictures: int = 8
    control_offset: float = 0.1

    def __post_init__(self) -> None:
        if self.batch < 1 or self.pictures < 0:
            raise ValueError("evaluate: batch must be at least 1, and pictures 0 or more")


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
        kind="report", stage=STAGE, version=VERSION, config={"evaluate": config, "benchmark": benchmark}, inputs=inputs
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
    """Score every validation image; report.json and report.html."""

    def work(build: Build) -> None:
        from pipeline.inference import classes_of, outputs
        from pipeline.model import load_model, require_same_classes
        from pipeline.report import write_report
        from pipeline.text import open_text
        from pipeline.training import read_curves

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
        classes = classes_of(bank.embedding, bank.classes(), device)
        rows = {name: _Row(benchmark) for name in ("inductive", "transductive", "control", "ceiling")}
        right: dict[bool, list[bool]] = {True: [], False: []}
        pictures: list[Picture] = []
        samples = _samples(store, shards, tokens)
        resize = ResizeConfig(**stage_1.facts["resize"])
        with runtime.bar(sum(_counts(store, shards)), "evaluating", "image") as bar:
            for (sample, own), output in outputs(stage_1.segmenter, samples, resize, batch=config.batch):
                gt = _GroundTruth(sample, benchmark)
                maps = {}
                for name, model in models.items():
                    logits = model.logits(output.features, classes.text)
                    maps[name] = rows[name].predict(gt, output, logits, classes, model.facts)
                    if name == "inductive":
                        rows["control"].predict(
                            gt, output, logits, classes, model.facts, seen_offset=config.control_offset
                        )
                guess = (own.to(device) @ classes.text.T).argmax(1).tolist()
                rows["ceiling"].rename(gt, guess)
                for segment, k in zip(sample.segments, guess, strict=True):
                    if segment.iscrowd:
                        continue
                    position = benchmark.index[segment.category_id]
                    right[benchmark.seen[position]].append(k == position)
                if len(pictures) < config.pictures and any(
                    not benchmark.seen[benchmark.index[s.category_id]] for s in sample.segments
                ):
                    pictures.append(_picture(gt, maps, benchmark))
                bar.update()
        accuracy = {"instances": sum(map(len, right.values()))}
        accuracy |= {
            name: 100 * sum(right[flag]) / max(len(right[flag]), 1)
            for name, flag in (("seen", True), ("unseen", False))
        }
        report = {
            "benchmark": benchmark.name,
            "marks": marks(bank.teacher, benchmark),
            **{name: row.scores() for name, row in rows.items()},
            "teacher_accuracy": accuracy,
            "settings": {
                "object_threshold": stage_1.facts["object_threshold"],
                "overlap_threshold": stage_1.facts["overlap_threshold"],
                "control_offset": config.control_offset,
                "images": sum(_counts(store, shards)),
                "teacher": f"{bank.teacher['name']} / {bank.teacher['pretrained']}",
            },
        }
        stages = (("v2c", inductive), ("g2s", generator), ("cpa", transductive))
        curves = {stage: read_curves(store.open(ref).path) for stage, ref in stages}
        write_report(build.path, report, curves=curves, pictures=pictures)
        build.counts |= {name: {key: round(report[name][key], 3) for key in ("sPQ", "uPQ", "hPQ")} for name in rows}
        build.counts["images"] = report["settings"]["images"]

    inputs = {
        "shards": shards,
        "tokens": tokens,
        "text": text,
        "inductive": inductive,
        "generator": generator,
        "transductive": transductive,
    }
    return store.build(recipe(config, benchmark=benchmark, **inputs), work)


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


def _samples(store: Store, shards: Ref, tokens: Ref) -> Iterator[tuple[tuple[Sample, Tensor], Tensor]]:
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


class _GroundTruth:
    """A sample's ids (H, W) and class indices (H, W), -1 where nothing is annotated."""

    def __init__(self, sample: Sample, benchmark: Benchmark) -> None:
        from pipeline.metrics import class_map
        from storage.shards import decode_ids

        self.sample, self.benchmark = sample, benchmark
        self.ids = decode_ids(sample)
        self.classes = class_map(self.ids, sample.segments, benchmark.index, image=sample.image_id)


class _Row:
    """One row of the report under way."""

    def __init__(self, benchmark: Benchmark) -> None:
        from pipeline.metrics import ConfusionMatrix, PanopticQuality

        self.benchmark = benchmark
        self.quality = PanopticQuality([c.id for c in benchmark.categories])
        self.confusion = ConfusionMatrix(len(benchmark.categories))

    def predict(
        self,
        gt: _GroundTruth,
        output: Output,
        logits: Tensor,
        classes: Classes,
        facts: dict[str, Any],
        *,
        seen_offset: float = 0.0,
    ) -> tuple[np.ndarray, list[PredictedSegment]]:
        """Score one image by its class logits; returns the panoptic map."""
        from pipeline.inference import panoptic_map, semantic_map

        thresholds = {name: facts[name] for name in ("object_threshold", "overlap_threshold")}
        ids, segments = panoptic_map(output, logits, classes, seen_offset=seen_offset, **thresholds)
        self.quality.update(gt.ids, gt.sample.segments, ids, segments, image=gt.sample.image_id)
        self.confusion.update(
            gt.classes, semantic_map(output, logits, classes, seen_offset=seen_offset), image=gt.sample.image_id
        )
        return ids, segments

    def rename(self, gt: _GroundTruth, guess: list[int]) -> None:
        """Score one image whose masks are the true ones and whose segments, crowds apart, are named by class index `guess`."""
        import numpy as np

        from pipeline.metrics import PredictedSegment, class_map

        named = [
            PredictedSegment(id=s.id, category_id=self.benchmark.categories[k].id, score=1.0)
            for s, k in zip(gt.sample.segments, guess, strict=True)
            if not s.iscrowd
        ]
        ids = np.where(np.isin(gt.ids, [s.id for s in named]), gt.ids, 0)
        self.quality.update(gt.ids, gt.sample.segments, ids, named, image=gt.sample.image_id)
        classes = class_map(ids, named, self.benchmark.index, image=gt.sample.image_id)
        self.confusion.update(
            np.where(ids > 0, gt.classes, -1), np.where(ids > 0, classes, 0), image=gt.sample.image_id
        )

    def scores(self) -> dict[str, Any]:
        from pipeline.metrics import scores

        return scores(
            self.quality.result(), self.confusion, categories=self.benchmark.categories, seen=self.benchmark.seen
        )


def _picture(
    gt: _GroundTruth, maps: dict[str, tuple[np.ndarray, list[PredictedSegment]]], benchmark: Benchmark
) -> Picture:
    from pipeline.pictures import Picture
    from storage.shards import decode_image

    def labels(segments: Any) -> dict[int, tuple[str, bool]]:
        return {
            s.id: (benchmark.names[i], benchmark.seen[i]) for s in segments for i in (benchmark.index[s.category_id],)
        }

    return Picture(
        image=decode_image(gt.sample),
        ground_truth=(gt.ids, labels(gt.sample.segments)),
        inductive=(maps["inductive"][0], labels(maps["inductive"][1])),
        transductive=(maps["transductive"][0], labels(maps["transductive"][1])),
    )
