"""The trained network as a checkpoint holds it: segmenter, projector, and all that prediction must know about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.projector import Projector
from models.segmenter import Segmenter, build_segmenter
from models.vision_centric import LinearClassifier
from pipeline.text import TextBank
from storage.checkpoints import load_checkpoint, save_checkpoint


@dataclass(frozen=True, kw_only=True)
class Model:
    """A segmenter and its projector, the text embeddings `text` (K, D) or (K, S, D) of the classes, and the checkpoint's facts.

    Where a linear classifier stands in the projector's place, `text` is the identity (K, K): a class is told by its place alone.
    `facts` holds `architecture` (arguments of the two constructors), `classes` (TextBank.classes()), `templates`, `resize` (the test view),
    `object_threshold`, `overlap_threshold`, `augment` and `matching` (stage 1's views and matcher), and `stage`.
    """

    segmenter: Segmenter
    projector: Projector | LinearClassifier
    text: Tensor
    facts: dict[str, Any]

    @property
    def query_shape(self) -> tuple[int, int]:
        """(Q, C)."""
        architecture = self.facts["architecture"]["segmenter"]
        return architecture["queries"], architecture["dim"]

    def logits(self, features: Tensor, text: Tensor) -> Tensor:
        """Query features (..., C) and text embeddings (K, D) or (K, S, D) -> class logits (..., K)."""
        return self.projector.logits(self.projector(features), text)


def build_model(architecture: dict[str, Any], facts: dict[str, Any], text: Tensor) -> Model:
    """A network with fresh weights; draws from torch's global generator, so seed it first."""
    bare = {**architecture["segmenter"], "backbone_weights": None}  # a checkpoint holds all weights, and no path
    head = architecture["projector"]
    return Model(
        segmenter=build_segmenter(**architecture["segmenter"]),
        projector=LinearClassifier(**head) if "classes" in head else Projector(**head),
        text=text,
        facts={"architecture": {**architecture, "segmenter": bare}, **facts},
    )


def save_model(folder: Path, model: Model) -> None:
    tensors = {f"segmenter.{name}": value for name, value in model.segmenter.state_dict().items()}
    tensors |= {f"projector.{name}": value for name, value in model.projector.state_dict().items()}
    save_checkpoint(folder, {**tensors, "text.embedding": model.text.cpu()}, model.facts)


def load_model(folder: Path, device: torch.device | str = "cpu") -> Model:
    """Read a checkpoint, in evaluation mode. Raises ValueError when it is damaged, or its weights are not of the network it tells of."""
    tensors, facts = load_checkpoint(folder)
    try:
        model = build_model(facts["architecture"], facts, tensors["text.embedding"].to(device))
        for part in ("segmenter", "projector"):
            own = {name.removeprefix(f"{part}."): x for name, x in tensors.items() if name.startswith(f"{part}.")}
            getattr(model, part).load_state_dict(own)
            getattr(model, part).to(device).eval()
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"checkpoint {folder} does not fit together ({reason}); train it again, or pass another"
        ) from error
    return model


def require_same_classes(facts: dict[str, Any], bank: TextBank) -> None:
    """Refuse to use a checkpoint with another text bank than the one it was trained with; names the first difference."""
    ours, theirs = facts["classes"], bank.classes()
    for field in ("names", "ids", "seen", "teacher", "text"):
        if ours[field] != theirs[field]:
            difference = f"{ours[field]!r:.80} and {theirs[field]!r:.80}"
            if isinstance(ours[field], list):
                pairs = zip(ours[field], theirs[field], strict=False)
                place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours[field]), len(theirs[field])))
                difference = (
                    f"position {place}: {ours[field][place : place + 1]} and {theirs[field][place : place + 1]}"
                )
            raise ValueError(
                f"checkpoint and text bank text/{bank.key} disagree in {field} ({difference}); "
                "run `zs-seg run --from v2c` with this text bank, or use the checkpoint's own"
            )
