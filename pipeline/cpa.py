"""Stage "cpa": class projector adaptation. Fine-tunes the projector on real seen and synthetic unseen features.

Its checkpoint is the transductive result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.runtime import Runtime
from pipeline.training.config import CPAConfig
from storage.errors import UserError
from storage.keys import Recipe, Ref
from storage.store import Build

if TYPE_CHECKING:
    from pipeline.inference.model import Model

STAGE, VERSION = "cpa", 2


def recipe(config: CPAConfig, *, queries: Ref, text: Ref, checkpoint: Ref, generator: Ref) -> Recipe:
    return Recipe(
        kind="checkpoint",
        stage=STAGE,
        version=VERSION,
        config=config,
        inputs={"queries": queries, "text": text, "checkpoint": checkpoint, "generator": generator},
    )


def build(build: Build, config: CPAConfig, runtime: Runtime) -> None:
    """Fine-tune stage 1's projector from cached queries alone. The object threshold of stage 1 is kept (D8).

    Raises UserError for a benchmark without unseen classes.
    """
    from models.generator import build_generator
    from pipeline.inference.model import load_model, require_same_classes, save_model
    from pipeline.teacher.text_bank import open_text
    from pipeline.training.criteria import CPACriterion, freeze
    from pipeline.training.curves import add_training
    from pipeline.training.loop import parameter_groups, train
    from pipeline.training.query_loader import query_batches
    from storage.checkpoints import load_checkpoint
    from storage.queries import read_queries

    device = runtime.torch_device()
    text = build.open("text")
    bank = open_text(text.path, text.ref.key)
    if all(bank.seen):
        raise UserError("cpa: the benchmark has no unseen class to make features for; list some in its unseen_ids")
    model = load_model(build.open("checkpoint").path, device)
    require_same_classes(model.meta.classes, bank)
    cached = read_queries(build.open("queries").folders(".zarr"))
    weights, meta = load_checkpoint(build.open("generator").path)
    generator = build_generator(**meta["architecture"])
    generator.load_state_dict(weights)
    freeze(generator.to(device))
    if config.classifier == "linear":
        model = with_linear_classifier(model)
    modules = {"projector": model.projector.train()}
    train(
        STAGE,
        folder=build.path,
        schedule=config,
        modules=modules,
        groups=parameter_groups(modules, config),
        batches=lambda start: query_batches(cached, config, start),
        losses=CPACriterion(model.projector, generator, bank, config, text=model.text),
        runtime=runtime,
    )
    save_model(build.path, replace(model, meta=replace(model.meta, stage=STAGE)))
    add_training(build)
    build.provenance["device"] = str(device)
    build.counts |= {
        "views": len(cached.image_id),
        "steps": config.steps,
        "synthetic_features": config.steps * config.synthetic,
    }


def with_linear_classifier(model: Model) -> Model:
    """The model with a new linear classifier, one weight row per class, in place of the projector."""
    import torch

    from models.vision_centric import LinearClassifier

    device, classes = model.text.device, len(model.text)
    architecture = model.meta.architecture | {"projector": {"dim": model.query_shape[1], "classes": classes}}
    return replace(
        model,
        projector=LinearClassifier(**architecture["projector"]).to(device),
        text=torch.eye(classes, device=device),
        meta=replace(model.meta, architecture=architecture),
    )
