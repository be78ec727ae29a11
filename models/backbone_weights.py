"""Reads a backbone's weights file, and refuses one that was trained on the unseen classes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import load_state_dict
from torch import Tensor

from models.errors import ModelError

# names of a detector's or segmenter's parts in Detectron2, torchvision, mmdetection, transformers, DETR, timm and ours
PARTS = re.compile(
    r"(^|\.)(roi_heads?|rpn(_head)?|proposal_generator|anchor_generator|bbox\w*|box_(head|net|predictor)"
    r"|class_net|classification_head|regression_head"
    r"|mask_(head|embed|embedder|mlp|features|predictor)|sem_seg_head|panoptic_head|semantic_head|decode_head"
    r"|auxiliary_head|aux_classifier|class_embed|class_predictor|class_labels_classifier"
    r"|query_(feat|features|embed|positions|position_embeddings)|queries_(features|embedder)"
    r"|pixel_decoder|pixel_level_module|transformer_module|query_decoder|segmenter)(\.|$)"
)
# things, panoptic, stuff, and the original numbering's 90 and 182, each with and without an output for no object
COCO_OUTPUTS = {80, 81, 90, 91, 133, 134, 171, 172, 182, 183}


def read_weights(name: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a local weights file, by name, checked against timm's network `name`.

    Raises ModelError for a file that is missing, unreadable or for another network, and for one of a network trained on
    COCO's categories: with a detector's or segmenter's parts, with a classifier of as many outputs as COCO has classes,
    or zs-seg's own checkpoint. Such weights were trained on the unseen classes. A bare backbone cut out of such a
    network cannot be distinguished from an ImageNet one.
    """
    if not path.is_file():
        raise ModelError(f"backbone_weights {path}: no such file; use 'imagenet', none, or the path of a weights file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        weights = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        # safetensors, zip, pickle and key errors alike: the file is not in the expected format
        raise ModelError(
            f"backbone_weights {path}: not readable as .safetensors or a torch file of plain tensors "
            f"({type(error).__name__}); save timm.create_model({name!r}).state_dict() there"
        ) from error
    with torch.device("meta"):
        expected = timm.create_model(name, num_classes=0).state_dict()
    _refuse_leak(path, content, expected)
    wrong = [
        key
        for key, tensor in expected.items()
        if not key.endswith("num_batches_tracked") and (key not in weights or weights[key].shape != tensor.shape)
    ]
    if wrong:
        raise ModelError(
            f"backbone_weights {path}: {len(wrong)} of {len(expected)} tensors of {name!r} are missing or of another "
            f"shape, the first is {wrong[0]!r}; save timm.create_model({name!r}).state_dict() there"
        )
    return weights


def _refuse_leak(path: Path, content: Any, backbone: Mapping[str, Tensor]) -> None:
    for key, tensor in _tensors(content):
        if PARTS.search(key):
            what = "is part of a detector or segmenter"
        elif (
            key.endswith(("weight", "bias"))
            and not key.endswith(tuple(backbone))
            and tensor.dim()
            and tensor.shape[0] in COCO_OUTPUTS
        ):
            what = f"is a classifier of {tensor.shape[0]} outputs, as many as COCO has classes"
        else:
            continue
        raise ModelError(
            f"backbone_weights {path}: {key!r} {what}, so these weights have seen the unseen classes and zero-shot "
            f"scores would mean nothing; use weights trained on ImageNet alone, such as backbone_weights 'imagenet'"
        )


def _tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file, at any depth ("model", "state_dict", an optimiser's state), with its dotted name."""
    if isinstance(content, Tensor):
        yield prefix, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))
