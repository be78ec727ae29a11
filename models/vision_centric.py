"""The comparison that needs no language in its features: a trained linear classifier, and a generator made of primitives.

The idea is that of PADing (He et al., CVPR 2023), the method that the paper compares with: a plain segmenter, features of unseen
classes put together from learned primitives, and a classifier trained on both. Only the idea: its disentanglement and its
alignment of relations are left out.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

PRIOR = 0.01  # a class's probability before anything is learned (Lin et al. 2017)
HEADS = 4


class LinearClassifier(nn.Module):
    """One weight row and one bias a class, in place of the projector: it knows nothing of names.

    It begins with all rows zero and every class at probability `PRIOR`, so a class that it was never shown stays there.

    Args:
        dim: C, size of a query feature. classes: K.
    """

    def __init__(self, *, dim: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, math.log(PRIOR / (1 - PRIOR)))

    def forward(self, features: Tensor) -> Tensor:
        """Query features (..., C) as they are: what the projector makes of them has no counterpart here."""
        return features

    def logits(self, v: Tensor, text: Tensor) -> Tensor:
        """Class logits: v (..., C), text (n, K) rows of the identity, which choose n of the K classes -> (..., n)."""
        return self.linear(v) @ text.T


class PrimitiveGenerator(nn.Module):
    """Query features out of learned primitives: a class's text embedding and noise ask, by cross-attention, for a mixture.

    It is trained as a moment-matching network, by L_mmd alone (paper Eq. 6), and has `Generator`'s interface.

    Args:
        dim: C, size of a query feature. text_dim: D, size of a text embedding and of the noise. hidden: width, a multiple of
            `HEADS`. text_scale: as `Generator`'s, for its noise is as long. primitives: how many are learned. layers: attention
            blocks.
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
            generated features (N, C), and zeros (N, D) twice: it has no latent, so `kl_loss` of these is 0. `features` (N, C)
            are not looked at; the loss compares with them.
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
        """Features of classes known by text alone: (U, D) -> (U, C), no gradient; noise has one way in, whatever `noise_into`."""
        noise = torch.randn(len(text), self.text_dim, generator=rng, device=rng.device).to(text)
        return self(text.new_zeros(len(text), self.dim), text, noise)[0]
