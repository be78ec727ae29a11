"""The whole segmenter under torch.compile and under bfloat16 autocast."""

from __future__ import annotations

import pytest
import torch
from small_segmenter import small_segmenter
from torch import Tensor

from models.mask_logits import MaskLogits
from models.segmenter import Segmenter, SegmenterOutput

ARCHITECTURES = ("mask2former", "maskformer")


def learnt(segmenter: Segmenter, output: SegmenterOutput) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Features, the matched masks and every gradient, in float32."""
    masks = output.masks
    assert isinstance(masks, MaskLogits)
    layer, image, query = torch.tensor([[3, 0, 1, 3], [0, 1, 1, 0], [2, 4, 0, 1]])
    rows = masks[layer, image, query].float()
    features = output.features.float()
    segmenter.zero_grad()
    (features.square().mean() + rows.square().mean()).backward()
    gradients = {name: p.grad.float() for name, p in segmenter.named_parameters() if p.grad is not None}
    return features.detach(), rows.detach(), gradients


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_compiles_without_a_graph_break(architecture: str) -> None:
    """Forward and backward are traced, and say the same; after a run that filled the caches."""
    segmenter = small_segmenter(architecture=architecture).eval()
    compiled = torch.compile(segmenter, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 32, 64)
    expected, found = (learnt(segmenter, run(images, dense=False)) for run in (segmenter, compiled))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_autocast_is_close(architecture: str) -> None:
    segmenter = small_segmenter(architecture=architecture).eval()
    images = torch.randn(2, 3, 64, 96)
    expected = learnt(segmenter, segmenter(images, dense=False))
    with torch.autocast("cpu", torch.bfloat16):
        output = segmenter(images, dense=False)
        assert output.masks.pixels.dtype == torch.bfloat16
        found = learnt(segmenter, output)

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    assert apart(found[0], expected[0]) < 0.03 and apart(found[1], expected[1]) < 0.03
    assert all(gradient.isfinite().all() for gradient in found[2].values())
    ours, theirs = (
        torch.cat([gradients[name].flatten() for name in expected[2]]) for gradients in (found[2], expected[2])
    )
    assert apart(ours, theirs) < 0.3
