"""Stage 2's generator: a conditional VAE from a text embedding to a query feature of that class (D5, D7)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from models.transfer import send
from models.vision_centric import PrimitiveGenerator

LAYERS = 4  # of the encoder and of the decoder, as in the paper


def _layers(inputs: int, hidden: int) -> nn.Sequential:
    """Four times Linear, BatchNorm1d, LeakyReLU: (N, inputs) -> (N, hidden)."""
    modules: list[nn.Module] = []
    for layer in range(LAYERS):
        modules += [nn.Linear(hidden if layer else inputs, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU()]
    return nn.Sequential(*modules)


class Generator(nn.Module):
    """Conditional VAE: z = mu + eps std from a feature, h = z + s a, and a generated feature from h.

    The text embedding a is ADDED, so the latent has its size (D5). The paper does not give the length of a there: with
    a row of length 1 beside a latent of length sqrt(D) the generated features did not depend on the class name. In
    training mode BatchNorm needs 2 rows or more.

    Args:
        dim: C, size of a query feature. text_dim: D, size of a text embedding and of the latent. hidden: width of all
            layers. text_scale: length of s a in units of sqrt(D), which is that of a standard normal latent.
    """

    def __init__(self, *, dim: int, text_dim: int, hidden: int, text_scale: float) -> None:
        super().__init__()
        self.dim, self.text_dim = dim, text_dim
        self.scale = text_scale * math.sqrt(text_dim)
        self.encoder = _layers(dim, hidden)
        self.mu = nn.Linear(hidden, text_dim)
        self.log_var = nn.Linear(hidden, text_dim)
        self.decoder = nn.Sequential(_layers(text_dim, hidden), nn.Linear(hidden, dim))

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, C) -> mean and log variance of the latent, (N, D) each."""
        hidden = self.encoder(features)
        return self.mu(hidden), self.log_var(hidden)

    def decode(self, z: Tensor, text: Tensor) -> Tensor:
        """Latent (N, D) and text embeddings (N, D), unit norm -> features (N, C)."""
        return self.decoder(z + self.scale * text)

    def forward(self, features: Tensor, text: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct real features through the latent.

        Args:
            features: (N, C), real, of queries matched to a segment (F_s). text: (N, D), unit norm, of each one's class.
            eps: (N, D), standard normal draws.

        Returns:
            generated features (N, C), mu (N, D), log_var (N, D).
        """
        mu, log_var = self.encode(features)
        return self.decode(mu + eps * (0.5 * log_var).exp(), text), mu, log_var

    @torch.no_grad()
    def generate(self, text: Tensor, *, noise_into: Literal["encoder", "latent"], rng: torch.Generator) -> Tensor:
        """Features of classes from their text alone: (U, D) -> (U, C), no gradient.

        BatchNorm uses its running statistics, and every module's mode is restored afterwards: in training mode each
        call would update the statistics, and so change the generator for all later calls.

        Args:
            text: (U, D), unit norm, one row for each feature to generate; U may be 1.
            noise_into: D7. "encoder" (the paper's words): normal noise of size C passes the encoder, and the latent is
                drawn from its output; "latent": the latent itself is standard normal.
            rng: draws on the CPU, so that every machine gets the same noise.
        """

        def normal(size: int) -> Tensor:
            return send(torch.randn(len(text), size, generator=rng), text.device).to(text.dtype)

        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            if noise_into == "encoder":
                return self(normal(self.dim), text, normal(self.text_dim))[0]
            assert noise_into == "latent", noise_into
            return self.decode(normal(self.text_dim), text)
        finally:
            for module, mode in modes:
                module.training = mode


def build_generator(
    *, generator: Literal["vae", "primitives"], dim: int, text_dim: int, hidden: int, text_scale: float
) -> Generator | PrimitiveGenerator:
    """A generator with random weights, drawn from torch's global generator: seed it first. Sizes as in `Generator`."""
    kinds = {"vae": Generator, "primitives": PrimitiveGenerator}
    return kinds[generator](dim=dim, text_dim=text_dim, hidden=hidden, text_scale=text_scale)
