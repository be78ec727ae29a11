"""All of a report, counted image by image: the rows' scores, and of a panoptic benchmark the losses and the sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.projector import class_products
from pipeline.data.benchmarks import Benchmark
from pipeline.inference.maps import Classes, Output, Thresholds
from pipeline.inference.model import Model
from pipeline.inference.teacher import MaskTokens
from pipeline.scoring.config import EvaluateConfig
from pipeline.scoring.published import Beyond, beside_the_paper, marks, outlines
from pipeline.scoring.records import (
    CHECKPOINTS,
    ROWS,
    TEACHER_ROWS,
    WITH_TEACHER,
    LeftOut,
    Losses,
    Report,
    Settings,
    SweepReport,
    TeacherAccuracy,
)
from pipeline.scoring.rows import GroundTruth, Map, Row
from pipeline.scoring.sweeps import Sweeps
from pipeline.scoring.teacher_rows import TeacherSweep, teacher_rows
from pipeline.scoring.waterfall import Pairs, Waterfall, pair
from storage.shards import Sample


class Evaluator:
    """Counts the images given to `update`, in their order; `report` is the report of them.

    Args:
        benchmark: classes and split.
        models: "inductive" and "transductive", with the same segmenter and thresholds.
        classes: the teacher's rows of the classes, in the benchmark's order.
        config: the control row's offset, and the sweeps' grids and number of images.
        teacher_thresholds: of each row with the teacher at prediction, as `TeacherCalibration` chooses them.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        models: Mapping[str, Model],
        classes: Classes,
        config: EvaluateConfig,
        teacher_thresholds: Mapping[str, Thresholds],
    ) -> None:
        self.benchmark, self.models, self.classes, self.config = benchmark, models, classes, config
        self.rows = {name: Row(benchmark) for name in ROWS}
        self.waterfalls = {name: Waterfall(benchmark) for name in (*CHECKPOINTS, *TEACHER_ROWS)}
        self.sweeps = {
            name: Sweeps(
                benchmark,
                model.meta.thresholds,
                object_thresholds=config.object_thresholds,
                seen_offsets=config.seen_offsets,
            )
            for name, model in models.items()
        }
        self.teacher_rows, self.teacher_thresholds = teacher_rows(config), teacher_thresholds
        self.teacher_sweeps = {
            name: TeacherSweep(
                benchmark, self.teacher_rows[name], teacher_thresholds[name], exponents=config.teacher_exponents
            )
            for name in WITH_TEACHER
        }
        self.images = 0
        self.left_out = LeftOut(crowd_segments=0, segments_without_a_query=0)
        self._right: dict[bool, list[bool]] = {True: [], False: []}  # seen -> is the teacher's class the true one?

    @torch.no_grad()
    def update(self, sample: Sample, own: Tensor, output: Output, found: MaskTokens) -> dict[str, Map]:
        """Counts one image and returns its maps, inductive and transductive.

        `own`: the teacher's tokens of its segments (O, D); `found`: those of the masks that the network finds.
        """
        gt, output = GroundTruth(sample, self.benchmark), output.kept()
        pairs = pair(gt, output)
        logits = {name: model.logits(output.features, model.text) for name, model in self.models.items()}
        guess = class_products(own.to(self.classes.text.device), self.classes.text).argmax(1).cpu().numpy()
        guess[~own.any(1).numpy()] = -1  # too small for the teacher

        stage_1 = self.models["inductive"].meta.thresholds
        self.rows["ceiling"].rename(gt, guess.tolist())
        control = replace(stage_1, seen_offset=self.config.control_offset)
        self.rows["control"].predict(gt, output, logits["inductive"], self.classes, control)
        certain = pairs.certain(pairs.classes, logits["inductive"])
        self.rows["true_classes"].predict(gt, output, certain, self.classes, stage_1)
        maps: dict[str, Map] = {}
        for name, model in self.models.items():
            thresholds = model.meta.thresholds
            maps[name] = self.rows[name].predict(gt, output, logits[name], self.classes, thresholds)
            named = np.zeros(len(sample.segments), np.int64)  # crowds are left out whatever their name
            named[pairs.segments] = logits[name].argmax(1).cpu().numpy()[pairs.nearest]
            self.rows[f"true_masks_{name}"].rename(gt, named.tolist())
            if self.benchmark.task == "semantic":
                continue
            self.waterfalls[name].update(gt, output, pairs, logits[name], self.classes, thresholds)
            if self.images < self.config.sweep_images:
                self.sweeps[name].update(gt, output, logits[name], self.classes)

        self._update_with_teacher(gt, output, pairs, logits, found)
        for position, k in zip(pairs.classes, guess[pairs.segments], strict=True):
            if k >= 0:
                self._right[self.benchmark.seen[position]].append(bool(k == position))
        without = int((guess[pairs.segments] < 0).sum()) + (self.left_out.segments_without_a_token or 0)
        self.left_out = LeftOut(
            crowd_segments=self.left_out.crowd_segments + len(sample.segments) - len(pairs.segments),
            segments_without_a_query=self.left_out.segments_without_a_query + int((pairs.query < 0).sum()),
            segments_without_a_token=without or None,
        )
        self.images += 1
        return maps

    def _update_with_teacher(
        self, gt: GroundTruth, output: Output, pairs: Pairs, own: Mapping[str, Tensor], found: MaskTokens
    ) -> None:
        log_t = found.log_scores(self.classes.text)
        for name, row in self.teacher_rows.items():
            logits, thresholds = row.logits(own, found, log_t, self.classes.seen), self.teacher_thresholds[name]
            self.rows[name].predict(gt, output, logits, self.classes, thresholds)
            if self.benchmark.task == "panoptic":
                self.waterfalls[name].update(gt, output, pairs, logits, self.classes, thresholds)
        if self.benchmark.task == "panoptic" and self.images < self.config.sweep_images:
            for sweep in self.teacher_sweeps.values():
                sweep.update(gt, output, own, found, self.classes)

    def report(self, teacher: Mapping[str, Any], beyond: Sequence[Beyond] = ()) -> Report:
        """The report of the images so far; `teacher`: name and pretrained weights of the frozen CLIP; `beyond`: what the
        training had that the paper's has not."""
        rows = {name: row.scores() for name, row in self.rows.items()}
        warnings = marks(teacher, self.benchmark)
        settings: dict[str, Any] = {
            "seen_offset": 0.0,
            "control_offset": self.config.control_offset,
            "alpha": self.config.alpha,
            "beta": self.config.beta,
            "images": self.images,
            "teacher": f"{teacher['name']} / {teacher['pretrained']}",
        }
        panoptic = self.benchmark.task == "panoptic"
        if panoptic:
            stored = self.models["inductive"].meta.thresholds
            settings |= {
                "object_threshold": stored.object_threshold,
                "object_threshold_chosen_on": "seen classes of training images",
                "overlap_threshold": stored.overlap_threshold,
            }
            settings |= {
                f"object_threshold_{name}": thresholds.object_threshold
                for name, thresholds in self.teacher_thresholds.items()
            }
        return Report(
            benchmark=self.benchmark.name,
            marks=[*outlines(beyond), *warnings],
            rows=rows,
            losses=self._losses() if panoptic else None,
            sweeps=self._swept() if panoptic else None,
            left_out=self.left_out,
            teacher_accuracy=TeacherAccuracy(
                instances=sum(map(len, self._right.values())),
                **{
                    name: 100 * sum(self._right[flag]) / max(len(self._right[flag]), 1)
                    for name, flag in (("seen", True), ("unseen", False))
                },
            ),
            published=beside_the_paper(self.benchmark.name, rows, images=self.images, marks=warnings, beyond=beyond),
            settings=Settings(**settings),
        )

    def _losses(self) -> dict[str, Losses]:
        quality = {name: row.quality.result() for name, row in self.rows.items() if row.quality is not None}
        return {
            name: waterfall.result(true_classes=quality["true_classes"], actual=quality[name])
            for name, waterfall in self.waterfalls.items()
        }

    def _swept(self) -> SweepReport:
        counted = min(self.images, self.config.sweep_images)
        curves = {name: sweeps.curves() for name, sweeps in self.sweeps.items()}
        with_teacher: dict[str, Any] = {name: sweep.curves() for name, sweep in self.teacher_sweeps.items()}
        return SweepReport(images=counted, of=self.images, **curves, **with_teacher)
