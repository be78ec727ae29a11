"""The browser over all validation images of a run: one forward pass, kept as static files in a folder of pages.

    index.html, view.css, view.js     the page; opened from the disk or from any server
    data.js                           classes, scores, and of each image its qualities and the fate of its segments
    images/ID.webp, thumbs/ID.webp    the image, and one strip of `PANELS`
    maps/ID.js                        the ids of `MAPS` as PNGs, and their segments
    view.json                         the report that all of it belongs to

A page that was opened from the disk may read no file but by a tag, so data and maps are scripts.
"""

from __future__ import annotations

import base64
import colorsys
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.report.page import SETTINGS
from pipeline.report.pictures import places_png
from pipeline.report.style import COLOURS
from pipeline.scoring.records import CHECKPOINTS, HEADLINE, WITH_TEACHER, Settings, read_report
from storage.atomic import replacing, write_text
from storage.errors import UserError
from storage.keys import Ref

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.benchmarks import Benchmark
    from pipeline.inference.maps import Output, PredictedSegment
    from pipeline.inference.teacher import MaskTokens
    from pipeline.runtime import Runtime
    from pipeline.scoring.metrics import Matches
    from pipeline.scoring.rows import GroundTruth, Map
    from storage.shards import Sample, Segment
    from storage.store import Store

# raised when the meaning of the files changes
VERSION = 2
ABOUT, DATA, INDEX, FILES = "view.json", "data.js", "index.html", ("view.css", "view.js")
# JavaScript: the URL of the script's own folder of pages
BASE = 'document.currentScript.src.replace(/(maps\\/)?[^\\/]*$/, "")'
PREDICTIONS = *CHECKPOINTS, *WITH_TEACHER
MAPS = "truth", *PREDICTIONS
PANELS = "image", *MAPS
SIDE, THUMB, QUALITY = 640, 160, 75  # pixels of a long side, and WebP's quality
FILL = 0.55  # a class colour's share of a segment in a thumb
UNSEEN_EDGE = (194, 24, 91)
# The fates of a true segment: found, or the step of `Waterfall` at which no prediction matches it any more.
FATES = {
    "found": "A predicted segment of its class matches it by IoU > 0.5.",
    "masks": "No mask fits it, even where its query is given the true class.",
    "classification": "Its query prefers another class of the same group, seen or unseen.",
    "bias": "Its query prefers a class of the other group: an unseen segment gets a seen class, or the reverse.",
    "selection": "Its query has the right class, but is dropped by the thresholds or covered by another.",
}
SEMANTIC_FATES = {
    "found": "The class has an IoU above 0.5 in this image.",
    "missed": "The class has an IoU of 0.5 or less in this image.",
}
CROWD = -1
CLOSE = 0.05  # points of percent by which scores computed again may differ without a word

log = logging.getLogger(__name__)


def is_fresh(folder: Path, report: Ref) -> bool:
    """Whether the folder holds the finished pages of this report."""
    try:
        about = json.loads((folder / ABOUT).read_bytes())
        return about["report"] == str(report) and about["version"] == VERSION
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_view(folder: Path, *, name: str, store: Store, report: Ref, runtime: Runtime) -> None:
    """Compute the maps of all validation images of a report and write the pages; `folder` appears whole or not at all.

    Args:
        folder: where to, replacing an older one.
        name: the run's name, shown on the page.
        store: holds the report and what it was made from.
        report: a complete artefact of stage evaluate.
        runtime: where to compute; without `threads` with as many as the report was made with.

    Raises UserError where an input is missing or damaged, or the folder cannot be written.
    """
    manifest = store.require_intact(report)
    numbers = read_report(store.path(report) / "report.json")
    for part in ("text", "mask_tokens", *CHECKPOINTS):
        store.require_intact(Ref.parse(manifest.inputs[part]))
    task = "panoptic" if numbers.losses is not None else "semantic"
    rows = {key: {score: getattr(numbers.rows[key], score) for score in HEADLINE[task]} for key in PREDICTIONS}
    runtime = replace(runtime, threads=runtime.threads or manifest.provenance.get("threads", 0))
    inputs = {part: store.path(Ref.parse(ref)) for part, ref in manifest.inputs.items()}
    content, batch = manifest.config["benchmark"], manifest.config["evaluate"]["batch"]
    classes = sha256(_dumps([content["categories"], content["unseen_ids"]]).encode()).hexdigest()[:16]
    about = {"report": str(report), "version": VERSION, "shards": manifest.inputs["shards"], "classes": classes}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as temporary:
            for part in ("images", "thumbs", "maps"):
                (temporary / part).mkdir(parents=True)
            recorder = _Recorder(_benchmark(content), inputs, runtime, numbers.settings, task=task, batch=batch)
            images = [recorder.write(temporary, *seen) for seen in recorder.images()]
            _compare(rows, recorder.scores())
            data = {
                "run": name, "benchmark": numbers.benchmark, "task": task, "rows": rows,
                "panels": PANELS, "titles": {key: SETTINGS[key].name for key in PREDICTIONS}, "fates": list((FATES if task == "panoptic" else SEMANTIC_FATES).items()), "classes": recorder.class_rows(), "images": images,
            }  # fmt: skip
            write_text(temporary / DATA, f"(window.VIEWS ??= []).push({{base: {BASE}, ...{_dumps(data)}}});\n")
            for file in FILES:
                write_text(temporary / file, (Path(__file__).parent / file).read_text(encoding="utf-8"))
            write_text(temporary / INDEX, page([name], ["."]))
            # last: a folder that has it is complete
            write_text(temporary / ABOUT, _dumps({**about, "images": len(images)}))
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); mend that or run elsewhere") from error


