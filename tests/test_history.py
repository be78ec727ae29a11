"""`zs-seg runs` and the scores of `diff`: what changed, what was scored, TensorBoard's names, and the hook of a tracker."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from many_artefacts import demo_line, fill

from flows.cli import main
from flows.history import all_runs
from flows.presets import preset
from flows.request import Request
from flows.track import track
from pipeline.line import Stage
from storage.errors import UserError
from storage.runs import RunRecord, Runs
from storage.store import MANIFEST, Store

HEADLINE = ("sPQ", "uPQ", "hPQ")


def score(store: Store, steps: Sequence[Stage], **rows: tuple[float, float, float]) -> None:
    """Give the line's report these scores; its manifest, which has a checksum for `Store.open`, is only looked at."""
    path = store.path(steps[-1].recipe.ref) / MANIFEST
    content = json.loads(path.read_text())
    content["counts"] = {row: dict(zip(HEADLINE, values, strict=True)) for row, values in rows.items()}
    content["counts"] |= {"images": 3, "left_out": {"crowd segments": 1}}
    path.write_text(json.dumps(content))


def recorded(store: Store, name: str, steps: Sequence[Stage], *flags: str, command: str = "", date: str) -> None:
    words = command or " ".join(("zs-seg run --preset demo --store x --name", name, *flags))
    refs = {step.name: step.recipe.ref for step in steps}
    line = RunRecord(name=name, command=words, refs=refs, user="me", date=date)
    with Runs(store).running(line):
        pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three runs with reports, best in the middle, one that is half built, and one whose command nobody knows."""
    store = Store(tmp_path_factory.mktemp("store"))
    for number in range(3):
        fill(store, demo_line(number))
    fill(store, demo_line(3)[:5])
    first, second, third = (demo_line(number) for number in range(3))
    score(store, first, inductive=(60, 30, 40), transductive=(61, 50, 55), control=(59.5, 31, 40.8))
    score(store, second, inductive=(62, 31, 41.3), transductive=(62, 54.25, 57.9), control=(59.5, 31, 40.8))
    score(store, third, inductive=(10, 20, 13.3), transductive=(12, 6, 8))
    recorded(store, "demo", first, date="2026-11-01T10:00:00+0000")
    recorded(store, "wide", second, "--v2c.lr", "2e-3", "--max-steps", "50", date="2026-11-03T10:00:00+0000")
    recorded(store, "flat", third, "--v2c.global-weight", "0", date="2026-11-02T10:00:00+0000")
    recorded(store, "half", demo_line(3), date="2026-11-04T10:00:00+0000")
    recorded(store, "old", third, command="zs-seg run --preset gone --no-such 1", date="2026-10-01T10:00:00+0000")
    return store


def says(capsys: pytest.CaptureFixture[str], store: Store, *words: str, status: int = 0) -> list[str]:
    assert main((*words, "--store", str(store.root))) == status
    output = capsys.readouterr()
    return (output.err if status else output.out).splitlines()


def test_the_table_has_date_changes_and_scores(made: Store, capsys: pytest.CaptureFixture[str]) -> None:
    head, *rows = says(capsys, made, "runs")
    assert head.split("  ")[0] == "run" and "inductive sPQ/uPQ/hPQ" in head and "transductive sPQ/uPQ/hPQ" in head
    assert [row.split()[0] for row in rows] == ["old", "demo", "flat", "wide", "half"]  # by date
    by_name = {row.split()[0]: row.split() for row in rows}
    assert by_name["demo"][1:] == ["2026-11-01", "10:00", "60.0", "30.0", "40.0", "61.0", "50.0", "55.0"]
    steps = ["v2c.steps", "50,", "v2c.lr", "0.002,", "g2s.steps", "50,", "cpa.steps", "50"]
    assert sorted(by_name["wide"][9:]) == sorted(steps)
    assert by_name["flat"][9:] in (["v2c.global_weight", "0.0"], ["v2c.global_weight", "0"])
    assert by_name["half"][3:] == ["-", "-", "5", "of", str(len(demo_line())), "stages"]
    assert by_name["old"][9:] == ["?"]


@pytest.mark.parametrize(
    ("field", "order"),
    [
        ("name", ["demo", "flat", "half", "old", "wide"]),
        ("hPQ", ["half", "flat", "old", "demo", "wide"]),
        ("inductive.uPQ", ["half", "flat", "old", "demo", "wide"]),
        ("control.sPQ", ["flat", "half", "old", "demo", "wide"]),
    ],
)
def test_it_sorts(made: Store, capsys: pytest.CaptureFixture[str], field: str, order: list[str]) -> None:
    found = [row.split()[0] for row in says(capsys, made, "runs", "--sort", field)[1:]]
    scored = [name for name in order if name not in ("flat", "half", "old")]
    assert [name for name in found if name in scored] == scored
    assert sorted(found) == sorted(order) and (field != "name" or found == order)
    assert found[0] == "half" or field in ("name", "control.sPQ")


def test_other_rows_and_mistakes(made: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert "control sPQ/uPQ/hPQ" in says(capsys, made, "runs", "--row", "control")[0]
    head = says(capsys, made, "runs", "--row", "all")[0]
    assert all(f"{row} sPQ" in head for row in ("inductive", "transductive", "control"))
    assert "did you mean 'control'" in says(capsys, made, "runs", "--row", "contrl", status=2)[0]
    assert "did you mean 'transductive.hPQ'" in says(capsys, made, "runs", "--sort", "transductive.hpq", status=2)[0]


def test_json_and_csv_hold_every_row(made: Store, capsys: pytest.CaptureFixture[str]) -> None:
    found = {run["name"]: run for run in json.loads("\n".join(says(capsys, made, "runs", "--json")))}
    assert found["wide"]["scores"]["transductive"] == dict(zip(HEADLINE, (62, 54.25, 57.9), strict=True))
    assert found["wide"]["changed"]["v2c.lr"] == [preset("demo").v2c.lr, 2e-3]
    assert found["demo"]["changed"] == {} and found["old"]["changed"] is None and found["half"]["scores"] == {}
    assert (found["half"]["built"], found["half"]["stages"]) == (5, len(demo_line()))
    rows = list(csv.DictReader(io.StringIO("\n".join(says(capsys, made, "runs", "--csv")))))
    flat = next(row for row in rows if row["name"] == "flat")
    assert (flat["transductive.hPQ"], flat["control.hPQ"]) == ("8", "")
    assert "v2c.global_weight" in flat["changed"]


def test_diff_shows_scores_of_both(made: Store, capsys: pytest.CaptureFixture[str]) -> None:
    lines = says(capsys, made, "diff", "demo", "wide")
    rows = {row.split()[0]: row.split()[1:] for row in lines[lines.index("") + 2 :]}
    assert rows["transductive"] == ["61.0", "50.0", "55.0", "62.0", "54.2", "57.9", "+1.0", "+4.2", "+2.9"]
    assert rows.keys() == {"inductive", "transductive", "control"}
    assert "" not in says(capsys, made, "diff", "demo", "half")  # one has no report


def test_a_requests_command_can_be_read_again() -> None:
    for request in (
        Request(preset="demo"),
        Request(
            preset="coco-sample", coco="/data/my coco", store="s", name="x", max_steps=7, overrides=("--v2c.lr", "1e-3")
        ),
        Request(preset="demo", overrides=("--shard.skip-bad", "--data.unseen", "a b", "c")),
    ):
        assert Request.parse(request.command("run")) == request
    for command in ("zs-seg run", "zs-seg run --preset", "zs-seg run --preset demo --max-steps many"):
        with pytest.raises(UserError, match="no command of a run"):
            Request.parse(command)


def test_an_empty_store_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert says(capsys, Store(tmp_path), "runs") == [f"no run is recorded in {tmp_path}"]


def test_tensorboard_shows_the_names_of_runs(made: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own reader finds RUN/STAGE; links of runs that are gone go, and what is no link is left alone."""
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from torch.utils.tensorboard import SummaryWriter

    store = Store(tmp_path / "store")
    shutil.copytree(made.root, store.root)
    for number, step in ((0, "v2c"), (1, "v2c"), (0, "cpa")):
        ref = next(s.recipe.ref for s in demo_line(number) if s.name == step)
        with SummaryWriter(str(store.path(ref) / "tensorboard")) as board:
            board.add_scalar("total", 1.0, 10)
    links = tmp_path / "board"
    says(capsys, store, "runs", "--tensorboard", str(links))
    found = EventMultiplexer().AddRunsFromDirectory(str(links)).Reload().Runs()
    assert set(found) == {"demo/v2c", "demo/cpa", "wide/v2c"}
    Runs(store).forget("wide")
    says(capsys, store, "runs", "--tensorboard", str(links))
    assert {str(path.relative_to(links)) for path in links.glob("*/*")} == {"demo/v2c", "demo/cpa"}
    assert not (links / "wide").exists()
    (links / "demo" / "mine.txt").write_text("x")
    assert "mine.txt is no link" in says(capsys, store, "runs", "--tensorboard", str(links), status=2)[0]
    assert (links / "demo" / "v2c").is_symlink()


