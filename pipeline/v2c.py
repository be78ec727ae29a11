"""Stage "v2c": vision-to-CLIP alignment. Trains segmenter and projector; its checkpoint is the inductive result."""

from __future__ import annotations

import itertools
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.teacher_files import IMAGENET, SMALL_BACKBONE
from pipeline.runtime import Runtime, torchrun_rank
from pipeline.training.config import SegmenterConfig, V2CConfig
from storage.errors import UserError
from storage.keys import Recipe, Ref, sha256_file
from storage.store import Build

if TYPE_CHECKING:
    from pipeline.inference.model import CheckpointMeta, Model
    from pipeline.teacher.text_bank import TextBank
    from pipeline.training.distributed import Ranks
    from pipeline.training.loader import TrainingData

STAGE, VERSION = "v2c", 2
log = logging.getLogger(__name__)


def recipe(config: V2CConfig, *, shards: Ref, tokens: Ref, text: Ref) -> Recipe:
    segmenter = replace(config.segmenter, backbone_weights=_weights_identity(config.segmenter))
    return Recipe(
        kind="checkpoint",
        stage=STAGE,
        version=VERSION,
        config=replace(config, segmenter=segmenter),
        inputs={"shards": shards, "tokens": tokens, "text": text},
    )


def _weights_identity(config: SegmenterConfig) -> str | None:
    """What of the backbone's weights goes into the key: of a file the sha256, not the path; of ImageNet weights that are
    not timm's default their name. Raises UserError for a file that does not exist."""
    if config.backbone_weights is None:
        return None
    if config.backbone_weights == "imagenet":
        return IMAGENET.get(config.backbone, "imagenet")
    shipped = SMALL_BACKBONE / f"{config.backbone}.safetensors"
    path = shipped if config.backbone_weights == "shipped" else Path(config.backbone_weights)
    if not path.is_file():
        raise UserError(
            f"backbone weights {path} not found; correct --v2c.segmenter.backbone-weights, or use 'imagenet'"
        )
    return f"sha256:{sha256_file(path)}"


def build(build: Build, config: V2CConfig, runtime: Runtime) -> None:
    """Train stage 1 on `runtime.devices` devices and choose the object threshold; the checkpoint is self-contained.

    Under torchrun (several machines) every process calls this, and only rank 0 writes.
    """
    from pipeline.inference.model import load_model, save_model
    from pipeline.teacher.text_bank import open_text
    from pipeline.training.curves import add_training
    from pipeline.training.distributed import launch
    from pipeline.training.loader import TrainingData

    shards, tokens, text = (build.open(name).path for name in ("shards", "tokens", "text"))
    key = build.recipe.inputs["text"].key
    launch(train_model, config, shards, tokens, text, key, build.path, runtime=runtime)
    if torchrun_rank():
        return
    device = runtime.torch_device()
    bank = open_text(text, key)
    data = TrainingData(shards, tokens, bank, config.augment, seed=config.seed, workers=runtime.decoders)
    model = load_model(build.path, device)
    threshold, trials = choose_threshold(model, bank, data, config, runtime)
    save_model(build.path, replace(model, meta=replace(model.meta, object_threshold=threshold)))
    add_training(build)
    crowded = data.beyond(config.segmenter.queries)
    build.provenance |= {"device": str(device), "devices": runtime.devices}
    build.counts |= {
        "images": len(data),
        "images_beyond_queries": len(crowded),
        "segments_beyond_queries": sum(crowded.values()) - len(crowded) * config.segmenter.queries,
        "steps": config.steps,
        "object_threshold": threshold,
        "sPQ_by_threshold": trials,
        "parameters": sum(p.numel() for m in (model.segmenter, model.projector) for p in m.parameters()),
    }


