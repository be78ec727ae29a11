"""Zero-shot semantic segmentation, the whole line on label maps with pixel-ignore: what training uses, what is
scored."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from label_factory import NAMES, UNLABELLED, UNSEEN, make_stuff, save_labels, write_stuff_benchmark
from PIL import Image
from tiny import QUIET, build

from flows.presets import preset
from pipeline.data.benchmarks import Benchmark, load_benchmark
from pipeline.data.config import AugmentConfig, CocoConfig, ResizeConfig
from pipeline.inference.forward import outputs
from pipeline.inference.maps import classes_of, semantic_map
from pipeline.inference.model import load_model
from pipeline.inference.vocabulary import vocabulary_of
from pipeline.line import Config
from pipeline.report.view import PREDICTIONS, write_view
from pipeline.report.write import console_table
from pipeline.scoring import evaluate_checkpoint
from pipeline.scoring.metrics import ConfusionMatrix, class_map, semantic_scores
from pipeline.scoring.records import ROWS, read_report
from pipeline.scoring.rows import GroundTruth, Row
from pipeline.teacher.encode import shown_in_training
from pipeline.teacher.text_bank import open_text
from pipeline.training.loader import TrainingData
from storage.keys import Ref
from storage.shards import Sample, Segment, Shards, decode_image, read_shard
from storage.store import Store
from storage.tokens import read_tokens

pytestmark = pytest.mark.slow  # whole runs


@dataclass(frozen=True)
class Run:
    """A finished tiny run on label maps."""

    data: Path
    benchmark: Benchmark
    store: Store
    refs: dict[str, Ref]

    def folder(self, stage: str) -> Path:
        return self.store.path(self.refs[stage])

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder("evaluate") / "report.json").read_text())


def config(data: Path, benchmark: Path) -> Config:
    sample = preset("coco-sample")
    return replace(
        sample,
        data=CocoConfig(root=str(data), benchmark=str(benchmark)),
        shard=replace(sample.shard, samples_per_tar=5),
        v2c=replace(
            sample.v2c, steps=4, points=64, bank=8, calibration_images=4,
            augment=AugmentConfig(size=64, jitter=(0.7, 1.3)), resize=ResizeConfig(short=64, longest=96),
        ),
        queries=replace(sample.queries, views=2),
        g2s=replace(sample.g2s, steps=4, hidden=32),
        cpa=replace(sample.cpa, steps=4),
        evaluate=replace(sample.evaluate, pictures=2),
    )  # fmt: skip


def run_line(data: Path, *, until: str = "evaluate") -> Run:
    file = data.parent / "tiny.json"
    store = Store(data.parent / "store")
    steps = build(store, config(data, write_stuff_benchmark(file)), until=until)
    refs = {stage: step.recipe.ref for stage, step in steps.items()}
    return Run(data=data, benchmark=load_benchmark(str(file)), store=store, refs=refs)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_line(make_stuff(tmp_path_factory.mktemp("run") / "data", train=12, val=5))


# ------------------------------------------------------------------------------------------------ what training sees


def swapped(values: np.ndarray) -> np.ndarray:
    """Every unseen pixel is of the other unseen class."""
    one, other = UNSEEN
    return np.where(values == one, other, np.where(values == other, one, values))


def merged(values: np.ndarray) -> np.ndarray:
    return np.where(np.isin(values, UNSEEN), UNSEEN[0], values)


def blanked(values: np.ndarray) -> np.ndarray:
    """The protocol word by word: "pixels of an unseen category become 255 (ignored)"."""
    return np.where(np.isin(values, UNSEEN), UNLABELLED, values)


@pytest.mark.parametrize("change", [swapped, merged, blanked])
def test_no_weight_depends_on_the_labels_of_unseen_pixels(
    run: Run, tmp_path: Path, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Other labels on the unseen pixels of the training maps, or none: all three stages end in the same bytes."""
    data = tmp_path / "data"
    shutil.copytree(run.data, data)
    for path in (data / "stuffthingmaps" / "train2017").iterdir():
        save_labels(path, change(np.array(Image.open(path))).astype(np.uint8))
    other = run_line(data, until="cpa")
    assert other.refs["shard"] != run.refs["shard"]
    for tar in Shards(run.folder("shard")).tars("train"):
        assert tar.read_bytes() != (other.folder("shard") / tar.name).read_bytes()
        ours, theirs = (read_tokens(r.folder("cache-clip") / f"{tar.stem}.zarr").arrays() for r in (run, other))
        for name, array in ours.items():
            assert array.tobytes() == theirs[name].tobytes(), name
    for stage in ("v2c", "g2s", "cpa"):
        weights = [(r.folder(stage) / "weights.safetensors").read_bytes() for r in (run, other)]
        assert weights[0] == weights[1], stage
    facts = [load_model(r.folder("v2c")).meta.object_threshold for r in (run, other)]
    assert facts[0] == facts[1]


