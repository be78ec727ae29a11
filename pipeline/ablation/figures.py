"""The paper's figures 4 and 5, from one seed of table 4's rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.ablation.examples import draw_examples
from pipeline.ablation.feature_map import draw, generated_features, real_features
from pipeline.ablation.page import picture
from pipeline.ablation.rows import Run
from pipeline.ablation.tables import ALIGNED, BASELINE, WHOLE
from pipeline.line import Config, benchmark_of
from pipeline.runtime import Runtime
from pipeline.teacher.text_bank import open_text
from storage.atomic import write_text
from storage.store import Store

# Panels of figure 4 -> rows of table 4.
PANELS = {"baseline": BASELINE.name, "V2C, L_mmd alone": ALIGNED.name, "V2C and G2S": WHOLE.name}


def draw_figures(
    folder: Path, config: Config, rows: Mapping[str, Run], *, store: Store, runtime: Runtime
) -> dict[str, str]:
    """Both figures as PNG files and figure 4's numbers as JSON; returns sections of the page, heading -> HTML.

    `rows`: variant of table 4 -> its run. The generators that are compared with V2C share its segmenter, and so its
    real features.
    """
    ours = rows[WHOLE.name]
    common: dict[str, Any] = {
        "store": store, "shards": ours.ref("shard"), "tokens": ours.ref("cache-clip"),
        "benchmark": benchmark_of(config), "runtime": runtime,
    }  # fmt: skip
    bank = open_text(store.open(ours.ref("text")).path, ours.ref("text").key)
    panels = {}
    for title, variant in PANELS.items():
        real = real_features(checkpoint=rows[variant].ref("v2c"), **common)
        generator, counts = store.open(rows[variant].ref("g2s")).path, {k: len(found) for k, found in real.items()}
        made = generated_features(generator, bank, counts=counts, noise_into=config.cpa.noise_into, seed=0)
        panels[title] = real, made
    compared = draw(folder / "figure4.png", panels, bank.names)
    numbers = {title: c.as_dict([bank.names[k] for k in panels[title][0]]) for title, c in compared.items()}
    write_text(folder / "figure4.json", json.dumps(numbers, indent=1))
    checkpoints = {"baseline": rows[BASELINE.name].ref("cpa"), "ours": ours.ref("cpa")}
    draw_examples(folder / "figure5.png", checkpoints, count=4, **common)
    return {
        "figure 4: features of unseen classes, real and generated": picture(folder / "figure4.png"),
        "figure 5: transductive predictions; unseen classes are outlined in red": picture(folder / "figure5.png"),
    }
