"""What the user can mend is one line and status 2; a bug of ours keeps its traceback and ends with status 1."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flows.child import Died
from flows.child import run as run_child
from flows.cli import main
from flows.presets import preset
from models.errors import ModelError
from pipeline import scenes
from pipeline.line import line
from storage.errors import UserError
from storage.keys import Ref
from storage.store import State, Store

SMALL = ("--data.train-images", "2", "--data.val-images", "1", "--until", "scenes")
BUGS: dict[str, Callable[[], object]] = {
    "index": lambda: [1][int("1")],
    "zip": lambda: list(zip([1, 2], [1], strict=True)),
    "numpy": lambda: np.zeros(2) + np.zeros(3),
    "pathless OSError": lambda: (_ for _ in ()).throw(OSError("no file is to blame")),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_a_stage_keeps_its_traceback(
    bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scenes, "_draw_split", lambda *_: BUGS[bug]())
    with pytest.raises((IndexError, ValueError, OSError)) as caught:
        main(("run", "--preset", "demo", "--store", str(tmp_path), *SMALL))
    assert not isinstance(caught.value, UserError)
    assert "zs-seg:" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", [UserError, ModelError])
def test_what_the_user_can_mend_is_one_line(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise kind("scenes: cannot be drawn;\n draw others")

    monkeypatch.setattr(scenes, "_draw_split", refuse)
    assert main(("run", "--preset", "demo", "--store", str(tmp_path), *SMALL)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "zs-seg: scenes: cannot be drawn; draw others"


def test_a_bug_ends_a_stages_own_process_as_a_crash_and_not_as_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the Prefect flow starts it: a crash may be tried again, a mistake may not."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pipeline.scenes\npipeline.scenes._draw_split = lambda *_: list(zip([1], [], strict=True))\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1]}")
    lines: list[str] = []
    with pytest.raises(Died, match=r"status 1: ValueError: zip\(\)"):
        run_child("scenes", ["stage", "scenes", "--preset", "demo", "--store", str(tmp_path / "store")], lines.append)
    assert any(text.startswith("Traceback") for text in lines)
    with pytest.raises(UserError, match="nowhere"):
        run_child("scenes", ["stage", "scenes", "--preset", "nowhere"], lines.append)


def test_an_artefact_that_is_removed_while_it_is_opened_is_missing_and_not_damaged(tmp_path: Path) -> None:
    class Removing(Store):
        def state(self, ref: Ref) -> State:
            state = super().state(ref)
            shutil.rmtree(self.path(ref), ignore_errors=True)
            return state

    recipe = line(preset("demo"))[0].recipe
    store = Store(tmp_path)
    store.build(recipe, lambda build: None)
    with pytest.raises(UserError, match=f"{recipe.ref} is missing"):
        Removing(tmp_path).open(recipe.ref)
