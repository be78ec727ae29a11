"""What was made from what, and in which settings two lines differ: against slow references, and on the demo's own
line.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from many_artefacts import demo_line, fill

from flows.request import Request, configure
from pipeline.line import Stage, line
from storage.differences import ABSENT, Explainer, differences
from storage.keys import Recipe, Ref
from storage.lineage import Lineage, Node, ancestry
from storage.store import Build, Store

TRAPS = ('\n "files": {', '\n "provenance": {', '\n   "bytes": 7', '"files"', "")


def recipe(name: int, config: Any = None, **inputs: Ref) -> Recipe:
    return Recipe(kind="text", stage=f"stage-{name}", version=1, config=[name, config], inputs=inputs)


def overridden(*flags: str) -> list[Stage]:
    return line(configure(Request(preset="demo", overrides=flags)))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Every stage of the demo, as small files."""
    store = Store(tmp_path_factory.mktemp("store"))
    fill(store, demo_line(), files=3)
    return store


@examples(25)
@given(
    text=st.sampled_from(TRAPS) | st.text(max_size=8),
    sizes=st.dictionaries(
        st.sampled_from(['a"bytes": 9', "files", "ä", "x y", "provenance"]), st.integers(0, 999), max_size=4
    ),
)
def test_the_quick_look_says_what_the_manifest_says(text: str, sizes: dict[str, int]) -> None:
    config = {"files": {"bytes": 5}, text: text, "provenance": [text, {"files": {"bytes": 3}}]}

    def work(build: Build) -> None:
        for name, size in sizes.items():
            (build.path / name).write_bytes(bytes(size))
            build.add(build.path / name)
        build.counts[text or "files"] = {"files": [config]}

    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        source = store.build(recipe(0), lambda build: None)
        made = Recipe(kind="text", stage="stage-1", version=1, config=config, inputs={"source": source})
        ref = store.build(made, work)
        manifest, node = store.open(ref).manifest, Lineage(store).node(ref)
    assert node and (node.bytes, node.files) == (manifest.bytes, len(sizes)) == (sum(sizes.values()), len(sizes))
    assert (node.ref, node.stage, node.version, node.config) == (ref, "stage-1", 1, manifest.config)
    assert (node.counts, node.provenance, node.inputs) == (manifest.counts, manifest.provenance, {"source": source})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{\n "files": 1,\n "provenance": 2}', '{\n "inputs": []\n}'])
def test_an_unreadable_manifest_is_nothing(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    ref = store.build(recipe(0), lambda build: None)
    (store.path(ref) / "manifest.json").write_text(text)
    assert Lineage(store).node(ref) is None
    assert Lineage(store).nodes() == []


@examples(15)
@given(data=st.data())
def test_users_reach_and_ancestry_of_any_graph(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, made, inputs = Store(Path(folder)), list[Ref](), dict[Ref, set[Ref]]()
        for number in range(data.draw(st.integers(1, 8))):
            sources = data.draw(st.lists(st.sampled_from(made), max_size=3)) if made else []
            named = {f"input-{position}": source for position, source in enumerate(sources)}
            made.append(store.build(recipe(number, **named), lambda build: None))
            inputs[made[-1]] = set(sources)
        lineage = Lineage(store)
        above = {ref: {ref} for ref in made}
        for ref in made:  # inputs come before their users
            above[ref] = above[ref].union(*(above[source] for source in inputs[ref]))
        for ref in made:
            assert set(lineage.users(ref)) == {user for user in made if ref in inputs[user]}
            assert len(lineage.users(ref)) == len(set(lineage.users(ref)))
            assert lineage.reach([ref]) == above[ref]
            assert {node.ref for node in ancestry(ref, lineage.node).values()} == above[ref]
        assert lineage.reach(made) == set(made)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--v2c.lr", "2e-4"), {"v2c": "v2c.lr 0.001 -> 0.0002", "queries": "via checkpoint: v2c.lr 0.001 -> 0.0002",
                                "cpa": "via checkpoint: v2c.lr 0.001 -> 0.0002", "evaluate": "via inductive: v2c.lr 0.001 -> 0.0002"}),
        (("--tokens.crop", "box"), {"cache-clip": "cache-clip.crop full -> box", "v2c": "via tokens: cache-clip.crop full -> box",
                                    "g2s": "via queries: cache-clip.crop full -> box", # mask-tokens encodes with the same options
                                    "evaluate": "via tokens: cache-clip.crop full -> box and 1 more"}),
        (("--data.seed", "5"), {"scenes": "scenes.seed 0 -> 5", "shard": "via scenes: scenes.seed 0 -> 5",
                                "evaluate": "via shards: scenes.seed 0 -> 5"}),
        (("--cpa.lr", "2e-3", "--cpa.steps", "7"), {"cpa": "cpa.lr 0.003 -> 0.002 and 1 more",
                                                    "evaluate": "via transductive: cpa.lr 0.003 -> 0.002 and 1 more"}),
        (("--v2c.augment.jitter", "1", "1"), {"v2c": "v2c.augment.jitter [0.9,1.1] -> [1.0,1.0]"}),
        (("--evaluate.pictures", "3"), {"evaluate": "evaluate.pictures 8 -> 3"}),
        (("--g2s.steps", "3", "--v2c.lr", "2e-4"), {"v2c": "v2c.lr 0.001 -> 0.0002", "g2s": "g2s.steps 1000 -> 3 and 1 more"}),
    ],
)  # fmt: skip
def test_plan_says_which_field_moved_the_key(demo: Store, flags: tuple[str, ...], message: dict[str, str]) -> None:
    steps = overridden(*flags)
    explainer = Explainer((step.recipe for step in steps), Lineage(demo))
    why = {step.name: explainer.why(step.recipe.ref) for step in steps if demo.state(step.recipe.ref) == "missing"}
    assert {stage: why[stage] for stage in message} == message
    first = next(iter(message))
    assert next(iter(why)) == first  # what comes before is fresh


