"""The line: what reads what, which keys a change moves, and the keys of the presets as they are.

When a default was changed ON PURPOSE, `test_golden_keys` fails with the new table as text: read that only the stages
you meant have moved, and paste it over `GOLDEN`. When it fails and you changed nothing on purpose, every cached
artefact of every user is about to be thrown away: look for what moved it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from coco_factory import CATEGORIES, make_coco
from label_factory import make_stuff, write_stuff_benchmark

from flows.presets import preset
from pipeline.data.config import CocoConfig
from pipeline.data.label_maps import LabelSource
from pipeline.line import STAGES, Config, line
from pipeline.shard import CocoSource
from pipeline.teacher.config import TeacherConfig
from pipeline.world.config import ScenesConfig
from storage.keys import Recipe

# "demo": the keys of a run. "coco-sample": each stage's own part, with the data left out, for the files are not
# everywhere.
GOLDEN: dict[str, dict[str, str]] = {
    "demo": {
        "scenes": "8e18b01200b7b3b6",
        "shard": "05e5b910e27ef70c",
        "text": "64818f25f6fcfff2",
        "cache-clip": "2f94067f0df2a238",
        "v2c": "9ef6308c0056caa0",
        "queries": "e1946374ad179c34",
        "g2s": "0eca00f774e984c9",
        "cpa": "e1125a38d708b169",
        "mask-tokens": "3c98e0f279d9f2ff",
        "evaluate": "fd7dbef7d9e50215",
    },
    "coco-sample": {
        "shard": "6d36204fc5438c94",
        "text": "b3db2f7a7c664b2c",
        "cache-clip": "757a043c2975037b",
        "v2c": "3bd78b6c675dff49",
        "queries": "d28ccc03be0458f8",
        "g2s": "162d50e01c8bee67",
        "cpa": "1979de9dc00d2931",
        "mask-tokens": "b3cace6842557e14",
        "evaluate": "02cbf18aaed8ff63",
    },
}


def keys(config: Config) -> dict[str, str]:
    return {step.name: step.recipe.key for step in line(config)}


def moved(one: Config, other: Config) -> set[str]:
    before, after = keys(one), keys(other)
    assert before.keys() == after.keys()
    return {stage for stage in before if before[stage] != after[stage]}


def own_parts(config: Config, coco: Path) -> dict[str, str]:
    """What each stage adds to its key of itself: stage, version and config, without inputs and without the files'
    fingerprint.
    """
    assert isinstance(config.data, CocoConfig)
    recipes = {s.name: s.recipe for s in line(replace(config, data=replace(config.data, root=str(coco))))}
    recipes["shard"] = replace(recipes["shard"], config={**recipes["shard"].config, "source": None})
    return {stage: replace(recipe, inputs={}).key for stage, recipe in recipes.items()}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in COCO's layout whose categories are not the benchmark's; planning does not look at them."""
    return make_coco(tmp_path_factory.mktemp("coco"))


DEMO = preset("demo")
BELOW = {  # a stage and all that reads it, directly or not
    "scenes": {"scenes", "shard", "cache-clip", "v2c", "queries", "g2s", "cpa", "mask-tokens", "evaluate"},
    "shard": {"shard", "cache-clip", "v2c", "queries", "g2s", "cpa", "mask-tokens", "evaluate"},
    "text": {"text", "v2c", "queries", "g2s", "cpa", "mask-tokens", "evaluate"},
    "cache-clip": {"cache-clip", "v2c", "queries", "g2s", "cpa", "mask-tokens", "evaluate"},
    "v2c": {"v2c", "queries", "g2s", "cpa", "mask-tokens", "evaluate"},
    "queries": {"queries", "g2s", "cpa", "evaluate"},
    "g2s": {"g2s", "cpa", "evaluate"},
    "cpa": {"cpa", "evaluate"},
    "evaluate": {"evaluate"},
}


