"""The segmenters' reference: transformers' Mask2Former and MaskFormer with random weights, and the conversion of these
weights into ours. For the parity tests and the benchmarks; transformers is a development dependency."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.segmenter import Segmenter, SegmenterOutput, build_segmenter

if TYPE_CHECKING:
    from transformers import (
        Mask2FormerForUniversalSegmentation,
        MaskFormerForInstanceSegmentation,
        ResNetConfig,
    )

Names = Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]  # (pattern, replacement), applied in this order

RESNET: Names = (
    (r"embedder\.embedder\.convolution", "conv1"),
    (r"embedder\.embedder\.normalization", "bn1"),
    (r"encoder\.stages\.(\d+)\.layers", lambda found: f"layer{int(found[1]) + 1}"),
    (r"shortcut\.convolution", "downsample.0"),
    (r"shortcut\.normalization", "downsample.1"),
    (r"layer\.(\d+)\.convolution", lambda found: f"conv{int(found[1]) + 1}"),
    (r"layer\.(\d+)\.normalization", lambda found: f"bn{int(found[1]) + 1}"),
    (r"^", "backbone.net."),
)
FFN: Names = ((r"(mlp\.)?fc1", "ffn.0"), (r"(mlp\.)?fc2", "ffn.2"), (r"final_layer_norm", "ffn_norm"))
ENCODER: Names = ((r"self_attn_layer_norm", "attention_norm"), (r"self_attn", "attention"), (r"o_proj", "out_proj"))
DECODER: Names = (
    (r"queries_features", "query_features"),
    (r"queries_embedder", "query_positions"),
    (r"(mask_predictor\.)?mask_embedder\.(\d)\.0", lambda found: f"mask_mlp.{2 * int(found[2])}"),
    (r"decoder\.layernorm", "norm"),
    (r"decoder\.", ""),
    (r"self_attn_layer_norm", "self_norm"),
    (r"(cross|encoder)_attn_layer_norm", "cross_norm"),
    (r"self_attn", "self_attention"),
    (r"cross_attn\.in_proj_", "cross_attention.in_proj."),
    (r"(cross|encoder)_attn", "cross_attention"),
    (r"o_proj", "out_proj"),
    (r"^", "query_decoder."),
)
# The reference's prefix -> renaming of the rest of the name.
MASK2FORMER: Mapping[str, Names] = {
    "model.pixel_level_module.encoder.": RESNET,
    "model.pixel_level_module.decoder.": (
        (r"input_projections", "input_proj"),
        (r"level_embed", "level_embed.weight"),
        (r"adapter_1", "lateral"),
        (r"layer_1", "fpn"),
        (r"mask_projection", "mask_features"),
        (r"encoder\.layers", "layers"),
        *FFN,
        *ENCODER,
        (r"^", "pixel_decoder."),
    ),
    "model.transformer_module.": (*FFN, *DECODER),
}
MASKFORMER: Mapping[str, Names] = {
    "model.pixel_level_module.encoder.": RESNET,
    "model.pixel_level_module.transformer.": (*FFN, *ENCODER, (r"^", "pixel_decoder.")),
    "model.pixel_level_module.decoder.": (
        (r"fpn\.stem", "stem"),
        (r"fpn\.layers\.(\d)\.proj", r"lateral.\1"),
        (r"fpn\.layers\.(\d)\.block", r"fpn.\1"),
        (r"mask_projection", "mask_features"),
        (r"^", "pixel_decoder."),
    ),
    # Without an encoder, transformers' decoder holds the projection of the stride 32 map.
    "model.pixel_level_module.input_projection.": ((r"^", "pixel_decoder.input_proj."),),
    "model.transformer_module.input_projection.": ((r"^", "pixel_decoder.input_proj."),),
    "model.transformer_module.": (*FFN, *DECODER),
    "mask_embedder.": ((r"^", "mask_embedder."), *DECODER),
}


def _resnet(timm_name: str) -> ResNetConfig:
    from transformers import ResNetConfig

    stages: Any = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    if timm_name == "resnet18":
        return ResNetConfig(layer_type="basic", depths=[2] * 4, hidden_sizes=[64, 128, 256, 512], **stages)
    assert timm_name == "resnet50", timm_name
    return ResNetConfig(**stages)


def _timm_name(resnet: ResNetConfig) -> str:
    return "resnet50" if resnet.layer_type == "bottleneck" else "resnet18"


def randomise(module: nn.Module, *, seed: int) -> None:
    """Randomise, in place, every tensor that is initialised to zeros, ones or nearly equal values, so that an error in
    any of them changes the output.

    These are biases, norms, BatchNorm's statistics, linear layers (gain 0.4: below it attention is nearly uniform; at 1
    rounding errors grow), and the queries (deviation 0.02 in transformers, 1 in the published code; at 0.02 all queries
    give the same output).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():  # shares memory with the module
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.mul_((0.2 * noise).exp())
            elif "queries_" in name or "level_embed" in name:
                tensor.copy_(noise)
            elif tensor.dim() == 2:
                tensor.copy_(noise * 0.4 * tensor.shape[1] ** -0.5)
            elif tensor.dim() == 1 and tensor.is_floating_point():
                tensor.add_(0.1 * noise)


