"""The class projector: its logits are D1's, wherever scale, centre and precision come from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from models.projector import Projector


def make(layers: int = 3) -> Projector:
    torch.manual_seed(0)
    return Projector(dim=6, text_dim=4, hidden=8, layers=layers).double()


def slow_logits(v: Tensor, text: Tensor, center: Tensor, scale: float, bias: float) -> Tensor:
    rows = [[scale * float(q @ (a - center) / q.norm() / (a - center).norm()) + bias for a in text] for q in v]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_it_is_a_multilayer_perceptron(layers: int) -> None:
    projector = make(layers)
    weights = [m.weight for m in projector.modules() if isinstance(m, nn.Linear)]
    assert len(weights) == layers
    x = expected = torch.randn(5, 6, dtype=torch.float64)
    for i, linear in enumerate(m for m in projector.modules() if isinstance(m, nn.Linear)):
        expected = (expected.clamp(min=0) if i else expected) @ linear.weight.T + linear.bias
    torch.testing.assert_close(projector(x), expected)
    assert projector(x.expand(2, 3, 5, 6)).shape == (2, 3, 5, 4)


def test_logits_start_at_scale_20_and_bias_minus_12() -> None:
    projector, v, text = make(), torch.randn(5, 4).double(), torch.randn(3, 4).double()
    zero = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(projector.logits(v, text), slow_logits(v, text, zero, 20.0, -12.0), rtol=1e-6, atol=1e-5)
    assert projector.logits(v.expand(2, 5, 4), text).shape == (2, 5, 3)
    torch.testing.assert_close(projector.logits(v * 7, text), projector.logits(v, text))


def test_text_is_centred_then_normalised_again() -> None:
    projector, v, text = make(), torch.randn(5, 4).double(), torch.randn(3, 4).double() + 3
    plain = projector.logits(v, text)
    projector.text_center.copy_(text.mean(0))
    torch.testing.assert_close(
        projector.logits(v, text), slow_logits(v, text, text.mean(0), 20.0, -12.0), rtol=1e-6, atol=1e-5
    )
    assert not torch.allclose(projector.logits(v, text), plain)
    other = make()
    other.load_state_dict(projector.state_dict())  # the centre travels with the weights
    assert torch.equal(other.logits(v, text), projector.logits(v, text))


def test_the_scale_stops_at_100() -> None:
    projector, text = make(), torch.eye(4).double()
    with torch.no_grad():
        projector.bias.zero_()
        projector.log_scale.fill_(math.log(90.0))
        assert projector.logits(text, text).max() == pytest.approx(90)
        projector.log_scale.fill_(math.log(500.0))
        assert projector.logits(text, text).max() == pytest.approx(100)


def test_gradients_are_the_numerical_ones() -> None:
    projector, x, text = make(), torch.randn(3, 6).double().requires_grad_(), torch.randn(2, 4).double()
    assert torch.autograd.gradcheck(lambda x: projector.logits(projector(x), text), [x])
    projector.logits(projector(x), text).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())


def test_logits_keep_the_parameters_precision_under_autocast() -> None:
    projector, v, text = make().float(), torch.randn(5, 4), torch.randn(3, 4)
    expected = projector.logits(v, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(projector.logits(v, text), expected)
        assert projector.logits(v.bfloat16(), text.half()).dtype == torch.float32


def test_a_projector_has_a_layer() -> None:
    with pytest.raises(ValueError, match="layers is 0"):
        make(0)
