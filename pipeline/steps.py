"""What one training step of each stage minimises: three short classes, one a stage, side by side.

Each takes a batch and a generator for its draws and returns its losses by name, already weighted; an alignment loss of weight 0 is not
computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models import losses
from models.generator import Generator
from models.matcher import match
from models.projector import Projector
from models.segmenter import Segmenter
from pipeline.loader import Batch
from pipeline.query_data import QueryBatch

if TYPE_CHECKING:
    from pipeline.cpa import CPAConfig
    from pipeline.g2s import G2SConfig
    from pipeline.text import TextBank
    from pipeline.v2c import V2CConfig


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


class V2CStep:
    """L_v2c = L_match + w_g L_g + w_l L_l (paper Eq. 5): L_match on every decoder output, L_g and L_l on the last (D4)."""

    def __init__(
        self, segmenter: Segmenter, projector: Projector, bank: TextBank, global_tokens: Tensor, config: V2CConfig
    ) -> None:
        self.segmenter, self.projector, self.config = segmenter, projector, config
        self.device = global_tokens.device
        self.text, self.seen_row = seen_rows(bank, self.device)
        self.global_tokens = global_tokens

    def __call__(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        config = self.config
        batch = batch.to(self.device)
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
            generator=generator,
            mask_loss=config.mask_loss,
        )  # (L, B, Q): segment of the image, or -1
        segments = max(sum(len(label) for label in labels), 1)
        layer, image, query = (assigned >= 0).nonzero(as_tuple=True)
        first = torch.tensor([0, *[len(label) for label in labels]], device=self.device).cumsum(0)
        row = first[image] + assigned[layer, image, query]  # of all segments of the batch, one after the other
        target = torch.full_like(assigned, -1)
        target[layer, image, query] = torch.cat(labels)[row]
        predicted, masks = output.masks[layer, image, query], torch.cat(batch.masks)
        if config.mask_loss == "full":
            mask, dice = losses.full_mask_losses(predicted, masks, rows=row, normaliser=segments)
        else:
            mask, dice = losses.mask_losses(
                predicted, masks, rows=row, points=config.points, normaliser=segments, generator=generator
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
            bank = self.global_tokens[self._negatives(batch.global_rows, generator)]
            terms["global"] = config.global_weight * losses.global_loss(v_a, own, bank, tau=config.tau)
        if config.instance_weight:
            terms["instance"] = config.instance_weight * losses.instance_loss(
                v[-1][image[last], query[last]],
                torch.cat(batch.instance_tokens)[row[last]],
                image[last],
                tau=config.tau,
                negatives=config.instance_negatives,
            )
        return terms

    def _negatives(self, own: Tensor, generator: torch.Generator) -> Tensor:
        """Rows (B, T) drawn uniformly from the cached global tokens, an image's own row excluded (D3)."""
        others = len(self.global_tokens) - 1
        drawn = torch.randint(max(others, 1), (len(own), self.config.bank), generator=generator).to(self.device)
        return (drawn + (drawn >= own[:, None])).clamp(max=others)


class G2SStep:
    """L_g2s = L_mmd + lambda_s L_div + lambda_v L_gv2s + beta KL (paper Eq. 8, read as D6), from cached queries alone."""

    def __init__(self, generator: Generator, projector: Projector, bank: TextBank, config: G2SConfig) -> None:
        self.generator, self.projector, self.config = generator, projector, config
        self.device = next(projector.parameters()).device
        self.text_of_class = bank.first.to(self.device)
        self.text, self.seen_row = seen_rows(bank, self.device)

    def __call__(self, batch: QueryBatch, generator: torch.Generator) -> dict[str, Tensor]:
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


class CPAStep:
    """L_f = focal(P(F) over A_s) + focal(P(F'_u) over A) (paper Eq. 9): real seen and made-up unseen features, projector alone."""

    def __init__(self, projector: Projector, generator: Generator, bank: TextBank, config: CPAConfig) -> None:
        self.projector, self.generator, self.config = projector, generator, config
        self.device = next(projector.parameters()).device
        self.all_text, self.text_of_class = bank.embedding.to(self.device), bank.first.to(self.device)
        self.text, self.seen_row = seen_rows(bank, self.device)
        self.unseen = torch.tensor([k for k, seen in enumerate(bank.seen) if not seen], device=self.device)

    def __call__(self, batch: QueryBatch, generator: torch.Generator) -> dict[str, Tensor]:
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


def freeze(module: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients: what a later stage takes from an earlier one."""
    return module.eval().requires_grad_(False)