def test_it_is_quick_and_opens_no_network(made: Store) -> None:
    code = (
        "import sys; from flows.cli import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'prefect', 'mlflow', 'zarr') if m in sys.modules])"
    )
    words = [sys.executable, "-c", code, "runs", "--store", str(made.root)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_unknown_tracker_is_refused_before_anything_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    run = ("run", "--preset", "demo", "--track")
    assert "tracker 'wandb' is unknown" in says(capsys, store, *run, "wandb", status=2)[0]
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as where it is not installed
    assert "not installed" in says(capsys, store, *run, "mlflow", status=2)[0]
    assert list(tmp_path.iterdir()) == []


def test_mlflow_gets_config_curves_scores_and_pictures(
    made: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into plain files, without a server; a second time nothing is sent twice."""
    mlflow: Any = pytest.importorskip(
        "mlflow", reason="MLflow was not tried: it is not installed (pip install mlflow-skinny)"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store(tmp_path / "store")
    shutil.copytree(made.root, store.root)
    refs = {step.name: step.recipe.ref for step in demo_line()}
    for stage in ("v2c", "g2s", "cpa"):
        rows = [{"step": step, "total": 1 / step, "lr": 0.1} for step in (10, 20)]
        (store.path(refs[stage]) / "curves.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    published = tmp_path / "runs" / "demo"
    published.mkdir(parents=True)
    for name in ("report.html", "preview.jpg"):
        (published / name).write_text(name)
    for _ in range(2):
        track("demo", preset("demo"), refs, store, published)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("demo")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "demo" and run.info.status == "FINISHED"
    assert run.data.params["v2c.lr"] == str(preset("demo").v2c.lr) and "data.val_images" in run.data.params
    assert run.data.metrics["transductive.hPQ"] == 55 and run.data.tags["zs-seg.v2c"] == str(refs["v2c"])
    history: list[Any] = client.get_metric_history(run.info.run_id, "v2c.total")
    assert [(point.step, point.value) for point in history] == [(10, 0.1), (20, 0.05)]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"report.html", "preview.jpg"}
    assert (tmp_path / "mlruns").is_dir()
    assert len(all_runs(store)) == 5
