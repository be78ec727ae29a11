"""Every config of the tree: wrong choices are refused wherever one is built, and each field has its sentence."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest

from flows.flags import override
from flows.presets import preset
from pipeline.data.config import check_choices, choices_of
from pipeline.line import Config
from pipeline.runtime import Runtime
from storage.errors import UserError

ROOT = Path(__file__).parents[1]


def configs_in(hint: Any) -> Iterator[type]:
    """The dataclasses that a type hint names, with those that their fields name."""
    if is_dataclass(hint):
        assert isinstance(hint, type)
        yield hint
        for part in get_type_hints(hint).values():
            yield from configs_in(part)
    for part in get_args(hint):
        yield from configs_in(part)


CONFIGS = tuple(dict.fromkeys(configs_in(Config)))
CHOICES = [
    (config, field.name, choices)
    for config in CONFIGS
    for field in fields(config)
    if (choices := choices_of(get_type_hints(config)[field.name]))
]
LITERAL = pytest.mark.parametrize(
    ("config", "field", "choices"), CHOICES, ids=[f"{c.__name__}.{f}" for c, f, _ in CHOICES]
)


def test_the_tree_is_walked_to_its_leaves() -> None:
    names = {(config.__name__, field) for config, field, _ in CHOICES}
    assert {
        ("V2CConfig", "decay"), ("CPAConfig", "decay"), ("V2CConfig", "instance_negatives"), ("TeacherConfig", "fill"),
        ("ScenesConfig", "split"), ("TokensConfig", "views"), ("SegmenterConfig", "architecture"),
    } <= names  # fmt: skip
    assert {"CocoConfig", "LayoutConfig", "AugmentConfig", "EvaluateConfig"} <= {config.__name__ for config in CONFIGS}


@LITERAL
def test_a_wrong_choice_is_one_line_that_lists_the_choices(config: type, field: str, choices: tuple[Any, ...]) -> None:
    name = config.__name__.removesuffix("Config").lower()
    first = str(choices[0])
    strange: tuple[Any, ...] = (f"{first}{first[-1]}", "zzz", "", 0, 2.0, True, b"x", *([None] * (None not in choices)))
    for wrong in strange:
        for build in (lambda value: config(**{field: value}), lambda value: replace(config(), **{field: value})):
            with pytest.raises(UserError) as caught:
                build(wrong)
            line = str(caught.value)
            assert line.startswith(f"{name}: {field} must be one of {', '.join(map(str, choices))}, not {wrong!r}")
            assert "\n" not in line
    if len(first) > 2:
        with pytest.raises(UserError, match=rf"\(did you mean '{first}'\?\)$"):
            config(**{field: strange[0]})


@LITERAL
def test_every_right_choice_constructs(config: type, field: str, choices: tuple[Any, ...]) -> None:
    for right in choices:
        assert getattr(config(**{field: right}), field) == right


@LITERAL
def test_a_wrong_choice_is_refused_as_a_flag(config: type, field: str, choices: tuple[Any, ...]) -> None:
    run, (path, sound) = next(
        (run, found) for run in map(preset, ("demo", "coco-sample")) for found in parts(run) if type(found[1]) is config
    )
    flag = "--" + ".".join((*path, field)).replace("_", "-")
    wrong = "9" if isinstance(choices[0], int) else "zzz"
    with pytest.raises(UserError, match=f"{field} must be one of {choices[0]}, "):
        override(run, [flag, wrong])
    assert getattr(sound, field) in choices


def parts(config: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The configs in a config, with the names on the way to them."""
    yield path, config
    for field in fields(config):
        if is_dataclass(value := getattr(config, field.name)):
            yield from parts(value, *path, field.name)


@pytest.mark.parametrize(
    ("hint", "choices"),
    [
        (Literal["a", "b"], ("a", "b")),
        (Literal["a", 2] | None, ("a", 2, None)),
        (tuple[Literal["a", "b"], ...], ("a", "b")),
        (tuple[Literal[1], Literal[2]] | None, (1, 2, None)),
        (str | None, ()),
        (tuple[int, ...], ()),
    ],
)
def test_choices_are_found_inside_tuples_and_beside_none(hint: Any, choices: tuple[Any, ...]) -> None:
    assert choices_of(hint) == choices


class Several:
    """Checked like a config."""

    colours: tuple[Literal["red", "green"], ...] = ("red", "green")
    maybe: Literal["yes"] | None = None


def test_every_entry_of_a_tuple_is_checked() -> None:
    several = Several()
    check_choices(several)
    several.maybe = "yes"
    check_choices(several)
    several.colours = ("red", "gren")  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=r"several: colours .* red, green, not 'gren' \(did you mean 'green'\?\)"):
        check_choices(several)
    several.colours, several.maybe = (), "no"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="several: maybe must be one of yes, None, not 'no'"):
        check_choices(several)


def written_sentences(config: type) -> dict[str, str]:
    """Field -> the string that stands directly below it in the source, of the class itself alone; "" where there is
    none."""
    source = Path(inspect.getfile(config)).read_text(encoding="utf-8")
    body = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == config.__name__).body
    found = {}
    for field, below in zip(body, [*body[1:], None], strict=True):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
            case ast.AnnAssign(target=ast.Name(id=name)), _:
                found[name] = ""
    return found


@pytest.mark.parametrize("config", [*CONFIGS, Runtime], ids=lambda config: config.__name__)
def test_every_field_has_a_sentence_of_its_own(config: type) -> None:
    bases = [base for base in config.__mro__ if is_dataclass(base)]
    found = {name: text for base in reversed(bases) for name, text in written_sentences(base).items()}
    assert found.keys() == {field.name for field in fields(config)}
    for name, text in found.items():
        assert text.endswith((".", '."')), f"{config.__name__}.{name} has no sentence"
        assert len(text) <= 210 or config is Runtime, f"{config.__name__}.{name}: {len(text)} characters"
    assert len(set(found.values())) == len(found)


def test_sentences_cite_only_equations_of_the_paper_and_decisions_that_there_are() -> None:
    for config in CONFIGS:
        for name, text in written_sentences(config).items():
            cited = re.findall(r"\bD(\d+)", text)
            assert all(1 <= int(number) <= 10 for number in cited), (config, name)
            for number in re.findall(r"Eq\. (\d+)", text):
                assert 1 <= int(number) <= 9, (config, name)


def test_no_config_imports_what_is_slow() -> None:
    files = [file for file in (ROOT / "pipeline").rglob("config.py")]
    assert len(files) >= 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not {name.partition(".")[0] for name in names} & {"torch", "open_clip", "timm", "zarr"}, file


@pytest.mark.parametrize(("batch", "size"), [(1, 32), (2, 32), (1, 64)])
def test_batchnorm_with_one_value_is_refused_as_by_torch(batch: int, size: int) -> None:
    """The config refuses just what the network cannot compute, and nothing where BatchNorm is frozen."""
    import torch

    from models.segmenter import build_segmenter

    sample = preset("coco-sample").v2c
    view = replace(sample.augment, size=size)
    replace(sample, batch=batch, augment=view, segmenter=replace(sample.segmenter, frozen_batchnorm=True))
    network = build_segmenter(**asdict(sample.segmenter)).train()
    if batch * size**2 > 32**2:
        network(torch.rand(batch, 3, size, size))
        replace(sample, batch=batch, augment=view)
        return
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network(torch.rand(batch, 3, size, size))
    with pytest.raises(UserError, match="batch 1 and views of 32 pixels .* one value a channel at stride 32"):
        replace(sample, batch=batch, augment=view)
