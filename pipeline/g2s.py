"""Stage "g2s": generation-to-semantic alignment. Trains the generator on cached queries; segmenter and projector stay frozen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from pipeline.runtime import Runtime
from pipeline.schedule import Schedule, require_sampling
from storage.keys import Recipe, Ref
from storage.store import Build, Store

STAGE, VERSION = "g2s", 3


@dataclass(frozen=True, kw_only=True)
class G2SConfig(Schedule):
    """Stage 2. L_g2s = L_mmd + lambda_s L_div + lambda_v L_gv2s + beta KL (paper Eq. 8, D6).

    `generator`: "vae", the paper's, or "primitives", the vision-centric comparison's, which is trained by L_mmd alone.
    `mmd_weight` is 1 in the paper, `diversity_weight` is lambda_s, `semantic_weight` lambda_v, `kl_weight` beta; 0 switches a loss off. `hidden`: width of the
    generator's layers. `text_scale`: see `Generator`. `tau`: Eq. 7's temperature. `batch`: images a step. `sampling`: "natural" or, rare classes
    as often as frequent ones, "balanced".

    The paper gives none of these. With text rows of length 1 (`text_scale` 1 / sqrt(D)) and beta 0 the generated features of unseen
    classes had nothing to do with their names; these defaults come from the ablations' validation split. README, "Does the
    method do what the paper claims?", has the sweep and figure 4's numbers.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    generator: Literal["vae", "primitives"] = "vae"
    hidden: int = 512
    text_scale: float = 2.0
    mmd_weight: float = 1.0
    diversity_weight: float = 0.01
    semantic_weight: float = 0.01
    kl_weight: float = 1.0
    tau: float = 0.1
    sampling: Literal["natural", "balanced"] = "natural"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau <= 0 or self.text_scale <= 0:
            raise ValueError(f"g2s: tau and text_scale must be above 0, not {self.tau} and {self.text_scale}")
        if self.generator not in ("vae", "primitives"):
            raise ValueError(f"g2s: generator {self.generator!r} is not one of 'vae' and 'primitives'; choose one")
        if self.batch < 2:
            raise ValueError("g2s: batch must be at least 2, for the generator's BatchNorm")
        require_sampling("g2s", self.sampling)


def recipe(config: G2SConfig, *, queries: Ref, text: Ref, checkpoint: Ref) -> Recipe:
    return Recipe(
        kind="generator", stage=STAGE, version=VERSION, config=config,
        inputs={"queries": queries, "text": text, "checkpoint": checkpoint},
    )  # fmt: skip


def run(config: G2SConfig, *, queries: Ref, text: Ref, checkpoint: Ref, store: Store, runtime: Runtime) -> Ref:
    """Train the generator from cached queries alone."""

    def work(build: Build) -> None:
        import torch

        from models.generator import build_generator
        from models.projector import Projector
        from pipeline.model import load_model, require_same_classes
        from pipeline.query_data import query_batches
        from pipeline.steps import G2SStep, freeze
        from pipeline.text import open_text
        from pipeline.training import parameter_groups, train
        from storage.checkpoints import remove_training_state, save_checkpoint
        from storage.queries import read_queries

        device = runtime.torch_device()
        bank = open_text(store.open(text).path, text.key)
        model = load_model(store.open(checkpoint).path, device)
        require_same_classes(model.facts, bank)
        assert isinstance(model.projector, Projector)
        cached = read_queries(store.open(queries).path)
        freeze(model.projector)
        torch.manual_seed(config.seed)
        architecture = {
            "generator": config.generator, "dim": model.query_shape[1], "text_dim": bank.embedding.shape[-1], "hidden": config.hidden,
            "text_scale": config.text_scale,
        }  # fmt: skip
        generator = build_generator(**architecture)
        modules = {"generator": generator.to(device).train()}
        train(
            STAGE,
            folder=build.path,
            schedule=config,
            modules=modules,
            groups=parameter_groups(modules, config),
            # a view in which no query found a segment has nothing to generate from
            batches=lambda start: query_batches(cached, config, start, sampling=config.sampling, matched=True),
            losses=G2SStep(generator, model.projector, bank, config),
            runtime=runtime,
        )
        facts = {"stage": STAGE, "architecture": architecture, "classes": bank.classes(), "config": asdict(config)}
        save_checkpoint(build.path, generator.state_dict(), facts)
        remove_training_state(build.path)
        build.provenance["device"] = str(device)
        build.counts |= {"views": len(cached.image_id), "steps": config.steps}

    return store.build(recipe(config, queries=queries, text=text, checkpoint=checkpoint), work)
