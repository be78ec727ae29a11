"""The conditional VAE: its structure, what it computes, and that generating leaves no trace in it."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from models import losses
from models.generator import Generator

Noise = Literal["encoder", "latent"]


def make(dim: int = 6, text_dim: int = 4) -> Generator:
    """A generator in training mode whose running statistics are not the start's."""
    torch.manual_seed(0)
    generator = Generator(dim=dim, text_dim=text_dim, hidden=8, text_scale=1.5)
    generator(torch.randn(32, dim) * 3 + 1, torch.randn(32, text_dim), torch.randn(32, text_dim))
    return generator


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state(generator: Generator) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in generator.state_dict().items()}


def test_encoder_and_decoder_have_four_layers_each() -> None:
    generator = make()
    for part, linear in ((generator.encoder, 4), (generator.decoder, 5)):
        kinds = [type(m) for m in part.modules() if not isinstance(m, nn.Sequential)]
        assert kinds == [nn.Linear, nn.BatchNorm1d, nn.LeakyReLU] * 4 + [nn.Linear] * (linear - 4)


def test_forward_adds_the_text_to_the_drawn_latent() -> None:
    generator = make().eval()
    features, text, eps = torch.randn(5, 6), torch.randn(5, 4), torch.randn(5, 4)
    fake, mu, log_var = generator(features, text, eps)
    assert fake.shape == (5, 6)
    assert mu.shape == log_var.shape == (5, 4)
    torch.testing.assert_close(mu, generator.encode(features)[0])
    length = 1.5 * 4**0.5  # text_scale in units of sqrt(D)
    torch.testing.assert_close(fake, generator.decoder(mu + torch.exp(log_var).sqrt() * eps + length * text))
    torch.testing.assert_close(fake, generator.decode(mu + torch.exp(log_var).sqrt() * eps, text))
    # a + c in the text is as much in the latent
    shifted = generator(features, text + 1, torch.zeros_like(eps))[0]
    torch.testing.assert_close(shifted, generator.decode(mu + length, text))


def test_every_parameter_learns() -> None:
    generator = make()
    fake, mu, log_var = generator(torch.randn(9, 6), torch.randn(9, 4), torch.randn(9, 4))
    (fake.square().sum() + mu.sum() + log_var.sum()).backward()
    assert all(p.grad is not None for p in generator.parameters())


@pytest.mark.parametrize("noise_into", ["encoder", "latent"])
def test_generating_leaves_no_trace(noise_into: Noise) -> None:
    generator = make()
    generator.decoder.eval()  # a mixture of modes comes back as it was
    before, modes = state(generator), [m.training for m in generator.modules()]
    fake = generator.generate(torch.randn(7, 4), noise_into=noise_into, rng=rng())
    after = state(generator)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [m.training for m in generator.modules()] == modes
    assert fake.shape == (7, 6)
    assert not fake.requires_grad


def test_training_does_move_the_statistics() -> None:
    generator = make()
    before = state(generator)
    generator(torch.randn(7, 6), torch.randn(7, 4), torch.randn(7, 4))
    assert not torch.equal(before["encoder.1.running_mean"], state(generator)["encoder.1.running_mean"])


def test_noise_enters_where_it_is_told_to() -> None:
    generator, text = make(), torch.randn(7, 4)
    found = {into: generator.generate(text, noise_into=into, rng=rng(3)) for into in ("encoder", "latent")}
    generator.eval()
    draw = rng(3)
    features, eps = torch.randn(7, 6, generator=draw), torch.randn(7, 4, generator=draw)
    torch.testing.assert_close(found["encoder"], generator(features, text, eps)[0])
    torch.testing.assert_close(found["latent"], generator.decode(torch.randn(7, 4, generator=rng(3)), text))


@pytest.mark.parametrize("noise_into", ["encoder", "latent"])
def test_draws_come_from_the_seed_alone(noise_into: Noise) -> None:
    generator, text = make(), torch.randn(7, 4)
    one, two, other = (generator.generate(text, noise_into=noise_into, rng=rng(s)) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    same_class_twice = generator.generate(text[:1].expand(2, 4), noise_into=noise_into, rng=rng())
    assert not torch.equal(same_class_twice[0], same_class_twice[1])


@pytest.mark.parametrize("noise_into", ["encoder", "latent"])
def test_rows_do_not_depend_on_the_rest_of_the_batch(noise_into: Noise) -> None:
    generator, text = make(), torch.randn(7, 4)
    found = generator.generate(text, noise_into=noise_into, rng=rng())
    text[1:] = torch.randn(6, 4) * 5
    other = generator.generate(text, noise_into=noise_into, rng=rng())
    torch.testing.assert_close(other[0], found[0])
    assert not torch.isclose(other[1:], found[1:]).any(1).all()
    assert generator.generate(text[:1], noise_into=noise_into, rng=rng()).shape == (1, 6)


def test_another_place_for_noise_is_a_bug_and_modes_are_restored() -> None:
    generator = make()
    with pytest.raises(AssertionError, match="decoder"):
        generator.generate(torch.randn(2, 4), noise_into="decoder", rng=rng())  # pyright: ignore[reportArgumentType]
    assert all(m.training for m in generator.modules())


def named_right(*, text_scale: float, kl_weight: float) -> float:
    """Share of generated features whose nearest class centre is that of their name, after 200 steps on twelve
    clusters.
    """
    torch.manual_seed(0)
    classes, dim, text_dim = 12, 16, 32
    text = nn.functional.normalize(torch.randn(classes, text_dim), dim=-1)
    centres = 6 * nn.functional.normalize(text @ torch.randn(text_dim, dim), dim=-1)
    generator = Generator(dim=dim, text_dim=text_dim, hidden=64, text_scale=text_scale)
    adam = torch.optim.Adam(generator.parameters(), lr=1e-3)
    images = torch.arange(16).repeat_interleave(4)
    nobody = torch.zeros(0, dim), torch.zeros(0, dtype=torch.long)
    for _ in range(200):
        label = torch.randint(classes, (len(images),))
        real = centres[label] + 0.5 * torch.randn(len(images), dim)
        fake, mu, log_var = generator(real, text[label], torch.randn(len(images), text_dim))
        diversity = losses.diversity_loss(fake, real, images, *nobody, tau=0.1)
        adam.zero_grad()
        (losses.mmd_loss(fake, real) + 0.01 * diversity + kl_weight * losses.kl_loss(mu, log_var)).backward()
        adam.step()
    label = torch.arange(classes).repeat(20)
    made = generator.generate(text[label], noise_into="encoder", rng=rng())
    return float((torch.cdist(made, centres).argmin(1) == label).float().mean())


def test_features_follow_their_names_where_the_text_is_as_long_as_the_latent() -> None:
    assert named_right(text_scale=2.0, kl_weight=1.0) > 0.7
    # a row of length 1 in a latent that nothing holds: what is made has little to do with its name
    assert named_right(text_scale=32**-0.5, kl_weight=0.0) < 0.4