def test_a_seen_label_does_change_the_weights(run: Run, tmp_path: Path) -> None:
    """So the test above can fail."""
    data = tmp_path / "data"
    shutil.copytree(run.data, data)
    for path in (data / "stuffthingmaps" / "train2017").iterdir():
        values = np.array(Image.open(path))
        save_labels(path, np.where(values == 0, 3, values).astype(np.uint8))
    other = run_line(data, until="v2c")
    assert (run.folder("v2c") / "weights.safetensors").read_bytes() != (
        other.folder("v2c") / "weights.safetensors"
    ).read_bytes()


def test_every_image_stays_and_only_seen_segments_have_tokens(run: Run) -> None:
    seen = {category for category in NAMES if category not in UNSEEN}
    some_unseen = 0
    for split in ("train", "val"):
        for tar in Shards(run.folder("shard")).tars(split):
            group = read_tokens(run.folder("cache-clip") / f"{tar.stem}.zarr")
            assert group.kept.all()
            for row, sample in enumerate(read_shard(tar)):
                every = [s.id for s in sample.segments]
                allowed = [s.id for s in sample.segments if s.category_id in seen or split == "val"]
                some_unseen += split == "train" and allowed != every
                assert group.segment_id[group.rows(row)].tolist() == allowed
    assert some_unseen > 3


def test_targets_are_the_seen_classes_with_tokens_of_their_own(run: Run) -> None:
    """A target's token is the teacher's token of that very region; pixels of unseen classes are in no mask."""
    from pipeline.runtime import Runtime

    bank = open_text(run.folder("text"), run.refs["text"].key)
    augment = AugmentConfig(size=64, jitter=(1.0, 1.0))
    source = TrainingData(run.folder("shard"), run.folder("cache-clip"), bank, augment, seed=0, workers=1)
    teacher = preset("coco-sample").teacher.load(Runtime(device="cpu"))
    samples = {s.image_id: s for tar in source.tars for s in read_shard(tar)}
    assert len(source) == len(samples) == 12
    for ((_, item),) in source.items(0, view=0, resize=ResizeConfig(short=64, longest=96), most=1):
        values = np.array(Image.open(run.data / "stuffthingmaps" / "train2017" / f"{item.image_id:012d}.png"))
        shown = sorted({*values.ravel().tolist()} - {UNLABELLED, *UNSEEN})
        assert [bank.ids[label] for label in item.labels] == shown
        sample = samples[item.image_id]
        assert [sample.segments[i].category_id for i in item.segments] == shown
        prepared = teacher.prepare(torch.from_numpy(decode_image(sample)).permute(2, 0, 1))
        for value, token in zip(shown, item.instance_tokens, strict=True):
            fresh = teacher.encode_images(teacher.mask(prepared, torch.from_numpy(values == value)[None]))[0]
            assert torch.cosine_similarity(token, fresh, dim=0) > 0.999
        share = np.isin(values, shown).mean()
        scale = item.masks.any(0).sum().item() / (values.size * (64 / min(values.shape)) ** 2)
        assert item.masks.sum(0).max() <= 1 and scale == pytest.approx(share, abs=0.04)


def test_what_is_shown_in_training() -> None:
    parts = tuple(Segment(id=i + 1, category_id=i, area=1, iscrowd=False) for i in (0, 7, 20, 24))
    sample = Sample(image_id=1, image=b"", png=b"", height=2, width=2, segments=parts)
    categories = load_benchmark("coco-stuff-zss").categories
    protocols: list[tuple[Any, list[int]]] = [
        ("pixel-ignore", [0, 24]), ("image-filter", [0, 7, 20, 24]), ("none", [0, 7, 20, 24]),
    ]  # fmt: skip
    for protocol, left in protocols:
        benchmark = Benchmark(name="x", categories=categories, unseen_ids=(7, 20), protocol=protocol)
        assert [s.category_id for s in shown_in_training(sample, benchmark).segments] == left


# ------------------------------------------------------------------------------------------------ what is scored


def test_the_report_holds_ious_and_nothing_panoptic(run: Run) -> None:
    report = run.report
    for name in ROWS:
        row = report[name]
        assert {"mIoU", "sIoU", "uIoU", "hIoU", "accuracy"} < row.keys() and "PQ" not in row
        assert [(c["id"], c["seen"]) for c in row["per_class"]] == [(value, value not in UNSEEN) for value in NAMES]
    assert not {"losses", "sweeps"} & report.keys()
    assert not {"object_threshold", "overlap_threshold"} & report["settings"].keys()
    assert run.store.open(run.refs["evaluate"]).manifest.counts["transductive"].keys() == {"sIoU", "uIoU", "hIoU"}
    with (run.folder("evaluate") / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["id"]) for row in rows] == list(NAMES)
    assert {"inductive_IoU", "inductive_pixels"} < rows[0].keys() and not [name for name in rows[0] if "PQ" in name]
    page = (run.folder("evaluate") / "report.html").read_text()
    text = re.sub(r"data:image/[^\"]*", "", page.split("</style>")[1].split("<script>")[0])
    assert "hIoU" in text and "PQ" not in text
    assert page.count("<div class=pictures>") == 2
    record = read_report(run.folder("evaluate") / "report.json")
    assert [column.header for column in console_table(record).columns] == ["percent", "sIoU", "uIoU", "hIoU"]


