"""The help pages: a screen of common flags, and every flag with its sentence; the version."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

from flows.cli import TREE_COMMANDS, main
from flows.flags import flags_of
from flows.help import sentence
from flows.presets import PRESETS, preset


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that ends well prints."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code
    output = capsys.readouterr()
    assert not output.err
    return output.out


@pytest.mark.parametrize("command", TREE_COMMANDS)
@pytest.mark.parametrize("name", PRESETS)
def test_help_is_one_screen(
    command: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    screen = shown(capsys, command, "--preset", name, "--help")
    assert len(screen.splitlines()) <= 24
    assert max(map(len, screen.splitlines())) <= 100
    for flag in ("--preset PRESET", "--coco DIR", "--store DIR", "--max-steps N", "--v2c.lr NUMBER", "--help-all"):
        assert flag in screen
    assert 6 <= screen.count("--v2c.") + screen.count("--g2s.") + screen.count("--cpa.") + screen.count("--data.") <= 10
    assert f"({preset(name).v2c.steps})" in screen  # the preset's own values
    assert screen == shown(capsys, command, "--preset", name, "-h")


def test_run_shows_where_it_begins_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    screen = shown(capsys, "run", "--help")  # of the first preset
    for flag in ("--from", "--until", "--force", "--name", "--device", "--devices", "preset demo"):
        assert flag in screen
    assert "STAGE" in shown(capsys, "stage", "--help") and "TABLE" in shown(capsys, "ablate", "--help")


@pytest.mark.parametrize("columns", [80, 100, 200])
@pytest.mark.parametrize("name", ["demo", "coco-zss-r101c"])
def test_help_all_has_every_flag_with_its_sentence(
    name: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    page = shown(capsys, "run", "--preset", name, "--help-all")
    lines = page.splitlines()
    assert max(len(line) for line in lines) <= min(columns, 100)
    config = preset(name)
    for flag in flags_of(config):
        (place,) = (
            i
            for i, line in enumerate(lines)
            if line.startswith(f"  {flag.names[0]}") and line[2:].split()[0].rstrip(",") == flag.names[0]
        )
        below = " ".join(" ".join(lines[place : place + 12]).split())
        text = sentence(config, flag.path)
        assert text[: text.index(" ", 20)] in below, flag.path
    for own in ("--traceback", "--dask", "--checkpoint-every", "--skip-bad", "--help-all", "data:", "v2c.segmenter:"):
        assert own in page
    assert page.isascii()  # no boxes, no colours


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    line = shown(capsys, "--version")
    assert line == f"zs-seg {importlib.metadata.version('zs-seg')}\n"
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert line.split()[1] == project["version"]
