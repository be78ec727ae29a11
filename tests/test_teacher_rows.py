"""The rows with the teacher at prediction: their thresholds are chosen as stated, and their curves are the prediction
at every exponent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quarters import BENCHMARK, CLASSES, HEIGHT, LISTED, WIDTH, quarters
from torch import Tensor

from models.projector import Projector
from pipeline.data.config import AugmentConfig, ResizeConfig
from pipeline.inference.maps import Output, Thresholds, panoptic_map
from pipeline.inference.model import CheckpointMeta, Model
from pipeline.inference.teacher import MaskTokens, teacher_log_scores, with_teacher
from pipeline.scoring.config import OBJECT_THRESHOLDS, EvaluateConfig
from pipeline.scoring.metrics import PanopticQuality
from pipeline.scoring.records import TEACHER_ROWS, WITH_TEACHER
from pipeline.scoring.rows import GroundTruth, Row
from pipeline.scoring.teacher_rows import TeacherCalibration, TeacherRow, TeacherSweep, teacher_rows
from storage.shards import Sample, decode_ids

CONFIG = EvaluateConfig(alpha=0.3, beta=0.6)
SEEN = CLASSES.seen


def model(seed: int) -> Model:
    """A projector that is a linear map; its segmenter is not used."""
    torch.manual_seed(seed)
    projector = Projector(dim=4, text_dim=4, hidden=1, layers=1)
    with torch.no_grad():
        projector.log_scale.fill_(1.5)
        projector.bias.fill_(-4.0)
        cast(Any, projector.mlp[0]).weight.copy_(torch.eye(4) + 0.3 * torch.randn(4, 4))
    meta = CheckpointMeta(
        architecture={"segmenter": {}, "projector": {}}, stage="v2c", classes=LISTED, templates=[],
        resize=ResizeConfig(), augment=AugmentConfig(), matching={}, overlap_threshold=0.6, object_threshold=0.35,
    )  # fmt: skip
    return Model(segmenter=cast(Any, None), projector=projector.requires_grad_(False), text=torch.eye(4), meta=meta)


MODELS = {"inductive": model(0), "transductive": model(1)}


def images(count: int) -> list[tuple[Sample, Output, MaskTokens]]:
    """The same truth under queries that wander, with features and tokens near their class."""
    found, rng = [], torch.Generator().manual_seed(5)
    for number in range(count):
        shown, size = quarters(crowds={102} if number == 1 else None), (HEIGHT, WIDTH)
        ids = decode_ids(shown)
        segments = (*shown.segments, *shown.segments[:2])
        shifts = torch.randint(-3, 4, (len(segments), 2), generator=rng).tolist()
        masks = [np.roll(np.where(ids == s.id, 3.0, -3.0), by, (0, 1)) for s, by in zip(segments, shifts, strict=True)]
        true = F.one_hot(torch.tensor([BENCHMARK.index[s.category_id] for s in segments]), 4)
        # two queries over nothing in particular, whose scores are low
        masks += [np.where(np.roll(ids, (8, 13), (0, 1)) == s.id, 3.0, -3.0) for s in segments[:2]]
        features = torch.cat([true, torch.full((2, 4), 0.4)]) + 0.5 * torch.randn(len(masks), 4, generator=rng)
        output = Output(
            features=features,
            masks=torch.from_numpy(np.stack(masks)).float(), padded_size=size, image_size=size, original_size=size,
        )  # fmt: skip
        queries = torch.tensor([0, 1, 2, 4, 5, 7])
        tokens = F.normalize(features[queries] + 0.5 * torch.randn(6, 4, generator=rng), dim=1)
        found.append((shown, output, MaskTokens(queries=queries, tokens=tokens, scale=6.0)))
    return found


def own(output: Output) -> dict[str, Tensor]:
    return {name: one.logits(output.features, one.text) for name, one in MODELS.items()}


def test_the_rows() -> None:
    rows = teacher_rows(CONFIG)
    assert tuple(rows) == TEACHER_ROWS and [rows[name].checkpoint for name in WITH_TEACHER] == list(MODELS)
    assert {(row.alpha, row.beta) for row in (rows["inductive_teacher"], rows["transductive_teacher"])} == {(0.3, 0.6)}
    assert rows["teacher"] == TeacherRow(checkpoint="inductive", alpha=1.0, beta=1.0)


@pytest.mark.parametrize("slack", [0.0, 4.0])
def test_thresholds_are_chosen_among_seen_classes(slack: float) -> None:
    """By loops over images and thresholds: seen classes alone are predicted, and t is the softmax over them; segments of
    unseen classes are void."""
    shown, rows = images(12), teacher_rows(CONFIG)
    calibration = TeacherCalibration(rows, MODELS, CLASSES, slack=slack)
    for sample, output, found in shown:
        calibration.update(sample, output, found)
    chosen, seen, expected = calibration.thresholds(), CLASSES.only(SEEN), {}
    for name, row in rows.items():
        found_pq = {}
        for threshold in OBJECT_THRESHOLDS:
            quality = PanopticQuality([5, 7])
            for sample, output, found in shown:
                logits = own(output)[row.checkpoint][:, SEEN]
                q = with_teacher(
                    logits, found.queries, teacher_log_scores(found.tokens, seen.text, 6.0), seen.seen,
                    alpha=row.alpha, beta=row.beta,
                )  # fmt: skip
                segments = [s for s in sample.segments if s.category_id in (5, 7)]
                truth = np.where(np.isin(decode_ids(sample), [s.id for s in segments]), decode_ids(sample), 0)
                guess = panoptic_map(output, q, seen, Thresholds(object_threshold=threshold, overlap_threshold=0.6))
                quality.update(truth, segments, *guess, image=1)
            found_pq[threshold] = quality.result().mean().pq
        expected[name] = min(t for t, pq in found_pq.items() if pq >= max(found_pq.values()) - slack)
        assert len(set(found_pq.values())) > (1 if name == "teacher" else 3)
    assert {name: thresholds.object_threshold for name, thresholds in chosen.items()} == expected
    assert slack or max(expected.values()) > min(OBJECT_THRESHOLDS)
    assert all(thresholds.overlap_threshold == 0.6 for thresholds in chosen.values())


def test_curves_are_the_prediction_at_every_exponent() -> None:
    shown, thresholds = images(6), Thresholds(object_threshold=0.2, overlap_threshold=0.6)
    row = teacher_rows(CONFIG)["transductive_teacher"]
    sweep = TeacherSweep(BENCHMARK, row, thresholds, exponents=(0.0, 0.5, 1.0))
    for sample, output, found in shown:
        sweep.update(GroundTruth(sample, BENCHMARK), output, own(output), found, CLASSES)
    curves = sweep.curves()
    assert [p.value for p in curves.alpha] == [0.0, 0.3, 0.5, 1.0] and [p.value for p in curves.beta] == [
        0.0, 0.5, 0.6, 1.0,
    ]  # fmt: skip

    def at(**change: float) -> Row:
        counted, here = Row(BENCHMARK), replace(row, **change)
        for sample, output, found in shown:
            log_t = teacher_log_scores(found.tokens, CLASSES.text, 6.0)
            q = with_teacher(own(output)["transductive"], found.queries, log_t, SEEN, alpha=here.alpha, beta=here.beta)
            counted.predict(GroundTruth(sample, BENCHMARK), output, q, CLASSES, thresholds)
        return counted

    points = {("alpha", p.value): p for p in curves.alpha} | {("beta", p.value): p for p in curves.beta}
    for (name, value), point in points.items():
        scores = cast(Any, at(**{name: value}).scores())
        assert (point.sPQ, point.uPQ, point.hPQ) == (scores.sPQ, scores.uPQ, scores.hPQ)
    assert replace(points["alpha", 0.3], value=0) == replace(points["beta", 0.6], value=0)
    assert len({point.hPQ for point in points.values()}) > 3


def test_a_linear_classifier_knows_its_classes_by_their_places() -> None:
    """Its text is the identity over all classes, so the seen ones are columns of its logits."""
    linear = model(0)
    cut = replace(linear, meta=replace(linear.meta, architecture={"segmenter": {}, "projector": {"classes": 4}}))
    rows, (sample, output, found) = teacher_rows(CONFIG), images(1)[0]
    both = {"inductive": cut, "transductive": cut}
    calibration = TeacherCalibration(rows, both, CLASSES, slack=0.0)
    calibration.update(sample, output, found)
    assert torch.equal(calibration._logits("inductive", output), own(output)["inductive"][:, SEEN])
    assert calibration.thresholds().keys() == rows.keys()
