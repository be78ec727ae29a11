"""What may be written for an artefact: keys, runs, RUN:STAGE, and what is refused because it could be two things."""

from __future__ import annotations

from pathlib import Path

import pytest
from many_artefacts import demo_line, fill, note

from pipeline.inference.model import checkpoint_folder
from storage.keys import Ref
from storage.names import find, named
from storage.runs import RunRecord
from storage.store import Store

STAGES = {stage.name: stage.recipe.ref for stage in demo_line()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The demo's line as run "demo", and of run "begun" all but the last two stages."""
    store = Store(tmp_path / "store")
    fill(store, demo_line())
    fill(store, demo_line(1)[:7])
    note(store, "demo", demo_line())
    note(store, "begun", demo_line(1))
    return store


def test_a_key_a_run_and_a_stage_of_it(store: Store) -> None:
    for ref in STAGES.values():
        assert named(store, str(ref)) == named(store, ref.key) == find(store, ref.key) == ref
    run = named(store, "demo")
    assert isinstance(run, RunRecord) and dict(run.refs) == STAGES
    assert find(store, "demo") == STAGES["evaluate"]
    assert find(store, "demo", kind="checkpoint") == STAGES["cpa"]
    assert all(find(store, f"demo:{name}") == ref for name, ref in STAGES.items())
    note(store, "demo", demo_line(1))
    assert find(store, "demo:v2c") == demo_line(1)[4].recipe.ref  # the last line of that name


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("dmo", "", r"no artefact and no run 'dmo' in .*\(did you mean 'demo'\?\); `zs-seg list`"),
        ("dmo:v2c", "", "did you mean 'demo'"),
        ("", "", "no artefact"),
        ("no/such", "", "no artefact"),
        ("demo:vc2", "", r"run demo has no stage 'vc2' \(did you mean 'v2c'\?\); its stages are scenes, "),
        ("demo", "picture", "run demo has no picture"),
        ("begun", "", "evaluate of run begun .* is missing in .* or write begun:scenes, .*begun:g2s$"),
        ("begun", "checkpoint", "cpa of run begun .* is missing in "),
    ],
)
def test_what_is_not_there_is_named_with_what_is(store: Store, text: str, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find(store, text, kind=kind)


def test_a_run_whose_name_begins_a_key_is_refused_with_the_choices(store: Store) -> None:
    key = STAGES["text"].key
    for name in (key, key[:5]):
        note(store, name, demo_line())
        with pytest.raises(ValueError, match=f"'{name}' is a run and the beginning of .*text/{key}.* {name}:evaluate"):
            named(store, name)
        assert find(store, f"{name}:v2c") == STAGES["v2c"]
        assert find(store, f"text/{name}") == Ref(kind="text", key=key)


def test_a_folder_with_the_name_of_a_run_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/meta.json").write_text('{"stage": "cpa"}')
    with pytest.raises(ValueError, match=r"'demo' is a folder here and a run in .*; write \./demo or demo:cpa"):
        checkpoint_folder(store, "demo")
    assert checkpoint_folder(store, "./demo") == Path("demo")
    with pytest.raises(ValueError, match=f"{STAGES['v2c'].key} is no checkpoint of"):  # which was found, and is a sham
        checkpoint_folder(store, "demo:v2c")
