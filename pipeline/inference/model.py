"""The trained network as a checkpoint holds it: segmenter, projector, and all that prediction must know about them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.config import AugmentConfig, ResizeConfig, SemanticAugmentConfig
from pipeline.teacher.text_bank import ClassList
from storage import names
from storage.errors import UserError
from storage.runs import Runs
from storage.store import Store

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.projector import Projector
    from models.segmenter import Segmenter
    from models.vision_centric import LinearClassifier
    from pipeline.inference.maps import Thresholds
    from pipeline.teacher.text_bank import TextBank


@dataclass(frozen=True, kw_only=True)
class CheckpointMeta:
    """All that prediction and later stages must know about a network, as the checkpoint's meta.json holds it.

    `architecture` has the arguments of the constructors of "segmenter" and "projector". `stage` is "v2c" or "cpa".
    `templates` are the sentences around a class name, empty for imported embeddings. `resize` is the test view;
    `augment` are stage 1's training views and `matching` its matcher's settings, for the stage "queries".
    `object_threshold` is None until it is chosen (D8).
    """

    architecture: dict[str, dict[str, Any]]
    stage: str
    classes: ClassList
    templates: list[str]
    resize: ResizeConfig
    augment: AugmentConfig
    matching: dict[str, Any]
    overlap_threshold: float
    object_threshold: float | None = None

    @property
    def thresholds(self) -> Thresholds:
        """The thresholds of a panoptic map, with no offset on seen scores."""
        from pipeline.inference.maps import Thresholds

        assert self.object_threshold is not None
        return Thresholds(object_threshold=self.object_threshold, overlap_threshold=self.overlap_threshold)

    @property
    def linear(self) -> bool:
        """Is a linear classifier in the projector's place?"""
        return "classes" in self.architecture["projector"]

    def content(self) -> dict[str, Any]:
        """The JSON of meta.json."""
        content = asdict(self)
        if self.object_threshold is None:
            del content["object_threshold"]
        return content

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> CheckpointMeta:
        """The inverse of `content`. Raises KeyError or TypeError for JSON that is no checkpoint's."""
        semantic = "colours" in content["augment"]
        return cls(
            **{
                **content,
                "classes": ClassList(**content["classes"]),
                "resize": ResizeConfig(**content["resize"]),
                "augment": (SemanticAugmentConfig if semantic else AugmentConfig)(**content["augment"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    """A segmenter and its projector, the text embeddings `text` (K, D) or (K, S, D) of the classes, and the
    checkpoint's `meta`.

    With a linear classifier in the projector's place, `text` is the identity (K, K): a class is known by its place
    alone.
    """

    segmenter: Segmenter
    projector: Projector | LinearClassifier
    text: Tensor
    meta: CheckpointMeta

    @property
    def query_shape(self) -> tuple[int, int]:
        """(Q, C)."""
        architecture = self.meta.architecture["segmenter"]
        return architecture["queries"], architecture["dim"]

    def logits(self, features: Tensor, text: Tensor) -> Tensor:
        """Query features (..., C) and text embeddings (K, D) or (K, S, D) -> class logits (..., K)."""
        return self.projector.logits(self.projector(features), text)


def build_model(meta: CheckpointMeta, text: Tensor) -> Model:
    """A network with fresh weights, or with those of `backbone_weights`, which `meta` then forgets: a checkpoint holds
    all weights, and no path; draws from torch's global generator, so seed it first."""
    from models.projector import Projector
    from models.segmenter import build_segmenter
    from models.vision_centric import LinearClassifier

    segmenter, projector = meta.architecture["segmenter"], meta.architecture["projector"]
    architecture = {**meta.architecture, "segmenter": {**segmenter, "backbone_weights": None}}
    return Model(
        segmenter=build_segmenter(**segmenter),
        projector=LinearClassifier(**projector) if meta.linear else Projector(**projector),
        text=text,
        meta=replace(meta, architecture=architecture),
    )


def save_model(folder: Path, model: Model) -> None:
    from storage.checkpoints import save_checkpoint

    tensors = {f"segmenter.{name}": value for name, value in model.segmenter.state_dict().items()}
    tensors |= {f"projector.{name}": value for name, value in model.projector.state_dict().items()}
    save_checkpoint(folder, {**tensors, "text.embedding": model.text.cpu()}, model.meta.content())


def load_model(folder: Path, device: torch.device | str = "cpu") -> Model:
    """Read a checkpoint, in evaluation mode. Raises UserError when it is damaged, or its weights are not of the network
    that it describes.
    """
    import torch

    from storage.checkpoints import load_checkpoint

    tensors, content = load_checkpoint(folder)
    try:
        model = build_model(CheckpointMeta.parse(content), tensors["text.embedding"].to(device))
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


def require_same_classes(classes: ClassList, bank: TextBank) -> None:
    """Refuse to use a checkpoint of these classes with another text bank than the one it was trained with; names the
    first difference.
    """
    ours, theirs = asdict(classes), asdict(bank.classes())
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
    """The folder of a v2c or cpa checkpoint: `checkpoint` itself, or that of a key or of a run in the store
    (`storage.names`).

    Raises UserError where there is none, and for a folder's bare name that is also a run's.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        if checkpoint in Runs(store).names():
            raise UserError(
                f"{checkpoint!r} is a folder here and a run in {store.root}; write ./{checkpoint} or {checkpoint}:cpa"
            )
    else:
        ref = names.find(store, checkpoint, kind="checkpoint")
        store.require_intact(ref)
        folder = store.path(ref)
    try:
        stage = json.loads((folder / "meta.json").read_bytes()).get("stage")
    except (OSError, ValueError, AttributeError):
        stage = None
    if stage not in ("v2c", "cpa"):
        raise UserError(f"{folder} is no checkpoint of v2c or cpa; pass another --checkpoint, `zs-seg list` shows them")
    return folder
