"""A small world for the tests of evaluation: four classes, two of them unseen, and an image of five segments."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.data.benchmarks import Benchmark, Category
from pipeline.inference.maps import Output, Thresholds, classes_of
from pipeline.teacher.text_bank import ClassList
from storage.shards import Sample, Segment, decode_ids, encode_ids

HEIGHT, WIDTH = 24, 40
BENCHMARK = Benchmark(
    name="four",
    categories=(
        Category(id=7, name="cat", isthing=True),
        Category(id=3, name="dog", isthing=True),
        Category(id=20, name="sky", isthing=False),
        Category(id=5, name="sea", isthing=False),
    ),
    unseen_ids=(3, 20),
    protocol="image-filter",
)
THRESHOLDS = Thresholds(object_threshold=0.3, overlap_threshold=0.8)
LISTED = ClassList(
    text="",
    ids=[c.id for c in BENCHMARK.categories],
    names=BENCHMARK.names,
    isthing=[c.isthing for c in BENCHMARK.categories],
    seen=BENCHMARK.seen,
    teacher={},
    clean_names=False,
)
CLASSES = classes_of(torch.eye(4), LISTED, torch.device("cpu"))


def sample(ids: np.ndarray, categories: dict[int, int], crowds: set[int] | None = None) -> Sample:
    segments = tuple(
        Segment(id=i, category_id=c, area=int((ids == i).sum()), iscrowd=i in (crowds or set()))
        for i, c in categories.items()
    )
    return Sample(image_id=1, image=b"", png=encode_ids(ids), height=HEIGHT, width=WIDTH, segments=segments)


def quarters(*, crowds: set[int] | None = None) -> Sample:
    """Two cats (240 pixels each) over a dog (240) and sky and sea (120 each)."""
    ids = np.zeros((HEIGHT, WIDTH), np.int32)
    ids[:12, :20], ids[:12, 20:], ids[12:, :20], ids[12:, 20:30], ids[12:, 30:] = 101, 102, 103, 104, 105
    return sample(ids, {101: 7, 102: 7, 103: 3, 104: 20, 105: 5}, crowds)


def perfect(shown: Sample, *, spare: int = 3) -> tuple[Output, Tensor]:
    """One query a segment that is certain of its mask and class, and some that see nothing."""
    ids = torch.from_numpy(decode_ids(shown))
    masks = torch.full((len(shown.segments) + spare, *ids.shape), -20.0)
    logits = torch.full((len(masks), len(BENCHMARK.categories)), -20.0)
    for query, segment in enumerate(shown.segments):
        masks[query][ids == segment.id] = 20.0
        logits[query, BENCHMARK.index[segment.category_id]] = 20.0
    size = (HEIGHT, WIDTH)
    return Output(
        features=torch.zeros(len(masks), 2), masks=masks, padded_size=size, image_size=size, original_size=size
    ), logits
