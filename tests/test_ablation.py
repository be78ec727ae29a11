"""The ablations: rows change what they are named for and nothing else, share artefacts, and their numbers are the
reports'."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reports import panoptic_scores, report
from scipy import stats
from tiny import tiny_config

from flows import presets
from flows.ablate import _name
from flows.cli import main
from flows.request import Request
from pipeline.ablation.rows import runs_of
from pipeline.ablation.tables import (
    ALIGNED,
    SCORES,
    SETTINGS,
    SWEPT,
    TABLES,
    Table,
    Variant,
    as_is,
    cells,
    html,
    markdown,
    seeded,
    summary,
    sweep,
)
from pipeline.line import Config, line
from pipeline.scoring.records import Report
from storage.keys import canonical
from storage.store import Store


def differences(one: Any, other: Any, path: str = "") -> dict[str, Any]:
    """Field -> new value, of two nested dicts."""
    if isinstance(one, dict):
        found: dict[str, Any] = {}
        for key in one:
            found |= differences(one[key], other[key], f"{path}.{key}".strip("."))
        return found
    return {} if one == other else {path: other}


def changes(table: str) -> list[dict[str, Any]]:
    base = presets.preset("scenes")
    return [differences(asdict(base), asdict(variant.change(base))) for variant in TABLES[table].variants]


def test_rows_change_what_the_paper_toggles() -> None:
    off = {"v2c.global_weight": 0.0, "v2c.instance_weight": 0.0}
    mmd = {"g2s.diversity_weight": 0.0, "g2s.semantic_weight": 0.0}
    assert changes("table4") == [off | mmd, mmd, {}]
    attention, instances = {"v2c.target_attention": False}, {"v2c.instance_weight": 0.0}
    assert changes("table5") == [attention | instances, attention, instances, {}]
    assert changes("table6") == [mmd, {"g2s.diversity_weight": 0.0}, {"g2s.semantic_weight": 0.0}, {}]
    whole, plain, masks, both = changes("beyond")
    world = {"data.protocol": "pixel-ignore", "data.unseen_share": 1.0}
    regions = {"tokens.regions": "components", "v2c.candidate_mask_weight": 0.5}
    assert (whole, plain, masks) == ({}, world, world | regions)
    assert both == masks | {"v2c.candidate_token_weight": 1.0}
    centric, ours = changes("table2")
    assert ours == {} and off.items() | mmd.items() <= centric.items()
    assert centric["g2s.generator"] == "primitives" and centric["cpa.classifier"] == "linear"


def test_the_sweep_moves_one_setting_at_a_time() -> None:
    base = presets.preset("scenes")
    split = {"data.split": "validation"}
    first, *rest = [differences(asdict(base), asdict(v.change(base))) for v in sweep(base).variants]
    assert first == split and all(split.items() <= change.items() and len(change) == 2 for change in rest)
    assert {path for change in rest for path in change} - set(split) == set(SWEPT)


def test_seeds_leave_the_teacher_and_its_tokens_alone() -> None:
    refs = [{s.name: s.recipe.ref for s in line(seeded(presets.preset("scenes"), seed))} for seed in (0, 1)]
    same = {stage for stage in refs[0] if refs[0][stage] == refs[1][stage]}
    assert same == {"scenes", "shard", "text", "cache-clip"}


def test_rows_that_differ_late_share_their_stage_1() -> None:
    base = presets.preset("scenes")
    every = runs_of(tuple(TABLES.values()), base, 3)
    # Plain, whole, table 5's three others, and three under pixel-ignore.
    assert len({run.ref("v2c") for run in every}) == 3 * 8
    assert len({run.ref("cache-clip") for run in every}) == 3
    assert len({run.ref("evaluate") for run in every}) == 3 * 12


def test_equal_configurations_have_one_name_and_one_run() -> None:
    base = presets.preset("scenes")
    tables = (*TABLES.values(), sweep(base))
    names: dict[str, str] = {}
    for variant in (variant for table in tables for variant in table.variants):
        assert names.setdefault(canonical(variant.change(base)), variant.name) == variant.name
    runs = runs_of(tables, base, 2)
    assert len(runs) == 2 * len(names) == len({run.name("ablate-scenes") for run in runs})
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def drawn(seed: int, shift: float) -> Report:
    rng = np.random.default_rng(seed)
    return report(
        {s: panoptic_scores(**{k: float(rng.uniform(10, 60)) + shift for k in SCORES}, PQ=1.0) for s in SETTINGS}
    )


def of(run: Report, setting: str, score: str) -> float:
    return getattr(run.rows[setting], score)


def interval(differences: list[float]) -> dict[str, Any]:
    """By scipy's own confidence interval."""
    n, mean = len(differences), statistics.mean(differences)
    low, high = stats.t.interval(0.95, n - 1, loc=mean, scale=stats.sem(differences))
    return {"mean": pytest.approx(mean), "half": pytest.approx((high - low) / 2)}