def build_mask2former(*, small: bool = False, classes: int = 2, seed: int = 0) -> Mask2FormerForUniversalSegmentation:
    """transformers' Mask2Former with random weights, in evaluation mode: the published R50 network, or a small one over
    a ResNet-18 (width 256 all the same, since its GroupNorm always has 32 groups). `classes`: of its class head."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    # decoder_layers counts the query-only output
    sizes: Any = (
        {
            "encoder_layers": 2,
            "encoder_feedforward_dim": 96,
            "decoder_layers": 5,
            "dim_feedforward": 80,
            "num_queries": 7,
        }
        if small
        else {}
    )
    backbone = _resnet("resnet18" if small else "resnet50")
    config = Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=classes,  # pyright: ignore[reportCallIssue]
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Mask2FormerForUniversalSegmentation(config)
    randomise(network, seed=seed + 1)
    return network.eval()


def ours_of_mask2former(reference: Mask2FormerForUniversalSegmentation) -> Segmenter:
    """Our network of the same sizes with the reference's weights, in evaluation mode; its BatchNorm is not frozen, like
    the reference's."""
    config: Any = reference.config
    segmenter = build_segmenter(
        backbone=_timm_name(config.backbone_config),
        backbone_weights=None,
        frozen_batchnorm=False,
        queries=config.num_queries,
        dim=config.hidden_dim,
        heads=config.num_attention_heads,
        encoder_layers=config.encoder_layers,
        encoder_ffn=config.encoder_feedforward_dim,
        encoder_points=4,
        decoder_layers=config.decoder_layers - 1,
        decoder_ffn=config.dim_feedforward,
    ).to(next(reference.parameters()).dtype)
    copy_mask2former(reference, segmenter)
    return segmenter.eval()


def copy_mask2former(reference: Mask2FormerForUniversalSegmentation, segmenter: Segmenter) -> None:
    """Load the reference's weights and BatchNorm statistics into ours. Every tensor of both sides is used exactly once,
    but for `class_predictor` (ours has the projector instead) and the loss's `criterion.empty_weight`."""
    segmenter.load_state_dict(our_names(reference.state_dict(), MASK2FORMER))  # strict: all names and shapes


