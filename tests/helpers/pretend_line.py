"""What test_pretend_device.py runs on the pretend device, in processes of their own: single operations, and every stage
from the text bank to the prediction."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny import tiny_config, tiny_regions

from pipeline.line import Config, line
from pipeline.runtime import Runtime
from storage.store import Store

STEPS = 4
RUNTIME = Runtime(device="pretend:0", threads=1, progress=False, checkpoint_every=2, dask="none")


def config(variant: str) -> Config:
    """The tiny line on 12 images: "mask2former" as in the demo, "maskformer" with losses over full masks, tokens by
    attention, batches in two parts, averaged weights, and negatives from the whole batch; "regions" with candidate
    regions."""
    base = tiny_regions() if variant == "regions" else tiny_config()
    small = replace(
        base.v2c, steps=STEPS, points=32, bank=8, calibration_images=4, instance_negatives="image",
        segmenter=replace(base.v2c.segmenter, decoder_layers=2, queries=10),
    )  # fmt: skip
    base = replace(
        base,
        shard=replace(base.shard, limit=12),
        v2c=small,
        g2s=replace(base.g2s, steps=STEPS, batch=4),
        cpa=replace(base.cpa, steps=STEPS, batch=4),
    )
    if variant in ("mask2former", "regions"):
        return base
    other = replace(small.segmenter, architecture="maskformer")
    return replace(
        base,
        tokens=replace(base.tokens, method="attention", views=2),
        v2c=replace(small, segmenter=other, mask_loss="full", accumulate=2, ema=0.9, instance_negatives="batch"),
    )


def walk(store: str, variant: str, image: str, out: str) -> None:
    """Run all stages that the store has not, and predict `image`; of "regions" those up to stage 1. Stage 1 is
    interrupted when it has saved its state, and goes on. The file `out` gets, by stage, what `TRAFFIC` counted: in every
    training step, and besides."""
    from pretend_device import TRAFFIC

    from pipeline import predict
    from pipeline.training import loop

    add, save = loop.Record.add, loop.save_training_state
    steps: list[dict[str, Any]] = []
    interrupted: list[int] = []

    def add_and_count(self: Any, *arguments: Any, **named: Any) -> None:
        steps.append(vars(TRAFFIC.take()))
        add(self, *arguments, **named)

    def save_and_stop(folder: Path, state: Any) -> None:
        save(folder, state)
        if not interrupted:
            interrupted.append(state["step"])
            raise KeyboardInterrupt

    loop.Record.add, loop.save_training_state = add_and_count, save_and_stop
    made, counted, stages = Store(Path(store)), {}, line(config(variant))
    if variant == "regions":
        stages = stages[: [stage.name for stage in stages].index("v2c") + 1]
    for stage in stages:
        if stage.name == "v2c":
            with contextlib.suppress(KeyboardInterrupt):
                stage.run(store=made, runtime=RUNTIME)
        stage.run(store=made, runtime=RUNTIME)
        counted[stage.name] = {"steps": list(steps), "besides": vars(TRAFFIC.take())}
        steps.clear()
    assert interrupted == [2]
    if variant != "regions":
        predict.run(
            checkpoint=str(made.path(stages[-3].recipe.ref)), images=[image], out=str(Path(out).with_suffix("")),
            teacher_weights="", skip_bad=False, store=made, runtime=RUNTIME,
        )  # fmt: skip
        counted["predict"] = {"steps": [], "besides": vars(TRAFFIC.take())}
    Path(out).write_text(json.dumps(counted, indent=1))


def show_what_it_refuses(out: str) -> None:
    """Operations on the device: what became of them, the waits, and the bytes copied."""
    import torch
    from pretend_device import DEVICE, TRAFFIC

    there, mask = torch.arange(6.0, device=DEVICE), torch.tensor([True, False, True] * 2, device=DEVICE)
    here, place = torch.ones(6), torch.tensor([1, 2])
    rows, weight = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.ones(6, device=DEVICE, requires_grad=True)
    tried = {
        "add": lambda: there + here,
        "matrix product": lambda: there @ here,
        "indexed by the device": lambda: here[rows],
        "into the CPU": lambda: here.add_(there),
        "number": lambda: there + torch.tensor(2.0) * 2,
        "copy": lambda: torch.zeros(6, device=DEVICE).copy_(here),
        "queued copy": lambda: here.to(DEVICE, non_blocking=True),
        "list": lambda: torch.tensor([1.0, 2.0], device=DEVICE),
        "item": lambda: int(there.sum()),
        "tolist": there.tolist,
        "back": there.cpu,
        "truth": lambda: bool(mask.any()),
        "nonzero": mask.nonzero,
        "bools": lambda: there[mask],
        "integers": lambda: there[rows],
        "the CPU's integers": lambda: there[place],
        "backward": lambda: (weight * 2).sum().backward(),
        "backward of bools": lambda: weight[mask].sum().backward(),
        "generator": lambda: torch.rand(3, generator=torch.Generator(DEVICE), device=DEVICE),
        "optimiser": lambda: torch.optim.AdamW([weight], fused=True).step(),
    }
    found = {}
    for name, operation in tried.items():
        TRAFFIC.take()
        try:
            operation()
            counted = TRAFFIC.take()
            found[name] = [counted.waits.total(), counted.copied.total()]
        except RuntimeError as error:
            found[name] = str(error)
    Path(out).write_text(json.dumps(found))