def test_a_report_is_another_where_something_is_beyond_the_paper(coco: Path) -> None:
    """And of what was there before, its key has no entry."""

    def beyond(config: Config) -> list[str] | None:
        return line(config)[-1].recipe.config.get("beyond")

    assert beyond(DEMO) is None and beyond(preset("demo-regions")) == ["regions"]
    config = preset("coco-zps-r50")
    assert isinstance(config.data, CocoConfig)
    config = replace(config, data=replace(config.data, root=str(coco)))
    assert beyond(config) is None
    assert beyond(replace(config, data=replace(config.data, protocol="pixel-ignore"))) == ["protocol"]
    tokens = replace(DEMO.tokens, min_area=9)
    assert line(replace(DEMO, tokens=tokens))[-1].recipe.config["min_area"] == 9
    assert "min_area" not in line(DEMO)[-1].recipe.config


def test_golden_keys(coco: Path) -> None:
    found = {"demo": keys(DEMO), "coco-sample": own_parts(preset("coco-sample"), coco)}
    table = "\n".join(
        f'    "{name}": {{\n' + "".join(f'        "{stage}": "{key}",\n' for stage, key in part.items()) + "    },"
        for name, part in found.items()
    )
    changed = sorted(
        {
            f"{name}: {stage}"
            for name in found
            for stage in found[name]
            if GOLDEN.get(name, {}).get(stage) != found[name][stage]
        }
    )
    assert found == GOLDEN, (
        f"moved: {changed}; if that is on purpose:\nGOLDEN: dict[str, dict[str, str]] = {{\n{table}\n}}"
    )


def test_the_stages_come_in_order_and_read_only_what_came_before() -> None:
    steps = line(DEMO)
    assert tuple(step.name for step in steps) == STAGES
    made: set[str] = set()
    for step in steps:
        assert {str(ref) for ref in step.recipe.inputs.values()} <= made, step.name
        made.add(str(step.recipe.ref))
    assert len(made) == len(steps)


def test_each_stage_reads_what_the_design_says() -> None:
    steps = line(DEMO)
    stage_of = {str(step.recipe.ref): step.name for step in steps}
    reads = {step.name: {name: stage_of[str(ref)] for name, ref in step.recipe.inputs.items()} for step in steps}
    data = {"shards": "shard", "tokens": "cache-clip", "text": "text"}
    assert reads == {
        "scenes": {},
        "shard": {"scenes": "scenes"},
        "text": {},
        "cache-clip": {"shards": "shard"},
        "v2c": data,
        "queries": {**data, "checkpoint": "v2c"},
        "g2s": {"queries": "queries", "text": "text", "checkpoint": "v2c"},
        "cpa": {"queries": "queries", "text": "text", "checkpoint": "v2c", "generator": "g2s"},
        "mask-tokens": {"shards": "shard", "checkpoint": "v2c"},
        "evaluate": {
            **data,
            "inductive": "v2c",
            "generator": "g2s",
            "transductive": "cpa",
            "mask_tokens": "mask-tokens",
        },
    }


def test_each_step_runs_what_its_recipe_says() -> None:
    for step in line(DEMO):
        assert isinstance(step.work, partial)
        module = __import__(step.work.func.__module__, fromlist=["recipe"])
        assert step.name == module.STAGE
        # The shards' input is called by the kind of its source, and given as `source`.
        inputs = {name: ref for name, ref in step.recipe.inputs.items() if name != "scenes"}
        assert module.recipe(**step.work.keywords, **inputs) == step.recipe


