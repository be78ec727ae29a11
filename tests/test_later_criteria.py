"""What stages 2 and 3 minimise, against slow loops over images and queries; and who learns from it, and from what."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from loss_samples import (
    DIM,
    QUERIES,
    SEEN,
    TEXT_DIM,
    bank,
    cosine,
    info_nce,
    naive_focal,
    projector,
    rng,
    unit,
    values,
    with_other_unseen,
)
from torch import Tensor, nn

from models import losses
from models.generator import Generator
from models.projector import Projector
from pipeline.teacher.text_bank import TextBank
from pipeline.training.config import CPAConfig, G2SConfig
from pipeline.training.criteria import CPACriterion, G2SCriterion, freeze
from pipeline.training.query_loader import QueryBatch

G2S = G2SConfig(hidden=12, tau=0.3, diversity_weight=0.5, semantic_weight=2.0, kl_weight=0.25)
CPA = CPAConfig(synthetic=9, synthetic_weight=0.5)


def queries() -> QueryBatch:
    """Three images: 3, 1 and 2 of 6 queries matched, to seen classes."""
    category = torch.tensor([[0, -1, 3, -1, 6, -1], [-1, 2, -1, -1, -1, -1], [6, 0, -1, -1, -1, -1]])
    return QueryBatch(image_ids=[1, 2, 3], feature=torch.randn(3, QUERIES, DIM, generator=rng(10)), category=category)


def generator() -> Generator:
    torch.manual_seed(11)
    made = Generator(dim=DIM, text_dim=TEXT_DIM, hidden=12, text_scale=1.0)
    made(torch.randn(32, DIM), unit(32, TEXT_DIM, seed=12), torch.randn(32, TEXT_DIM))  # moves the running statistics
    return made


def g2s(config: G2SConfig = G2S, texts: TextBank | None = None) -> G2SCriterion:
    frozen = projector()
    freeze(frozen)
    return G2SCriterion(generator().train(), frozen, texts or bank(), config)


def test_stage_2_is_the_sum_of_its_terms() -> None:
    step = g2s()
    copied = copy.deepcopy(step.generator)
    terms = values(step.terms(queries(), rng(3)))
    data = queries()
    image, query = [0, 0, 0, 1, 2, 2], [0, 2, 4, 1, 0, 1]
    label = [0, 3, 6, 2, 6, 0]
    real = data.feature[image, query]
    with torch.no_grad():
        fake, mu, log_var = copied(real, bank().embedding[label], torch.randn(6, TEXT_DIM, generator=rng(3)))
        logits = step.projector.logits(step.projector(fake), bank().embedding[[0, 2, 3, 6]])
    targets = torch.zeros(6, 4)
    targets[range(6), [0, 2, 3, 1, 3, 0]] = 1

    def kernel(a: Tensor, b: Tensor) -> float:
        square = float((a.double() - b.double()).square().sum())
        return sum(float(torch.exp(torch.tensor(-square / (2 * s * s)))) for s in (2, 5, 10, 20, 40, 80)) / 6

    def mean(x: Tensor, y: Tensor) -> float:
        return sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))

    diversity = []
    for i in range(6):
        same = [fake[j] for j in range(6) if j != i and image[j] == image[i]]
        same += [data.feature[image[i], q] for q in range(QUERIES) if data.category[image[i], q] < 0]
        diversity.append(info_nce(cosine(fake[i], real[i]) / G2S.tau, [cosine(fake[i], n) / G2S.tau for n in same]))
    assert terms == pytest.approx(
        {
            "mmd": mean(fake, fake) + mean(real, real) - 2 * mean(fake, real),
            "diversity": 0.5 * sum(diversity) / 6,
            "semantic": 2.0 * naive_focal(logits, targets) / 6,
            "kl": 0.25 * float(0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum() / 6),
        },
        rel=1e-3,
    )


@pytest.mark.parametrize("name", ["diversity", "semantic", "kl"])
def test_each_loss_of_stage_2_can_be_switched_off(name: str) -> None:
    whole = values(g2s().terms(queries(), rng(3)))
    without = values(g2s(replace(G2S, **{f"{name}_weight": 0.0})).terms(queries(), rng(3)))
    assert set(whole) - set(without) == {name}
    assert all(without[other] == whole[other] for other in without)


def test_stage_2_draws_from_its_generator_alone() -> None:
    torch.manual_seed(0)
    one = values(g2s().terms(queries(), rng(3)))
    step = g2s()
    torch.manual_seed(1)
    assert values(step.terms(queries(), rng(3))) == one
    assert values(g2s().terms(queries(), rng(4)))["mmd"] != one["mmd"]


def test_only_the_generator_learns_in_stage_2() -> None:
    step = g2s()
    before = copy.deepcopy(step.projector.state_dict())
    torch.stack(list(step.terms(queries(), rng(3)).values())).sum().backward()
    assert all(p.grad is None for p in step.projector.parameters())
    assert all(torch.equal(v, before[k]) for k, v in step.projector.state_dict().items())
    for name, parameter in step.generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_stage_2_knows_nothing_of_unseen_classes() -> None:
    assert values(g2s(texts=with_other_unseen(bank())).terms(queries(), rng(3))) == values(
        g2s().terms(queries(), rng(3))
    )


def cpa(config: CPAConfig = CPA, texts: TextBank | None = None, *, training: bool = False) -> CPACriterion:
    made = generator()
    freeze(made)
    return CPACriterion(
        projector().train(), made.train(training), texts or bank(), config, text=(texts or bank()).embedding
    )


@pytest.mark.parametrize("noise_into", ["encoder", "latent"])
def test_stage_3_is_the_sum_of_its_terms(noise_into: str) -> None:
    config = replace(CPA, noise_into=noise_into)
    step, data, draws = cpa(config), queries(), rng(3)
    terms = values(step.terms(data, rng(3)))
    targets = torch.zeros(3, QUERIES, 4)
    for image, query, row in [(0, 0, 0), (0, 2, 2), (0, 4, 3), (1, 1, 1), (2, 0, 3), (2, 1, 0)]:
        targets[image, query, row] = 1
    with torch.no_grad():
        real = step.projector.logits(step.projector(data.feature), bank().embedding[[0, 2, 3, 6]])
        label = [[1, 4, 5][i] for i in torch.randint(3, (9,), generator=draws).tolist()]
        fake = step.generator.generate(bank().embedding[label], noise_into=config.noise_into, rng=draws)
        synthetic = step.projector.logits(step.projector(fake), bank().embedding)
    synthetic_targets = torch.zeros(9, 7)
    synthetic_targets[range(9), label] = 1
    expected = {
        "real": naive_focal(real, targets) / 6,
        "synthetic": 0.5 * naive_focal(synthetic, synthetic_targets) / 9,
    }
    assert terms == pytest.approx(expected, rel=1e-4)
    assert len(set(label)) > 1


def test_views_without_a_match_are_normalised_by_one() -> None:
    step = cpa()
    data = replace(queries(), category=torch.full((3, QUERIES), -1))
    logits = step.projector.logits(step.projector(data.feature), step.text)
    assert step.terms(data, rng(3))["real"].item() == pytest.approx(
        naive_focal(logits, torch.zeros_like(logits)), rel=1e-4
    )


def test_only_the_projector_learns_in_stage_3() -> None:
    step = cpa(training=True)
    before = copy.deepcopy(step.generator.state_dict())
    torch.stack(list(step.terms(queries(), rng(3)).values())).sum().backward()
    assert all(p.grad is None for p in step.generator.parameters())
    for name, parameter in step.projector.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    after = step.generator.state_dict()  # BatchNorm's statistics among it
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(m.training for m in step.generator.modules())


def test_real_features_never_push_unseen_classes() -> None:
    embedding = bank().embedding.requires_grad_()
    terms = cpa(texts=replace(bank(), embedding=embedding)).terms(queries(), rng(3))
    (real,) = torch.autograd.grad(terms["real"], [embedding], retain_graph=True)
    assert [bool(row.any()) for row in real] == SEEN
    (synthetic,) = torch.autograd.grad(terms["synthetic"], [embedding])
    assert all(row.any() for row in synthetic)
    one, other = (
        values(cpa().terms(queries(), rng(3))),
        values(cpa(texts=with_other_unseen(bank())).terms(queries(), rng(3))),
    )
    assert one["real"] == other["real"] and one["synthetic"] != other["synthetic"]


def test_synthetic_classes_are_drawn_uniformly_among_the_unseen() -> None:
    """Seen through the targets: with every logit at 0, a class's gradient counts how often it was drawn."""
    step = cpa(replace(CPA, synthetic=9_000, synthetic_weight=1.0))
    assert isinstance(step.projector, Projector)
    with torch.no_grad():
        step.projector.log_scale.fill_(-20.0)  # logits are the bias, which is 0
        step.projector.bias.zero_()
    step.projector.bias = nn.Parameter(torch.zeros(len(SEEN)))  # one bias a class, to read the counts from
    step.text = bank().embedding
    step.seen_row = torch.arange(len(SEEN))
    (gradient,) = torch.autograd.grad(step.terms(queries(), rng(3))["synthetic"] * 9_000, [step.projector.bias])
    # at logit 0 a positive's derivative is a, a negative's b: gradient = n a + (9000 - n) b
    z = torch.zeros(2, requires_grad=True)
    a, b = torch.autograd.grad(losses.focal_loss(z, torch.tensor([1, 0]), normaliser=1), [z])[0].tolist()
    counts = (gradient - 9_000 * b) / (a - b)
    assert counts[torch.tensor(SEEN)].abs().max() < 1
    assert counts.sum().item() == pytest.approx(9_000, abs=5)
    assert ((counts[~torch.tensor(SEEN)] - 3_000).abs() < 5 * (9_000 * 2 / 9) ** 0.5).all()
