"""The teacher at prediction: the class scores of the network, multiplied with those of the frozen CLIP.

The paper predicts without the teacher. With it, every query whose mask m (probability >= 0.5, at the image's size) is
not empty has C_q, the teacher's token of the image with everything but m filled, made as the cached tokens were:

    t_qk = softmax_k(e^s cos(C_q, a_k)), e^s the teacher's own logit scale, a_k the class's text embedding
    q_qk = p_qk^(1 - w_k) t_qk^(w_k), w_k = alpha for a seen class and beta for an unseen one

and q takes the place of p, the sigmoid of the class logits, in the panoptic and in the semantic map. A query without a
token keeps q = p. Form and exponents (alpha 0.4, beta 0.8) are FC-CLIP's geometric ensemble: taken over, not tuned.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.projector import class_products
from pipeline.inference.maps import Classes, Output
from pipeline.inference.model import CheckpointMeta
from pipeline.runtime import Runtime
from pipeline.teacher.config import TokensConfig, teacher_of
from storage.errors import UserError
from storage.keys import Ref
from storage.store import MANIFEST, Store

if TYPE_CHECKING:  # importing open_clip takes seconds, and who reads cached tokens needs none
    from models.teacher import Teacher

log = logging.getLogger(__name__)

TOKENS = "tokens.json"  # in an exported folder


@dataclass(frozen=True, kw_only=True)
class MaskTokens:
    """The tokens of one image: `queries` (m,), those that have one, and `tokens` (m, D); `scale` is e^s."""

    queries: Tensor
    tokens: Tensor
    scale: float

    def log_scores(self, text: Tensor) -> Tensor:
        """log t (m, K), see `teacher_log_scores`."""
        return teacher_log_scores(self.tokens, text, self.scale)


def teacher_log_scores(tokens: Tensor, text: Tensor, scale: float) -> Tensor:
    """log t (m, K): tokens (m, D) and text rows (K, D) or (K, S, D), of unit length, and e^s, the teacher's `scale`.

    Of text (K, S, D) a class has the largest of its S products, as everywhere.
    """
    return (scale * class_products(tokens.to(text), text)).log_softmax(-1)


def with_teacher(logits: Tensor, queries: Tensor, log_t: Tensor, seen: Tensor, *, alpha: float, beta: float) -> Tensor:
    """The logits of q, (Q, K) float32, whose sigmoid is q; computed from logarithms, so that no score underflows.

    Args:
        logits: (Q, K), of p.
        queries: (m,), those that have a token. The others keep their logits.
        log_t: (m, K), see `teacher_log_scores`.
        seen: (K,) bool.
        alpha: w of the seen classes, in [0, 1]: 0 is the network alone, 1 the teacher alone.
        beta: the same of the unseen classes.
    """
    weight = _weights(seen, alpha, beta)
    result = logits.float().clone()
    log_q = (1 - weight) * F.logsigmoid(result[queries]) + weight * log_t
    result[queries] = log_q - torch.log(-torch.expm1(log_q))
    return result


def can_be_chosen(logits: Tensor, seen: Tensor, threshold: float, *, alpha: float, beta: float) -> Tensor:
    """(Q,) bool: the queries that a panoptic map with this object threshold can hold, whatever their tokens are.

    As t <= 1, no score of a query is above its largest p_k^(1 - w_k). Where that is not above the threshold, the query
    is never chosen, without its token as with it, and the map is the same.
    """
    bound = (F.logsigmoid(logits.float()) * (1 - _weights(seen, alpha, beta))).amax(1).exp()
    return bound > threshold * (1 - 1e-5)  # q and its bound are rounded


def _weights(seen: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.where(seen, alpha, beta)


@dataclass(frozen=True, kw_only=True)
class TeacherAtPrediction:
    """A loaded teacher that classifies the masks of one image after the other.

    `options`: how masks are encoded. `alpha`, `beta`: see `with_teacher`.
    """

    teacher: Teacher
    options: TokensConfig
    alpha: float
    beta: float

    @property
    def scale(self) -> float:
        """e^s, the teacher's logit scale."""
        return logit_scale(self.teacher)

    @torch.no_grad()
    def logits(self, image: Tensor, output: Output, logits: Tensor, classes: Classes) -> Tensor:
        """The logits of q, (Q, K) float32, for `panoptic_map` and `semantic_map`, which needs the tokens of all masks.

        `image` (3, H, W) uint8 and `output` are of the same image; `logits` (Q, K) are those of p, over `classes`.
        """
        queries, tokens = mask_tokens(self.teacher, image, output, self.options)
        queries, log_t = queries.to(logits.device), teacher_log_scores(tokens, classes.text, self.scale)
        return with_teacher(logits, queries, log_t, classes.seen, alpha=self.alpha, beta=self.beta)