def test_means_deviations_and_gains_are_those_of_the_runs() -> None:
    table = TABLES["table4"]
    runs = {v.name: [drawn(10 * i + seed, i) for seed in range(3)] for i, v in enumerate(table.variants)}
    rows = summary(table, runs)
    for row in rows:
        for setting in SETTINGS:
            for score in SCORES:
                values = [of(run, setting, score) for run in runs[row["name"]]]
                assert row["mean"][setting][score] == pytest.approx(np.mean(values))
                assert row["sd"][setting][score] == pytest.approx(np.std(values, ddof=1))
        gains = [of(run, "transductive", "hPQ") - of(run, "control", "hPQ") for run in runs[row["name"]]]
        assert row["gain"] == interval(gains)
        for setting in SETTINGS if row["name"] != table.against else ():
            for score in SCORES:
                pairs = zip(runs[row["name"]], runs[table.against], strict=True)
                found = [of(own, setting, score) - of(other, setting, score) for own, other in pairs]
                assert row["against"][setting][score] == interval(found)
    assert rows[0]["against"] == {}
    assert rows[2]["paper"]["transductive"] == {"hPQ": 22.6, "sPQ": 31.0, "uPQ": 17.7}
    lines = cells(table, rows)
    assert len(lines) == 4 and {len(line) for line in lines} == {13}
    assert (
        lines[3][-1] == "22.6"
        and lines[1][3] == f"{rows[0]['mean']['inductive']['hPQ']:.1f} ± {rows[0]['sd']['inductive']['hPQ']:.1f}"
    )
    assert markdown(lines).count("\n") == 5 and html(lines).count("<tr>") == 4


def test_every_row_of_the_paper_has_a_row_here() -> None:
    paper = json.loads((Path(__file__).parents[1] / "pipeline/ablation/paper.json").read_text())
    assert paper.keys() - {"note"} == TABLES.keys() - {"beyond"}
    for name, table in ((name, TABLES[name]) for name in paper.keys() - {"note"}):
        assert set(paper[name]) == {variant.name for variant in table.variants}


def test_a_single_run_has_no_deviation_and_a_sweep_no_paper() -> None:
    table = Table(
        name="sweep", title="one", variants=(Variant(name="as the preset", change=as_is),), against="as the preset"
    )
    (row,) = summary(table, {"as the preset": [drawn(0, 0)]})
    assert row["paper"] == {} and row["sd"]["inductive"]["hPQ"] == 0.0
    heads, line = cells(table, [row])
    assert len(heads) == 11 and line[3] == f"{row['mean']['inductive']['hPQ']:.1f}"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["scenes", "table9"], "table 'table9' is unknown"),
        (["scenes", "table4", "--seeds", "0"], "must be at least 1"),
        (["scenes", "table4", "--jobs", "0"], "must be at least 1"),
        (["demo-regions", "beyond", "--plan"], "preset demo-regions has candidate regions"),
        (["coco-sample", "sweep", "--coco", "nowhere", "--plan"], "pass --data.unseen with other classes"),
    ],
)
def test_what_cannot_be_asked_for(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "--preset", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("zs-seg: ") and why in line


def test_what_differs_from_the_preset_has_names_of_its_own() -> None:
    def name(*overrides: str, max_steps: int = 0) -> str:
        return _name(Request(preset="scenes", overrides=overrides, max_steps=max_steps))

    assert name() == "ablate-scenes" and name(max_steps=3) == "ablate-scenes-max-steps-3"
    assert name("--data.split", "validation") == "ablate-scenes-data-split-validation"
    long = "--v2c.global-weight", "0", "--v2c.instance-weight", "0"
    assert name(*long) != name(*long[:-1], "1") and len(name(*long)) <= 54
    assert name(*long).startswith("ablate-scenes-v2c-global-weight-0-v2c")
    (run,) = runs_of([replace(TABLES["table4"], variants=TABLES["table4"].variants[:1])], presets.preset("scenes"), 1)
    assert run.name(name()) == "ablate-scenes.baseline-l-match-l-mmd.0"


def small(name: str) -> Config:
    """A world that is learnt in seconds, badly."""
    tiny = tiny_config()
    return replace(tiny, preset=name, evaluate=replace(tiny.evaluate, sweep_images=2))


@pytest.mark.slow
def test_the_command_builds_tables_and_figures_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(presets.PRESETS, "tiny", lambda: small("tiny"))
    words = ["ablate", "table4", "--preset", "tiny", "--seeds", "2", "--store", "store", "--threads", "1"]
    assert main([*words, "--plan"]) == 0
    assert "v2c          4 artefacts,   4 to build" in capsys.readouterr().out
    assert main(words) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "runs" / "ablate-tiny"
    assert {p.name for p in folder.iterdir()} == {
        "table4.json", "table4.md", "figure4.png", "figure4.json", "figure5.png", "report.html",
    }  # fmt: skip
    content = json.loads((folder / "table4.json").read_text())
    assert content["of"] == "--preset tiny --store store"
    store = Store(tmp_path / "store")
    entry = next(a for a in content["artefacts"] if a["variant"] == ALIGNED.name and a["seed"] == 1)
    scored = json.loads((store.root / "report" / entry["evaluate"] / "report.json").read_text())
    row = next(row for row in content["rows"] if row["name"] == ALIGNED.name)
    assert row["runs"][1] == {s: {k: scored[s][k] for k in SCORES} for s in SETTINGS}
    numbers = json.loads((folder / "figure4.json").read_text())
    assert set(numbers) == {"baseline", "V2C, L_mmd alone", "V2C and G2S"}
    assert "table4: modules" in out and (folder / "table4.md").read_text() in out
    built = {ref: store.open(ref).manifest.provenance["created"] for ref in store.refs()}
    assert main(words) == 0
    assert "0 to build" in capsys.readouterr().out
    assert built == {ref: store.open(ref).manifest.provenance["created"] for ref in store.refs()}
