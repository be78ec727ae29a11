"""The GPU memory that stage 1 is said to take: the accounting by hand, and every COCO preset within a card of 80 GB."""

from __future__ import annotations

import json
from pathlib import Path

import memory_samples
import pytest
from children import start
from memory_samples import PRESETS

MB, GB = 2**20, 1e9


def run(function: object, out: Path) -> dict[str, float]:
    """What a function of memory_samples.py writes."""
    child = start(function, out)  # pyright: ignore[reportArgumentType]
    assert child.wait() == 0, child.err
    return json.loads(out.read_text())


def test_blocks_count_from_their_making_to_their_last_use(tmp_path: Path) -> None:
    found = run(memory_samples.by_hand, tmp_path / "found.json")
    assert found == {
        "two": 8 * MB, "one after the other": 4 * MB, "view": 4 * MB, "in place": 4 * MB, "rounded up": 512,
        "bfloat16": 6 * MB, "on the CPU": 0,
    }  # fmt: skip


@pytest.mark.slow
def test_every_coco_preset_fits_a_card_of_80_gb(tmp_path: Path) -> None:
    """With at least 8 GB to spare; and two parts take about half of one."""
    found = run(memory_samples.presets, tmp_path / "found.json")
    assert {name: found[name] < 72 * GB for name in PRESETS} == dict.fromkeys(PRESETS, True), found
    assert 0.45 < found["in two parts"] / found[PRESETS[0]] < 0.6
