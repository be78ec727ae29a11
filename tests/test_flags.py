"""The flags of the config tree: each field has one, and what is written behind it becomes the field's value and nothing
else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest

from flows.flags import Flag, flags_of, override
from flows.presets import PRESETS, preset
from storage.errors import UserError


def at(config: Any, path: Sequence[str]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_a_flag_changes_its_field_and_nothing_else(name: str) -> None:
    before = preset(name)
    assert override(before, ["--v2c.lr", "2e-4"]) == replace(before, v2c=replace(before.v2c, lr=2e-4))
    assert override(before, []) == before


@pytest.mark.parametrize("name", PRESETS)
def test_every_field_takes_its_own_value_as_it_is_shown(name: str) -> None:
    """What --help-all prints can be typed: the preset stays the same, one flag at a time and with all of them
    together."""
    config = preset(name)
    words = []
    for flag in flags_of(config):
        if flag.hint is bool:
            written = [flag.names[0] if flag.value else flag.names[1]]
        else:
            values = flag.value if isinstance(flag.value, tuple) else (flag.value,)
            written = [flag.names[0], *map(str, values)]
        assert override(config, written) == config, written
        words += written
    assert override(config, words) == config
    assert len([word for word in words if word.startswith("--")]) > 100


def test_every_field_but_the_presets_name_has_a_flag() -> None:
    paths = [flag.path for flag in flags_of(preset("demo"))]
    assert len(set(paths)) == len(paths)
    for path in (("v2c", "segmenter", "queries"), ("data", "layout", "things"), ("text", "names")):
        assert path in paths
    assert ("preset",) not in paths
    with pytest.raises(UserError, match="'--preset' is not a flag"):
        override(preset("demo"), ["--preset", "scenes"])


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--v2c.lr", "2e-4"], ("v2c", "lr"), 2e-4),
        (["--v2c.lr=2e-4"], ("v2c", "lr"), 2e-4),
        (["--v2c.backbone_lr", "0.5"], ("v2c", "backbone_lr"), 0.5),
        (["--v2c.steps", "3", "--v2c.steps", "4"], ("v2c", "steps"), 4),
        (["--v2c.augment.jitter", "0.5", "2"], ("v2c", "augment", "jitter"), (0.5, 2.0)),
        (["--v2c.augment.no-flip"], ("v2c", "augment", "flip"), False),
        (["--v2c.augment.no-flip", "--v2c.augment.flip"], ("v2c", "augment", "flip"), True),
        (["--v2c.text-centering"], ("v2c", "text_centering"), True),
        (["--g2s.decay", "step"], ("g2s", "decay"), "step"),
        (["--tokens.views", "2"], ("tokens", "views"), 2),
        (["--v2c.segmenter.backbone-weights", "None"], ("v2c", "segmenter", "backbone_weights"), None),
        (["--v2c.segmenter.backbone-weights", "none.pt"], ("v2c", "segmenter", "backbone_weights"), "none.pt"),
        (["--data.shapes", "ring"], ("data", "shapes"), ("ring",)),
        (["--text.templates", "a {}", "the {}"], ("text", "templates"), ("a {}", "the {}")),
        (["--text.templates=a = {}"], ("text", "templates"), ("a = {}",)),
        (["--evaluate.seen-offsets"], ("evaluate", "seen_offsets"), ()),
        (["--evaluate.control-offset", "-0.1"], ("evaluate", "control_offset"), -0.1),
    ],
)
def test_words_become_values(words: list[str], path: tuple[str, ...], value: Any) -> None:
    found = at(override(preset("demo"), words), path)
    assert found == value and type(found) is type(value)


def test_fields_of_one_config_are_checked_together() -> None:
    """On their own, both would be refused."""
    changed = override(preset("demo"), ["--v2c.resize.short", "200", "--v2c.lr", "1", "--v2c.resize.longest", "300"])
    assert (changed.v2c.resize.short, changed.v2c.resize.longest) == (200, 300)
    for alone in (["--v2c.resize.short", "200"], ["--text.embeddings", "x.npy"]):
        with pytest.raises(UserError):
            override(preset("demo"), alone)
    assert override(preset("demo"), ["--text.embeddings", "x.npy", "--text.names", "x.txt"]).text.names == "x.txt"


@pytest.mark.parametrize(
    ("hint", "takes"),
    [
        (int, "INT"),
        (float, "NUMBER"),
        (str, "TEXT"),
        (bool, ""),
        (str | None, "TEXT|None"),
        (tuple[int, float], "INT NUMBER"),
        (tuple[float, ...], "NUMBER ..."),
        (Literal["image", "batch"], "{image,batch}"),
        (tuple[Literal[1, 2], ...], "{1,2} ..."),
    ],
)
def test_what_a_flag_takes(hint: Any, takes: str) -> None:
    assert Flag(path=("a", "b_c"), hint=hint, value=None).takes == takes


def test_a_mistake_names_the_flag_as_it_was_written() -> None:
    for words, message in (
        (["--v2c.lr", "a b"], "--v2c.lr takes NUMBER, such as 0.001, not 'a b'"),
        (["--v2c.no-lr"], r"'--v2c.no-lr' is not a flag of preset demo \(did you mean '--v2c.lr'\?\)"),
        (["--v2c", "3"], "'--v2c' is not a flag of preset demo"),
        (["--v2c.bakcbone_lr", "3"], r"'--v2c.bakcbone_lr' .*did you mean '--v2c.backbone-lr'"),
        (["--v2c.augment.flip", "off"], "takes no value, not 'off'; .* --v2c.augment.no-flip off"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            override(preset("demo"), words)
        assert "\n" not in str(caught.value)
