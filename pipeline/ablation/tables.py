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
from pipeline.world.config import ScenesConfig
from storage.errors import UserError

PAPER = Path(__file__).parent / "paper.json"
SETTINGS = "inductive", "control", "transductive", "inductive_teacher", "transductive_teacher"
SCORES = "hPQ", "sPQ", "uPQ"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a table: its name, how its config differs from the preset's."""

    name: str
    change: Callable[[Config], Config]


# What a table shows: of a setting a score in percent, or its difference from the same seed's in the row `against`.
Columns = tuple[tuple[str, str], ...]
CONTROL = "control", "hPQ"
PAPERS: Columns = (
    *(("inductive", score) for score in ("sPQ", "uPQ", "hPQ")),
    CONTROL,
    *(("transductive", score) for score in ("sPQ", "uPQ", "hPQ")),
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that differ in one respect, which `title` names; the others are compared with the row `against`, seed by
    seed. `columns` are shown with mean and deviation, `differences` with mean and interval."""

    name: str
    title: str
    variants: tuple[Variant, ...]
    against: str
    columns: Columns = PAPERS
    differences: Columns = (("inductive", "uPQ"), ("transductive", "hPQ"))


def v2c(**changes: Any) -> Callable[[Config], Config]:
    """Stage 1 with other settings."""
    return lambda config: replace(config, v2c=replace(config.v2c, **changes))


def g2s(**changes: Any) -> Callable[[Config], Config]:
    """Stage 2 with other settings."""
    return lambda config: replace(config, g2s=replace(config.g2s, **changes))


def unlabelled(**changes: Any) -> Callable[[Config], Config]:
    """All images stay, generated ones may all show unseen classes, and the pixels of these are unlabelled; stage 1 with
    other settings, of candidate regions.

    No unseen name or class is used, but where candidate regions are, the outline of what is unlabelled is.
    """

    def change(config: Config) -> Config:
        data = replace(config.data, protocol="pixel-ignore")
        if isinstance(data, ScenesConfig):
            data = replace(data, unseen_share=1.0)
        tokens = replace(config.tokens, regions="components" if changes else "none")
        weights = {"candidate_mask_weight": 0.0, "candidate_token_weight": 0.0} | changes
        return replace(config, data=data, tokens=tokens, v2c=replace(config.v2c, **weights))

    return change


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


# A configuration has one name, in whichever tables it stands. The paper's tables 5 and 6 name what is added to L_g and to
# L_mmd; here what is left out of the whole.
BASELINE = Variant(name="baseline (L_match, L_mmd)", change=together(PLAIN_SEGMENTER, MOMENTS_ALONE))
ALIGNED = Variant(name="V2C, L_mmd alone", change=MOMENTS_ALONE)
WHOLE = Variant(name="whole method", change=as_is)
CENTRIC = Variant(name="vision-centric (PADing's idea)", change=vision_centric)

TABLES = {
    table.name: table
    for table in (
        Table(
            name="table2",
            title="against a vision-centric method",
            variants=(CENTRIC, WHOLE),
            against=CENTRIC.name,
        ),
        Table(
            name="table4",
            title="modules",
            variants=(BASELINE, ALIGNED, WHOLE),
            against=BASELINE.name,
        ),
        Table(
            name="table5",
            title="V2C: target attention and instance alignment (L_g is on in every row)",
            variants=(
                Variant(name="without either", change=v2c(target_attention=False, instance_weight=0.0)),
                Variant(name="without target attention", change=v2c(target_attention=False)),
                Variant(name="without instance alignment", change=v2c(instance_weight=0.0)),
                WHOLE,
            ),
            against="without either",
        ),
        Table(
            name="table6",
            title="G2S: the generator's losses",
            variants=(
                ALIGNED,
                Variant(name="without L_div", change=g2s(diversity_weight=0.0)),
                Variant(name="without L_gv2s", change=g2s(semantic_weight=0.0)),
                WHOLE,
            ),
            against=ALIGNED.name,
        ),
        Table(
            name="beyond",
            title="beyond the paper: candidate regions (E3), for which the outline of the unlabelled area is used; the teacher at "
            "prediction (E1)",
            variants=(
                WHOLE,
                Variant(name="pixel-ignore", change=unlabelled()),
                Variant(name="pixel-ignore, regions' masks", change=unlabelled(candidate_mask_weight=0.5)),
                Variant(
                    name="pixel-ignore, regions' masks and tokens",
                    change=unlabelled(candidate_mask_weight=0.5, candidate_token_weight=1.0),
                ),
            ),
            against="pixel-ignore",
            columns=(
                *(("inductive", score) for score in ("sPQ", "uPQ", "hPQ")),
                ("transductive", "hPQ"),
                ("inductive_teacher", "uPQ"),
                ("inductive_teacher", "hPQ"),
                ("transductive_teacher", "hPQ"),
            ),
            differences=(("inductive", "uPQ"), ("inductive", "hPQ"), ("inductive_teacher", "hPQ")),
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


def validated(config: Config) -> Config:
    """On the generated world's validation split, by which settings are chosen.

    Real images have none: there, raises UserError unless other classes than the reported ones are unseen.
    """
    if isinstance(config.data, ScenesConfig):
        return replace(config, data=replace(config.data, split="validation"))
    if not config.data.unseen:
        raise UserError(
            "table sweep compares settings, and no reported class may decide one; pass --data.unseen with other classes"
        )
    return config


def sweep(config: Config) -> Table:
    """The preset and, for every field of `SWEPT`, the values it does not have; `validated`."""

    def setting(path: str, value: Any) -> Callable[[Config], Config]:
        stage, field = path.split(".")
        return lambda config: replace(config, **{stage: replace(getattr(config, stage), **{field: value})})

    preset = Variant(name="as the preset", change=validated)
    variants = [preset]
    for path, values in SWEPT.items():
        stage, field = path.split(".")
        own = getattr(getattr(config, stage), field)
        variants += [
            Variant(name=f"{path} {value} (not {own})", change=together(validated, setting(path, value)))
            for value in values
            if value != own
        ]
    title = "what the paper leaves open, one setting at a time"
    return Table(name="sweep", title=title, variants=tuple(variants), against=preset.name)


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
    """Every row: its runs, their mean and standard deviation, the differences that are read from it, and the paper's
    row.

    Args:
        runs: variant's name -> the report of each seed, at least one, in the same order for every variant.

    Returns:
        per variant `name`, `runs` [{setting: {score: percent}}], `mean` and `sd` {setting: {score: points}} (sd over
        n - 1, 0 of a single run); `gain`, transductive minus control hPQ of the same seed; `against` {setting: {score}},
        this row minus the table's row `against` of the same seed, empty for that row itself; and `paper` {setting:
        {score: percent}}, empty where it has none. Differences are as `paired` returns them.
    """
    paper = json.loads(PAPER.read_text(encoding="utf-8")).get(table.name, {})
    scores = {
        variant.name: [
            {s: {k: getattr(report.rows[s], k) for k in SCORES} for s in SETTINGS} for report in runs[variant.name]
        ]
        for variant in table.variants
    }
    rows = []
    for variant in table.variants:
        own, others = scores[variant.name], scores[table.against]

        def each(found: Callable[[str, str], Any]) -> dict[str, dict[str, Any]]:
            return {s: {k: found(s, k) for k in SCORES} for s in SETTINGS}

        def minus(s: str, k: str, own: Any = own, others: Any = others) -> dict[str, float]:
            return paired([one[s][k] - other[s][k] for one, other in zip(own, others, strict=True)])

        rows.append(
            {
                "name": variant.name,
                "runs": own,
                "mean": each(lambda s, k, own=own: statistics.mean(run[s][k] for run in own)),
                "sd": each(lambda s, k, own=own: _deviation([run[s][k] for run in own])),
                "gain": paired([run["transductive"]["hPQ"] - run["control"]["hPQ"] for run in own]),
                "against": {} if variant.name == table.against else each(minus),
                "paper": {s: dict(zip(SCORES, v, strict=True)) for s, v in paper.get(variant.name, {}).items()},
            }
        )
    return rows


def paired(differences: Sequence[float]) -> dict[str, float]:
    """Differences of the same seeds, in points: their `mean`, and `half`, half the width of its 95 % confidence interval
    by Student's t over n - 1 degrees of freedom; 0 of a single one."""
    from scipy.special import stdtrit

    n = len(differences)
    half = float(stdtrit(n - 1, 0.975)) * _deviation(differences) / n**0.5 if n > 1 else 0.0
    return {"mean": statistics.mean(differences), "half": half}


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def cells(table: Table, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table as text, heads first: mean ± standard deviation in percent, differences of the same seeds with half
    their 95 % interval in brackets (neither of a single run), stage 3's gain over the control in a table that shows the
    control, and the paper's hPQ where the paper has such a row."""
    published = any(row["paper"] for row in rows)
    gain = CONTROL in table.columns
    heads = [table.title, *_heads(table.columns), *["gain over control"] * gain]
    heads += [f"{_setting(s)} {k} minus {table.against}" for s, k in table.differences]
    lines = [heads + ["paper: inductive hPQ", "paper: transductive hPQ"] * published]
    for row in rows:
        several = len(row["runs"]) > 1
        line = [row["name"]]
        line += [f"{row['mean'][s][k]:.1f}" + f" ± {row['sd'][s][k]:.1f}" * several for s, k in table.columns]
        differences = [*[row["gain"]] * gain, *(row["against"].get(s, {}).get(k) for s, k in table.differences)]
        line += [f"{d['mean']:+.1f}" + f" (± {d['half']:.1f})" * several if d else "" for d in differences]
        if published:
            paper = [row["paper"].get(setting) for setting in ("inductive", "transductive")]
            line += [f"{known['hPQ']:.1f}" if known else "" for known in paper]
        lines.append(line)
    return lines


def _heads(columns: Columns) -> list[str]:
    """A column names its setting where the one before has another."""
    before = [None, *(setting for setting, _ in columns)]
    return [k if s == last else f"{_setting(s)} {k}" for (s, k), last in zip(columns, before, strict=False)]


def _setting(name: str) -> str:
    return name.replace("_", " + ")


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
