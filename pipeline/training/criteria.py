"""The criteria of the three training stages, one class per stage, one method per loss.

Each takes a batch and the step's number and yields the weighted losses by name, once for every part of the batch; an
alignment loss of weight 0 is not computed. Equations are the paper's; models/README.md explains the decisions Dn.

Labels, indices and counts are computed on the CPU and sent to the device, so that the host waits for the device in one
place only, the costs of stage 1's matching: wherever a shape follows from values, a GPU would have to be asked for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from models import losses
from models.generator import Generator
from models.mask_logits import MaskLogits
from models.matcher import match
from models.projector import Projector
from models.segmenter import Segmenter
from models.transfer import send
from models.vision_centric import LinearClassifier, PrimitiveGenerator
from pipeline.teacher.text_bank import TextBank
from pipeline.training.config import CPAConfig, G2SConfig, V2CConfig
from pipeline.training.distributed import ALONE, Ranks
from pipeline.training.loader import Batch
from pipeline.training.loop import autocast, image_generator, step_generator
from pipeline.training.query_loader import QueryBatch

Frozen = TypeVar("Frozen", bound=nn.Module)


def seen_rows(bank: TextBank, device: torch.device) -> tuple[Tensor, Tensor]:
    """The seen classes' embeddings A_s (K_s, D) or (K_s, S, D), see `TextBank`; and, on the CPU, (K,): class index ->
    row of A_s or -1."""
    seen = torch.tensor(bank.seen)
    row = torch.where(seen, seen.cumsum(0) - 1, -1)
    return bank.embedding[seen].to(device), row


def one_hot(rows: Tensor, classes: int) -> Tensor:
    """Class rows (...), -1 for no class -> one-hot targets (..., classes), all zero for no class (D2)."""
    targets = torch.zeros(*rows.shape, classes + 1, device=rows.device)
    targets.scatter_(-1, rows.where(rows >= 0, classes)[..., None], 1.0)
    return targets[..., :classes]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """N queries and what each was assigned to, ordered by image; (N,) int64 on the CPU. `row` is the index of the
    segment or region among all of its kind, image after image; `shown` the index of its mask among all masks."""

    image: Tensor
    layer: Tensor
    query: Tensor
    row: Tensor
    shown: Tensor

    @classmethod
    def of(
        cls, assigned: Tensor, chosen: Tensor, first: Sequence[int], counts: Sequence[int], masks: Sequence[int]
    ) -> Pairs:
        """The `chosen` (L, B, Q) bool of the queries of `assigned` (L, B, Q). Image b has `masks[b]` masks, of which
        `counts[b]` from `first[b]` on are of this kind."""
        # Transposed, so that the matches are ordered by image.
        image, layer, query = chosen.transpose(0, 1).nonzero(as_tuple=True)
        place = assigned[layer, image, query]
        before, all_before = (torch.tensor([0, *numbers]).cumsum(0)[image] for numbers in (counts, masks))
        own = place - torch.tensor(first)[image]
        return cls(image=image, layer=layer, query=query, row=before + own, shown=all_before + place)


@dataclass(frozen=True, kw_only=True)
class Matching:
    """The outputs of one part of a batch, L decoder outputs of B images, and which query was assigned to which segment,
    or to which class-less region.

    On the device: `totals` (3,), or (4,) with regions: images, segments, instances and regions of the global batch, each
    at least 1; `shown` (S, H, W) bool, the masks of all S segments and regions of the part, image after image; `v` (L,
    B, Q, D), `logits` (L, B, Q, K_s), `masks` (L, B, Q, h, w).

    On the CPU: `target` (L, B, Q) int64, the row of A_s of a query's segment, or -1; `matched`, the queries with a
    segment, and `candidates`, those with a region.
    """

    batch: Batch
    totals: Tensor
    shown: Tensor
    v: Tensor
    logits: Tensor
    masks: Tensor | MaskLogits
    target: Tensor
    matched: Pairs
    candidates: Pairs

    @property
    def images(self) -> Tensor:
        return self.totals[0]

    @property
    def segments(self) -> Tensor:
        return self.totals[1]

    @property
    def instances(self) -> Tensor:
        return self.totals[2]

    @property
    def regions(self) -> Tensor:
        return self.totals[3]


class V2CCriterion:
    """L_v2c = L_match + w_g L_g + w_l L_l (paper Eq. 5): L_match on every decoder output, L_g and L_l on the last (D4).

    With candidate regions (E3, not in the paper), + w_c L_mask + w_r L_l of the queries that were left free and matched
    to a region by their masks: the mask losses on every decoder output, L_l towards the region's token on the last.
    Such a query is left out of the class loss on that output.

    A global batch may be split over processes, and over `accumulate` parts in sequence. Every sum is divided by a count
    of the global batch and every random draw belongs to an image, so the gradients add up to those of the undivided
    batch.
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
        """The weighted losses of each part of this process's share of the batch."""
        config = self.config
        parts = batch.split(config.accumulate)
        first = self.ranks.rank * len(batch.image_ids)
        rngs = [image_generator(config.seed, step, first + i, self.device) for i in range(len(batch.image_ids))]
        totals = self.ranks.sum(self.totals(batch))
        tokens: list[Tensor] = []
        if config.instance_negatives == "batch" or config.candidate_token_weight:
            tokens = [send(_encoded(torch.cat(part.instance_tokens)), self.device) for part in parts]
            tokens += self.ranks.others(torch.cat(tokens))
        regions: list[Tensor] = []
        if config.candidate_token_weight:
            regions = [send(torch.cat(part.region_tokens), self.device) for part in parts]
            regions += self.ranks.others(torch.cat(regions))
        for number, part in enumerate(parts):
            own_rngs, rngs = rngs[: len(part.image_ids)], rngs[len(part.image_ids) :]
            with autocast(self.device, config.precision):
                terms = self.terms(
                    part,
                    own_rngs,
                    totals=totals,
                    elsewhere=_but(tokens, number),
                    regions_elsewhere=_but(regions, number),
                )
            yield terms

    def totals(self, batch: Batch) -> Tensor:
        """(3,): images, segments, and instances that have a negative in L_l. At most Q segments of an image are
        matched. Where candidate regions take part (4,): also those that are matched, to queries that are left."""
        found = [min(len(_encoded(tokens)), self.config.segmenter.queries) for tokens in batch.instance_tokens]
        if self.config.instance_negatives == "image":
            found = [count for count in found if count > 1]
        counts = [len(batch.labels), sum(map(len, batch.labels)), sum(found)]
        if self.config.candidates:
            free = [max(self.config.segmenter.queries - len(labels), 0) for labels in batch.labels]
            counts.append(sum(map(min, free, map(len, batch.region_tokens))))
        return send(torch.tensor(counts), self.device)

    def terms(
        self,
        batch: Batch,
        generators: Sequence[torch.Generator],
        *,
        totals: Tensor,
        elsewhere: Tensor | None = None,
        regions_elsewhere: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """This part's share of every loss. `generators`: one per image. `totals`: counts of the global batch, see
        `totals`. `elsewhere` (M, D): instance tokens of the other parts of the batch, for batch negatives, and
        `regions_elsewhere` those of regions."""
        matching = self.matching(batch, generators, totals)
        mask_losses = self.mask_losses(matching, matching.matched, matching.segments, generators)
        terms = {"class": self.class_loss(matching), **mask_losses}
        if self.config.global_weight:
            terms["global"] = self.global_loss(matching, generators)
        if self.config.instance_weight:
            terms["instance"] = self.instance_loss(matching, elsewhere)
        # Last, so that they leave the other losses' draws where they are.
        if self.config.candidate_mask_weight:
            found = self.mask_losses(matching, matching.candidates, matching.regions, generators)
            terms["candidate mask"] = self.config.candidate_mask_weight * sum(
                found.values(), torch.zeros_like(found["dice"])
            )
        if self.config.candidate_token_weight:
            terms["candidate token"] = self.candidate_token_loss(matching, elsewhere, regions_elsewhere)
        return terms

    def matching(self, batch: Batch, generators: Sequence[torch.Generator], totals: Tensor) -> Matching:
        """The network's outputs for this part, and the matching sigma^ of every decoder output (Eq. 1), with that of
        the other queries to regions, as far as the batch shows any."""
        config = self.config
        labels = [self.seen_row[label] for label in batch.labels]
        masks = [mask.to(self.device, non_blocking=True) for mask in batch.masks]
        output = self.segmenter(batch.images.to(self.device, non_blocking=True), dense=False)
        v = self.projector(output.features)  # (L, B, Q, D)
        logits = self.projector.logits(v, self.text)  # (L, B, Q, K_s)
        assigned = match(
            logits,
            output.masks,
            labels,
            masks,
            class_weight=config.class_weight,
            bce_weight=config.bce_weight,
            dice_weight=config.dice_weight,
            points=config.points,
            generators=generators,
            mask_loss=config.mask_loss,
        )  # (L, B, Q): segment or region of the image, or -1
        segments, shown = [len(label) for label in labels], [len(mask) for mask in masks]
        named = assigned < torch.tensor(segments)[:, None]
        matched = Pairs.of(assigned, (assigned >= 0) & named, [0] * len(shown), segments, shown)
        regions = [both - one for both, one in zip(shown, segments, strict=True)]
        target = torch.full_like(assigned, -1)
        target[matched.layer, matched.image, matched.query] = torch.cat(labels)[matched.row]
        return Matching(
            batch=batch,
            totals=totals.clamp(min=1),
            shown=torch.cat(masks),
            v=v,
            logits=logits,
            masks=output.masks,
            target=target,
            matched=matched,
            candidates=Pairs.of(assigned, ~named, segments, regions, shown),
        )

    def class_loss(self, m: Matching) -> Tensor:
        """The focal loss of Eq. 1 over A_s, on every decoder output; an unmatched query has an all-zero target (D2), one
        that is matched to a region is left out: its class may be any."""
        logits, target = m.logits, m.target
        if len(m.candidates.query):
            counted = torch.ones_like(target, dtype=torch.bool)
            counted[m.candidates.layer, m.candidates.image, m.candidates.query] = False
            target = target[counted]
            logits = logits.flatten(0, 2)[send(counted.flatten().nonzero()[:, 0], self.device)]
        targets = one_hot(send(target, self.device), len(self.text))
        return self.config.class_weight * losses.focal_loss(logits, targets, normaliser=m.segments)

    def mask_losses(
        self, m: Matching, pairs: Pairs, normaliser: Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """BCE (or focal, "mask") and dice of Eq. 1 on every decoder output, at sampled points or over all pixels."""
        config = self.config
        predicted, rows = m.masks[pairs.layer, pairs.image, pairs.query], send(pairs.shown, self.device)
        if config.mask_loss == "full":
            mask, dice = losses.full_mask_losses(predicted, m.shown, rows=rows, normaliser=normaliser)
            return {"mask": config.bce_weight * mask, "dice": config.dice_weight * dice}
        counts = torch.bincount(pairs.image, minlength=len(generators)).tolist()
        bce, dice = losses.mask_losses(
            predicted,
            m.shown,
            rows=rows,
            points=config.points,
            normaliser=normaliser,
            draws=list(zip(generators, counts, strict=True)),
        )
        return {"bce": config.bce_weight * bce, "dice": config.dice_weight * dice}

    def global_loss(self, m: Matching, generators: Sequence[torch.Generator]) -> Tensor:
        """L_g (Eq. 3) of the last decoder output: V_a (Eq. 2) against its image's C_g; negatives from the bank (D3)."""
        config = self.config
        rows, matched = send(m.batch.global_rows, self.device), send(m.target[-1] >= 0, self.device)
        own = self.global_tokens[rows]
        v_a = losses.target_attention(own, m.v[-1], matched, gamma=config.gamma, enabled=config.target_attention)
        bank = self.global_tokens[self._negatives(rows, generators)]
        return config.global_weight * losses.global_loss(v_a, own, bank, tau=config.tau, normaliser=m.images)

    def instance_loss(self, m: Matching, elsewhere: Tensor | None) -> Tensor:
        """L_l (Eq. 4) of the last decoder output. Segments too small for the teacher have no token and are left out."""
        config, tokens, pairs = self.config, torch.cat(m.batch.instance_tokens), m.matched
        counted = (pairs.layer == len(m.target) - 1) & tokens.any(1)[pairs.row]
        image, query, row = torch.stack((pairs.image, pairs.query, pairs.row))[:, counted]
        # Instances for which no query was left are negatives all the same, as they are for other parts.
        rest = tokens.any(1)
        rest[row] = False
        own = send(torch.cat((tokens[row], tokens[rest])), self.device)
        if config.instance_negatives == "batch":
            elsewhere = torch.cat([own[len(row) :]] + ([] if elsewhere is None else [elsewhere]))
        image, query = send(torch.stack((image, query)), self.device)
        return config.instance_weight * losses.instance_loss(
            m.v[-1][image, query],
            own[: len(row)],
            image,
            tau=config.tau,
            negatives=config.instance_negatives,
            elsewhere=elsewhere,
            normaliser=m.instances,
        )

    def candidate_token_loss(self, m: Matching, elsewhere: Tensor | None, regions_elsewhere: Tensor | None) -> Tensor:
        """L_l of the last decoder output between queries and the tokens of their regions; negatives are all other tokens
        of the batch's regions and instances."""
        config, tokens, pairs = self.config, torch.cat(m.batch.region_tokens), m.candidates
        last = pairs.layer == len(m.target) - 1
        image, query, row = torch.stack((pairs.image, pairs.query, pairs.row))[:, last]
        # Regions for which no query was left are negatives all the same, as they are for other parts.
        rest = torch.ones(len(tokens), dtype=torch.bool)
        rest[row] = False
        own = torch.cat((tokens[row], tokens[rest], _encoded(torch.cat(m.batch.instance_tokens))))
        own, (image, query) = send(own, self.device), send(torch.stack((image, query)), self.device)
        others = [tokens for tokens in (own[len(row) :], elsewhere, regions_elsewhere) if tokens is not None]
        return config.candidate_token_weight * losses.instance_loss(
            m.v[-1][image, query],
            own[: len(row)],
            image,
            tau=config.tau,
            negatives="batch",
            elsewhere=torch.cat(others),
            normaliser=m.regions,
        )

    def _negatives(self, own: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Row indices (B, T), uniform over the cached global tokens of the same view, never the image's own (D3)."""
        others, image, size = self.images - 1, own % self.images, (self.config.bank,)
        drawn = [torch.randint(max(others, 1), size, generator=rng, device=rng.device) for rng in generators]
        drawn = torch.stack(drawn).to(self.device)
        return (own - image)[:, None] + (drawn + (drawn >= image[:, None])).clamp(max=others)


class G2SCriterion:
    """L_g2s = L_mmd + lambda_s L_div + lambda_v L_gv2s + beta KL (paper Eq. 8 with D6), from cached queries alone."""

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
        image, query = (batch.category >= 0).nonzero(as_tuple=True)
        label, real = batch.category[image, query], send(batch.feature[image, query], self.device)
        eps = send(torch.randn(len(label), self.text.shape[-1], generator=generator), self.device)
        fake, mu, log_var = self.generator(real, self.text_of_class[send(label, self.device)], eps)
        terms = {"mmd": config.mmd_weight * losses.mmd_loss(fake, real)}
        if config.diversity_weight:
            terms["diversity"] = self.diversity_loss(fake, real, image, batch)
        if config.semantic_weight:
            terms["semantic"] = self.semantic_loss(fake, label)
        if config.kl_weight:
            terms["kl"] = config.kl_weight * losses.kl_loss(mu, log_var)
        return terms

    def diversity_loss(self, fake: Tensor, real: Tensor, image: Tensor, batch: QueryBatch) -> Tensor:
        """L_div (Eq. 7): f'_i against its f_i; negatives are the image's other f'_j and its unmatched queries F_0."""
        void_image, void_query = (batch.category < 0).nonzero(as_tuple=True)
        unmatched = batch.feature[void_image, void_query]
        image, unmatched, void_image = (send(value, self.device) for value in (image, unmatched, void_image))
        loss = losses.diversity_loss(fake, real, image, unmatched, void_image, tau=self.config.tau)
        return self.config.diversity_weight * loss

    def semantic_loss(self, fake: Tensor, label: Tensor) -> Tensor:
        """L_gv2s (Eq. 8): the focal loss of P(F'_s) over A_s, the projector frozen."""
        logits = self.projector.logits(self.projector(fake), self.text)
        target = one_hot(send(self.seen_row[label], self.device), len(self.text))
        return self.config.semantic_weight * losses.focal_loss(logits, target, normaliser=len(label))


class CPACriterion:
    """L_f = focal(P(F) over A_s) + focal(P(F'_u) over A) (paper Eq. 9): real seen and synthetic unseen features.

    Only the projector is trained. `text`: the classifier's rows, `Model.text`: A, or the identity for a linear
    classifier.
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
        self.unseen = torch.tensor([k for k, seen in enumerate(bank.seen) if not seen])

    def __call__(self, batch: QueryBatch, step: int) -> Iterator[dict[str, Tensor]]:
        yield self.terms(batch, step_generator(self.config.seed, step))

    def terms(self, batch: QueryBatch, generator: torch.Generator) -> dict[str, Tensor]:
        return {"real": self.real_loss(batch), "synthetic": self.synthetic_loss(generator)}

    def real_loss(self, batch: QueryBatch) -> Tensor:
        """focal(P(F)) of all cached queries over A_s only, so unseen objects are no negatives of their class."""
        category = batch.category
        row = torch.where(category >= 0, self.seen_row[category], -1)
        target = one_hot(send(row, self.device), len(self.text))
        logits = self.projector.logits(self.projector(send(batch.feature, self.device)), self.text)
        matched = max(int((category >= 0).sum()), 1)
        return self.config.real_weight * losses.focal_loss(logits, target, normaliser=matched)

    def synthetic_loss(self, generator: torch.Generator) -> Tensor:
        """focal(P(F'_u)) over A of U generated features, each of an unseen class drawn uniformly (D7)."""
        config = self.config
        drawn = torch.randint(len(self.unseen), (config.synthetic,), generator=generator)
        label = send(self.unseen[drawn], self.device)
        fake = self.generator.generate(self.text_of_class[label], noise_into=config.noise_into, rng=generator)
        logits = self.projector.logits(self.projector(fake), self.all_text)
        target = one_hot(label, len(self.all_text))
        return config.synthetic_weight * losses.focal_loss(logits, target, normaliser=config.synthetic)


def _but(tokens: Sequence[Tensor], number: int) -> Tensor | None:
    """The tokens of all parts of the global batch but this one; None where there is no other."""
    return torch.cat([*tokens[:number], *tokens[number + 1 :]]) if len(tokens) > 1 else None


def _encoded(tokens: Tensor) -> Tensor:
    """Tokens (N, D) without the zero rows of segments that were too small for the teacher."""
    return tokens[tokens.any(1)]


def freeze(module: Frozen) -> Frozen:
    """Put a module of an earlier stage into evaluation mode without gradients, in place, and return it."""
    return module.eval().requires_grad_(False)
