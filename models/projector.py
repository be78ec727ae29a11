"""The class projector P: from query features to the teacher's embedding space, and from there to class logits."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError

MAX_SCALE = 100.0  # as in CLIP


def class_products(v: Tensor, text: Tensor) -> Tensor:
    """Scalar products: v (..., D), text (K, D) -> (..., K); of text (K, S, D), S names a class, the largest a class."""
    products = v @ text.flatten(0, -2).T
    return products.unflatten(-1, text.shape[:2]).amax(-1) if text.ndim == 3 else products


class Projector(nn.Module):
    """V = P(F), an MLP, and the class logits l_qk = e^s cos(v_q, a_k) + b (D1).

    e^s starts at 20 and b at -0.6 * 20, the focal prior (-4.6) for wrong classes at cosine 0.37. Both are learned, but
    slowly, so give `log_scale` and `bias` a learning rate of their own and no weight decay.

    Attributes:
        log_scale: s, scalar; e^s is clamped to 100 wherever it is used (above, s has no gradient).
        bias: b, scalar.
        text_center: (D,) buffer subtracted from the text rows before the cosine (option `text_centering` of D1: the
            mean of the seen rows); zeros at the start.

    Args:
        dim: C, size of a query feature. text_dim: D, size of a text embedding.
        hidden: width between the layers. layers: number of linear layers, 1 or more (1 = a linear map, `hidden`
            unused).
    """

    text_center: Tensor

    def __init__(self, *, dim: int, text_dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        if layers < 1:
            raise ModelError(f"layers is {layers}; a projector needs 1 or more")
        widths = [dim, *[hidden] * (layers - 1), text_dim]
        mlp: list[nn.Module] = []
        for before, after in pairwise(widths):
            mlp += [nn.Linear(before, after), nn.ReLU()]
        self.mlp = nn.Sequential(*mlp[:-1])
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))
        self.bias = nn.Parameter(torch.tensor(-0.6 * 20.0))
        self.register_buffer("text_center", torch.zeros(text_dim))

    def forward(self, features: Tensor) -> Tensor:
        """Query features (..., C) -> V (..., D), not normalised."""
        return self.mlp(features)

    def logits(self, v: Tensor, text: Tensor) -> Tensor:
        """Class logits: v (..., D), text (K, D) -> (..., K), in the parameters' precision, under autocast too.

        Text (K, S, D) has S names a class, which gets the largest of their logits.
        """
        precision = self.log_scale.dtype
        with torch.autocast(v.device.type, enabled=False):
            classes = F.normalize(text.to(precision) - self.text_center, dim=-1)
            cosine = class_products(F.normalize(v.to(precision), dim=-1), classes)
            return self.log_scale.exp().clamp(max=MAX_SCALE) * cosine + self.bias
