"""The paper's ablations as changes of one config, and their results over seeds as tables beside the paper's."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from pipeline.line import Config
from pipeline.scoring.records import Report

PAPER = Path(__file__).parent / "paper.json"
SETTINGS = "inductive", "control", "transductive"
SCORES = "hPQ", "sPQ", "uPQ"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a table: its name, how its config differs from the preset's."""

    name: str
    change: Callable[[Config], Config]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that differ in one respect, which `title` names."""

    name: str
    title: str
    variants: tuple[Variant, ...]


def v2c(**changes: Any) -> Callable[[Config], Config]:
    """Stage 1 with other settings."""
    return lambda config: replace(config, v2c=replace(config.v2c, **changes))


def g2s(**changes: Any) -> Callable[[Config], Config]:
    """Stage 2 with other settings."""
    return lambda config: replace(config, g2s=replace(config.g2s, **changes))


def together(*changes: Callable[[Config], Config]) -> Callable[[Config], Config]:
    """One change after the other."""

    def change(config: Config) -> Config:
        for one in changes:
            config = one(config)
        return config

    return change


def as_is(config: Config) -> Config:
    """The whole method as the preset has it."""
    return config


PLAIN_SEGMENTER = v2c(global_weight=0.0, instance_weight=0.0)
MOMENTS_ALONE = g2s(diversity_weight=0.0, semantic_weight=0.0)


def vision_centric(config: Config) -> Config:
    """The comparison after PADing: the plain segmenter's features, a primitive generator trained by L_mmd, a linear
    classifier.

    Its settings were chosen on the validation split like ours. Its classifier starts from random weights and has more
    steps than the projector; more weight on generated features did not improve it.
    """
    generator = g2s(generator="primitives", text_scale=0.5, steps=2 * config.g2s.steps)
    config = together(PLAIN_SEGMENTER, MOMENTS_ALONE, generator)(config)
    steps = 4 * config.cpa.steps
    return replace(config, cpa=replace(config.cpa, classifier="linear", lr=1e-3, synthetic_weight=1.0, steps=steps))


TABLES = {
    table.name: table
    for table in (
        Table(
            name="table2",
            title="against a vision-centric method",
            variants=(
                Variant(name="vision-centric (PADing's idea)", change=vision_centric),
                Variant(name="ours", change=as_is),
            ),
        ),
        Table(
            name="table4",
            title="modules",
            variants=(
                Variant(name="baseline (L_match, L_mmd)", change=together(PLAIN_SEGMENTER, MOMENTS_ALONE)),
                Variant(name="+V2C", change=MOMENTS_ALONE),
                Variant(name="+V2C+G2S+CPA", change=as_is),
            ),
        ),
        Table(
            name="table5",
            title="V2C: target attention and instance alignment (L_g is on in every row)",
            variants=(
                Variant(name="neither", change=v2c(target_attention=False, instance_weight=0.0)),
                Variant(name="instance alignment", change=v2c(target_attention=False)),
                Variant(name="target attention", change=v2c(instance_weight=0.0)),
                Variant(name="both", change=as_is),
            ),
        ),
        Table(
            name="table6",
            title="G2S: the generator's losses",
            variants=(
                Variant(name="L_mmd", change=MOMENTS_ALONE),
                Variant(name="L_mmd + L_gv2s", change=g2s(diversity_weight=0.0)),
                Variant(name="L_mmd + L_div", change=g2s(semantic_weight=0.0)),
                Variant(name="L_mmd + L_div + L_gv2s", change=as_is),
            ),
        ),
    )
}

# What the paper leaves open: each setting alone, the others as the preset has them.
SWEPT: dict[str, tuple[Any, ...]] = {
    "v2c.scale_lr": (1.0, 30.0),
    "v2c.text_centering": (True, False),
    "v2c.gamma": (0.0, 4.0),
    "v2c.tau": (0.05, 0.2),
    "v2c.bank": (64, 1024),
    "g2s.text_scale": (0.0884, 1.0, 4.0),  # 0.0884 = 1 / sqrt(128), a row of length 1
    "g2s.tau": (0.05, 0.2),
    "g2s.diversity_weight": (0.1, 1.0),
    "g2s.semantic_weight": (0.1, 1.0),
    "g2s.kl_weight": (0.0, 0.1),
    "cpa.synthetic": (8, 72),
    "cpa.synthetic_weight": (1.0, 3.0, 30.0),
    "cpa.noise_into": ("latent", "encoder"),
    "cpa.lr": (1e-4, 1e-3),
    "queries.views": (1, 4),
}


def sweep(config: Config) -> Table:
    """The preset and, for every field of `SWEPT`, the values it does not have."""

    def setting(path: str, value: Any) -> Callable[[Config], Config]:
        stage, field = path.split(".")
        return lambda config: replace(config, **{stage: replace(getattr(config, stage), **{field: value})})

    variants = [Variant(name="as the preset", change=as_is)]
    for path, values in SWEPT.items():
        stage, field = path.split(".")
        own = getattr(getattr(config, stage), field)
        variants += [
            Variant(name=f"{path} {value} (not {own})", change=setting(path, value)) for value in values if value != own
        ]
    return Table(name="sweep", title="what the paper leaves open, one setting at a time", variants=tuple(variants))


def seeded(config: Config, seed: int) -> Config:
    """The config with every training seed replaced; the images, the teacher and its tokens stay."""
    return replace(
        config,
        v2c=replace(config.v2c, seed=seed),
        queries=replace(config.queries, seed=seed),
        g2s=replace(config.g2s, seed=seed),
        cpa=replace(config.cpa, seed=seed),
    )


def summary(table: Table, runs: Mapping[str, Sequence[Report]]) -> list[dict[str, Any]]:
    """Every row: its runs, their mean and standard deviation, and the paper's row.

    Args:
        runs: variant's name -> the report of each seed, at least one.

    Returns:
        per variant `name`, `runs` [{setting: {score: percent}}], `mean` and `sd` {setting: {score: points}} (sd over
        n - 1, 0 of a single run), `gain` {"mean", "sd"}: transductive minus control hPQ of the same seed, and `paper`
        {setting: {score: percent}}, empty where it has none.
    """
    paper = json.loads(PAPER.read_text(encoding="utf-8")).get(table.name, {})
    rows = []
    for variant in table.variants:
        scores = [
            {s: {k: getattr(report.rows[s], k) for k in SCORES} for s in SETTINGS} for report in runs[variant.name]
        ]
        gains = [run["transductive"]["hPQ"] - run["control"]["hPQ"] for run in scores]
        rows.append(
            {
                "name": variant.name,
                "runs": scores,
                "mean": {s: {k: statistics.mean(run[s][k] for run in scores) for k in SCORES} for s in SETTINGS},
                "sd": {s: {k: _deviation([run[s][k] for run in scores]) for k in SCORES} for s in SETTINGS},
                "gain": {"mean": statistics.mean(gains), "sd": _deviation(gains)},
                "paper": {s: dict(zip(SCORES, v, strict=True)) for s, v in paper.get(variant.name, {}).items()},
            }
        )
    return rows


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def cells(table: Table, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table as text, heads first: mean ± standard deviation (of several runs) in percent, and the paper's hPQ
    where the paper has such a row."""
    published = any(row["paper"] for row in rows)
    heads = [
        table.title,
        "inductive sPQ",
        "uPQ",
        "hPQ",
        "control hPQ",
        "transductive sPQ",
        "uPQ",
        "hPQ",
        "gain over control",
    ]
    lines = [heads + ["paper: inductive hPQ", "paper: transductive hPQ"] * published]
    for row in rows:
        scores = [(setting, score) for setting in ("inductive", "transductive") for score in ("sPQ", "uPQ", "hPQ")]
        scores.insert(3, ("control", "hPQ"))
        several = len(row["runs"]) > 1
        line = [row["name"]]
        line += [f"{row['mean'][s][k]:.1f}" + f" ± {row['sd'][s][k]:.1f}" * several for s, k in scores]
        line.append(f"{row['gain']['mean']:+.1f}" + f" ± {row['gain']['sd']:.1f}" * several)
        if published:
            paper = [row["paper"].get(setting) for setting in ("inductive", "transductive")]
            line += [f"{known['hPQ']:.1f}" if known else "" for known in paper]
        lines.append(line)
    return lines


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """`cells` as a Markdown table."""
    rule = "|---" + "|---:" * (len(lines[0]) - 1) + "|"
    heads, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([heads, rule, *body]) + "\n"


def html(lines: Sequence[Sequence[str]]) -> str:
    """`cells` as an HTML table."""
    rows = [
        "".join(f"<{tag}{' class=number' * (i > 0)}>{escape(cell)}" for i, cell in enumerate(line))
        for tag, line in zip(["th", *["td"] * len(lines)], lines, strict=False)
    ]
    return f"<table><thead><tr>{rows[0]}</thead><tbody>{''.join(f'<tr>{row}' for row in rows[1:])}</tbody></table>"