def logit_scale(teacher: Teacher) -> float:
    """e^s, by which the teacher multiplies its cosines."""
    return float(teacher.clip.logit_scale.exp())


@torch.no_grad()
def mask_tokens(
    teacher: Teacher, image: Tensor, output: Output, options: TokensConfig, *, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The queries (m,) that have a token, ascending, and their tokens (m, D) float32, on the teacher's device.

    A query has one when its mask, the pixels of probability >= 0.5 at the image's size, has `options.min_area` pixels
    and at least one; `among` (n,), ascending, leaves only these. `image` is (3, H, W) uint8.
    """
    from pipeline.teacher.masks import encode_masks

    if among is None:
        among = torch.arange(len(output.masks), device=output.masks.device)
    found: list[Tensor] = []

    def masks() -> Iterator[Tensor]:
        start = 0
        for probabilities, areas in output.chunks(among):
            large = (areas >= max(options.min_area, 1)).nonzero()[:, 0]
            found.append(among[(large + start).to(among.device)])
            start += len(areas)
            yield (probabilities[large] >= 0.5)

    tokens = encode_masks(teacher, image, masks() if len(among) else (), options)
    return (torch.cat(found) if found else among).to(tokens.device), tokens


def load_for_prediction(
    meta: CheckpointMeta, folder: Path, store: Store, runtime: Runtime, *, weights: str, alpha: float, beta: float
) -> TeacherAtPrediction:
    """The teacher of a checkpoint, ready for its masks; `weights` is its weights file where it was a local one.

    Raises UserError when an exponent is outside of [0, 1], as `require_embeddings`, and when the teacher is not at hand,
    with what to pass.
    """
    require_exponents(alpha, beta)
    require_embeddings(meta)
    teacher = teacher_of(meta.classes.teacher, weights).load(runtime)
    options = cached_options(folder, store)
    return TeacherAtPrediction(teacher=teacher, options=options, alpha=alpha, beta=beta)


def require_exponents(alpha: float, beta: float) -> None:
    """Raises UserError unless both lie in [0, 1]."""
    if not (0 <= alpha <= 1 and 0 <= beta <= 1):
        raise UserError(f"--alpha and --beta must lie in 0..1, not {alpha:g} and {beta:g}")


def require_embeddings(meta: CheckpointMeta) -> None:
    """Raises UserError where the checkpoint has no class embeddings, with which the teacher's tokens are compared."""
    if meta.linear:
        raise UserError(
            "the checkpoint's classifier is linear and has no class embeddings to compare the teacher's tokens with; "
            "leave out --with-teacher, or take a checkpoint with a projector"
        )


def cached_options(folder: Path, store: Store) -> TokensConfig:
    """The options of the tokens that a checkpoint was trained with, from the manifests of its store, or from the file
    that `zs-seg export --folder` put beside it.

    A folder that was copied out of its store has lost them; then the defaults are taken, and a line says so.
    """
    try:
        if (folder / TOKENS).is_file():
            return TokensConfig(**json.loads((folder / TOKENS).read_bytes()))
        inputs = json.loads((folder / MANIFEST).read_bytes())["inputs"]
        if "tokens" not in inputs:
            inputs = store.open(Ref.parse(inputs["checkpoint"])).manifest.inputs
        found = store.open(Ref.parse(inputs["tokens"])).manifest.config["tokens"]
        return TokensConfig(**found)
    except (OSError, KeyError, UserError):
        log.warning("%s: the store does not have its tokens, so masks are encoded with %s", folder, _brief())
        return TokensConfig()


def _brief() -> str:
    options: dict[str, Any] = asdict(TokensConfig())
    return ", ".join(f"{name} {options[name]}" for name in ("method", "crop", "resize", "dtype"))
