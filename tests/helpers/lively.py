"""A checkpoint with segments to look at, made of one that was hardly trained, whose masks all are empty."""

from __future__ import annotations

from pathlib import Path

import torch

from storage.checkpoints import load_checkpoint, save_checkpoint


def lively(source: Path, target: Path, *, sharpness: float = 30.0, decoder_layers: int = 3) -> Path:
    """A copy of the checkpoint `source` in the folder `target`, with queries that differ, masks of high contrast,
    and scores from near 0 to near 1; of its decoder's layers only the first `decoder_layers` are kept."""
    tensors, meta = load_checkpoint(source)
    generator = torch.Generator().manual_seed(0)
    decoder = "segmenter.query_decoder"
    architecture = meta["architecture"]["segmenter"]
    for layer in range(decoder_layers, architecture["decoder_layers"]):
        tensors = {name: x for name, x in tensors.items() if not name.startswith(f"{decoder}.layers.{layer}.")}
    architecture["decoder_layers"] = min(decoder_layers, architecture["decoder_layers"])
    for name in (f"{decoder}.query_features.weight", f"{decoder}.query_positions.weight"):
        tensors[name] = 3 * torch.randn(tensors[name].shape, generator=generator)
    for name in [name for name in tensors if name.startswith(f"{decoder}.mask_mlp") and name.endswith("weight")]:
        tensors[name] = torch.randn(tensors[name].shape, generator=generator) / tensors[name].shape[1] ** 0.5
    tensors[f"{decoder}.mask_mlp.4.weight"] *= sharpness
    name = "projector.mlp.0.weight"
    tensors[name] = torch.randn(tensors[name].shape, generator=generator)
    tensors["projector.text_center"] = tensors["text.embedding"].mean(0)
    tensors["projector.bias"] = torch.tensor(-1.0)
    save_checkpoint(target, tensors, meta)
    return target
