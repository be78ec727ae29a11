"""The fast part of the fault suite: every kind of fault once, in files, processes, disks and clocks; `make test-faults`
tries more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import Child as Process
from fault_injection import Child, attempt, cut, flip, swap
from fault_run import KINDS

from storage.errors import UserError


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each kind of fault once, tried by a process that forks: it has imported torch, and computed nothing."""
    found = tmp_path_factory.mktemp("faults") / "trials.json"
    process = Process("fault_run", "--seed", "1", "--count", str(len(KINDS)), "--json", str(found))
    assert process.wait() == 0, process.out + process.err
    return {trial["kind"]: trial for trial in json.loads(found.read_text())}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_fault_leads_to_a_wrong_result(kind: str, trials: dict[str, dict[str, Any]]) -> None:
    trial = trials[kind]
    assert trial["repaired"] and not trial["wrong"] and not trial["problem"], trial


@pytest.mark.slow
def test_most_faults_stop_with_a_line(trials: dict[str, dict[str, Any]]) -> None:
    assert trials.keys() == KINDS.keys()
    assert sum(bool(trial["message"]) for trial in trials.values()) >= 9  # damaged inputs and reports at the least


def test_the_suite_does_what_it_says(tmp_path: Path) -> None:
    """Its own tools: a flipped bit is one bit, a cut file shorter, and a child's end is told from a kill."""
    rng = np.random.default_rng(0)
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(name.encode() * 50)
    (tmp_path / "manifest.json").write_text("{}")
    before = int.from_bytes((tmp_path / "a.bin").read_bytes())
    flip(tmp_path / "a.bin", rng)
    assert (before ^ int.from_bytes((tmp_path / "a.bin").read_bytes())).bit_count() == 1
    a, b = ((tmp_path / name).read_bytes() for name in ("a.bin", "b.bin"))
    swap(tmp_path / "a.bin", rng)
    assert ((tmp_path / "b.bin").read_bytes(), (tmp_path / "a.bin").read_bytes()) == (a, b)
    cut(tmp_path / "b.bin", rng)
    assert a.startswith((tmp_path / "b.bin").read_bytes()) and len((tmp_path / "b.bin").read_bytes()) < len(a)
    assert attempt(lambda: 3).kind == "ok"
    assert attempt(lambda: {}["x"]).kind == "bug"
    assert attempt(lambda: int("x")).kind == "bug"

    def mistake() -> None:
        raise UserError("correct --store")

    assert attempt(mistake).kind == "message"
    child = Child(lambda: __import__("time").sleep(60))
    assert child.alive()
    child.kill()
    assert child.wait().kind == "killed"
    assert Child(lambda: __import__("time").sleep(60)).wait(0.1).kind == "hung"
