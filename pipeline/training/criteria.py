"""What one training step of each stage minimises: three short classes, one a stage, side by side.

Each takes a batch and the step's number and yields its losses by name, already weighted, once for every part of the batch; an
alignment loss of weight 0 is not computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from models import losses
from models.generator import Generator
from models.matcher import match
from models.projector import Projector
from models.segmenter import Segmenter
from models.vision_centric import LinearClassifier, PrimitiveGenerator
from pipeline.training.distributed import ALONE, Ranks
from pipeline.training.loader import Batch
from pipeline.training.loop import autocast, image_generator, step_generator
from pipeline.training.query_loader import QueryBatch

if TYPE_CHECKING:
    from pipeline.teacher.text_bank import TextBank
    from pipeline.training.config import CPAConfig, G2SConfig, V2CConfig


Frozen = TypeVar("Frozen", bound=nn.Module)


def seen_rows(bank: TextBank, device: torch.device) -> tuple[Tensor, Tensor]:
    """The seen classes' embeddings A_s (K_s, D) or (K_s, S, D), see `TextBank`, and class index -> row of A_s or -1 (K,)."""
    seen = torch.tensor(bank.seen)
    row = torch.where(seen, seen.cumsum(0) - 1, -1)
    return bank.embedding[seen].to(device), row.to(device)


def one_hot(rows: Tensor, classes: int) -> Tensor:
    """Class rows (...) with -1 for none -> targets (..., classes); none is all zero (D2)."""
    targets = torch.zeros(*rows.shape, classes + 1, device=rows.device)
    targets.scatter_(-1, rows.where(rows >= 0, classes)[..., None], 1.0)
    return targets[..., :classes]


