"""Everything the report counts, image by image: the settings' scores, the ceilings, and of a panoptic benchmark where quality is
lost and the sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.projector import class_products
from pipeline.data.benchmarks import Benchmark
from pipeline.inference.maps import Classes, Output, thresholds_of
from pipeline.inference.model import Model
from pipeline.scoring.config import EvaluateConfig
from pipeline.scoring.rows import GroundTruth, Map, Row
from pipeline.scoring.sweeps import Sweeps
from pipeline.scoring.waterfall import Waterfall, pair
from storage.shards import Sample

CHECKPOINTS = ("inductive", "transductive")


class Evaluator:
    """Counts the images given to `update`, in their order; `results` is the report's part so far.

    Args:
        benchmark: classes and split.
        models: "inductive" and "transductive", with the same segmenter and thresholds.
        classes: the teacher's rows of the classes, in the benchmark's order.
        config: the control row's offset, and the sweeps' grids and number of images.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        models: Mapping[str, Model],
        classes: Classes,
        config: EvaluateConfig,
    ) -> None:
        self.benchmark, self.models, self.classes, self.config = benchmark, models, classes, config
        names = *CHECKPOINTS, "control", "ceiling", "true_classes", *(f"true_masks_{name}" for name in CHECKPOINTS)
        self.rows = {name: Row(benchmark) for name in names}
        self.waterfalls = {name: Waterfall(benchmark) for name in CHECKPOINTS}
        self.sweeps = {
            name: Sweeps(
                benchmark,
                thresholds_of(model.facts),
                object_thresholds=config.object_thresholds,
                seen_offsets=config.seen_offsets,
            )
            for name, model in models.items()
        }
        self.images = 0
        self.left_out = {"crowd segments": 0, "segments without a query": 0}
        self._right: dict[bool, list[bool]] = {True: [], False: []}  # seen -> is the teacher right?

    @torch.no_grad()
    def update(self, sample: Sample, own: Tensor, output: Output) -> dict[str, Map]:
        """Counts one image and returns its maps, inductive and transductive.

        `own`: the teacher's tokens of its segments (O, D).
        """
        gt, output = GroundTruth(sample, self.benchmark), output.kept()
        pairs = pair(gt, output)
        logits = {name: model.logits(output.features, model.text) for name, model in self.models.items()}
        guess = class_products(own.to(self.classes.text.device), self.classes.text).argmax(1).cpu().numpy()

        stage_1 = self.models["inductive"].facts
        self.rows["ceiling"].rename(gt, guess.tolist())
        control = thresholds_of(stage_1, seen_offset=self.config.control_offset)
        self.rows["control"].predict(gt, output, logits["inductive"], self.classes, control)
        certain = pairs.certain(pairs.classes, logits["inductive"])
        self.rows["true_classes"].predict(gt, output, certain, self.classes, thresholds_of(stage_1))
        maps: dict[str, Map] = {}
        for name, model in self.models.items():
            thresholds = thresholds_of(model.facts)
            maps[name] = self.rows[name].predict(gt, output, logits[name], self.classes, thresholds)
            named = np.zeros(len(sample.segments), np.int64)  # crowds are left out whatever their name
            named[pairs.segments] = logits[name].argmax(1).cpu().numpy()[pairs.nearest]
            self.rows[f"true_masks_{name}"].rename(gt, named.tolist())
            if self.benchmark.task == "semantic":
                continue
            self.waterfalls[name].update(gt, output, pairs, logits[name], self.classes, thresholds)
            if self.images < self.config.sweep_images:
                self.sweeps[name].update(gt, output, logits[name], self.classes)

        for position, k in zip(pairs.classes, guess[pairs.segments], strict=True):
            self._right[self.benchmark.seen[position]].append(bool(k == position))
        self.left_out["crowd segments"] += len(sample.segments) - len(pairs.segments)
        self.left_out["segments without a query"] += int((pairs.query < 0).sum())
        self.images += 1
        return maps

    def results(self) -> dict[str, Any]:
        """`metrics.scores` (or `semantic_scores`) of every row by its name; of a panoptic benchmark `losses`, see
        `Waterfall.result`, and `sweeps`, see `Sweeps.curves`, by checkpoint; `left_out`; and `teacher_accuracy`."""
        accuracy: dict[str, float] = {"instances": sum(map(len, self._right.values()))}
        for name, flag in (("seen", True), ("unseen", False)):
            accuracy[name] = 100 * sum(self._right[flag]) / max(len(self._right[flag]), 1)
        return {
            **{name: row.scores() for name, row in self.rows.items()},
            **self._diagnosis(),
            "left_out": dict(self.left_out),
            "teacher_accuracy": accuracy,
        }

    def _diagnosis(self) -> dict[str, Any]:
        quality = {name: row.quality.result() for name, row in self.rows.items() if row.quality is not None}
        if not quality:
            return {}
        return {
            "losses": {
                name: waterfall.result(true_classes=quality["true_classes"], actual=quality[name])
                for name, waterfall in self.waterfalls.items()
            },
            "sweeps": {
                "images": min(self.images, self.config.sweep_images),
                "of": self.images,
                **{name: sweeps.curves() for name, sweeps in self.sweeps.items()},
            },
        }