@pytest.mark.parametrize(
    ("stage", "offset", "row"), [("v2c", 0.0, "inductive"), ("cpa", 0.0, "transductive"), ("v2c", 0.1, "control")]
)
def test_a_checkpoint_on_the_runs_own_maps_gives_the_reports_numbers(
    run: Run, stage: str, offset: float, row: str
) -> None:
    """`zs-seg evaluate` reads the maps themselves, the report their segments in the shards."""
    result = evaluate_checkpoint.run(
        checkpoint=str(run.folder(stage)), benchmark=str(run.data.parent / "tiny.json"), data=str(run.data),
        split="val", seen_offset=offset, with_teacher=False, alpha=0.4, beta=0.8, object_threshold=None, match_names=False, out="", teacher_weights="", store=run.store, runtime=QUIET,
    )  # fmt: skip
    assert {**result["scores"], "per_class": result["per_class"]} == run.report[row]
    assert vocabulary_of(load_model(run.folder(stage)), run.benchmark, "", QUIET).benchmark.unseen_ids == UNSEEN


def test_the_teachers_names_on_true_masks_by_hand(run: Run) -> None:
    bank = open_text(run.folder("text"), run.refs["text"].key)
    confusion = ConfusionMatrix(len(NAMES))
    for tar in Shards(run.folder("shard")).tars("val"):
        group = read_tokens(run.folder("cache-clip") / f"{tar.stem}.zarr")
        for row, sample in enumerate(read_shard(tar)):
            values = np.array(Image.open(run.data / "stuffthingmaps" / "val2017" / f"{sample.image_id:012d}.png"))
            truth, guess = np.full(values.shape, -1), np.full(values.shape, -1)
            tokens = torch.from_numpy(group.instance[group.rows(row)]).float()
            for value, token in zip(sorted({*values.ravel().tolist()} - {UNLABELLED}), tokens, strict=True):
                truth[values == value] = run.benchmark.index[value]
                guess[values == value] = int((bank.embedding @ token).argmax())
            confusion.update(truth, guess, image=sample.image_id)
    expected = semantic_scores(confusion, categories=run.benchmark.categories, seen=run.benchmark.seen)
    assert run.report["ceiling"] == asdict(expected) and expected.accuracy > 0


def test_the_map_of_the_pictures_is_the_semantic_map(run: Run) -> None:
    model = load_model(run.folder("cpa"))
    bank = open_text(run.folder("text"), run.refs["text"].key)
    classes = classes_of(bank.embedding, bank.classes(), torch.device("cpu"))
    tagged = [
        (sample, torch.from_numpy(decode_image(sample)).permute(2, 0, 1))
        for tar in Shards(run.folder("shard")).tars("val")
        for sample in read_shard(tar)
    ]
    for sample, output in outputs(model.segmenter, tagged, model.meta.resize, batch=1):
        logits = model.logits(output.features, classes.text)
        ids, segments = Row(run.benchmark).predict(
            GroundTruth(sample, run.benchmark), output, logits, classes, model.meta.thresholds
        )
        named = class_map(ids, segments, run.benchmark.index, image=sample.image_id)
        np.testing.assert_array_equal(named, semantic_map(output, logits, classes))


def test_the_pages_of_all_images_hold_the_maps_that_the_report_scores(run: Run, tmp_path: Path) -> None:
    """Their pixels counted again give the report's IoU of every class; in an image a class is found above an IoU of 0.5."""
    folder = tmp_path / "view"
    write_view(folder, name="stuff", store=run.store, report=run.refs["evaluate"], runtime=QUIET)
    text = (folder / "data.js").read_text()
    data = json.loads(text[text.index("...{") + 3 : text.rindex("});")])
    assert data["task"] == "semantic" and [name for name, _ in data["fates"]] == ["found", "missed"]
    confusion = {name: ConfusionMatrix(len(run.benchmark.categories)) for name in PREDICTIONS}
    for image, *_, truth, spurious in data["images"]:
        text = (folder / "maps" / f"{image:012d}.js").read_text()
        content = json.loads(text[text.index('{"truth"') : text.rindex(");")])
        maps = {}
        for name in ("truth", *PREDICTIONS):
            png = Image.open(io.BytesIO(base64.b64decode(content[name]["png"])))
            places = np.asarray(png).astype(int)[..., 0]
            maps[name] = np.array([-1, *(one["class"] for one in content[name]["segments"])])[places]
        for c, name in enumerate(PREDICTIONS):
            one = ConfusionMatrix(len(run.benchmark.categories))
            for matrix in (one, confusion[name]):
                matrix.update(maps["truth"], maps[name], image=image)
            assert [(k, fates[c] == 0) for k, *fates in truth] == [(k, one.iou[k] > 50) for k, *_ in truth]
            assert set(spurious[c]) == set(np.unique(maps[name]).tolist()) - {k for k, *_ in truth}
    for name, matrix in confusion.items():
        assert matrix.iou.tolist() == [row["IoU"] for row in run.report[name]["per_class"]]
