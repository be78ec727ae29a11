from __future__ import annotations

import pytest
import torch
from small_segmenter import randomise_batchnorm, small_segmenter
from torch import nn

from models.folding import for_inference
from models.winograd import WinogradConv


@pytest.mark.parametrize(
    ("backbone", "batchnorm"),
    [("test_resnet", True), ("resnet18", True), ("test_convnext", False), ("swin_tiny_patch4_window7_224", False)],
)
def test_it_predicts_the_same_without_batchnorm(backbone: str, batchnorm: bool) -> None:
    segmenter = small_segmenter(backbone=backbone).eval()
    randomise_batchnorm(segmenter)
    folded = for_inference(segmenter)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = folded(images), segmenter(images)
    torch.testing.assert_close(ours.features, theirs.features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.masks, theirs.masks, atol=1e-4, rtol=1e-4)
    before, after = ([m for m in net.modules() if isinstance(m, nn.BatchNorm2d)] for net in (segmenter, folded))
    assert (bool(before), len(after)) == (batchnorm, 0)
    assert any(isinstance(m, WinogradConv) for m in folded.modules()) == (backbone == "resnet18")


def test_it_is_a_frozen_copy() -> None:
    segmenter = small_segmenter(backbone="test_resnet")
    folded = for_inference(segmenter)
    assert segmenter.training and not any(module.training for module in folded.modules())
    assert all(p.requires_grad for p in segmenter.parameters()) and not any(
        p.requires_grad for p in folded.parameters()
    )
    images = torch.randn(1, 3, 32, 32)
    before = folded(images).features
    with torch.no_grad():
        for parameter in segmenter.parameters():
            parameter.zero_()
    assert torch.equal(folded(images).features, before)
