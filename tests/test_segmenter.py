from __future__ import annotations

import pytest
import torch
from small_segmenter import small_segmenter
from torch import Tensor, nn

from models.pixel_decoder import sine_positions
from models.query_decoder import Attention, QueryDecoder, attention_mask


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (160, 32)])
def test_shapes_and_gradients(height: int, width: int) -> None:
    segmenter = small_segmenter()
    features, masks = segmenter(torch.randn(2, 3, height, width))
    assert features.shape == (5, 2, 5, 32)
    assert masks.shape == (5, 2, 5, height // 4, width // 4)
    (features.square().sum() + masks.square().sum()).backward()
    for name, parameter in segmenter.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_features_are_normalised_and_masks_follow_from_them() -> None:
    """Every output passes the final norm, and its masks are MLP(features) . mask features."""
    segmenter = small_segmenter().eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features, masks = segmenter(images)
        _, mask_features = segmenter.pixel_decoder(segmenter.backbone(images))
    embeddings = segmenter.query_decoder.mask_mlp(features)
    expected = (embeddings[..., None, None] * mask_features[None, :, None]).sum(3)
    torch.testing.assert_close(masks, expected)
    torch.testing.assert_close(features.mean(-1), torch.zeros(5, 2, 5), atol=1e-5, rtol=0)  # LayerNorm at its start
    assert not torch.allclose(features[-1], features[-2])


def test_images_of_a_batch_do_not_touch_each_other() -> None:
    segmenter = small_segmenter().eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        together = segmenter(images)
        alone = segmenter(images[1:2])
    torch.testing.assert_close(together.features[:, 1:2], alone.features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.masks[:, 1:2], alone.masks, atol=1e-4, rtol=1e-4)


def test_training_after_inference_mode() -> None:
    """What is cached a shape in inference must serve autograd later."""
    sine_positions.cache_clear()
    segmenter = small_segmenter()
    images = torch.randn(2, 3, 32, 64)
    with torch.inference_mode():
        segmenter(images)
    segmenter(images).masks.sum().backward()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"dim": 36}, "dim 36"),
        ({"dim": 264}, "dim 264"),
        ({"heads": 5}, "heads 5"),
        ({"backbone": "resnet5000"}, "resnet5000"),
        ({"backbone": "test_vit"}, "test_vit"),
        ({"backbone_weights": "/nowhere.safetensors"}, "/nowhere.safetensors"),
    ],
)
def test_mistakes_are_named(changes: dict[str, object], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        small_segmenter(**changes)


def test_another_architecture_is_not_built() -> None:
    """A config refuses it; `load_model` tells this error of a checkpoint that is not ours."""
    with pytest.raises(KeyError, match="detr"):
        small_segmenter(architecture="detr")


# Query decoder


def test_attention_mask_opens_empty_rows() -> None:
    logits = torch.tensor([[[1.0, -1.0, 0.0], [-1.0, -2.0, -3.0]]])
    assert attention_mask(logits).tolist() == [[[True, False, True], [True, True, True]]]


def slow_attention(module: Attention, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """One image, head and query at a time, over the allowed keys only."""
    wq, wk, wv = module.in_proj.weight.chunk(3)
    bq, bk, bv = module.in_proj.bias.chunk(3)
    q, k, v = query @ wq.T + bq, key @ wk.T + bk, value @ wv.T + bv
    out = torch.zeros_like(query)
    width = query.shape[-1] // module.heads
    for b in range(query.shape[0]):
        for h in range(module.heads):
            part = slice(h * width, (h + 1) * width)
            for i in range(query.shape[1]):
                seen = allowed[b, i].nonzero()[:, 0]
                weights = (k[b, seen, part] @ q[b, i, part] / width**0.5).softmax(0)
                out[b, i, part] = weights @ v[b, seen, part]
    return module.out_proj(out)


def test_masked_attention_equals_a_loop() -> None:
    torch.manual_seed(0)
    module = Attention(dim=12, heads=3).double()
    nn.init.normal_(module.in_proj.bias)
    query, key, value = torch.randn(2, 4, 12).double(), torch.randn(2, 7, 12).double(), torch.randn(2, 7, 12).double()
    allowed = attention_mask(torch.randn(2, 4, 7) - 1)
    assert not allowed.all()
    torch.testing.assert_close(module(query, key, value, allowed), slow_attention(module, query, key, value, allowed))


def test_attention_masks_pass_no_gradient() -> None:
    """The mask features reach the features only through the attention masks, which are detached."""
    decoder = QueryDecoder(queries=4, dim=16, heads=2, layers=2, ffn=16)
    levels = [torch.randn(1, n, 16) for n in (2, 8, 32)]
    mask_features = torch.randn(1, 16, 8, 16, requires_grad=True)
    features, masks = decoder(levels, mask_features)
    assert torch.autograd.grad(features.sum(), mask_features, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(masks.dense().sum(), mask_features)[0].abs().sum() > 0
