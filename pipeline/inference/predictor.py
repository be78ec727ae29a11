"""One image, any words: masks and query features are computed once an image, and classes are chosen from them as often
as the words or thresholds change.

`zs-seg predict`, the page of `zs-seg app` and the module `zs_seg` stand on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from models.folding import for_inference
from pipeline.data.transforms import channels_first
from pipeline.inference.config import ALPHA, BETA
from pipeline.inference.forward import outputs
from pipeline.inference.maps import Classes, Output, PredictedSegment, Thresholds, classes_of, panoptic_map
from pipeline.inference.model import Model, load_model
from pipeline.inference.teacher import (
    cached_options,
    can_be_chosen,
    logit_scale,
    mask_tokens,
    require_embeddings,
    require_exponents,
    teacher_log_scores,
    with_teacher,
)
from pipeline.inference.vocabulary import Lexicon, Vocabulary
from pipeline.inference.words import Word
from pipeline.runtime import Runtime
from pipeline.teacher.config import TokensConfig
from storage.errors import UserError
from storage.store import Store

SCENE = 192  # pixels; the scenes that the shipped teacher was trained on have a side of 96, none was larger than this


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is computed of an image once: the image (H, W, 3) uint8 RGB, the segmenter's `output` for it, which holds
    4 Q H W bytes of masks, and the teacher's `tokens` (D,) of the queries that were `asked` for and have one."""

    image: NDArray[np.uint8]
    output: Output
    tokens: dict[int, Tensor] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One segment of a prediction: `id` of its pixels in the map, its class, the class's score in [0, 1], whether the
    class is a thing and was seen in training, `area` in pixels, `bbox` as (left, top, width, height)."""

    id: int
    category_id: int
    name: str
    score: float
    isthing: bool
    seen: bool
    area: int
    bbox: tuple[int, int, int, int]

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**vars(self), "bbox": list(self.bbox), "score": round(self.score, 4)}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A panoptic map (H, W) int32, 0 = void, and the segments of all other ids, 1, 2, ..."""

    ids: NDArray[np.int32]
    segments: tuple[Segment, ...]

    @property
    def named(self) -> dict[int, tuple[str, bool]]:
        """Category id -> name, seen, of the classes that are there."""
        return {segment.category_id: (segment.name, segment.seen) for segment in self.segments}


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """The classes to choose from, ready on the device, and how the map is made of them.

    `min_score`: segments with a lower score are taken out of the map, and their pixels become void. The object
    threshold decides before that which queries compete for pixels at all. `exponents`: alpha and beta of the teacher at
    prediction (`pipeline/inference/teacher.py`), None = the network alone.
    """

    vocabulary: Vocabulary
    classes: Classes
    thresholds: Thresholds
    min_score: float = 0.0
    exponents: tuple[float, float] | None = None

    @cached_property
    def by_id(self) -> dict[int, tuple[str, bool, bool]]:
        """Category id -> name, thing, seen."""
        known = self.vocabulary.classes
        return dict(zip(known.ids, zip(known.names, known.isthing, known.seen, strict=True), strict=True))


