"""A stage in a process of its own: however that process ends, its parent says so; however the parent ends, it ends
too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from flows import child

ROOT = Path(__file__).parents[1]


def long_run(store: Path) -> list[str]:
    return ["run", "--preset", "demo", "--until", "scenes", "--data.train-images", "100000", "--store", str(store)]


def child_of(process: psutil.Process) -> psutil.Process:
    """The process of the stage, as soon as it works on its artefact."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for found in process.children(recursive=True):
            if "flows.child" in found.cmdline():
                return found
        time.sleep(0.05)
    raise AssertionError("no process of a stage was started")


@pytest.fixture(autouse=True)
def import_this_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_what_it_prints_comes_line_by_line_and_a_mistake_is_the_parents_value_error(tmp_path: Path) -> None:
    heard: list[str] = []
    child.run("a list", ["list", "--store", str(tmp_path)], heard.append)
    assert heard == [f"0 artefacts, 0 B, in {tmp_path}"]
    with pytest.raises(ValueError, match="^there is no stage 'nine' here; the stages are scenes, [^\n]*$"):
        child.run("nine", ["stage", "nine", "--preset", "demo", "--store", str(tmp_path)], heard.append)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_dies_is_told_from_a_mistake(tmp_path: Path, number: signal.Signals) -> None:
    started = threading.Event()

    def kill() -> None:
        started.wait(30)
        child_of(psutil.Process()).send_signal(number)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(child.Died, match=rf"^the process of scenes was ended by {number.name} \(.*goes on from there$"):
        child.run("scenes", long_run(tmp_path), lambda _: started.set())
    killer.join()


def test_it_ends_with_its_parent_even_when_that_is_killed(tmp_path: Path) -> None:
    program = f"from flows import child; child.run('scenes', {long_run(tmp_path)!r}, print)"
    parent = subprocess.Popen([sys.executable, "-c", program], env=os.environ, stdout=subprocess.DEVNULL)
    ours = child_of(psutil.Process(parent.pid))
    while len(list(tmp_path.glob("scenes/.*.partial/*/*"))) < 20:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([ours], 4)  # later, its next word to a pipe that nobody reads would end it as well
    assert not alive