def train_model(
    ranks: Ranks,
    runtime: Runtime,
    config: V2CConfig,
    shards: Path,
    tokens: Path,
    text: Path,
    text_key: str,
    folder: Path,
) -> None:
    """The training in each process; rank 0 saves the weights in `folder`."""
    import torch

    from models.projector import Projector
    from pipeline.inference.model import build_model, save_model
    from pipeline.teacher.text_bank import open_text
    from pipeline.training.criteria import V2CCriterion
    from pipeline.training.distributed import share_batch_statistics
    from pipeline.training.loader import TrainingData
    from pipeline.training.loop import begin_as_the_first, parameter_groups, train

    config.share(ranks.world)
    if ranks.world > 1 and runtime.remote:
        begin_as_the_first(folder, ranks)
    device = runtime.torch_device()
    bank = open_text(text, text_key)
    data = TrainingData(
        shards,
        tokens,
        bank,
        config.augment,
        seed=config.seed,
        workers=runtime.decoders,
        regions=config.candidates,
    )
    if ranks.rank == 0:
        _warn_of_crowded(data, config.segmenter.queries)
    torch.manual_seed(config.seed)
    model = build_model(_meta(config, bank), bank.embedding)
    assert isinstance(model.projector, Projector)
    if config.text_centering:
        model.projector.text_center.copy_(bank.first[torch.tensor(bank.seen)].mean(0))
    modules = {"segmenter": model.segmenter.to(device).train(), "projector": model.projector.to(device).train()}
    share_batch_statistics(model.segmenter, ranks)
    network: Any = torch.compile(model.segmenter) if runtime.compile else model.segmenter
    train(
        STAGE,
        folder=folder,
        schedule=config,
        modules=modules,
        groups=parameter_groups(
            modules,
            config,
            own_lr={
                "segmenter.backbone.": config.backbone_lr,
                "projector.log_scale": config.scale_lr,
                "projector.bias": config.scale_lr,
            },
        ),
        batches=lambda start: data.batches(config.batch, start=start, ranks=ranks, device=device),
        losses=V2CCriterion(
            network,
            model.projector,
            bank,
            data.global_tokens().to(device),
            config,
            ranks,
            token_views=data.token_views,
        ),
        runtime=runtime,
        ranks=ranks,
        precision=config.precision,
    )
    if ranks.rank == 0:
        save_model(folder, model)


def _warn_of_crowded(data: TrainingData, queries: int) -> None:
    """Log how many training images have more targets than the network has queries."""
    if crowded := data.beyond(queries):
        image, most = max(crowded.items(), key=lambda item: item[1])
        log.warning(
            "v2c: %d of %d training images have more segments than the %d queries, so that up to %d segments an epoch "
            "are matched with none; image %d has the most, %d; raise --v2c.segmenter.queries",
            len(crowded), len(data), queries, sum(crowded.values()) - len(crowded) * queries, image, most,
        )  # fmt: skip


def _meta(config: V2CConfig, bank: TextBank) -> CheckpointMeta:
    from pipeline.inference.model import CheckpointMeta

    projector = {"dim": config.segmenter.dim, "text_dim": bank.embedding.shape[-1], **asdict(config.projector)}
    return CheckpointMeta(
        architecture={"segmenter": asdict(config.segmenter), "projector": projector},
        stage=STAGE,
        classes=bank.classes(),
        templates=bank.templates,
        resize=config.resize,
        augment=config.augment,
        matching={
            name: getattr(config, name) for name in ("class_weight", "bce_weight", "dice_weight", "points", "mask_loss")
        },
        overlap_threshold=config.overlap_threshold,
    )


def choose_threshold(
    model: Model, bank: TextBank, data: TrainingData, config: V2CConfig, runtime: Runtime
) -> tuple[float, dict[str, float]]:
    """The object threshold, chosen on the first training images (see `Calibration`), and sPQ there by threshold. Stage 1
    is not trained with the unseen names, so only seen classes are predicted."""
    import torch

    from models.folding import for_inference
    from pipeline.inference.forward import outputs
    from pipeline.inference.maps import classes_of
    from pipeline.scoring.calibration import Calibration

    device = next(model.projector.parameters()).device
    classes = classes_of(bank.embedding, bank.classes(), device).only(torch.tensor(bank.seen, device=device))
    calibration = Calibration(classes, overlap_threshold=config.overlap_threshold, slack=config.threshold_slack)
    samples = itertools.islice(data.plain_samples(), config.calibration_images)
    with runtime.bar(min(config.calibration_images, len(data)), "choosing the object threshold", "image") as bar:
        for sample, output in outputs(for_inference(model.segmenter), samples, config.resize, batch=config.batch):
            calibration.update(sample, output, model.logits(output.features, classes.text))
            bar.update()
    chosen, by_threshold = calibration.result()
    log.info("object_threshold %.2f: sPQ %.1f on training images", chosen, by_threshold[chosen])
    return chosen, {str(threshold): round(pq, 2) for threshold, pq in by_threshold.items()}
