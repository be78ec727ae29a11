"""The backbone: timm's networks as four maps, their weights, and which weights are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from small_segmenter import randomise_batchnorm
from torch import Tensor, nn
from transformers import SwinBackbone, SwinConfig

from models.backbone import Backbone, _affine
from pipeline.bench.reference import Names, renamed
from storage.checkpoints import save_checkpoint


@pytest.mark.parametrize("name", ["test_resnet", "lcnet_035", "test_convnext", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (32, 160)])
def test_backbone_strides_channels_and_gradients(name: str, height: int, width: int) -> None:
    torch.manual_seed(0)
    backbone = Backbone(name)
    maps = backbone(torch.randn(2, 3, height, width))
    assert [tuple(map_.shape) for map_ in maps] == [
        (2, channels, height // stride, width // stride)
        for channels, stride in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]
    sum((map_ * torch.randn_like(map_)).sum() for map_ in maps).backward()  # pyright: ignore[reportAttributeAccessIssue]
    for parameter_name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet50", (256, 512, 1024, 2048)),
        ("resnet101c", (256, 512, 1024, 2048)),
        ("swin_base_patch4_window12_384", (128, 256, 512, 1024)),
        ("swinv2_tiny_window8_256", (96, 192, 384, 768)),
        ("convnext_tiny", (96, 192, 384, 768)),
    ],
)
def test_published_backbones(name: str, channels: tuple[int, ...]) -> None:
    """On the meta device: shapes alone, at a size that is none of the pretraining's."""
    with torch.device("meta"):
        backbone = Backbone(name).eval()
        maps = backbone(torch.empty(1, 3, 352, 160))
    assert backbone.channels == channels
    shapes = [(1, width, 352 // s, 160 // s) for width, s in zip(channels, (4, 8, 16, 32), strict=True)]
    assert [tuple(map_.shape) for map_ in maps] == shapes


def test_the_deep_stem_is_three_convolutions() -> None:
    """The paper's resnet101c, as Detectron2's and MMSegmentation's: 3 x 3, the first of stride 2."""
    with torch.device("meta"):
        net = Backbone("resnet101c").net
    stem = [
        module for name, module in net.named_modules() if name.startswith("conv1") and isinstance(module, nn.Conv2d)
    ]
    assert [(conv.kernel_size, conv.stride) for conv in stem] == [((3, 3), (2, 2)), ((3, 3), (1, 1)), ((3, 3), (1, 1))]


SWIN_NAMES: Names = (
    (r"^hidden_states_norms\.stage(\d)", lambda found: f"norms.{int(found[1]) - 1}"),
    (r"^swin\.embeddings\.patch_embeddings\.projection", "net.patch_embed.proj"),
    (r"^swin\.embeddings\.norm", "net.patch_embed.norm"),
    # transformers puts the merging of patches at a stage's end, timm at the next one's start
    (r"^swin\.encoder\.layers\.(\d)\.downsample", lambda found: f"net.layers_{int(found[1]) + 1}.downsample"),
    (r"^swin\.encoder\.layers\.", "net.layers_"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.relative_position_bias", "attn"),
    (r"attention\.o_proj", "attn.proj"),
    (r"attention\.q_proj", "attn.qkv"),
    (r"attention\.", "attn."),
)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (64, 96), (160, 32)])
def test_swin_equals_transformers(height: int, width: int) -> None:
    """Also where the maps are no multiple of the window, and smaller than it."""
    stages: Any = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    torch.manual_seed(0)
    theirs = SwinBackbone(SwinConfig(drop_path_rate=0.0, **stages)).eval().double()
    ours = Backbone("swin_tiny_patch4_window7_224").eval().double()
    for name, parameter in theirs.named_parameters():
        nn.init.normal_(parameter, std=0.2 if "bias" in name or "norm" in name else parameter.shape[-1] ** -0.5)
    weights: dict[str, Tensor] = {}
    for key, tensor in theirs.state_dict().items():
        if key.startswith("swin.layernorm"):  # of the classifier
            continue
        if "q_proj" in key:
            tensor = torch.cat([theirs.state_dict()[key.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        if "k_proj" not in key and "v_proj" not in key:
            weights[renamed(key, SWIN_NAMES)] = tensor
    ours.load_state_dict(weights)
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        for our, their in zip(ours(images), theirs(images).feature_maps, strict=True):
            assert (our - their).abs().max() < 1e-9 * their.abs().max()


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


@pytest.mark.parametrize(
    ("name", "source"),
    [("resnet50", "timm/resnet50.tv_in1k"), ("resnet101c", "timm/resnet101c.gluon_in1k"), ("resnet18", "timm/resnet18.a1_in1k")],
)  # fmt: skip
def test_which_imagenet_weights_are_fetched(
    name: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published ones of resnet50, timm's default of others; offline, so that the message names them."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="could not be loaded") as caught:
        Backbone(name, weights="imagenet")
    assert f"({source})" in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_local_weights_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_byobnet").state_dict(), other)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no weights")
    for path, words in ((other, "missing or of another shape"), (broken, "not readable")):
        with pytest.raises(ValueError, match=words) as error:
            Backbone("test_resnet", weights=str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def weights_of(name: str, **changes: Tensor) -> dict[str, Tensor]:
    return {**timm.create_model(name).state_dict(), **changes}


def prefixed(prefix: str, name: str = "test_resnet") -> dict[str, Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in timm.create_model(name, num_classes=0).state_dict().items()}


LEAKS: dict[str, tuple[Any, str]] = {
    "maskrcnn": (prefixed("backbone.body.") | {"roi_heads.box_predictor.cls_score.bias": torch.zeros(2)}, "roi_heads"),
    "detr": ({"model": prefixed("backbone.0.body.") | {"class_embed.weight": torch.zeros(92, 8)}}, "class_embed"),
    "mask2former": ({"model": prefixed("backbone.") | {"sem_seg_head.predictor.x": torch.zeros(1)}}, "sem_seg_head"),
    "transformers": (
        prefixed("x.") | {"model.transformer_module.level_embed.weight": torch.zeros(3, 8)},
        "transformer",
    ),
    "beside": ({"state_dict": weights_of("test_resnet"), "ema": {"panoptic_head.w": torch.zeros(1)}}, "panoptic_head"),
    "multi-label": (
        weights_of("test_resnet", **{"fc.weight": torch.zeros(80, 256), "fc.bias": torch.zeros(80)}),
        "80 out",
    ),
    "stuff": ({"state_dict": weights_of("test_resnet", **{"fc.bias": torch.zeros(171)})}, "171 outputs"),
    "other classifier": (weights_of("test_resnet") | {"cls.bias": torch.zeros(133)}, "133 outputs"),
    "our own": (prefixed("segmenter.backbone.net."), "segmenter"),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_weights_that_have_seen_coco_are_refused(tmp_path: Path, leak: str) -> None:
    content, shown = LEAKS[leak]
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match="seen the unseen classes") as error:
        Backbone("test_resnet", weights=str(path))
    message = str(error.value)
    assert str(path) in message and shown in message and "imagenet" in message and "\n" not in message


def test_a_checkpoint_of_this_package_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, prefixed("segmenter.backbone.net."), {})
    with pytest.raises(ValueError, match="'segmenter"):
        Backbone("lcnet_035", weights=str(next(tmp_path.glob("*.safetensors"))))


@pytest.mark.parametrize("classes", [1000, 21841, 40])
def test_a_classifier_of_other_categories_is_ignored(tmp_path: Path, classes: int) -> None:
    """Also beside an optimiser's state, and with layers as wide as COCO has classes: this network's second stage is."""
    source = timm.create_model("convnext_atto", num_classes=classes)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": source.state_dict(), "optimizer": {"state": {0: {"exp_avg": torch.zeros(80)}}}}, path)
    backbone = Backbone("convnext_atto", weights=str(path))
    assert backbone.channels[1] == 80
    assert torch.equal(backbone.net.state_dict()["stem_0.weight"], source.state_dict()["stem.0.weight"])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_frozen_batchnorm_as_a_product_and_sum(dtype: torch.dtype, limit: float) -> None:
    """The form for a GPU against torch's own: values and the gradient of the input, relative in the 2-norm."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16).double()
    randomise_batchnorm(norm)
    norm.eval().requires_grad_(False)
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    norm_type = torch.float64 if dtype == torch.float64 else torch.float32
    found = []
    # torch's own in double precision is the reference
    for kind, forward in (
        (torch.float64, norm),
        (dtype, lambda leaf: _affine(copy.deepcopy(norm).to(norm_type), leaf)),
    ):
        leaf = x.to(kind, memory_format=torch.channels_last).requires_grad_()
        out = forward(leaf)
        out.square().sum().backward()
        assert leaf.grad is not None and out.dtype == kind
        found.append((out.detach().double(), leaf.grad.double()))
    for expected, ours in zip(*found, strict=True):
        assert (ours - expected).norm() < limit * expected.norm()