class Predictor:
    """A checkpoint's network, ready for images and words.

    Args:
        model: in evaluation mode, on the runtime's device; of the checkpoint in `folder`.
        store: where the options of the tokens are found that the checkpoint was trained with.
        teacher_weights: the teacher's weights file, where it was a local one and is needed: for further names, and at
            prediction.
    """

    def __init__(self, model: Model, folder: Path, store: Store, runtime: Runtime, teacher_weights: str = "") -> None:
        self.model, self.folder, self.store = model, folder, store
        self.device = model.text.device
        self.segmenter = for_inference(model.segmenter)
        self.lexicon = Lexicon(model, teacher_weights, runtime)

    @classmethod
    def load(cls, folder: Path, store: Store, runtime: Runtime, teacher_weights: str = "") -> Predictor:
        """Of a checkpoint's folder. Raises UserError when it is damaged."""
        return cls(load_model(folder, runtime.torch_device()), folder, store, runtime, teacher_weights)

    def look(self, image: NDArray[np.uint8]) -> Seen:
        """One pass of the network over an image (H, W, 3) uint8 RGB."""
        view = channels_first(np.ascontiguousarray(image))
        ((_, output),) = outputs(self.segmenter, [(None, view)], self.model.meta.resize, batch=1)
        return Seen(image=image, output=output.kept())

    def chooser(
        self,
        words: Sequence[Word] = (),
        *,
        only: bool = False,
        object_threshold: float | None = None,
        overlap_threshold: float | None = None,
        seen_offset: float = 0.0,
        min_score: float = 0.0,
        with_teacher: bool = False,
        alpha: float = ALPHA,
        beta: float = BETA,
    ) -> Chooser:
        """The checkpoint's classes and `words`, or the words alone (`Lexicon.vocabulary`), and its own thresholds where
        none is given. Raises UserError as `Lexicon.vocabulary`, and for a number out of range."""
        require_exponents(alpha, beta)
        if with_teacher:
            require_embeddings(self.model.meta)
        vocabulary = self.lexicon.vocabulary(words, only=only)
        given = {"object_threshold": object_threshold, "overlap_threshold": overlap_threshold}
        for name, value in {**given, "min_score": min_score}.items():
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} must lie between 0 and 1, not {value:g}")
        if not math.isfinite(seen_offset):
            raise UserError(f"seen_offset must be a finite number, not {seen_offset}")
        chosen = {name: value for name, value in given.items() if value is not None}
        return Chooser(
            vocabulary=vocabulary,
            classes=classes_of(vocabulary.embedding, vocabulary.classes, self.device),
            thresholds=replace(self.model.meta.thresholds, **chosen, seen_offset=seen_offset),
            min_score=min_score,
            exponents=(alpha, beta) if with_teacher else None,
        )

    @torch.no_grad()
    def name(self, seen: Seen, chooser: Chooser) -> Prediction:
        """The map of an image that was looked at; the network is not run again."""
        logits = self.model.logits(seen.output.features, chooser.classes.text)
        if chooser.exponents:
            logits = self._with_teacher(seen, logits, chooser, *chooser.exponents)
        ids, segments = panoptic_map(seen.output, logits, chooser.classes, chooser.thresholds)
        return _described(ids, segments, chooser)

    def _with_teacher(self, seen: Seen, logits: Tensor, chooser: Chooser, alpha: float, beta: float) -> Tensor:
        """The logits of q (Q, K). Only queries that can be in the map are encoded, each once an image."""
        teacher, classes = self.lexicon.teacher, chooser.classes
        weights = {"alpha": alpha, "beta": beta}
        wanted = can_be_chosen(logits, classes.seen, chooser.thresholds.object_threshold, **weights)
        among = wanted.nonzero()[:, 0].tolist()
        if missing := [query for query in among if query not in seen.asked]:
            view, new = channels_first(seen.image), torch.tensor(missing, device=seen.output.masks.device)
            queries, tokens = mask_tokens(teacher, view, seen.output, self.token_options, among=new)
            seen.tokens.update(zip(queries.tolist(), tokens, strict=True))
            seen.asked.update(missing)
        queries = [query for query in among if query in seen.tokens]
        if not queries:
            return logits
        tokens = torch.stack([seen.tokens[query] for query in queries])
        log_t = teacher_log_scores(tokens, classes.text, logit_scale(teacher))
        return with_teacher(logits, torch.tensor(queries, device=logits.device), log_t, classes.seen, **weights)

    @cached_property
    def token_options(self) -> TokensConfig:
        """How the checkpoint's teacher encodes masks."""
        return cached_options(self.folder, self.store)


def foreign(model: Model, image: NDArray[np.uint8]) -> str:
    """Why the names that the model's teacher gives mean nothing on this image (H, W, 3), in one line; "" for no reason.

    The small teacher that is shipped was trained on generated scenes alone. An image with a longer side than any of
    them, `SCENE`, is taken for none.
    """
    height, width = image.shape[:2]
    if model.meta.classes.teacher["name"] != "small" or max(height, width) <= SCENE:
        return ""
    return (
        f"the checkpoint's teacher was trained on generated scenes of 96 pixels alone, and an image of {width} x {height} "
        "is none: classes and scores mean nothing on photographs; use a checkpoint whose teacher is a real CLIP"
    )


def _described(ids: NDArray[np.int32], segments: Sequence[PredictedSegment], chooser: Chooser) -> Prediction:
    """The map without segments below the smallest score, ids renumbered 1, 2, ..."""
    kept = [segment for segment in segments if segment.score >= chooser.min_score]
    if len(kept) < len(segments):
        number = np.zeros(1 + len(segments), np.int32)
        for new, segment in enumerate(kept, start=1):
            number[segment.id] = new
        ids = number[ids]
    areas = np.bincount(ids.ravel(), minlength=1 + len(kept)).tolist()
    found = []
    for new, (segment, box) in enumerate(zip(kept, ndimage.find_objects(ids, len(kept)), strict=True), start=1):
        name, isthing, seen = chooser.by_id[segment.category_id]
        rows, columns = box
        found.append(
            Segment(
                id=new,
                category_id=segment.category_id,
                name=name,
                score=segment.score,
                isthing=isthing,
                seen=seen,
                area=areas[new],
                bbox=(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start),
            )
        )
    return Prediction(ids=ids, segments=tuple(found))
