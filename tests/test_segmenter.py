from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.backbone import Backbone
from models.pixel_decoder import PixelDecoder, sine_positions
from models.query_decoder import Attention, QueryDecoder, attention_mask
from models.segmenter import Segmenter, build_segmenter

SMALL = {
    "backbone": "lcnet_035",
    "backbone_weights": None,
    "frozen_batchnorm": False,
    "queries": 5,
    "dim": 32,
    "heads": 4,
    "encoder_layers": 1,
    "encoder_ffn": 48,
    "encoder_points": 4,
    "decoder_layers": 4,
    "decoder_ffn": 48,
}


def small_segmenter(**changes: object) -> Segmenter:
    torch.manual_seed(0)
    return build_segmenter(**(SMALL | changes))  # pyright: ignore[reportArgumentType]


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


# Backbone


def randomise_batchnorm(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
            nn.init.normal_(norm.running_mean, std=0.1)  # pyright: ignore[reportArgumentType]
            nn.init.uniform_(norm.running_var, 0.5, 1.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["test_resnet", "lcnet_035", "test_convnext"])
def test_backbone_strides_and_channels(name: str) -> None:
    backbone = Backbone(name)
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(map_.shape) for map_ in maps] == [
        (1, channels, 64 // stride, 96 // stride)
        for channels, stride in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batchnorm_stays(frozen: bool) -> None:
    backbone = Backbone("test_resnet", frozen_batchnorm=frozen)
    randomise_batchnorm(backbone)
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, weight_decay=0.1)
    backbone.train()
    backbone(torch.randn(2, 3, 64, 64))[-1].square().sum().backward()
    optimizer.step()
    after = backbone.state_dict()

    assert norms and all(norm.training != frozen for norm in norms)
    batchnorm = {f"{name}." for name, module in backbone.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, value in before.items():
        is_norm = any(name.startswith(prefix) for prefix in batchnorm)
        assert torch.equal(value, after[name]) == (is_norm and frozen), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights_are_loaded(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(1)
    source: Any = timm.create_model("test_resnet").eval()
    randomise_batchnorm(source)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    backbone = Backbone("test_resnet", weights=str(path)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = source.forward_intermediates(images, indices=4, intermediates_only=True)
        torch.testing.assert_close(backbone(images), expected, atol=1e-4, rtol=1e-4)


def test_wrong_local_weights_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_byobnet").state_dict(), other)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no weights")
    for path, words in ((other, "missing or of another shape"), (broken, "not readable")):
        with pytest.raises(ValueError, match=words) as error:
            Backbone("test_resnet", weights=str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


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
    assert torch.autograd.grad(masks.sum(), mask_features)[0].abs().sum() > 0


# Parity with transformers


def decoder_weights(reference: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pixel and query decoder weights of a transformers Mask2FormerModel under our names."""
    linears = {"fc1": "ffn.0", "fc2": "ffn.2", "final_layer_norm": "ffn_norm"}

    def rename(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
        out = {}
        for key, tensor in state.items():
            for old, new in names.items():
                key = key.replace(old, new)
            out[key] = tensor
        return out

    pixel = rename(
        reference.pixel_level_module.decoder.state_dict(),
        {
            "input_projections": "input_proj",
            "level_embed": "level_embed.weight",
            "adapter_1": "lateral",
            "layer_1": "fpn",
        }
        | {"encoder.": "", "self_attn_layer_norm": "attention_norm", "self_attn": "attention"}
        | {"mask_projection": "mask_features"}
        | linears,
    )
    state = reference.transformer_module.state_dict()
    query = rename(
        state,
        {"queries_features": "query_features", "queries_embedder": "query_positions", "decoder.layernorm": "norm"}
        | {
            "decoder.mask_predictor.mask_embedder.0.0": "mask_mlp.0",
            "decoder.mask_predictor.mask_embedder.1.0": "mask_mlp.2",
        }
        | {
            "decoder.mask_predictor.mask_embedder.2.0": "mask_mlp.4",
            "decoder.": "",
            "cross_attn_layer_norm": "cross_norm",
        }
        | {"self_attn_layer_norm": "self_norm", "cross_attn.in_proj_": "cross_attention.in_proj."}
        | {"cross_attn": "cross_attention", "self_attn": "self_attention"}
        | linears,
    )
    for key in [key for key in query if ".q_proj." in key]:
        parts = [query.pop(key.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        query[key.replace("q_proj", "in_proj")] = torch.cat(parts)
    return pixel, query


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 160)])
def test_decoders_equal_transformers(height: int, width: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    channels = (8, 12, 16, 20)
    body = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=list(channels),
        depths=[1] * 4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    # width 256: the reference's GroupNorm always has 32 groups.  decoder_layers counts the query-only output.
    config = transformers.Mask2FormerConfig(
        backbone_config=body, feature_size=256, mask_feature_size=256, hidden_dim=256, encoder_feedforward_dim=96,
        dim_feedforward=80, encoder_layers=2, decoder_layers=5, num_queries=7, num_attention_heads=8,
    )  # fmt: skip
    reference = transformers.Mask2FormerModel(config).eval()
    with torch.no_grad():  # make every weight matter: published starts have zeros and equal weights
        for name, parameter in reference.named_parameters():
            if parameter.dim() == 1 or "attention_weights" in name or "sampling_offsets" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)

    pixel = PixelDecoder(channels=channels, dim=256, heads=8, layers=2, ffn=96, points=4)
    query = QueryDecoder(queries=7, dim=256, heads=8, layers=4, ffn=80)
    pixel_weights, query_weights = decoder_weights(reference)
    pixel.load_state_dict(pixel_weights)
    query.load_state_dict(query_weights)

    maps = [torch.randn(2, c, height // s, width // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)]
    with torch.no_grad():
        theirs = reference.pixel_level_module.decoder(maps)
        levels, mask_features = pixel(maps)
        outputs = reference.transformer_module(theirs.multi_scale_features, theirs.mask_features)
        features, masks = query(levels, mask_features)

    def close(ours: Tensor, reference: Tensor) -> None:
        assert ours.shape == reference.shape
        assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()

    for level, map_ in zip(levels, theirs.multi_scale_features, strict=True):
        close(level, map_.flatten(2).transpose(1, 2))
    close(mask_features, theirs.mask_features)
    close(features, torch.stack(outputs.intermediate_hidden_states).transpose(1, 2))
    close(masks, torch.stack(outputs.masks_queries_logits))
