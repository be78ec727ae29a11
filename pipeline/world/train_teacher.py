"""Trains the small CLIP that ships with the package: `python -m pipeline.world.train_teacher --out models/small_clip`.

It is the teacher for the generated world, as OpenAI's CLIP is for photographs: trained contrastively on captions of
whole scenes and of single masked instances, over every class, including those that are unseen in segmentation. Equal
captions in a batch are positives of each other. Nothing else in the product imports this file.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from models.teacher import Teacher
from models.teacher_files import SMALL_CLIP
from pipeline.world.draw import Scene, draw_scene
from pipeline.world.names import APPEARANCES, SHAPES, stuff_names, thing_names
from storage.atomic import replacing, write_text

TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of {}")


@dataclass(frozen=True, kw_only=True)
class TeacherTraining:
    """Settings of the training; the shipped weights were made with the defaults."""

    out: Path = SMALL_CLIP
    seed: int = 0
    size: int = 96  # pixels of a drawn scene
    scenes: int = 12_000  # drawn once, used many times, mirrored half of the time
    steps: int = 750
    cycle: int = 2_000  # steps of the learning rate's whole cycle; training stops early, after `steps`
    instances: int = 112  # masked instances per batch
    wholes: int = 16  # whole scenes per batch
    lr: float = 2e-3
    weight_decay: float = 0.05
    rich: bool = False  # half of the instances' captions have their size, place and shade, too


def described(scene: Scene, segment: int, *, mirrored: bool) -> str:
    """A segment's class name with what the name leaves out: "a small light red star at the top left".

    Size by the square root of its area, as a share of the image's side: small below 0.28, large from 0.38. Place by its
    centre, in thirds. Shade, of plain colours alone: dark where its mean brightness is below 0.93 of its colour's,
    light above 1.03; a scene's brightness is drawn from 0.85 to 1.12.
    """
    mask, side, name = scene.ids == segment, len(scene.ids), scene.names[segment]
    share = float(np.sqrt(mask.sum())) / side
    size = "small" if share < 0.28 else "large" if share >= 0.38 else "medium"
    row, column = (int(3 * (at.mean() + 0.5) / side) for at in np.nonzero(mask[:, ::-1] if mirrored else mask))
    place = " ".join(filter(None, (("top", "", "bottom")[row], ("left", "", "right")[column]))) or "centre"
    colour, shade = APPEARANCES.get(name.split(" ")[0]), ""
    if colour is not None:
        ratio = scene.image[mask].mean() / np.mean(colour)
        shade = "dark " if ratio < 0.93 else "light " if ratio > 1.03 else ""
    return f"{size} {shade}{name} at the {place}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence about a whole scene: "a red star and a blue ring on grey dots"."""
    things = [f"a {n}" for n in scene.names.values() if n.split(" ")[1] in SHAPES]
    stuff = [n for n in scene.names.values() if n.split(" ")[1] not in SHAPES]
    rng.shuffle(things)
    return f"{', '.join(things[:-1])} and {things[-1]} on {' and '.join(stuff)}"


def contrastive_loss(image: Tensor, text: Tensor, group: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over unit rows `image` and `text` (N, D); pairs of equal `group` (N,) are positives."""
    logits = scale * image @ text.T
    target = (group[:, None] == group[None, :]).float()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def batch_of(
    teacher: Teacher, pool: list[Scene], config: TeacherTraining, rng: np.random.Generator
) -> tuple[Tensor, list[str]]:
    """Prepared inputs and captions of `instances` masked instances and `wholes` whole scenes."""
    inputs, captions = [], []
    count = 0
    while count < config.instances:
        scene = pool[rng.integers(len(pool))]
        mirrored = rng.random() < 0.5
        image = torch.from_numpy(scene.image.transpose(2, 0, 1).copy())
        ids = torch.from_numpy(scene.ids)
        prepared = teacher.prepare(image.flip(-1) if mirrored else image)
        segments = torch.tensor(list(scene.names))
        inputs.append(teacher.mask(prepared, (ids.flip(-1) if mirrored else ids) == segments[:, None, None]))
        for segment, name in scene.names.items():
            full = config.rich and rng.random() < 0.5
            about = described(scene, segment, mirrored=mirrored) if full else name
            captions.append(str(rng.choice(TEMPLATES)).format(about))
        count += len(segments)
        if len(inputs) <= 2 * config.wholes and len(inputs) % 2 == 0:
            inputs.append(prepared[None])
            captions.append(caption(scene, rng))
    return torch.cat(inputs), captions


def accuracy(teacher: Teacher, scenes: list[Scene], names: list[str]) -> tuple[float, int]:
    """The share (0..1) of masked instances whose nearest name in `names` is their own, and the number of instances."""
    text = F.normalize(
        torch.stack([teacher.encode_texts([t.format(n) for t in TEMPLATES]).mean(0) for n in names]), dim=-1
    )
    right = total = 0
    for scene in scenes:
        prepared = teacher.prepare(torch.from_numpy(scene.image.transpose(2, 0, 1).copy()))
        segments = torch.tensor(list(scene.names))
        tokens = teacher.encode_images(teacher.mask(prepared, torch.from_numpy(scene.ids) == segments[:, None, None]))
        best = (tokens @ text.T).argmax(1).tolist()
        right += sum(names[b] == n for b, n in zip(best, scene.names.values(), strict=True))
        total += len(best)
    return right / total, total


def main(config: TeacherTraining) -> None:
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    things, stuff = thing_names(SHAPES), stuff_names()
    draw = {"size": config.size, "things": things, "stuff": stuff}
    pool = [draw_scene(rng, **draw) for _ in tqdm(range(config.scenes), desc="drawing", mininterval=5)]
    held_out = [draw_scene(np.random.default_rng([config.seed, 1, i]), **draw) for i in range(400)]
    clip: Any = open_clip.create_model(f"local-dir:{SMALL_CLIP}", load_weights=False)
    teacher = Teacher(clip, open_clip.get_tokenizer(f"local-dir:{SMALL_CLIP}"), fill="mean")
    clip.requires_grad_(True)
    decayed = [p for p in clip.parameters() if p.ndim >= 2 and p is not clip.token_embedding.weight]
    plain = [p for p in clip.parameters() if p.ndim < 2 or p is clip.token_embedding.weight]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}], lr=config.lr
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=config.cycle, pct_start=0.05)
    started, right, total = time.time(), 0.0, 0
    bar = tqdm(range(config.steps), desc="training", mininterval=10)
    for step in bar:
        clip.train()
        inputs, captions = batch_of(teacher, pool, config, rng)
        unique = sorted(set(captions))
        group = torch.tensor([unique.index(c) for c in captions])
        image = F.normalize(clip.encode_image(inputs), dim=-1)
        text = F.normalize(clip.encode_text(teacher.tokenizer(unique)), dim=-1)[group]
        loss = contrastive_loss(image, text, group, clip.logit_scale.exp().clamp(max=100))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 250 == 0 or step + 1 == config.steps:
            clip.eval()
            right, total = accuracy(teacher, held_out, things + stuff)
            tqdm.write(f"step {step + 1}: {right:.4f} of {total} held-out masked instances right")
    with replacing(config.out / "open_clip_model.safetensors") as path:
        save_file({name: value.half().contiguous() for name, value in clip.state_dict().items()}, path)
    facts = {
        "steps": config.steps,
        "held_out_accuracy": right,
        "instances": total,
        "minutes": (time.time() - started) / 60,
    }
    write_text(config.out / "training.json", json.dumps({"fill": "mean", **facts}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(TeacherTraining))
