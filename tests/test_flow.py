"""The deployments, against a real local Prefect server, started and stopped as `make serve` and `make stop` do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import QUIET, copy_artefacts

from flows.presets import PRESETS
from flows.request import Request, configure
from pipeline.line import STAGES, Stage, line
from storage.checkpoints import load_training_state
from storage.runs import Runs
from storage.store import Store

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
OVERRIDES = (
    "--data.train-images", "24", "--data.val-images", "6", "--v2c.steps", "2", "--v2c.calibration-images", "4",
    "--g2s.steps", "2", "--cpa.steps", "2",
)  # fmt: skip
DEPLOYMENTS = {
    "cache-clip": "cache-clip",
    "v2c": "v2c",
    "g2s": "g2s",
    "cpa": "cpa",
    "evaluate": "evaluate",
    "full": "evaluate",
}
SERVE = [sys.executable, "-m", "flows.serve"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(something: Callable[[], Any], seconds: float, message: Callable[[], object]) -> Any:
    """What `something` returns, as soon as that is not false; fails with `message()`."""
    deadline = time.monotonic() + seconds
    while not (found := something()):
        assert time.monotonic() < deadline, message()
        time.sleep(0.2)
    return found


@dataclass(frozen=True, kw_only=True)
class Served:
    """A served project: its working folder, its clients' environment, and the store of its runs."""

    folder: Path
    environment: dict[str, str]
    store: Store
    process: psutil.Process
    port: int
    reports: str

    def ask(self, path: str, **body: object) -> Any:
        """Prefect's REST interface. Where its SQLite is busy for a moment it answers 503, and Prefect's own client asks
        again, too."""
        data = json.dumps(body).encode() if body else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.environment['PREFECT_API_URL']}/{path}", data, headers)

        def answer() -> tuple[Any] | None:
            try:
                with urllib.request.urlopen(request, timeout=60) as found:
                    return (json.load(found),)
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
            return None

        return wait_for(answer, 60, self.log)[0]

    def start(self, deployment: str, **parameters: object) -> str:
        """Start a flow run as the button of the UI does; its id."""
        found = self.ask(f"deployments/name/zs-seg/{deployment}")
        once = {"idempotency_key": str(uuid.uuid4()), "parameters": self._parameters(**parameters)}
        return self.ask(f"deployments/{found['id']}/create_flow_run", **once)["id"]

    def start_as_a_user(self, deployment: str) -> tuple[str, Callable[[], str]]:
        """`prefect deployment run zs-seg/DEPLOYMENT --watch`; the flow run's id, and what it has printed at its end."""
        words = [word for name, value in self._parameters().items() for word in ("-p", f"{name}={_text(value)}")]
        printed = self.folder / f"{deployment}.log"
        command = [sys.executable, "-m", "prefect", "deployment", "run", f"zs-seg/{deployment}", "--watch", *words]
        with printed.open("wb") as output:
            process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=output, stderr=output)

        def text() -> str:
            assert process.wait(60) == 0, printed.read_text()
            return printed.read_text()

        wait_for(lambda: "URL: " in printed.read_text() or process.poll(), 60, printed.read_text)
        return printed.read_text().split("UUID: ")[1].split()[0], text

    def _parameters(self, **parameters: object) -> dict[str, object]:
        return {"store": str(self.store.root), "dask": "none", "overrides": list(OVERRIDES), **parameters}

    def ended(self, run: str, seconds: float = 120) -> dict[str, Any]:
        """The flow run, when it has come to an end."""
        final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        return wait_for(
            lambda: (found := self.ask(f"flow_runs/{run}"))["state_type"] in final and found, seconds, self.log
        )

    def log(self) -> str:
        return (self.folder / "log").read_text()[-6000:]

    def training(self, older: psutil.Process | None = None) -> psutil.Process:
        """The process of stage v2c, another one than `older`, as soon as there is one."""
        return wait_for(lambda: self._training(older), 60, self.log)

    def _training(self, older: psutil.Process | None) -> psutil.Process | None:
        for process in self.process.children(recursive=True):
            if process != older and "flows.child" in _command(process) and "v2c" in _command(process):
                return process
        return None


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def steps_of(overrides: tuple[str, ...]) -> dict[str, Stage]:
    return {step.name: step for step in line(configure(Request(preset="demo", overrides=overrides)))}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A served project in a working folder of its own, with links to the project's files: flow runs start in it and
    leave their reports there."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("flows", "prefect.yaml"):
        (folder / name).symlink_to(ROOT / name)
    port, reports_port, log = free_port(), free_port(), folder / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "PYTEST_"))}
    environment |= {"PREFECT_HOME": str(folder / ".prefect"), "PYTHONPATH": str(ROOT), "PWD": str(folder)}
    start = [*SERVE, "start", "--port", str(port), "--reports-port", str(reports_port)]
    with log.open("wb") as output:
        process = subprocess.Popen(start, cwd=folder, env=environment, stdout=output, stderr=output)
    tree: list[psutil.Process] = []
    store = Store(tmp_path_factory.mktemp("store"))
    try:
        for stage, step in steps_of(OVERRIDES).items():  # while the server starts
            step.run(store=store, runtime=QUIET)
            if stage == "cache-clip":
                break
        wait_for(lambda: process.poll() is not None or "serving at" in log.read_text(), 180, log.read_text)
        assert process.poll() is None, log.read_text()
        top = psutil.Process(process.pid)
        tree = [top, *top.children(recursive=True)]
        yield Served(
            folder=folder,
            environment={**environment, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"},
            store=store,
            process=top,
            port=port,
            reports=f"http://127.0.0.1:{reports_port}",
        )
    finally:
        tree += psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        subprocess.run([*SERVE, "stop"], cwd=folder, env=environment, check=True, timeout=90)
        process.wait(10)
    assert len(tree) >= 3
    assert not [survivor for survivor in psutil.wait_procs(tree, 10)[1] if survivor.status() != psutil.STATUS_ZOMBIE]
    assert not list((folder / ".prefect").glob("*.pid"))


def test_the_form_of_every_deployment_has_types_choices_and_descriptions(served: Served) -> None:
    found = {row["name"]: row for row in served.ask("deployments/filter", limit=20)}
    assert found.keys() == DEPLOYMENTS.keys()
    for name, row in found.items():
        form = row["parameter_openapi_schema"]["properties"]
        assert all(field.get("description") for field in form.values()), form
        texts = [row["description"], *(field["description"] for field in form.values())]
        assert not [text for text in texts if "<" in text]  # the pages would take it for HTML
        assert form["preset"]["enum"] == list(PRESETS) and form["until_stage"]["enum"] == list(STAGES)
        assert (form["remote"]["type"], form["push"]["type"], form["cache"]["minimum"]) == ("string", "boolean", 0)
        assert form["devices"] | {"type": "integer", "minimum": 1} == form["devices"]
        assert row["description"] and row["parameters"]["until_stage"] == DEPLOYMENTS[name]
        assert row["enforce_parameter_schema"]


def test_a_second_serve_on_the_port_changes_nothing(served: Served, tmp_path: Path) -> None:
    """From another folder: it ends with the cure, and the first one's pools and deployments are as they were."""

    def state() -> dict[str, list[dict[str, Any]]]:
        found = {what: served.ask(f"{what}/filter", limit=20) for what in ("work_pools", "deployments")}
        for row in (row for rows in found.values() for row in rows):
            row.pop("status")  # what the worker's next look changes
            row.pop("last_polled", None)
        return found

    for name in ("flows", "prefect.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    before = state()
    assert len(before["deployments"]) == len(DEPLOYMENTS) and before["work_pools"]
    environment = {**served.environment, "PREFECT_HOME": str(tmp_path / ".prefect"), "PWD": str(tmp_path)}
    words = [*SERVE, "start", "--port", str(served.port)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"port {served.port} cannot be used" in done.stderr and "PREFECT_PORT=" in done.stderr
    assert state() == before and not (tmp_path / ".prefect").exists()


def test_what_serve_prints_names_every_deployment_once(served: Served) -> None:
    lines = (served.folder / "log").read_text().splitlines()
    for name in DEPLOYMENTS:
        assert sum(line.startswith(f"zs-seg/{name} ") for line in lines) == 1
    assert not [line for line in lines if "\u256d" in line or "\u2502" in line]  # no boxes
    assert f"reports at {served.reports}" in lines


def test_every_deployment_completes_one_after_the_other(served: Served) -> None:
    """All are asked for at once, and each builds what the ones before it have not; `evaluate` alone is too early the
    first time.
    """
    early = served.start("evaluate")
    runs = {name: served.start(name) for name in list(DEPLOYMENTS)[:-1]}
    runs["full"], watched = served.start_as_a_user("full")
    message = served.ended(early)["state"]
    assert message["type"] == "FAILED" and "reads what stage v2c makes" in message["message"], message
    assert "`zs-seg run --until v2c " in message["message"]
    ended = {name: served.ended(run, 300) for name, run in runs.items()}
    assert {name: run["state_type"] for name, run in ended.items()} == dict.fromkeys(runs, "COMPLETED"), served.log()
    for first, second in zip(list(ended.values())[:-1], list(ended.values())[1:], strict=True):
        assert first["end_time"] <= second["start_time"]

    steps = steps_of(OVERRIDES)
    assert [served.store.state(step.recipe.ref) for step in steps.values()] == ["fresh"] * len(steps)
    report = json.loads((served.folder / "runs/demo/report.json").read_text())
    assert {stage: made["ref"] for stage, made in report["lineage"].items()} == {
        stage: str(step.recipe.ref) for stage, step in steps.items()
    }
    logs = served.ask("logs/filter", logs={"flow_run_id": {"any_": [runs["v2c"]]}}, limit=200)
    key = steps["v2c"].recipe.ref.key
    assert any(line["message"].startswith(f"{key}  v2c: building checkpoint/{key}") for line in logs)

    for name, cached in (("v2c", STAGES[:4]), ("full", STAGES)):
        tasks = served.ask("task_runs/filter", flow_runs={"id": {"any_": [runs[name]]}}, limit=20)
        assert {row["name"]: row["state_name"] for row in tasks} == {
            row["name"]: "Cached" if row["name"] in cached else "Completed" for row in tasks
        }
    assert len(tasks) == len(STAGES)
    for row in tasks:  # the graph of the run: a task has the tasks as sources that made its inputs
        assert len(row["task_inputs"]["inputs"]) == len(steps[row["name"]].recipe.inputs), row
    assert all(f"prefect.task-run.Cached * {stage}" in watched() for stage in STAGES)

    shown = {row["key"]: row for row in served.ask("artifacts/filter", limit=200) if row["flow_run_id"] == runs["full"]}
    assert shown.keys() == {"demo-stages", "demo-scores", "demo-report", "demo-pictures"}
    scores = json.loads(shown["demo-scores"]["data"])
    assert scores[0] == {
        "percent": "inductive",
        **{name: f"{report['inductive'][name]:.1f}" for name in ("sPQ", "uPQ", "hPQ", "sIoU", "uIoU", "hIoU")},
    }
    assert [row["stage"] for row in json.loads(shown["demo-stages"]["data"])] == list(STAGES)
    assert {row["this run"] for row in json.loads(shown["demo-stages"]["data"])} == {"cached"}
    link = f"{served.reports}/demo/report.html"
    assert f"]({link})" in shown["demo-report"]["data"]
    with urllib.request.urlopen(link, timeout=60) as answer:
        assert answer.read() == (served.folder / "runs/demo/report.html").read_bytes()
    assert (
        "](data:image/jpeg;base64," in shown["demo-pictures"]["data"] and len(shown["demo-pictures"]["data"]) < 300_000
    )


def test_a_run_in_an_empty_store_takes_and_leaves_what_a_remote_has(served: Served, tmp_path: Path) -> None:
    """Other shards of the same scenes: these are fetched, those are built and sent."""
    remote, store = Store(tmp_path / "remote"), Store(tmp_path / "store")
    overrides = (*OVERRIDES, "--shard.samples-per-tar", "7")
    steps = steps_of(overrides)
    scenes, shards = steps["scenes"].recipe.ref, steps["shard"].recipe.ref
    copy_artefacts(served.store, remote, [scenes, steps["text"].recipe.ref])
    where = {"store": str(store.root), "remote": f"file://{remote.root}", "push": True, "overrides": list(overrides)}
    run = served.start("cache-clip", until_stage="text", **where)
    assert served.ended(run)["state_type"] == "COMPLETED", served.log()
    assert remote.verify(shards) == [] and remote.open(shards).manifest == store.open(shards).manifest
    assert Runs(remote).lines("demo")[-1].refs["shard"] == shards
    tasks = served.ask("task_runs/filter", flow_runs={"id": {"any_": [run]}}, limit=20)
    found = {row["name"]: (row["state_name"], row["state"]["message"]) for row in tasks}
    assert found["shard"][0] == "Completed" and found["scenes"][0] == found["text"][0] == "Cached"
    assert found["scenes"][1].startswith(f"{scenes}: from file://{remote.root}, built by ")


def test_a_killed_and_a_cancelled_training_go_on_where_they_were(served: Served) -> None:
    """`kill -9` twice: the first time the stage is tried again, the second time it has failed. The next run is
    cancelled.
    """
    overrides = (*OVERRIDES, "--v2c.steps", "40")
    step = steps_of(overrides)["v2c"]
    partial = served.store.partial(step.recipe.ref)
    parameters = {"overrides": list(overrides), "checkpoint_every": 1}
    workers = served.process.children()

    def saved() -> int:
        return (load_training_state(partial) or {"step": 0})["step"]

    run, killed, done = served.start("v2c", **parameters, retries=1), None, 0
    for _ in range(2):
        killed = served.training(older=killed)
        wait_for(lambda before=done: saved() > before, 60, served.log)
        killed.send_signal(signal.SIGKILL)
        killed.wait(10)
        done = saved()
    message = served.ended(run)["state"]
    assert message["type"] == "FAILED", message
    assert f"the process of v2c ({step.recipe.ref}) was ended by SIGKILL" in message["message"]
    assert served.store.state(step.recipe.ref) == "partial"
    assert served.process.children() == workers and all(worker.is_running() for worker in workers)

    run = served.start("v2c", **parameters)
    training = served.training()
    wait_for(lambda: saved() > done, 60, served.log)
    family = [training, *training.parents()[:1]]
    served.ask(f"flow_runs/{run}/set_state", state={"type": "CANCELLING"})  # as the button of the UI does
    assert served.ended(run)["state_type"] == "CANCELLED"
    assert not psutil.wait_procs(family, 5)[1]
    cancelled_at = saved()
    assert served.store.state(step.recipe.ref) == "partial" and done < cancelled_at < 40

    assert served.ended(served.start("v2c", **parameters))["state_type"] == "COMPLETED", served.log()
    manifest = served.store.open(step.recipe.ref).manifest
    assert manifest.provenance["resumed"]
    assert served.process.children() == workers
