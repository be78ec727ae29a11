"""Figure 4's numbers against loops, and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.ablation.feature_map import compare, draw


def clouds(seed: int, shift: float) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: (rng.normal(size=(n, 5)) + shift * k).astype(np.float32) for k, n in ((3, 12), (7, 20), (8, 9))}


def test_distances_are_those_of_the_class_means() -> None:
    real, made = clouds(0, 0.4), clouds(1, 0.3)
    result = compare(real, made)
    centres = [{k: sum(rows.astype(float)) / len(rows) for k, rows in part.items()} for part in (real, made)]

    def distance(a: Any, b: Any) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5

    for i, k in enumerate(real):
        assert result.to_real[i] == pytest.approx(distance(centres[0][k], centres[1][k]))
    for centre, message in zip(centres, (result.really_apart, result.apart), strict=True):
        pairs = [distance(centre[a], centre[b]) for a, b in ((3, 7), (3, 8), (7, 8))]
        assert message == pytest.approx(sum(pairs) / 3)
    right = [min(real, key=lambda c: distance(row, centres[0][c])) == k for k, rows in made.items() for row in rows]
    assert result.nearest == pytest.approx(sum(right) / len(right)) and 0 < result.nearest < 1


def test_perfect_copies_are_right_and_at_no_distance() -> None:
    real = clouds(0, 9.0)
    result = compare(real, real)
    assert result.nearest == 1.0 and not result.to_real.any() and result.apart == result.really_apart


def test_the_picture_has_a_panel_each_and_the_same_seed_gives_the_same(tmp_path: Path) -> None:
    names = [f"class {k}" for k in range(9)]
    panels = {"one": (clouds(0, 1.0), clouds(1, 1.0)), "two": (clouds(0, 1.0), clouds(2, 0.5))}
    message = draw(tmp_path / "a.png", panels, names)
    draw(tmp_path / "b.png", panels, names)
    assert list(message) == ["one", "two"] and message["two"].apart == compare(*panels["two"]).apart
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1.8 * image.height
    assert set(message["one"].as_dict(["x", "y", "z"])["to_real"]) == {"x", "y", "z"}