def write_versus(folder: Path, other: Path, *, names: tuple[str, str]) -> Path:
    """A page of two finished folders side by side, in `folder`, which reads the data of both; returns its path.

    Raises UserError where the two were not made of the same images and classes.
    """
    own, theirs = (json.loads((one / ABOUT).read_bytes()) for one in (folder, other))
    if own["shards"] != theirs["shards"] or own["classes"] != theirs["classes"]:
        what = "validation images" if own["shards"] != theirs["shards"] else "classes"
        raise UserError(
            f"runs {names[0]} and {names[1]} have other {what}, so nothing lies side by side; view each alone"
        )
    path = folder / f"versus-{names[1]}.html"
    write_text(path, page(names, [".", quote(os.path.relpath(other, folder))]))
    return path


def page(names: Sequence[str], bases: Sequence[str]) -> str:
    """The page of one run or two; `bases` are the URLs of their folders, as seen from the page's."""
    title = escape(" and ".join(names))
    scripts = "".join(f'<script src="{base}/{DATA}"></script>' for base in bases)
    return (
        f'<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>zs-seg {title}</title><style>{COLOURS}</style><link rel=stylesheet href=view.css></head><body>"
        f"<noscript>This page needs JavaScript.</noscript>{scripts}<script src=view.js></script></body></html>\n"
    )


def fates(segments: Sequence[Segment], levels: Sequence[Matches]) -> list[int]:
    """Of each true segment its number in `FATES`, or `CROWD`; `levels` are the image's matches at the waterfall's steps,
    the last one of the prediction itself."""
    matched = [set(level.pairs[:, 0].tolist()) for level in levels]

    def fate(i: int) -> int:
        return 0 if i in matched[-1] else next(step for step, there in enumerate(matched, 1) if i not in there)

    return [CROWD if segment.iscrowd else fate(i) for i, segment in enumerate(segments)]


