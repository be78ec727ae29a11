"""The deployment, against a real local Prefect server, started and stopped as `make serve` and `make stop` do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.stages import Request, configure
from pipeline.line import STAGES, line
from storage.store import Store

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
OVERRIDES = (
    "--data.train-images", "24", "--data.val-images", "6", "--v2c.steps", "2", "--v2c.calibration-images", "4",
    "--g2s.steps", "2", "--cpa.steps", "2",
)  # fmt: skip
SERVE = [sys.executable, "-m", "flows.serve"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(text: str, log: Path, process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while text not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A served project, in a working folder of its own; yields the environment of its clients.

    The folder holds links to the project's files, for flow runs start in it and leave their reports there.
    """
    folder = tmp_path_factory.mktemp("project")
    for name in ("flows", "prefect.yaml"):
        (folder / name).symlink_to(ROOT / name)
    port, log = free_port(), folder / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "PYTEST_"))}
    environment |= {"PREFECT_HOME": str(folder / ".prefect"), "PYTHONPATH": str(ROOT), "PWD": str(folder)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*SERVE, "start", "--port", str(port)], cwd=folder, env=environment, stdout=output, stderr=output
        )
    tree: list[psutil.Process] = []
    try:
        wait_for("serving at", log, process, 180)
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        yield {**environment, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    finally:
        subprocess.run([*SERVE, "stop"], cwd=folder, env=environment, check=True, timeout=90)
        process.wait(10)
    assert len(tree) >= 3
    assert not [survivor for survivor in psutil.wait_procs(tree, 10)[1] if survivor.status() != psutil.STATUS_ZOMBIE]
    assert not list((folder / ".prefect").glob("*.pid"))


def run_deployment(environment: dict[str, str], **parameters: object) -> subprocess.CompletedProcess[str]:
    """`prefect deployment run zs-seg/full --watch`, as a user would."""
    words = [word for name, value in parameters.items() for word in ("-p", f"{name}={_text(value)}")]
    command = [sys.executable, "-m", "prefect", "deployment", "run", "zs-seg/full", *words, "--watch"]
    return subprocess.run(
        command, cwd=environment["PWD"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_deployment_runs_every_stage_and_leaves_a_report(served: dict[str, str], tmp_path: Path) -> None:
    done = run_deployment(served, preset="demo", store=str(tmp_path), overrides=list(OVERRIDES))
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"prefect.task-run.Completed * {stage}" in done.stdout for stage in STAGES), done.stdout
    store, steps = Store(tmp_path), line(configure(Request(preset="demo", overrides=OVERRIDES)))
    assert [store.state(step.recipe.ref) for step in steps] == ["fresh"] * len(steps)
    report = json.loads((Path(served["PWD"]) / "runs/demo/report.json").read_text())
    assert report["lineage"] == {
        step.stage: {"ref": str(step.recipe.ref), "seconds": report["lineage"][step.stage]["seconds"]} for step in steps
    }


def test_a_mistake_fails_the_flow_with_its_message(served: dict[str, str], tmp_path: Path) -> None:
    done = run_deployment(served, preset="demo", store=str(tmp_path), from_stage="cpa", until_stage="cpa")
    assert done.returncode == 1, done.stdout
    assert "stage cpa reads what stage queries makes" in (Path(served["PWD"]) / "log").read_text()
    assert not list(tmp_path.iterdir())