def renamed(name: str, names: Names) -> str:
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def our_names(state: Mapping[str, Tensor], parts: Mapping[str, Names]) -> dict[str, Tensor]:
    """The reference's tensors (weights, or their gradients) by our names; `parts` is MASK2FORMER or MASKFORMER."""
    ours: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.startswith(("class_predictor.", "criterion.")):
            continue
        prefix = next(prefix for prefix in parts if key.startswith(prefix))
        name = renamed(key.removeprefix(prefix), parts[prefix])
        assert name not in ours, f"two tensors of the reference are {name}"
        ours[name] = tensor
    # Ours has query, key and value projections in one tensor.
    for key in [key for key in ours if ".q_proj." in key]:
        ours[key.replace("q_proj", "in_proj")] = torch.cat(
            [ours.pop(key.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        )
    return ours


def mask2former_outputs(reference: Mask2FormerForUniversalSegmentation, images: Tensor) -> SegmenterOutput:
    """The reference's output in our form: every output of its decoder, the query-only one first."""
    outputs: Any = reference.model(images, output_hidden_states=True)
    features = torch.stack(outputs.transformer_decoder_intermediate_states).transpose(1, 2)
    return SegmenterOutput(features, torch.stack(outputs.masks_queries_logits))


def build_maskformer(
    *, encoder_layers: int = 6, small: bool = False, seed: int = 0
) -> MaskFormerForInstanceSegmentation:
    """transformers' MaskFormer with random weights, in evaluation mode: the published R50 network of COCO panoptic, or
    a small one with a ResNet-18.

    transformers has only the FPN pixel decoder (`encoder_layers` 0: its network unchanged). The published network for
    COCO panoptic, TransformerEncoderPixelDecoder, is assembled from transformers' parts: its DETR encoder with sine
    positions over the projected stride 32 map; the encoder's output replaces that map in the FPN and in the decoder.
    """
    from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation
    from transformers.models.maskformer import modeling_maskformer

    sizes: Any = {"num_queries": 7, "decoder_layers": 3, "decoder_ffn_dim": 80, "encoder_ffn_dim": 96} if small else {}
    config = MaskFormerConfig(
        backbone_config=_resnet("resnet18" if small else "resnet50"),
        decoder_config=DetrConfig(dropout=0.0, encoder_layers=encoder_layers, **sizes),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MaskFormerForInstanceSegmentation(config)
        if encoder_layers:
            model: Any = network.model
            model.pixel_level_module = _encoded_pixel_level(config)
            model.transformer_module = modeling_maskformer.MaskFormerTransformerModule(256, config)
    randomise(network, seed=seed + 1)
    return network.eval()


def _encoded_pixel_level(config: Any) -> nn.Module:
    from transformers import AutoBackbone
    from transformers.models.detr.modeling_detr import DetrEncoder
    from transformers.models.maskformer import modeling_maskformer as hf

    class EncodedPixelLevel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoBackbone.from_config(config.backbone_config)
            *lateral, coarsest = self.encoder.channels
            self.input_projection = nn.Conv2d(coarsest, 256, 1)
            self.position_embedder = hf.MaskFormerSinePositionEmbedding(128, normalize=True)
            self.transformer = DetrEncoder(config.decoder_config)
            self.decoder = hf.MaskFormerPixelDecoder(
                in_features=256, lateral_widths=lateral, feature_size=256, mask_feature_size=256
            )

        def forward(self, pixel_values: Tensor, *_: Any, **__: Any) -> hf.MaskFormerPixelLevelModuleOutput:
            *finer, coarsest = self.encoder(pixel_values).feature_maps
            map_ = self.input_projection(coarsest)
            positions = self.position_embedder(map_.shape, map_.device, map_.dtype)
            tokens = self.transformer(
                inputs_embeds=map_.flatten(2).transpose(1, 2),
                spatial_position_embeddings=positions.flatten(2).transpose(1, 2),
            ).last_hidden_state
            map_ = tokens.transpose(1, 2).reshape(map_.shape)
            mask_features = self.decoder([*finer, map_]).last_hidden_state
            return hf.MaskFormerPixelLevelModuleOutput(
                encoder_last_hidden_state=map_, decoder_last_hidden_state=mask_features
            )

    return EncodedPixelLevel()


def ours_of_maskformer(reference: MaskFormerForInstanceSegmentation) -> Segmenter:
    """Our network of the same sizes with the reference's weights, in evaluation mode."""
    config: Any = reference.config
    detr = config.decoder_config
    segmenter = build_segmenter(
        architecture="maskformer",
        backbone=_timm_name(config.backbone_config),
        backbone_weights=None,
        frozen_batchnorm=False,
        queries=detr.num_queries,
        dim=detr.d_model,
        heads=detr.decoder_attention_heads,
        encoder_layers=detr.encoder_layers,
        encoder_ffn=detr.encoder_ffn_dim,
        encoder_points=4,
        decoder_layers=detr.decoder_layers,
        decoder_ffn=detr.decoder_ffn_dim,
    ).to(next(reference.parameters()).dtype)
    copy_maskformer(reference, segmenter)
    return segmenter.eval()


def copy_maskformer(reference: MaskFormerForInstanceSegmentation, segmenter: Segmenter) -> None:
    """As `copy_mask2former`."""
    segmenter.load_state_dict(our_names(reference.state_dict(), MASKFORMER))


def maskformer_outputs(reference: MaskFormerForInstanceSegmentation, images: Tensor) -> SegmenterOutput:
    """The reference's output in our form: every layer of its decoder after the final norm, and the masks computed from
    it, as in the published code. (transformers' auxiliary masks skip that norm; its last masks equal these.)"""
    states: list[Tensor] = []
    decoder: Any = reference.model.transformer_module.decoder
    hooks = [layer.register_forward_hook(lambda _, __, state: states.append(state)) for layer in decoder.layers]
    outputs: Any = reference.model(images)
    for hook in hooks:
        hook.remove()
    features = decoder.layernorm(torch.stack(states))
    masks = torch.einsum("lbqc,bchw->lbqhw", reference.mask_embedder(features), outputs.pixel_decoder_last_hidden_state)
    return SegmenterOutput(features, masks)
