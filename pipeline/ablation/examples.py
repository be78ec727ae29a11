"""The paper's figure 5: validation images with an unseen class, the ground truth, and checkpoints' predictions."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from PIL import Image

from models.folding import for_inference
from pipeline.data.benchmarks import Benchmark
from pipeline.data.samples import samples_with_tokens
from pipeline.data.transforms import channels_first
from pipeline.inference.forward import outputs
from pipeline.inference.maps import classes_of, panoptic_map
from pipeline.inference.model import load_model
from pipeline.report.overlay import labels_of, overlay
from pipeline.report.pictures import sheet
from pipeline.runtime import Runtime
from storage.keys import Ref
from storage.shards import Shards, decode_ids, decode_image
from storage.store import Store

SIDE = 480  # pixels, the long side of a picture


def draw_examples(
    path: Path,
    checkpoints: Mapping[str, Ref],
    *,
    store: Store,
    shards: Ref,
    tokens: Ref,
    benchmark: Benchmark,
    count: int,
    runtime: Runtime,
) -> None:
    """A PNG of the first `count` validation images that show an unseen class, one a row: a column for the image, one
    for the ground truth, and one for each checkpoint by its title. Unseen classes have the broad outline of
    `UNSEEN`."""
    device = runtime.torch_device()
    named = {c.id: (c.name, seen) for c, seen in zip(benchmark.categories, benchmark.seen, strict=True)}
    unseen = set(benchmark.unseen_ids)
    samples = (
        sample
        for (sample, _), _ in samples_with_tokens(
            Shards(store.open(shards).path), store.open(tokens).path, workers=runtime.decoders
        )
    )
    chosen = list(islice((s for s in samples if any(x.category_id in unseen for x in s.segments)), count))
    photos = [decode_image(sample) for sample in chosen]
    columns = {
        "image": [Image.fromarray(photo) for photo in photos],
        "ground truth": [
            overlay(photo, decode_ids(sample), labels_of(sample.segments, named), side=SIDE)
            for photo, sample in zip(photos, chosen, strict=True)
        ],
    }
    for title, ref in checkpoints.items():
        model = load_model(store.open(ref).path, device)
        classes = classes_of(model.text, model.meta.classes, device)
        thresholds = model.meta.thresholds
        views = ((photo, channels_first(photo)) for photo in photos)
        columns[title] = []
        for photo, output in outputs(for_inference(model.segmenter), views, model.meta.resize, batch=8):
            logits = model.logits(output.features, classes.text)
            ids, segments = panoptic_map(output, logits, classes, thresholds)
            columns[title].append(overlay(photo, ids, labels_of(segments, named), side=SIDE))
    rows = list(zip(*columns.values(), strict=True))
    sheet(list(columns), rows, side=SIDE).save(path)