def test_plan_compares_with_the_nearest_and_then_the_newest(tmp_path: Path) -> None:
    store, steps = Store(tmp_path), overridden("--v2c.lr", "2e-4", "--v2c.steps", "7")
    explainer = Explainer([step.recipe for step in steps], Lineage(store))
    v2c = steps[4].recipe.ref
    assert explainer.why(v2c) == "no v2c in this store yet"
    fill(store, overridden()[:5])
    fill(store, overridden("--v2c.lr", "2e-4")[:5])
    assert Explainer([step.recipe for step in steps], Lineage(store)).why(v2c) == "v2c.steps 1600 -> 7"


def test_plan_when_an_input_of_the_nearest_is_gone(demo: Store, tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, demo_line()[:4])
    shards = demo_line()[1].recipe.ref
    store.remove(shards)
    steps = overridden("--tokens.crop", "box")
    message = Explainer([step.recipe for step in steps], Lineage(store)).why(steps[3].recipe.ref)
    assert (
        message == "cache-clip.crop full -> box and 2 more"
    )  # shards, and with them the scenes, that nobody knows any more
    (gone,) = differences(
        ancestry(demo_line()[3].recipe.ref, Lineage(store).node), {"shard": Node.planned(steps[1].recipe)}
    )[:1]
    assert (gone.field, gone.before, gone.after) == ("shard", ABSENT, str(shards))  # fmt: skip


def test_long_values_are_told_in_numbers() -> None:
    def node(config: Any) -> dict[str, Node]:
        ref = Ref(kind="text", key=f"{abs(hash(json.dumps(config))) % 16**16:016x}")
        return {"text": Node(ref=ref, stage="text", version=1, config=config, inputs={})}

    names = [{"id": i, "name": f"class {i}"} for i in range(56)]
    (one,) = differences(
        node({"text": {"names": names}}), node({"text": {"names": [*names[:50], {"id": 1}, *names[51:], {}]}})
    )
    assert str(one) == "text.names 56 entries -> 57 entries, 2 of them other"
    (one,) = differences(node({"a": {"b": "x" * 99}}), node({"a": {"b": None}}))
    assert str(one) == f"text.a.b {'x' * 21}... -> null"
    one, other = differences(node({"a": {}}), node({"a": {"b": 1}}))
    assert {str(one), str(other)} == {"text.a {} -> -", "text.a.b - -> 1"}
    assert differences(node([1]), node([1])) == []
