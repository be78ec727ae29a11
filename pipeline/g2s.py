"""Stage "g2s": generation-to-semantic alignment. Trains the generator on cached queries, the projector frozen."""

from __future__ import annotations

from dataclasses import asdict

from pipeline.runtime import Runtime
from pipeline.training.config import G2SConfig
from storage.keys import Recipe, Ref
from storage.store import Build

STAGE, VERSION = "g2s", 3


def recipe(config: G2SConfig, *, queries: Ref, text: Ref, checkpoint: Ref) -> Recipe:
    return Recipe(
        kind="generator",
        stage=STAGE,
        version=VERSION,
        config=config,
        inputs={"queries": queries, "text": text, "checkpoint": checkpoint},
    )


def build(build: Build, config: G2SConfig, runtime: Runtime) -> None:
    """Train the generator from cached queries alone."""
    import torch

    from models.generator import build_generator
    from models.projector import Projector
    from pipeline.inference.model import load_model, require_same_classes
    from pipeline.teacher.text_bank import open_text
    from pipeline.training.criteria import G2SCriterion, freeze
    from pipeline.training.curves import add_training
    from pipeline.training.loop import parameter_groups, train
    from pipeline.training.query_loader import query_batches
    from storage.checkpoints import save_checkpoint
    from storage.queries import read_queries

    device = runtime.torch_device()
    text = build.open("text")
    bank = open_text(text.path, text.ref.key)
    model = load_model(build.open("checkpoint").path, device)
    require_same_classes(model.meta.classes, bank)
    assert isinstance(model.projector, Projector)
    cached = read_queries(build.open("queries").folders(".zarr"))
    freeze(model.projector)
    torch.manual_seed(config.seed)
    architecture = {
        "generator": config.generator,
        "dim": model.query_shape[1],
        "text_dim": bank.embedding.shape[-1],
        "hidden": config.hidden,
        "text_scale": config.text_scale,
    }
    generator = build_generator(**architecture)
    modules = {"generator": generator.to(device).train()}
    train(
        STAGE,
        folder=build.path,
        schedule=config,
        modules=modules,
        groups=parameter_groups(modules, config),
        # A view without a matched query has no class to generate features for.
        batches=lambda start: query_batches(cached, config, start, matched=True),
        losses=G2SCriterion(generator, model.projector, bank, config),
        runtime=runtime,
    )
    meta = {
        "stage": STAGE,
        "architecture": architecture,
        "classes": asdict(bank.classes()),
        "config": asdict(config),
    }
    save_checkpoint(build.path, generator.state_dict(), meta)
    add_training(build)
    build.provenance["device"] = str(device)
    build.counts |= {"views": len(cached.image_id), "steps": config.steps}