class _Recorder:
    """Maps, fates and files of one image after the other; counts what the report counts of them."""

    def __init__(
        self,
        benchmark: Benchmark,
        inputs: Mapping[str, Path],
        runtime: Runtime,
        settings: Settings,
        *,
        task: str,
        batch: int,
    ) -> None:
        from pipeline.inference.maps import classes_of
        from pipeline.inference.model import load_model
        from pipeline.scoring.config import EvaluateConfig
        from pipeline.scoring.metrics import PanopticQuality
        from pipeline.scoring.teacher_rows import teacher_rows
        from pipeline.teacher.text_bank import open_text

        self.benchmark, self.inputs, self.runtime, self.batch = benchmark, inputs, runtime, batch
        self.panoptic = task == "panoptic"
        device = runtime.torch_device()
        bank = open_text(inputs["text"], "")
        self.models = {name: load_model(inputs[name], device) for name in CHECKPOINTS}
        self.classes = classes_of(bank.embedding, bank.classes(), device)
        self.seen = np.array(benchmark.seen)
        self.colours = _colours(len(benchmark.categories))
        self.quality = {name: PanopticQuality([c.id for c in benchmark.categories]) for name in PREDICTIONS}
        self.teacher_rows = teacher_rows(EvaluateConfig(alpha=settings.alpha, beta=settings.beta))
        self.thresholds = {name: model.meta.thresholds for name, model in self.models.items()}
        for name in WITH_TEACHER if self.panoptic else ():
            own = self.thresholds[self.teacher_rows[name].checkpoint]
            self.thresholds[name] = replace(own, object_threshold=getattr(settings, f"object_threshold_{name}"))

    def images(self) -> Iterator[tuple[Sample, Output, MaskTokens]]:
        """Every validation image with the segmenter's output for it, and the teacher's tokens of the masks in it."""
        from models.folding import for_inference
        from pipeline.data.ahead import mapped
        from pipeline.data.transforms import channels_first
        from pipeline.inference.forward import outputs
        from pipeline.scoring.found_masks import validation_masks
        from storage.shards import Shards, decode_image, read_shard

        shards, stage_1 = Shards(self.inputs["shards"]), self.models["inductive"]
        samples = (sample for tar in shards.tars("val") for sample in read_shard(tar))
        workers = self.runtime.decoders
        views = mapped(
            lambda one: (one, channels_first(decode_image(one))), samples, workers=workers, count=4 * workers
        )
        with self.runtime.bar(sum(shards.counts("val")), "drawing pages", "image") as bar:
            every = outputs(for_inference(stage_1.segmenter), views, stage_1.meta.resize, batch=self.batch)
            tokens = validation_masks(shards, self.inputs["mask_tokens"], self.runtime.torch_device())
            for (sample, output), (image, found) in zip(every, tokens, strict=True):
                assert image == sample.image_id, (image, sample.image_id)
                yield sample, output, found
                bar.update()

    def write(self, folder: Path, sample: Sample, output: Output, tokens: MaskTokens) -> list[Any]:
        """Write the files of one image; returns its entry of data.js: [id, width, height, quality of each prediction,
        [class, fate in each prediction] of every true segment, classes of the spurious segments of each prediction]."""
        import torch

        from pipeline.scoring.rows import GroundTruth
        from storage.shards import decode_image

        gt, output = GroundTruth(sample, self.benchmark), output.kept()
        with torch.no_grad():
            logits = self._logits(output, tokens)
            found = self._panoptic(gt, output, logits) if self.panoptic else self._semantic(gt, output, logits)
        index, truth = self.benchmark.index, sample.segments
        maps = {"truth": _places(gt.ids, truth)} | {name: _places(*one.map) for name, one in found.items()}
        classes = {name: [index[s.category_id] for s in one.map[1]] for name, one in found.items()}
        classes["truth"] = [index[s.category_id] for s in truth]
        content: dict[str, Any] = {}
        for name, places in maps.items():
            segments: list[Any] = [{"class": k} for k in classes[name]]
            if name in found:
                found[name].describe(segments)
            png = base64.b64encode(places_png(places, SIDE)).decode()
            content[name] = {"png": png, "segments": segments}
        content["over"] = {name: one.over(maps["truth"], maps[name]) for name, one in found.items()}
        name = f"{sample.image_id:012d}"
        write_text(folder / "maps" / f"{name}.js", f"viewMap({BASE}, {sample.image_id}, {_dumps(content)});\n")
        image = Image.fromarray(decode_image(sample))
        image.resize(_size(image, SIDE)).save(folder / "images" / f"{name}.webp", quality=QUALITY)
        panels = [(maps[part], np.array(classes[part], np.int64)) for part in MAPS]
        self._strip(image, panels).save(folder / "thumbs" / f"{name}.webp", quality=QUALITY)
        fates = [[k, *(one.fates[i] for one in found.values())] for i, k in enumerate(classes["truth"])]
        spurious = [[classes[name][i] for i in one.spurious] for name, one in found.items()]
        quality = [round(one.quality, 2) for one in found.values()]
        return [sample.image_id, sample.width, sample.height, quality, fates, spurious]

    def _logits(self, output: Output, tokens: MaskTokens) -> dict[str, Tensor]:
        """Class logits (Q, K) of every prediction."""
        own = {name: model.logits(output.features, model.text) for name, model in self.models.items()}
        log_t = tokens.log_scores(self.classes.text)
        rows = {name: self.teacher_rows[name] for name in WITH_TEACHER}
        return own | {name: row.logits(own, tokens, log_t, self.classes.seen) for name, row in rows.items()}

    def _panoptic(self, gt: GroundTruth, output: Output, every: Mapping[str, Tensor]) -> dict[str, _Found]:
        from pipeline.inference.maps import panoptic_map
        from pipeline.scoring.waterfall import pair

        pairs = pair(gt, output)
        found: dict[str, _Found] = {}
        for name, logits in every.items():
            thresholds = self.thresholds[name]
            # the steps of `Waterfall`, from the true classes to the prediction itself
            levels = [
                panoptic_map(output, pairs.certain(names, logits), self.classes, thresholds)
                for names in (pairs.classes, *pairs.choices(logits, self.seen))
            ]
            levels.append(panoptic_map(output, logits, self.classes, thresholds))
            quality, segments = self.quality[name], gt.sample.segments
            matches = [quality.match(gt.ids, segments, *level, image=gt.sample.image_id) for level in levels]
            quality.add(matches[-1])
            found[name] = _Found(
                map=levels[-1], fates=fates(segments, matches), spurious=matches[-1].spurious.tolist(), quality=matches[-1].pq,
                iou={(i, j): iou for (i, j), iou in zip(matches[-1].pairs.tolist(), matches[-1].iou.tolist(), strict=True)},
            )  # fmt: skip
        return found

    def _semantic(self, gt: GroundTruth, output: Output, every: Mapping[str, Tensor]) -> dict[str, _Found]:
        from pipeline.inference.maps import PredictedSegment, semantic_map

        truth, found = gt.sample.segments, {}
        position = {self.benchmark.index[segment.category_id]: i for i, segment in enumerate(truth)}
        for name, logits in every.items():
            named = semantic_map(output, logits, self.classes)
            classes, annotated = np.unique(named).tolist(), gt.classes >= 0
            iou: dict[tuple[int, int], float] = {}
            for j, k in enumerate(classes):
                if k in position:
                    mine, true = (named == k) & annotated, gt.classes == k
                    iou[position[k], j] = float((mine & true).sum() / (mine | true).sum())
            of = {i: value for (i, _), value in iou.items()}
            found[name] = _Found(
                map=(named + 1, [PredictedSegment(id=k + 1, category_id=self.benchmark.categories[k].id, score=1.0) for k in classes]),
                fates=[0 if of.get(i, 0.0) > 0.5 else 1 for i in range(len(truth))],
                spurious=[j for j, k in enumerate(classes) if k not in position],
                quality=100 * sum(of.values()) / max(len(truth), 1),
                iou=iou,
            )  # fmt: skip
        return found

    def scores(self) -> dict[str, dict[str, float]]:
        """sPQ and uPQ by prediction, as counted; of a semantic benchmark nothing."""
        if not self.panoptic:
            return {}
        results = {name: quality.result() for name, quality in self.quality.items()}
        return {name: {"sPQ": one.mean(self.seen).pq, "uPQ": one.mean(~self.seen).pq} for name, one in results.items()}

    def class_rows(self) -> list[dict[str, Any]]:
        """The classes in the benchmark's order, as data.js has them."""
        return [
            {
                "name": category.name,
                "seen": bool(seen),
                "thing": category.isthing,
                "colour": "#{:02x}{:02x}{:02x}".format(*colour),
            }
            for category, seen, colour in zip(self.benchmark.categories, self.seen, self.colours.tolist(), strict=True)
        ]

    def _strip(
        self, image: Image.Image, panels: Sequence[tuple[NDArray[np.integer], NDArray[np.int64]]]
    ) -> Image.Image:
        """`PANELS` side by side: the image, and of every map, places (H, W) and the class of each place, the image with
        classes in their colours, unseen ones with an edge."""
        small = image.resize(_size(image, THUMB, grow=True))
        pixels = np.asarray(small, np.float32)
        rows, columns = (
            np.arange(n) * own // n for n, own in zip(pixels.shape[:2], (image.height, image.width), strict=True)
        )
        shown: list[NDArray[Any]] = [pixels]
        for places, classes in panels:
            place = places[np.ix_(rows, columns)]
            colour, unseen = (
                np.vstack([np.full((1, 3), 128), self.colours[classes]]).astype(np.float32),
                np.append(False, ~self.seen[classes]),
            )
            painted = (1 - FILL) * pixels + FILL * colour[place]
            edge = np.zeros(place.shape, bool)
            edge[:-1] |= place[:-1] != place[1:]
            edge[:, :-1] |= place[:, :-1] != place[:, 1:]
            edge[1:] |= place[1:] != place[:-1]
            edge[:, 1:] |= place[:, 1:] != place[:, :-1]
            painted[edge & unseen[place]] = UNSEEN_EDGE
            shown.append(painted)
        return Image.fromarray(np.concatenate(shown, axis=1).round().astype(np.uint8))


