"""The trained network as a checkpoint holds it: segmenter, projector, and all that prediction must know about them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import UserError
from storage.store import Store

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.projector import Projector
    from models.segmenter import Segmenter
    from models.vision_centric import LinearClassifier
    from pipeline.teacher.text_bank import TextBank


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
    from models.projector import Projector
    from models.segmenter import build_segmenter
    from models.vision_centric import LinearClassifier

    bare = {**architecture["segmenter"], "backbone_weights": None}  # a checkpoint holds all weights, and no path
    head = architecture["projector"]
    return Model(
        segmenter=build_segmenter(**architecture["segmenter"]),
        projector=LinearClassifier(**head) if "classes" in head else Projector(**head),
        text=text,
        facts={"architecture": {**architecture, "segmenter": bare}, **facts},
    )


def save_model(folder: Path, model: Model) -> None:
    from storage.checkpoints import save_checkpoint

    tensors = {f"segmenter.{name}": value for name, value in model.segmenter.state_dict().items()}
    tensors |= {f"projector.{name}": value for name, value in model.projector.state_dict().items()}
    save_checkpoint(folder, {**tensors, "text.embedding": model.text.cpu()}, model.facts)


def load_model(folder: Path, device: torch.device | str = "cpu") -> Model:
    """Read a checkpoint, in evaluation mode. Raises UserError when it is damaged, or its weights are not of the network it tells of."""
    import torch

    from storage.checkpoints import load_checkpoint

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
        raise UserError(
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
            raise UserError(
                f"checkpoint and text bank text/{bank.key} disagree in {field} ({difference}); "
                "run `zs-seg run --from v2c` with this text bank, or use the checkpoint's own"
            )


def checkpoint_folder(store: Store, checkpoint: str) -> Path:
    """The folder of a v2c or cpa checkpoint: `checkpoint` itself, or that of a key in the store.

    Raises UserError where there is none.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        ref = store.find(checkpoint)
        store.require_intact(ref)
        folder = store.path(ref)
    try:
        stage = json.loads((folder / "meta.json").read_bytes()).get("stage")
    except (OSError, ValueError, AttributeError):
        stage = None
    if stage not in ("v2c", "cpa"):
        raise UserError(f"{folder} is no checkpoint of v2c or cpa; pass another --checkpoint, `zs-seg list` shows them")
    return folder
