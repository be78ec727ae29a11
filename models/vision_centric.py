"""The comparison without language in its features: a trained linear classifier, and a generator of learned primitives.

The idea is that of PADing (He et al., CVPR 2023), with which the paper compares: a plain segmenter, features of unseen
classes generated from learned primitives, and a classifier trained on both. PADing's disentanglement and its alignment
of relations are left out.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from models.transfer import send

PRIOR = 0.01  # initial probability of a class (Lin et al. 2017)
HEADS = 4


class LinearClassifier(nn.Module):
    """One weight row and one bias a class, in place of the projector; text embeddings are not used.

    All rows start at zero and every class at probability `PRIOR`, where a class that is not in the training data stays.

    Args:
        dim: C, size of a query feature. classes: K.
    """

    def __init__(self, *, dim: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, math.log(PRIOR / (1 - PRIOR)))

    def forward(self, features: Tensor) -> Tensor:
        """Query features (..., C), unchanged: there is no projection."""
        return features

    def logits(self, v: Tensor, text: Tensor) -> Tensor:
        """Class logits: v (..., C), text (n, K), rows of the identity that select n of the K classes -> (..., n)."""
        return self.linear(v) @ text.T


class PrimitiveGenerator(nn.Module):
    """Query features as mixtures of learned primitives, by cross-attention from a class's text embedding and noise.

    It is trained as a moment-matching network, by L_mmd alone (paper Eq. 6), and has `Generator`'s interface.

    Args:
        dim: C, size of a query feature. text_dim: D, size of a text embedding and of the noise. hidden: width, a
            multiple of `HEADS`. text_scale: as of `Generator`, whose noise has the same length. primitives: their
            number. layers:
            attention blocks.
    """

    def __init__(
        self, *, dim: int, text_dim: int, hidden: int, text_scale: float, primitives: int = 64, layers: int = 2
    ) -> None:
        super().__init__()
        self.dim, self.text_dim = dim, text_dim
        self.scale = text_scale * math.sqrt(text_dim)
        self.ask = nn.Linear(2 * text_dim, hidden)
        self.primitives = nn.Parameter(torch.randn(primitives, hidden))
        self.attention = nn.ModuleList(nn.MultiheadAttention(hidden, HEADS, batch_first=True) for _ in range(layers))
        self.feedforward = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
            for _ in range(layers)
        )
        self.answer = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, dim))

    def forward(self, features: Tensor, text: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the classes `text` (N, D), unit norm, from the noise `eps` (N, D).

        Returns:
            generated features (N, C), and zeros (N, D) twice: it has no latent, so `kl_loss` of these is 0. `features`
            (N, C) are not used; the loss compares with them.
        """
        hidden = self.ask(torch.cat((self.scale * text, eps), dim=-1))
        primitives = self.primitives[None]
        for attention, feedforward in zip(self.attention, self.feedforward, strict=True):
            mixed, _ = attention(hidden[None], primitives, primitives, need_weights=False)
            hidden = hidden + mixed[0]
            hidden = hidden + feedforward(hidden)
        return self.answer(hidden), torch.zeros_like(text), torch.zeros_like(text)

    @torch.no_grad()
    def generate(self, text: Tensor, *, noise_into: Literal["encoder", "latent"], rng: torch.Generator) -> Tensor:
        """Features of classes from their text alone: (U, D) -> (U, C), no gradient; `noise_into` has no effect."""
        noise = send(torch.randn(len(text), self.text_dim, generator=rng), text.device).to(text.dtype)
        return self(text.new_zeros(len(text), self.dim), text, noise)[0]