@pytest.mark.parametrize(
    ("part", "field", "value", "stage"),
    [
        ("shard", "samples_per_tar", 10, "shard"),
        ("shard", "limit", 10, "shard"),
        ("text", "templates", ("{}",), "text"),
        ("tokens", "batch", 64, "cache-clip"),
        ("v2c", "lr", 5e-3, "v2c"),
        ("v2c", "seed", 1, "v2c"),
        ("v2c", "batch", 8, "v2c"),
        ("v2c", "instance_weight", 0.0, "v2c"),
        ("queries", "views", 7, "queries"),
        ("g2s", "kl_weight", 0.125, "g2s"),
        ("g2s", "seed", 1, "g2s"),
        ("cpa", "lr", 5e-3, "cpa"),
        ("cpa", "noise_into", "latent", "cpa"),
        ("evaluate", "control_offset", 0.2, "evaluate"),
    ],
)
def test_a_change_moves_its_stage_and_all_below(part: str, field: str, value: Any, stage: str) -> None:
    old = getattr(DEMO, part)
    assert getattr(old, field) != value
    assert moved(DEMO, replace(DEMO, **{part: replace(old, **{field: value})})) == BELOW[stage]


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [("segmenter", "queries", 21), ("segmenter", "backbone_weights", None), ("projector", "hidden", 99)],
)
def test_a_change_of_the_architecture_moves_stage_1_and_all_below(part: str, field: str, value: Any) -> None:
    inner = replace(getattr(DEMO.v2c, part), **{field: value})
    assert moved(DEMO, replace(DEMO, v2c=replace(DEMO.v2c, **{part: inner}))) == BELOW["v2c"]


def test_a_change_of_the_teacher_moves_all_that_it_says() -> None:
    """The shipped weights know one fill only, so random ones stand in."""
    random = TeacherConfig(name="small", pretrained="random")
    one, other, seed = (
        replace(DEMO, teacher=replace(random, fill=fill, seed=seed))
        for fill, seed in (("mean", 0), ("zero", 0), ("mean", 1))
    )
    for changed in (other, seed, DEMO):
        assert moved(one, changed) == BELOW["text"] | BELOW["cache-clip"]


@pytest.mark.parametrize(
    "change", [{"split": "validation"}, {"size": 64}, {"shapes": ("circle", "star", "ring", "cross")}]
)
def test_a_change_of_the_classes_or_the_world_moves_all(change: dict[str, Any]) -> None:
    assert isinstance(DEMO.data, ScenesConfig)
    everything = set(STAGES) if change.keys() != {"size"} else BELOW["scenes"]  # the classes' names stay the same
    assert moved(DEMO, replace(DEMO, data=replace(DEMO.data, **change))) == everything


def test_neither_the_presets_name_nor_the_order_of_asking_is_in_a_key() -> None:
    assert moved(DEMO, replace(DEMO, preset="mine")) == set()
    assert keys(DEMO) == keys(preset("demo"))


def test_where_files_lie_moves_nothing(coco: Path, tmp_path: Path) -> None:
    """The data's folder, the teacher's weights and the backbone's."""
    configs = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        shutil.copytree(coco, folder / "coco")
        for name in ("clip.pt", "backbone.pt"):
            (folder / name).write_bytes(name.encode())
        sample = preset("coco-sample")
        configs.append(
            replace(
                sample,
                data=CocoConfig(root=str(folder / "coco")),
                teacher=TeacherConfig(pretrained=str(folder / "clip.pt")),
                v2c=replace(
                    sample.v2c, segmenter=replace(sample.v2c.segmenter, backbone_weights=str(folder / "backbone.pt"))
                ),
            )
        )
    here, there = configs
    assert moved(here, there) == set()
    (tmp_path / "there" / "backbone.pt").write_bytes(b"other")
    assert moved(here, there) == BELOW["v2c"]
    (tmp_path / "there" / "clip.pt").write_bytes(b"other")
    assert moved(here, there) == BELOW["text"] | BELOW["cache-clip"]


def test_real_images_start_at_shard_and_count_by_content(coco: Path, tmp_path: Path) -> None:
    sample = replace(preset("coco-sample"), data=CocoConfig(root=str(coco)))
    assert tuple(step.name for step in line(sample)) == STAGES[1:]
    assert isinstance(line(sample)[0].work.keywords["source"], CocoSource)  # pyright: ignore[reportFunctionMemberAccess]
    other = make_coco(tmp_path / "other", seed=1)
    assert moved(sample, replace(sample, data=CocoConfig(root=str(other)))) == BELOW["shard"]