@dataclass(frozen=True, kw_only=True)
class _Found:
    """One prediction of an image beside its truth.

    `fates`: of each true segment the number in `FATES`, or `CROWD`. `spurious`: positions of predicted segments.
    `quality`: the image's, in percent. `iou`: of (true, predicted) positions that are matched, in [0, 1].
    """

    map: Map
    fates: list[int]
    spurious: list[int]
    quality: float
    iou: dict[tuple[int, int], float]

    def describe(self, segments: list[dict[str, Any]]) -> None:
        """Adds score, IoU and what is spurious to the entries of the predicted segments."""
        for entry, segment in zip(segments, self.map[1], strict=True):
            entry["score"] = round(segment.score, 3)
        for (_, j), iou in self.iou.items():
            segments[j]["iou"] = round(iou, 3)
        for j in self.spurious:
            segments[j]["spurious"] = True

    def over(self, truth: NDArray[np.integer], places: NDArray[np.integer]) -> list[list[float]]:
        """Of each true segment the predicted one that covers most of it, as its position or -1 for void, and the share
        in [0, 1]; both maps as places (H, W)."""
        count, width = len(self.fates), len(self.map[1]) + 1
        overlap = np.bincount((truth * width + places).ravel(), minlength=(count + 1) * width).reshape(-1, width)[1:]
        most, area = overlap.argmax(1), overlap.sum(1)
        return [[int(j) - 1, round(float(overlap[i, j] / area[i]), 3)] for i, j in enumerate(most)]


