"""MaskFormer: its shapes, what a layer of it computes, and that stage 1 trains it; test_parity.py has the whole
network.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.maskformer import DETRLayer, EncoderLayer
from models.projector import Projector
from models.segmenter import Segmenter, build_segmenter
from pipeline.teacher.text_bank import TextBank
from pipeline.training.config import MASKFORMER, SegmenterConfig, V2CConfig
from pipeline.training.criteria import V2CCriterion
from pipeline.training.loader import Batch

SMALL = SegmenterConfig(
    architecture="maskformer",
    backbone="test_resnet",
    backbone_weights=None,
    frozen_batchnorm=False,
    queries=5,
    dim=32,
    heads=4,
    encoder_layers=2,
    encoder_ffn=48,
    decoder_layers=3,
    decoder_ffn=40,
)


def small_segmenter(config: SegmenterConfig = SMALL) -> Segmenter:
    torch.manual_seed(0)
    return build_segmenter(**asdict(config))


@pytest.mark.parametrize("encoder_layers", [0, 2])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (160, 32)])
def test_shapes_and_gradients(height: int, width: int, encoder_layers: int) -> None:
    segmenter = small_segmenter(replace(SMALL, encoder_layers=encoder_layers))
    features, masks = segmenter(torch.randn(2, 3, height, width))
    assert features.shape == (3, 2, 5, 32)  # as many as decoder layers: there is no query-only output
    assert masks.shape == (3, 2, 5, height // 4, width // 4)
    ((features * torch.randn_like(features)).sum() + masks.square().sum()).backward()
    for name, parameter in segmenter.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_images_of_a_batch_do_not_touch_each_other() -> None:
    segmenter = small_segmenter().eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        together, alone = segmenter(images), segmenter(images[1:2])
    for both, one in zip(together, alone, strict=True):
        torch.testing.assert_close(both[:, 1:2], one, atol=1e-4, rtol=1e-4)


def torch_attention(ours: nn.Module, *, heads: int) -> nn.MultiheadAttention:
    dim = ours.out_proj.in_features  # pyright: ignore[reportAttributeAccessIssue]
    theirs = nn.MultiheadAttention(dim, heads, batch_first=True, dtype=torch.float64)
    names = {"in_proj.weight": "in_proj_weight", "in_proj.bias": "in_proj_bias"}
    theirs.load_state_dict({names.get(name, name): tensor for name, tensor in ours.state_dict().items()})
    return theirs


def randomise(module: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def test_an_encoder_layer_is_detrs() -> None:
    """torch's attention, written out: positions in queries and keys, not in values; the norms come after the sums."""
    layer = EncoderLayer(dim=16, heads=4, ffn=24).double()
    randomise(layer)
    tokens, positions = torch.randn(2, 6, 16).double(), torch.randn(6, 16).double()
    attention = torch_attention(layer.attention, heads=4)
    placed = tokens + positions
    x = layer.attention_norm(tokens + attention(placed, placed, tokens)[0])
    expected = layer.ffn_norm(x + layer.ffn[2](layer.ffn[0](x).relu()))
    torch.testing.assert_close(layer(tokens, positions), expected)


def test_a_decoder_layer_is_detrs() -> None:
    """Self-attention before cross-attention; queries' positions in both, the map's in the keys."""
    layer = DETRLayer(dim=16, heads=4, ffn=24).double()
    randomise(layer)
    x, positions = torch.randn(2, 5, 16).double(), torch.randn(5, 16).double()
    keys, values = torch.randn(2, 6, 16).double(), torch.randn(2, 6, 16).double()
    own, cross = torch_attention(layer.self_attention, heads=4), torch_attention(layer.cross_attention, heads=4)
    y = layer.self_norm(x + own(x + positions, x + positions, x)[0])
    y = layer.cross_norm(y + cross(y + positions, keys, values)[0])
    expected = layer.ffn_norm(y + layer.ffn[2](layer.ffn[0](y).relu()))
    torch.testing.assert_close(layer(x, positions, keys, values), expected)


def test_the_published_network() -> None:
    """COCO panoptic R50, published with 45 M weights, of which the classifier that ours has not is 0.03 M."""
    with torch.device("meta"):
        segmenter = build_segmenter(**asdict(replace(MASKFORMER, backbone_weights=None)))
    assert round(sum(p.numel() for p in segmenter.parameters()) / 1e6) == 45


@pytest.mark.parametrize("mask_loss", ["points", "full"])
def test_stage_1_trains_it(mask_loss: str) -> None:
    torch.manual_seed(0)
    config = V2CConfig(segmenter=SMALL, points=24, bank=3, mask_loss=mask_loss, bce_weight=20.0, dice_weight=1.0)  # pyright: ignore[reportArgumentType]
    unit = F.normalize(torch.randn(9, 8), dim=-1)
    bank = TextBank(
        key="0" * 16, embedding=unit[:3], ids=[1, 2, 3], names=["a", "b", "c"], isthing=[True] * 3,
        seen=[True, False, True], teacher={}, templates=["{}"],
    )  # fmt: skip
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    masks[0, :30], masks[1, 30:, :20], masks[2, 10:50, 10:] = True, True, True
    batch = Batch(
        image_ids=[1, 2],
        images=torch.randn(2, 3, 64, 64),
        global_rows=torch.tensor([0, 1]),
        labels=[torch.tensor([0, 2]), torch.tensor([2])],
        masks=[masks[:2], masks[2:]],
        instance_tokens=[unit[4:6], unit[6:7]],
    )
    projector = Projector(dim=32, text_dim=8, hidden=16, layers=2)
    step = V2CCriterion(small_segmenter(), projector, bank, unit[:4], config)
    optimiser = torch.optim.AdamW([*step.segmenter.parameters(), *projector.parameters()], lr=1e-3)

    one, other = (next(iter(step(batch, seed))) for seed in (3, 4))
    assert (one["dice"] == other["dice"]) == (mask_loss == "full")  # no points are drawn

    def total() -> Tensor:
        (terms,) = step(batch, 3)
        assert terms.keys() == {"class", "mask" if mask_loss == "full" else "bce", "dice", "global", "instance"}
        return torch.stack(list(terms.values())).sum()

    first = total().item()
    for _ in range(15):
        optimiser.zero_grad()
        total().backward()
        optimiser.step()
    assert total().item() < 0.8 * first
