"""Trains the demo's backbone, in place of ImageNet pretraining: `python -m pipeline.world.train_backbone`.

Images are single plain objects on textured ground, in colours and tints that no class of the generated world has, so no
image contains a class of the world, seen or unseen, and shape and texture are learned from other colours than theirs.
Targets are the shape, the texture, and both mean colours. Nothing else in the product imports this file.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from models.teacher_files import SMALL_BACKBONE
from pipeline.data.transforms import normalise
from pipeline.world.draw import photograph, shape_mask, textured
from pipeline.world.names import APPEARANCES, SHAPES, TEXTURES, TINTS
from storage.atomic import replacing

BACKBONE = SMALL_BACKBONE / "test_resnet.safetensors"
APART = 60.0  # least RGB distance of a drawn colour from every colour that a class has


@dataclass(frozen=True, kw_only=True)
class BackboneTraining:
    """Settings of the training; the shipped weights were made with the defaults."""

    out: Path = BACKBONE
    name: str = "test_resnet"  # of timm
    seed: int = 0
    size: int = 96  # pixels
    images: int = 16_000  # drawn once, used several times, mirrored half of the time
    steps: int = 2_000
    batch: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.05


def strange_colour(rng: np.random.Generator, named: list[tuple[int, int, int]]) -> np.ndarray:
    """An RGB colour (3,) in 20..235 at a distance of more than `APART` from every named one."""
    while True:
        colour = rng.uniform(20, 235, 3)
        if min(float(np.linalg.norm(colour - np.array(other))) for other in named) > APART:
            return colour


def draw_object(rng: np.random.Generator, size: int) -> tuple[np.ndarray, int, int, np.ndarray]:
    """An image (S, S, 3) uint8, indices of its shape and texture, and the colours of object and ground (6,) in 0..1."""
    shape, texture = int(rng.integers(len(SHAPES))), int(rng.integers(len(TEXTURES)))
    colour = strange_colour(rng, [c for c in APPEARANCES.values() if c is not None])
    tint = strange_colour(rng, list(TINTS.values()))
    mask = shape_mask(rng, SHAPES[shape], size)
    image = np.where(mask[..., None], colour, textured(rng, list(tint), TEXTURES[texture], size))
    return photograph(rng, image), shape, texture, np.concatenate([colour, tint]) / 255


class Probe(nn.Module):
    """The backbone with one linear layer on its pooled last features, for shape, texture and colours."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone: Any = timm.create_model(name, num_classes=0)
        self.parts = (len(SHAPES), len(TEXTURES), 6)
        self.head = nn.Linear(self.backbone.num_features, sum(self.parts))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape, texture, colours = self.head(self.backbone(images)).split(self.parts, dim=1)
        return shape, texture, colours


def main(config: BackboneTraining) -> None:
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    drawn = [draw_object(rng, config.size) for _ in tqdm(range(config.images + 500), desc="drawing", mininterval=5)]
    images = torch.from_numpy(np.stack([d[0] for d in drawn])).permute(0, 3, 1, 2)
    shape, texture = torch.tensor([d[1] for d in drawn]), torch.tensor([d[2] for d in drawn])
    colours = torch.from_numpy(np.stack([d[3] for d in drawn])).float()
    probe = Probe(config.name)
    optimiser = torch.optim.AdamW(probe.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=config.steps, pct_start=0.05)
    started = time.time()
    bar = tqdm(range(config.steps), desc="training", mininterval=10)
    for step in bar:
        rows = torch.from_numpy(rng.integers(config.images, size=config.batch))
        batch = normalise(images[rows].flip(-1) if rng.random() < 0.5 else images[rows])
        guess = probe(batch)
        loss = F.cross_entropy(guess[0], shape[rows]) + F.cross_entropy(guess[1], texture[rows])
        loss = loss + 10 * F.mse_loss(guess[2], colours[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == config.steps:
            with torch.no_grad():
                guess = probe.eval()(normalise(images[config.images :]))
            probe.train()
            right = [
                (g.argmax(1) == t[config.images :]).float().mean().item()
                for g, t in ((guess[0], shape), (guess[1], texture))
            ]
            tqdm.write(f"step {step + 1}: shape {right[0]:.3f}, texture {right[1]:.3f} of 500 held-out objects right")
    config.out.parent.mkdir(exist_ok=True)
    with replacing(config.out) as path:
        save_file({name: value.contiguous() for name, value in probe.backbone.state_dict().items()}, path)
    print(f"{config.out}: {(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main(tyro.cli(BackboneTraining))
