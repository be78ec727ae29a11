"""Stage "queries": the frozen segmenter's queries of every training image, cached; stages 2 and 3 read no image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.runtime import Runtime
from pipeline.training.config import QueriesConfig
from storage.keys import Recipe, Ref
from storage.store import Build

if TYPE_CHECKING:
    from pipeline.inference.model import Model
    from pipeline.teacher.text_bank import TextBank
    from pipeline.training.loader import Item, TrainingData

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
    """Write one group of queries per training tar, matched as in training; existing groups are kept."""
    from pipeline.inference.model import load_model, require_same_classes
    from pipeline.teacher.text_bank import open_text
    from pipeline.training.loader import TrainingData
    from storage.queries import check_queries, query_files

    text = build.open("text")
    bank = open_text(text.path, text.ref.key)
    model = load_model(build.open("checkpoint").path, runtime.torch_device())
    require_same_classes(model.meta.classes, bank)
    data = TrainingData(
        build.open("shards").path,
        build.open("tokens").path,
        bank,
        model.meta.augment,
        seed=config.seed,
        workers=runtime.workers,
    )
    with runtime.bar(len(data) * config.views, "queries", "view") as bar:
        for number, tar in enumerate(data.tars):
            group = build.path / f"{tar.stem}.zarr"
            if not build.holds(group, check_queries):
                _write_group(group, number, data, model, bank, config)
            build.add(*query_files(group))
            bar.update(len(data.kept[number]) * config.views)
    build.provenance["device"] = str(runtime.torch_device())
    build.counts |= {"images": len(data), "views": len(data) * config.views, "queries_a_view": model.query_shape[0]}


def _write_group(path: Path, tar: int, data: TrainingData, model: Model, bank: TextBank, config: QueriesConfig) -> None:
    """Run the frozen segmenter on every view of one tar's images, and write queries and the matching sigma^ (Eq. 1)."""
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
    columns: dict[str, list[np.ndarray]] = {"feature": [], "segment": [], "category": [], "image_id": [], "view": []}
    resize = model.meta.resize
    for view in range(config.views):
        for items in group_by_size(data.items(tar, view=view, resize=resize), config.batch):
            batch = collate(items).to(device)
            with torch.no_grad():
                output = model.segmenter(batch.images, dense=False)
                logits = model.logits(output.features[-1:], text)
            assigned = match(
                logits,
                output.masks[-1:],
                [seen_row[label] for label in batch.labels],
                batch.masks,
                generators=[image_generator(config.seed, view, i) for i in batch.image_ids],
                **model.meta.matching,
            )[0].cpu()
            for i, item in enumerate(items):
                found = assigned[i] >= 0
                segment, category = torch.full_like(assigned[i], -1), torch.full_like(assigned[i], -1)
                segment[found] = item.segments[assigned[i][found]]
                category[found] = item.labels[assigned[i][found]]
                columns["feature"].append(output.features[-1, i].half().cpu().numpy())
                columns["segment"].append(segment.numpy())
                columns["category"].append(category.numpy())
                columns["image_id"].append(np.array(item.image_id))
                columns["view"].append(np.array(view))
    queries, dim = model.query_shape
    # The shapes for a tar without any image that the protocol leaves.
    empty = {
        "feature": (0, queries, dim),
        "segment": (0, queries),
        "category": (0, queries),
        "image_id": (0,),
        "view": (0,),
    }
    vouch(path.parent)
    write_queries(path, **{name: np.stack(rows) if rows else np.zeros(empty[name]) for name, rows in columns.items()})


def group_by_size(items: Iterator[Item], most: int) -> Iterator[list[Item]]:
    """Groups of at most `most` consecutive items whose images have one shape."""
    group: list[Item] = []
    for item in items:
        if group and (len(group) == most or group[0].image.shape != item.image.shape):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