def test_a_benchmark_of_ones_own(coco: Path, tmp_path: Path) -> None:
    """Another split of the same classes leaves the shards, which serve every protocol, where they are."""

    def sample(**facts: Any) -> Config:
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({"categories": CATEGORIES, "unseen_ids": [25], "protocol": "image-filter", **facts}))
        return replace(preset("coco-sample"), data=CocoConfig(root=str(coco), benchmark=str(path)))

    before = keys(sample())
    for facts, expected in (
        ({}, set()),
        ({"unseen_ids": [25, 193]}, BELOW["text"] | BELOW["cache-clip"]),
        ({"protocol": "none: why not"}, BELOW["cache-clip"]),
        ({"categories": CATEGORIES[::-1]}, BELOW["shard"] | BELOW["text"]),
    ):
        after = keys(sample(**facts))
        assert {stage for stage in before if before[stage] != after[stage]} == expected


def test_label_maps_start_at_shard_and_count_by_content(tmp_path: Path) -> None:
    """Of a semantic benchmark; where files lie moves nothing, and another split of the classes leaves the shards."""

    def semantic(root: Path, **facts: Any) -> Config:
        file = write_stuff_benchmark(tmp_path / "tiny.json", **facts)
        return replace(preset("coco-sample"), data=CocoConfig(root=str(root), benchmark=str(file)))

    data = make_stuff(tmp_path / "data")
    steps = line(semantic(data))
    assert tuple(step.name for step in steps) == STAGES[1:]
    assert isinstance(steps[0].work.keywords["source"], LabelSource)  # pyright: ignore[reportFunctionMemberAccess]
    before = keys(semantic(data))
    for facts, expected in (
        ({"unseen_ids": [7]}, BELOW["text"] | BELOW["cache-clip"]),
        ({"protocol": "none"}, BELOW["cache-clip"]),
        ({"ignored": [255, 254]}, BELOW["shard"]),
    ):
        after = keys(semantic(data, **facts))
        assert {stage for stage in before if before[stage] != after[stage]} == expected
    assert keys(semantic(data.rename(tmp_path / "moved"))) == before
    other = keys(semantic(make_stuff(tmp_path / "other", seed=1)))
    assert {stage for stage in before if before[stage] != other[stage]} == BELOW["shard"]


@pytest.mark.parametrize(
    ("unseen", "message"), [([], "has no unseen class"), ([c["id"] for c in CATEGORIES], "has no seen class")]
)
def test_a_benchmark_with_nothing_to_learn_from_or_for_is_refused(
    coco: Path, tmp_path: Path, unseen: list[int], message: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"categories": CATEGORIES, "unseen_ids": unseen, "protocol": "none"}))
    with pytest.raises(ValueError, match=f"benchmark mine {message} and is for `zs-seg evaluate`"):
        line(replace(preset("coco-sample"), data=CocoConfig(root=str(coco), benchmark=str(path))))


def test_what_cannot_be_found_is_said_before_anything_runs(tmp_path: Path) -> None:
    sample = preset("coco-sample")
    with pytest.raises(ValueError) as caught:
        line(replace(sample, data=CocoConfig(root=str(tmp_path))))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="nowhere"):
        line(replace(sample, data=CocoConfig(root=str(tmp_path), benchmark="nowhere")))
    with pytest.raises(ValueError, match=r"--teacher\.pretrained"):
        line(replace(DEMO, teacher=TeacherConfig(pretrained="folder/clip.pt")))


def test_keys_hold_no_machine() -> None:
    for step in line(DEMO):
        assert isinstance(step.recipe, Recipe)
        text = repr(step.recipe.config)
        assert (
            "device" not in text
            and "threads" not in text
            and str(Path.home()) not in text
            and str(Path(__file__).parents[1]) not in text
        )