def _benchmark(content: Mapping[str, Any]) -> Benchmark:
    """The classes in a report's manifest."""
    from pipeline.data.benchmarks import Benchmark, Category

    categories = tuple(Category(**category) for category in content["categories"])
    return Benchmark(
        name=content["name"],
        categories=categories,
        unseen_ids=tuple(content["unseen_ids"]),
        protocol=content["protocol"],
    )


def _compare(reported: Mapping[str, Mapping[str, float]], counted: Mapping[str, Mapping[str, float]]) -> None:
    """Warn where the maps of this pass do not have the report's scores."""
    for name, scores in counted.items():
        for score, value in scores.items():
            if abs(value - reported[name][score]) > CLOSE:
                log.warning(
                    "view: %s %s of these maps is %.2f, in the report %.2f; another device, or number of threads, rounds "
                    "otherwise", name, score, value, reported[name][score],
                )  # fmt: skip


def _places(ids: NDArray[np.integer], segments: Sequence[Segment | PredictedSegment]) -> NDArray[np.int64]:
    """Of every pixel (H, W) 0 for void, else 1 + the position of its segment."""
    known = np.array([0, *(segment.id for segment in segments)])
    order = np.argsort(known)
    return order[np.searchsorted(known[order], ids)]


def _size(image: Image.Image, side: int, *, grow: bool = False) -> tuple[int, int]:
    """Width and height with a long side of `side` pixels, or, unless it may grow, of the image's own if that is less."""
    scale = side / max(image.size)
    scale = scale if grow else min(scale, 1.0)
    return max(1, round(scale * image.width)), max(1, round(scale * image.height))


def _colours(count: int) -> NDArray[np.uint8]:
    """(count, 3): hues a golden angle apart, in three lightnesses, so that neighbours in the list differ."""
    colours = [colorsys.hls_to_rgb(0.618034 * k % 1, (0.5, 0.62, 0.38)[k % 3], 0.65) for k in range(count)]
    return (255 * np.array(colours)).round().astype(np.uint8)


def _dumps(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), allow_nan=False)