class V2CCriterion:
    """L_v2c = L_match + w_g L_g + w_l L_l (paper Eq. 5): L_match on every decoder output, L_g and L_l on the last (D4).

    A global batch may be spread over processes, and over `accumulate` parts one after the other: every sum is divided by a number of
    the global batch and every draw belongs to an image, so that the gradients add up to those of the batch in one piece.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        projector: Projector,
        bank: TextBank,
        global_tokens: Tensor,
        config: V2CConfig,
        ranks: Ranks = ALONE,
        *,
        token_views: int = 1,
    ) -> None:
        self.segmenter, self.projector, self.config, self.ranks = segmenter, projector, config, ranks
        self.device = global_tokens.device
        self.text, self.seen_row = seen_rows(bank, self.device)
        self.global_tokens = global_tokens  # (views * N, D)
        self.images = len(global_tokens) // token_views

    def __call__(self, batch: Batch, step: int) -> Iterator[dict[str, Tensor]]:
        """The terms of each part of this process's share of the batch."""
        config = self.config
        parts = [part.to(self.device) for part in batch.split(config.accumulate)]
        first = self.ranks.rank * len(batch.image_ids)
        rngs = [image_generator(config.seed, step, first + i, self.device) for i in range(len(batch.image_ids))]
        totals = self.ranks.sum(self.totals(batch))
        tokens = [_encoded(torch.cat(part.instance_tokens)) for part in parts]
        others = self.ranks.others(torch.cat(tokens)) if config.instance_negatives == "batch" else []
        for number, part in enumerate(parts):
            elsewhere = torch.cat([*tokens[:number], *tokens[number + 1 :], *others, tokens[number][:0]])
            own_rngs, rngs = rngs[: len(part.image_ids)], rngs[len(part.image_ids) :]
            with autocast(self.device, config.precision):
                terms = self.terms(part, own_rngs, totals=totals, elsewhere=elsewhere)
            yield terms

    def totals(self, batch: Batch) -> Tensor:
        """Images, segments, and instances that have a negative in L_l: (3,). Of an image's segments at most Q are found."""
        found = [min(len(_encoded(tokens)), self.config.segmenter.queries) for tokens in batch.instance_tokens]
        if self.config.instance_negatives == "image":
            found = [count for count in found if count > 1]
        return torch.tensor([len(batch.labels), sum(map(len, batch.labels)), sum(found)], device=self.device)

    def terms(
        self,
        batch: Batch,
        generators: Sequence[torch.Generator],
        *,
        totals: Tensor,
        elsewhere: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """This part's share of every term. `generators`: one an image. `totals` (3,): of the global batch, see `totals`.
        `elsewhere` (M, D): the instance tokens of its other parts, for batch negatives."""
        config = self.config
        images, segments, instances = totals.clamp(min=1).unbind()
        labels = [self.seen_row[label] for label in batch.labels]
        output = self.segmenter(batch.images, dense=False)
        v = self.projector(output.features)  # (L, B, Q, D)
        logits = self.projector.logits(v, self.text)  # (L, B, Q, K_s)
        assigned = match(
            logits,
            output.masks,
            labels,
            batch.masks,
            class_weight=config.class_weight,
            bce_weight=config.bce_weight,
            dice_weight=config.dice_weight,
            points=config.points,
            generators=generators,
            mask_loss=config.mask_loss,
        )  # (L, B, Q): segment of the image, or -1
        image, layer, query = (assigned >= 0).transpose(0, 1).nonzero(as_tuple=True)  # an image's rows side by side
        first = torch.tensor([0, *[len(label) for label in labels]], device=self.device).cumsum(0)
        row = first[image] + assigned[layer, image, query]  # of all segments of the batch, one after the other
        target = torch.full_like(assigned, -1)
        target[layer, image, query] = torch.cat(labels)[row]
        predicted, masks = output.masks[layer, image, query], torch.cat(batch.masks)
        if config.mask_loss == "full":
            mask, dice = losses.full_mask_losses(predicted, masks, rows=row, normaliser=segments)
        else:
            rows = [len(assigned) * min(len(label), assigned.shape[2]) for label in labels]
            mask, dice = losses.mask_losses(
                predicted,
                masks,
                rows=row,
                points=config.points,
                normaliser=segments,
                draws=list(zip(generators, rows, strict=True)),
            )
        terms = {
            "class": config.class_weight
            * losses.focal_loss(logits, one_hot(target, len(self.text)), normaliser=segments),
            "bce" if config.mask_loss == "points" else "mask": config.bce_weight * mask,
            "dice": config.dice_weight * dice,
        }
        last = layer == len(assigned) - 1
        if config.global_weight:
            matched = assigned[-1] >= 0
            own = self.global_tokens[batch.global_rows]
            v_a = losses.target_attention(own, v[-1], matched, gamma=config.gamma, enabled=config.target_attention)
            bank = self.global_tokens[self._negatives(batch.global_rows, generators)]
            terms["global"] = config.global_weight * losses.global_loss(
                v_a, own, bank, tau=config.tau, normaliser=images
            )
        if config.instance_weight:
            own = torch.cat(batch.instance_tokens)[row[last]]
            encoded = own.any(1)  # of a segment too small for the teacher there is nothing to learn
            terms["instance"] = config.instance_weight * losses.instance_loss(
                v[-1][image[last], query[last]][encoded],
                own[encoded],
                image[last][encoded],
                tau=config.tau,
                negatives=config.instance_negatives,
                elsewhere=elsewhere,
                normaliser=instances,
            )
        return terms

    def _negatives(self, own: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Rows (B, T) drawn uniformly from the cached global tokens of the same view, an image's own row excluded (D3)."""
        others, image, size = self.images - 1, own % self.images, (self.config.bank,)
        drawn = [torch.randint(max(others, 1), size, generator=rng, device=rng.device) for rng in generators]
        drawn = torch.stack(drawn).to(self.device)
        return (own - image)[:, None] + (drawn + (drawn >= image[:, None])).clamp(max=others)


class G2SCriterion:
    """L_g2s = L_mmd + lambda_s L_div + lambda_v L_gv2s + beta KL (paper Eq. 8, read as D6), from cached queries alone."""

    def __init__(
        self, generator: Generator | PrimitiveGenerator, projector: Projector, bank: TextBank, config: G2SConfig
    ) -> None:
        self.generator, self.projector, self.config = generator, projector, config
        self.device = next(projector.parameters()).device
        self.text_of_class = bank.first.to(self.device)
        self.text, self.seen_row = seen_rows(bank, self.device)

    def __call__(self, batch: QueryBatch, step: int) -> Iterator[dict[str, Tensor]]:
        yield self.terms(batch, step_generator(self.config.seed, step))

    def terms(self, batch: QueryBatch, generator: torch.Generator) -> dict[str, Tensor]:
        config = self.config
        feature, category = batch.feature.to(self.device), batch.category.to(self.device)
        image, query = (category >= 0).nonzero(as_tuple=True)
        label, real = category[image, query], feature[image, query]
        eps = torch.randn(len(label), self.text.shape[-1], generator=generator).to(self.device)
        fake, mu, log_var = self.generator(real, self.text_of_class[label], eps)
        terms = {"mmd": config.mmd_weight * losses.mmd_loss(fake, real)}
        if config.diversity_weight:
            void_image, void_query = (category < 0).nonzero(as_tuple=True)
            unmatched = feature[void_image, void_query]
            diversity = losses.diversity_loss(fake, real, image, unmatched, void_image, tau=config.tau)
            terms["diversity"] = config.diversity_weight * diversity
        if config.semantic_weight:
            logits = self.projector.logits(self.projector(fake), self.text)
            target = one_hot(self.seen_row[label], len(self.text))
            terms["semantic"] = config.semantic_weight * losses.focal_loss(logits, target, normaliser=len(label))
        if config.kl_weight:
            terms["kl"] = config.kl_weight * losses.kl_loss(mu, log_var)
        return terms


class CPACriterion:
    """L_f = focal(P(F) over A_s) + focal(P(F'_u) over A) (paper Eq. 9): real seen and made-up unseen features, projector alone.

    `text`: what the classifier tells the classes by, `Model.text`: A, or of a linear classifier the identity.
    """

    def __init__(
        self,
        projector: Projector | LinearClassifier,
        generator: Generator | PrimitiveGenerator,
        bank: TextBank,
        config: CPAConfig,
        *,
        text: Tensor,
    ) -> None:
        self.projector, self.generator, self.config = projector, generator, config
        self.device = next(projector.parameters()).device
        self.all_text, self.text_of_class = text.to(self.device), bank.first.to(self.device)
        self.seen_row = seen_rows(bank, self.device)[1]
        self.text = self.all_text[torch.tensor(bank.seen, device=self.device)]
        self.unseen = torch.tensor([k for k, seen in enumerate(bank.seen) if not seen], device=self.device)

    def __call__(self, batch: QueryBatch, step: int) -> Iterator[dict[str, Tensor]]:
        yield self.terms(batch, step_generator(self.config.seed, step))

    def terms(self, batch: QueryBatch, generator: torch.Generator) -> dict[str, Tensor]:
        config = self.config
        feature, category = batch.feature.to(self.device), batch.category.to(self.device)
        target = one_hot(torch.where(category >= 0, self.seen_row[category], -1), len(self.text))
        # Over the seen classes only: a query that in truth shows an unseen object is never taught "not that unseen class".
        logits = self.projector.logits(self.projector(feature), self.text)
        matched = max(int((category >= 0).sum()), 1)
        terms = {"real": config.real_weight * losses.focal_loss(logits, target, normaliser=matched)}
        drawn = torch.randint(len(self.unseen), (config.synthetic,), generator=generator).to(self.device)
        label = self.unseen[drawn]
        fake = self.generator.generate(self.text_of_class[label], noise_into=config.noise_into, rng=generator)
        logits = self.projector.logits(self.projector(fake), self.all_text)
        target = one_hot(label, len(self.all_text))
        terms["synthetic"] = config.synthetic_weight * losses.focal_loss(logits, target, normaliser=config.synthetic)
        return terms


def _encoded(tokens: Tensor) -> Tensor:
    """Without the zero rows of segments that were too small for the teacher."""
    return tokens[tokens.any(1)]


def freeze(module: Frozen) -> Frozen:
    """Evaluation mode, no gradients: what a later stage takes from an earlier one."""
    return module.eval().requires_grad_(False)
