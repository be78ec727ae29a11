"""Keys: equal recipes have equal keys, any change moves them, in every process."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.keys import Recipe, Ref, canonical, option, sha256_file


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 3
    name: str = "a"


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 1e-4
    steps: int = 10
    names: tuple[str, ...] = ("cat", "dog")
    inner: Inner = Inner()
    weights: str | None = None
    flip: bool = True


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
TEXT = Ref(kind="text", key="0" * 16)


def recipe(config: object = None, **changes: object) -> Recipe:
    base = Recipe(kind="tokens", stage="cache-clip", version=1, config=config or Config(), inputs={"text": TEXT})
    return replace(base, **changes)  # pyright: ignore[reportArgumentType]


def test_golden_key() -> None:
    # written out by hand: whoever changes the canonical form moves every key of every store
    text = (
        '{"config":{"flip":true,"inner":{"name":"a","width":3},"lr":0.0001,"names":["cat","dog"],"steps":10,'
        '"weights":null},"inputs":{"text":"0000000000000000"},"stage":"cache-clip","version":1}'
    )
    assert recipe().key == hashlib.sha256(text.encode()).hexdigest()[:16] == "4ed81a5bb0b480a8"


@given(PLAIN)
def test_canonical_is_json_and_a_fixed_point(value: object) -> None:
    text = canonical(value)
    assert json.loads(text) == value
    assert canonical(json.loads(text)) == text


@given(st.dictionaries(st.text(), PLAIN, min_size=2, max_size=6))
def test_order_of_a_mapping_does_not_matter(value: dict[str, object]) -> None:
    assert canonical(dict(reversed(value.items()))) == canonical(value)


@given(PLAIN, PLAIN)
def test_different_values_have_different_text(a: object, b: object) -> None:
    def typed(value: object) -> object:  # 1, 1.0 and True are equal in Python, and differ here
        if isinstance(value, dict):
            return {key: typed(item) for key, item in value.items()}
        return [typed(item) for item in value] if isinstance(value, list) else (type(value), repr(value))

    assert (canonical(a) == canonical(b)) == (typed(a) == typed(b))


@given(lr=st.floats(1e-6, 1), steps=st.integers(1, 9), names=st.lists(st.text()), width=st.integers(4, 9))
def test_any_changed_field_moves_the_key(lr: float, steps: int, names: list[str], width: int) -> None:
    changed = Config(lr=lr + 1, steps=steps, names=(*names, "x"), inner=Inner(width=width), weights="w", flip=False)
    for field in fields(Config):
        one = replace(Config(), **{field.name: getattr(changed, field.name)})
        assert recipe(one).key != recipe().key, field.name
        assert recipe(one).key == recipe(replace(one)).key


def test_stage_version_and_inputs_move_the_key_and_kind_does_not_hide_in_it() -> None:
    other = Ref(kind="text", key="1" * 16)
    keys = {
        recipe().key,
        recipe(stage="x").key,
        recipe(version=2).key,
        recipe(inputs={"text": other}).key,
        recipe(inputs={"texts": TEXT}).key,
        recipe(inputs={}).key,
    }
    assert len(keys) == 6
    assert recipe().ref == Ref(kind="tokens", key=recipe().key)


def test_the_key_is_the_same_in_another_process() -> None:
    code = (
        "from storage.keys import Recipe;"
        "print(Recipe(kind='a', stage='s', version=1, config={'b': [1, 2.5], 'a': 'é'}, inputs={}).key)"
    )
    root = Path(__file__).parents[1]
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            cwd=root,
            env={"PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert keys == {Recipe(kind="a", stage="s", version=1, config={"a": "é", "b": (1, 2.5)}, inputs={}).key}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1, {"a": float("-inf")}]])
def test_not_finite_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="finite"):
        canonical(value)


@pytest.mark.parametrize("value", [Path("x"), {1}, {1: 2}, b"x", Config, object()])
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        canonical({"config": value})


def test_ref_reads_as_it_prints() -> None:
    ref = Ref(kind="checkpoint", key="0123456789abcdef")
    assert str(ref) == "checkpoint/0123456789abcdef"


@pytest.mark.parametrize(
    ("kind", "key"), [("checkpoint", ""), ("checkpoint", "0123"), ("..", "0" * 16), ("a", "0123456789ABCDEF"), ("", "")]
)
def test_what_is_no_ref_is_refused(kind: str, key: str) -> None:
    with pytest.raises(ValueError, match="names no artefact"):
        Ref(kind=kind, key=key)


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_an_option_at_its_default_moves_no_key() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Later(Config):
        dial: float = option(0.5)

    assert Later().dial == 0.5
    assert canonical(Later()) == canonical(Config())
    assert canonical({"config": [Later(dial=0.5)]}) == canonical({"config": [Config()]})
    assert json.loads(canonical(Later(dial=1.0))) == json.loads(canonical(Config())) | {"dial": 1.0}
