"""Stage "queries": the frozen segmenter's queries of every training image, cached; stages 2 and 3 read no image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.runtime import Runtime
from pipeline.training.config import QueriesConfig
from storage.keys import Recipe, Ref
from storage.store import Build

if TYPE_CHECKING:
    from pipeline.inference.model import Model
    from pipeline.teacher.text_bank import TextBank
    from pipeline.training.distributed import Ranks
    from pipeline.training.loader import TrainingData

STAGE, VERSION = "queries", 3


def recipe(config: QueriesConfig, *, shards: Ref, tokens: Ref, text: Ref, checkpoint: Ref) -> Recipe:
    return Recipe(
        kind="queries",
        stage=STAGE,
        version=VERSION,
        config=config,
        inputs={"shards": shards, "tokens": tokens, "text": text, "checkpoint": checkpoint},
    )


def build(build: Build, config: QueriesConfig, runtime: Runtime) -> None:
    """Write one group of queries per training tar, matched as in training, on `runtime.devices` devices; existing
    groups are kept."""
    from pipeline.training.distributed import launch
    from storage.queries import check_queries, query_files, read_queries
    from storage.shards import Shards

    shards, tokens, text, checkpoint = (build.open(name).path for name in ("shards", "tokens", "text", "checkpoint"))
    groups = [(tar, _group(build.path, path)) for tar, path in enumerate(Shards(shards).tars("train"))]
    missing = [tar for tar, group in groups if not build.holds(group, check_queries)]
    key = build.recipe.inputs["text"].key
    if missing:
        launch(write_groups, config, shards, tokens, text, key, checkpoint, build.path, missing, runtime=runtime)
    for _, group in groups:
        build.add(*query_files(group))
    views, queries = read_queries([group for _, group in groups]).segment.shape
    build.provenance |= {"device": str(runtime.torch_device()), "devices": runtime.devices}
    build.counts |= {"images": views // config.views, "views": views, "queries_a_view": queries}


def _group(folder: Path, tar: Path) -> Path:
    return folder / f"{tar.stem}.zarr"


def write_groups(
    ranks: Ranks,
    runtime: Runtime,
    config: QueriesConfig,
    shards: Path,
    tokens: Path,
    text: Path,
    text_key: str,
    checkpoint: Path,
    folder: Path,
    tars: Sequence[int],
) -> None:
    """The work of each process: every `ranks.world`-th of the tars, its group in `folder`.

    On a GPU a tar's images are sorted by size, so that batches are full. On a CPU, where the seconds of an image hardly
    depend on the batch, but the last bits of its result do, neighbours share a batch.
    """
    from pipeline.inference.model import load_model, require_same_classes
    from pipeline.teacher.text_bank import open_text
    from pipeline.training.loader import TrainingData

    bank = open_text(text, text_key)
    device = runtime.torch_device()
    model = load_model(checkpoint, device)
    require_same_classes(model.meta.classes, bank)
    data = TrainingData(shards, tokens, bank, model.meta.augment, seed=config.seed, workers=runtime.workers)
    own = tars[ranks.rank :: ranks.world]
    with runtime.bar(sum(len(data.kept[tar]) for tar in own) * config.views, "queries", "view") as bar:
        for tar in own:
            window = 1 if device.type == "cpu" else max(len(data.kept[tar]), 1)
            _write_group(_group(folder, data.tars[tar]), tar, data, model, bank, config, window=window)
            bar.update(len(data.kept[tar]) * config.views)


def _write_group(
    path: Path,
    tar: int,
    data: TrainingData,
    model: Model,
    bank: TextBank,
    config: QueriesConfig,
    *,
    window: int,
) -> None:
    """Run the frozen segmenter on every view of one tar's images, and write queries and the matching sigma^ (Eq. 1).

    Neighbours of one size share a batch, after every `window` images were sorted by it.
    """
    import numpy as np
    import torch

    from models.matcher import match
    from pipeline.training.criteria import seen_rows
    from pipeline.training.loader import collate
    from pipeline.training.loop import image_generator
    from storage.inputs import vouch
    from storage.queries import write_queries

    device = next(model.projector.parameters()).device
    text, seen_row = seen_rows(bank, device)
    images, (queries, dim) = len(data.kept[tar]), model.query_shape
    views = config.views * images
    feature = np.zeros((views, queries, dim), np.float16)
    segment, category = (np.full((views, queries), -1) for _ in range(2))
    image_id, view_of = np.zeros(views, np.int64), np.repeat(np.arange(config.views), images)
    for view in range(config.views):
        for group in data.items(
            tar, view=view, resize=model.meta.resize, most=config.batch, device=device, window=window
        ):
            items = [item for _, item in group]
            batch = collate(items).to(device)
            with torch.no_grad():
                output = model.segmenter(batch.images, dense=False)
                logits = model.logits(output.features[-1:], text)
            assigned = match(
                logits,
                output.masks[-1:],
                [seen_row[item.labels] for item in items],
                batch.masks,
                generators=[image_generator(config.seed, view, i) for i in batch.image_ids],
                **model.meta.matching,
            )[0]
            rows = [view * images + place for place, _ in group]
            feature[rows] = output.features[-1].half().cpu().numpy()
            for row, item, found in zip(rows, items, assigned, strict=True):
                matched = found >= 0
                segment[row, matched.numpy()] = item.segments[found[matched]].numpy()
                category[row, matched.numpy()] = item.labels[found[matched]].numpy()
                image_id[row] = item.image_id
    vouch(path.parent)
    write_queries(path, feature=feature, segment=segment, category=category, image_id=image_id, view=view_of)
