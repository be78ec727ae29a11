"""The fast part of the fault suite: every kind of fault once, in files, processes, disks and clocks; `make test-faults` tries more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fault_injection import Child, attempt, cut, flip, swap
from fault_run import KINDS

TESTS = Path(__file__).parent
PYTHONPATH = f"{TESTS.parent}:{TESTS / 'helpers'}:{TESTS / 'faults'}"


@pytest.mark.slow
def test_no_fault_leads_to_a_wrong_result(tmp_path: Path) -> None:
    """In a process of its own, which forks: it has imported torch, and computed nothing."""
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(TESTS / "faults" / "fault_run.py"),
        "--seed",
        "1",
        "--count",
        str(len(KINDS)),
        "--json",
        str(tmp_path / "trials.json"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads((tmp_path / "trials.json").read_text())
    assert {trial["kind"] for trial in trials} == set(KINDS)
    assert Counter(bool(trial["wrong"] or trial["problem"]) for trial in trials) == {False: len(KINDS)}
    assert all(trial["repaired"] for trial in trials)
    assert sum(bool(trial["message"]) for trial in trials) >= 9  # every damaged input and report at the least


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
    assert attempt(lambda: int("x")).kind == "message"
    child = Child(lambda: __import__("time").sleep(60))
    assert child.alive()
    child.kill()
    assert child.wait().kind == "killed"
    assert Child(lambda: __import__("time").sleep(60)).wait(0.1).kind == "hung"
