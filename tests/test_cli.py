"""The command line as its users meet it: exit status, one line for a mistake, speed, and what each command prints."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_factory import make_coco
from PIL import Image

from flows import runs
from flows.cli import _mistake, main
from flows.request import Request, configure
from pipeline.data.config import CocoConfig
from pipeline.line import STAGES, line
from storage.store import Store

DEMO = ("--preset", "demo")
SMALL = (
    *DEMO, "--threads", "1", "--data.train-images", "24", "--data.val-images", "6", "--v2c.steps", "2",
    "--v2c.calibration-images", "4", "--g2s.steps", "2", "--cpa.steps", "2",
)  # fmt: skip
TREE = tuple(word for word in SMALL if word not in ("--threads", "1"))


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of a command that must exit with status 2."""
    try:
        status = main(words)
    except SystemExit as error:
        status = error.code
    output = capsys.readouterr()
    assert status == 2, output
    lines = output.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("zs-seg: "), output.err
    return lines[0]


def small_config():
    return configure(Request(preset="demo", overrides=TREE[2:]))


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The first three stages of a small demo."""
    store = Store(tmp_path_factory.mktemp("store"))
    assert main(("run", *SMALL, "--store", str(store.root), "--until", "text")) == 0
    return store


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan", "--preset", "no-such"), "demo, demo-regions, scenes, coco-sample"),
        (("plan", "--preset", "dmo"), "preset 'dmo' is unknown (did you mean 'demo'?)"),
        (("plan",), "--preset"),
        (("no-such",), "predict"),
        (("pln", *DEMO), "command 'pln' is unknown (did you mean 'plan'?); use one of new, plan, run"),
        (("run", *DEMO, "--no-such"), "--no-such"),
        (("run", *DEMO, "--forse", "cpa"), "'--forse' is unknown (did you mean '--force'?); `zs-seg run --help-all`"),
        (("run", *DEMO, "--backbone-lr=1"), "'--backbone-lr' is unknown (did you mean '--v2c.backbone-lr'?)"),
        (("list", "--jsn"), "'--jsn' is unknown (did you mean '--json'?); `zs-seg list --help` lists the flags"),
        (("list", "what"), "'what' is unknown"),
        (("run", *DEMO, "what"), "'what' is not a flag of preset demo"),
        (("run", *DEMO, "--v2c.no-such", "3"), "'--v2c.no-such' is not a flag of preset demo"),
        (("run", *DEMO, "--v2c.stepz", "3"), "(did you mean '--v2c.steps'?); `zs-seg run --preset demo --help-all`"),
        (("run", *DEMO, "--data.benchmark", "x"), "'--data.benchmark' is not a flag of preset demo"),
        (("run", *DEMO, "--v2c.lr", "fast"), "--v2c.lr takes NUMBER, such as 0.001, not 'fast'"),
        (("run", *DEMO, "--v2c.lr", "1", "2"), "--v2c.lr takes NUMBER, such as 0.001, not '1 2'"),
        (("run", *DEMO, "--v2c.steps=1.5"), "--v2c.steps takes INT, such as 1600, not '1.5'"),
        (
            ("run", *DEMO, "--v2c.augment.jitter", "1"),
            "--v2c.augment.jitter takes NUMBER NUMBER, such as 0.9 1.1, not '1'",
        ),
        (("run", *DEMO, "--tokens.views", "two"), "--tokens.views takes {1,2}, such as 1, not 'two'"),
        (("run", *DEMO, "--v2c.augment.no-flip", "yes"), "--v2c.augment.flip switches it on"),
        (("run", *DEMO, "--v2c.decay", "cosin"), "v2c: decay must be one of cosine, step, constant, not 'cosin' (did"),
        (
            ("run", *DEMO, "--data.split", "vaildation"),
            "scenes: split must be one of test, validation, not 'vaildation'",
        ),
        (("run", *DEMO, "--v2c.lr", "-1"), "lr must be above 0"),
        (("run", *DEMO, "--v2c.lr", "-1e-3"), "lr must be above 0"),
        (("run", *DEMO, "--v2c.lr"), "--v2c.lr takes NUMBER, such as 0.001"),
        (("run", *DEMO, "--text.names"), "--text.names takes TEXT"),
        (("run", *DEMO, "--from", "no-such"), "queries"),
        (("run", *DEMO, "--from", "cpa", "--until", "text"), "--until"),
        (("run", *DEMO, "--force", "cpa", "--until", "text"), "'cpa'"),
        (("stage", "no-such", *DEMO), "queries"),
        (("stage", "query", *DEMO), "there is no stage 'query' here (did you mean 'queries'?)"),
        (("run", *DEMO, "--until", "cache_clip"), "(did you mean 'cache-clip'?)"),
        (("run", *DEMO, "--coco", "/data"), "--coco"),
        (("run", *DEMO, "--threads", "-1"), "threads"),
        (("plan", "--preset", "coco-sample"), "--coco"),
        (("plan", "--preset", "coco-sample", "--coco", "/no/such"), "/no/such"),
        (("plan", *DEMO, "--teacher.pretrained", "no/such.safetensors"), "no/such.safetensors"),
        (("list", "--v2c.lr", "1"), "--v2c.lr"),
        (("show", "0123"), "zs-seg list"),
        (("predict", "--checkpoint", "0123", "--images", "/no/such.jpg", "--out", "o"), "/no/such.jpg"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    words: Sequence[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COCO_ROOT", raising=False)
    assert message in fails(capsys, *words)
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_traceback_is_there_for_developers() -> None:
    with pytest.raises(ValueError, match="no-such"):
        main(("plan", "--preset", "no-such", "--traceback"))


@pytest.mark.parametrize("flag", ["--skip-bad", "--shard.skip-bad"])
def test_skip_bad_makes_the_same_artefact_and_is_told_again(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    coco = make_coco(tmp_path / "coco")
    (coco / "train2017" / f"{12:012d}.jpg").unlink()
    words = ("run", "--preset", "coco-sample", "--coco", str(coco), "--store", str(tmp_path / "s"), "--until", "shard")
    assert main(words) == 2
    assert "train image 12" in capsys.readouterr().err
    for again in ((flag,), ()):  # the strict run finds the artefact that was made, and may not be silent about it
        caplog.clear()
        assert main((*words, *again)) == 0
        warning = caplog.record_tuples[-1]
        assert warning[:2] == ("flows.runs", logging.WARNING) and "1 bad image left out" in warning[2]


def test_coco_folder_comes_from_the_flag_or_else_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COCO_ROOT", "/environment")
    for coco, root in (("/flag", "/flag"), ("", "/environment")):
        data = configure(Request(preset="coco-sample", coco=coco)).data
        assert isinstance(data, CocoConfig)
        assert data.root == root
    configure(Request(preset="demo"))  # the environment is no --coco


def test_the_folder_of_the_images_is_in_no_key(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for split in ("train2017", "val2017"):
            (tmp_path / name / split).mkdir(parents=True)
            (tmp_path / name / "annotations" / f"panoptic_{split}").mkdir(parents=True)
            (tmp_path / name / "annotations" / f"panoptic_{split}.json").write_text("{}")
    refs = [
        [step.recipe.ref for step in line(configure(Request(preset="coco-sample", coco=str(tmp_path / name))))]
        for name in ("a", "b")
    ]
    assert refs[0] == refs[1]


def run_fresh(*words: str) -> tuple[float, str]:
    """CPU seconds (the machine may be busy) and the output of a command in a new process."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", PROBE, *words], check=True, capture_output=True, text=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, done.stdout


PROBE = """
import sys
from flows.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as error:
    status = error.code
heavy = {"torch", "prefect", "open_clip", "timm", "zarr", "matplotlib", "dask", "tyro"} & sys.modules.keys()
sys.exit(status or (f"imported {heavy}" if heavy else 0))
"""


@pytest.mark.parametrize(
    "words",
    [("--help",), ("--version",), ("plan", *DEMO), ("list",), ("run", *DEMO, "--help"), ("run", *DEMO, "--help-all")],
)
def test_help_and_plan_are_quick_and_import_nothing_heavy(words: Sequence[str]) -> None:
    seconds, output = min(run_fresh(*words) for _ in range(3))
    assert output
    assert seconds < 1


def test_plan_tells_fresh_from_missing(small_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("plan", *TREE, "--store", str(small_store.root))) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()[1 : 1 + len(STAGES)]]
    assert [row[0] for row in rows] == list(STAGES)
    assert [row[2] for row in rows] == ["fresh"] * 3 + ["missing"] * 7
    assert rows[4][3] == "-" and rows[4][4].startswith("~")  # the bytes of v2c are not known, its time is assumed


def test_plan_says_where_estimates_come_from(
    small_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for store, stages_alike in ((tmp_path, False), (small_store.root, True)):
        assert main(("plan", *TREE, "--shard.samples-per-tar", "5", "--store", str(store))) == 0
        message = capsys.readouterr().out.partition("stages to build")[2]
        assert "~ v2c assumed: 0.23 s a step, measured on 2 CPU cores" in message
        assert ("~ shard measured: " in message) == stages_alike


def test_plan_as_json(small_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("plan", *TREE, "--store", str(small_store.root), "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["store"] == str(small_store.root) and found["to_build"] == 7
    assert [row["stage"] for row in found["stages"]] == list(STAGES)
    assert [f"{row['kind']}/{row['key']}" for row in found["stages"]] == [
        str(stage.recipe.ref) for stage in line(small_config())
    ]
    shard, v2c = found["stages"][1], found["stages"][4]
    manifest = small_store.open(small_store.find(shard["key"])).manifest
    assert (shard["state"], shard["bytes"], shard["seconds"]) == (
        "fresh", manifest.bytes, manifest.provenance["seconds"],
    )  # fmt: skip
    assert (v2c["state"], v2c["bytes"]) == ("missing", None) and v2c["source"].startswith("assumed: ")
    assert v2c["why"] == "no v2c in this store yet" and (found["counts"]["train"], found["counts"]["val"]) == (24, 6)


def test_a_run_begins_with_what_there_is_to_do(small_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    config = small_config()
    stages = line(config)
    caplog.set_level(logging.INFO)
    for selected, again, expected in (
        (stages[:3], (), r"3 stages, none to build"),
        (stages[:3], stages[:1], r"3 stages, 1 to build, about \d+ s"),
        (stages, (), r"10 stages, 7 to build, about \d+ s \(assumed of all, see `zs-seg plan`\)"),
    ):
        caplog.clear()
        runs.show_work(config, small_store, stages, selected, again)
        (message,) = caplog.messages
        assert re.fullmatch(expected, message), message
    caplog.clear()
    runs.show_work(config, small_store, stages, stages[1:2])
    assert not caplog.messages
    annotations = small_store.path(stages[0].recipe.ref) / "annotations/panoptic_train2017.json"
    intact = annotations.read_bytes()
    annotations.write_text("{")
    try:
        runs.show_work(config, small_store, stages, stages)
    finally:
        annotations.write_bytes(intact)
    assert caplog.messages == ["10 stages, 7 to build; no time, as the images cannot be counted"]


def test_plan_estimates_from_the_last_artefact_alike(small_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("plan", *TREE, "--store", str(small_store.root), "--shard.samples-per-tar", "5")) == 0
    rows = capsys.readouterr().out.splitlines()
    assert "missing" in rows[2]
    assert rows[2].count("~") == 2


def test_plan_shows_what_a_killed_build_left(small_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    ref = line(small_config())[3].recipe.ref
    partial = small_store.root / ref.kind / f".{ref.key}.partial"
    partial.mkdir(parents=True)
    try:
        assert main(("plan", *TREE, "--store", str(small_store.root))) == 0
    finally:
        partial.rmdir()
    assert "partial" in capsys.readouterr().out.splitlines()[4]


def test_a_second_run_builds_nothing_and_says_so(small_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("run", *SMALL, "--store", str(small_store.root), "--until", "text")) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3
    assert all("fresh, nothing to do" in row for row in rows)


@pytest.mark.parametrize(("stage", "built"), [("scenes", [True, True, False]), ("shard", [False, True, False])])
def test_force_builds_again_what_it_names_and_all_that_reads_it(
    stage: str, built: list[bool], small_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(("run", *SMALL, "--store", str(small_store.root), "--until", "text", "--force", stage)) == 0
    rows = capsys.readouterr().out.splitlines()
    assert ["built in" in row for row in rows] == built


def test_force_follows_the_line_to_its_end() -> None:
    steps = line(small_config())
    again = runs.forced(steps, ["queries"])
    assert [step.name for step in again] == ["queries", "g2s", "cpa", "evaluate"]
    assert [step.name for step in runs.forced(steps[:6], ["cache-clip"])] == ["cache-clip", "v2c", "queries"]
    assert runs.forced(steps, []) == []


def test_force_removes_nothing_when_an_input_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The forced artefact is complete, so that without --force nobody would miss what it was made from."""
    store, steps = Store(tmp_path), line(small_config())
    shards, tokens = steps[1], steps[3]
    for step in steps[:4]:
        store.build(step.recipe, lambda build: None)
    store.remove(shards.recipe.ref)
    words = ("run", *SMALL, "--store", str(tmp_path), "--from", "cache-clip", "--until", "cache-clip")
    assert main(words) == 0
    capsys.readouterr()
    assert "what stage shard makes" in fails(capsys, *words, "--force", "cache-clip")
    assert store.state(tokens.recipe.ref) == "fresh"


def test_stage_without_its_inputs_names_the_stage_and_the_command(
    small_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(capsys, "stage", "v2c", *TREE, "--store", str(small_store.root))
    assert "stage cache-clip makes" in message
    assert "zs-seg run --until cache-clip --preset demo" in message
    assert "--data.train-images 24" in message  # with the same overrides, or it would make another artefact
    message = fails(capsys, "run", *TREE, "--store", str(small_store.root), "--from", "queries")
    assert "stage cache-clip makes" in message
    assert not list(small_store.root.glob("*/.*.partial"))


def test_stage_builds_just_that_stage(small_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    before = small_store.refs()
    words = ("stage", "shard", *SMALL, "--store", str(small_store.root), "--shard.samples-per-tar", "7")
    assert main(words) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    made = set(small_store.refs()) - set(before)
    assert [ref.kind for ref in made] == ["shards"]
    small_store.remove(made.pop())


def test_list_shows_every_artefact(small_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("list", "--store", str(small_store.root))) == 0
    output = capsys.readouterr().out
    assert all(str(ref) in output for ref in small_store.refs())
    assert len(output.splitlines()) == 2 + len(small_store.refs())


def test_store_comes_from_the_environment(
    small_store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZS_SEG_STORE", str(small_store.root))
    assert main(("list",)) == 0
    assert str(small_store.root) in capsys.readouterr().out


def test_show_prints_the_manifest(small_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    ref = line(small_config())[1].recipe.ref
    assert main(("show", ref.key[:9], "--store", str(small_store.root))) == 0
    output = capsys.readouterr().out
    assert str(ref) in output
    for content in ("samples_per_tar: 256", "images: 24", "index.json", "scenes: scenes/"):
        assert content in output


def test_verify_finds_a_changed_byte(small_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("verify", "--store", str(small_store.root))
    assert main(words) == 0
    assert "3 artefacts" in capsys.readouterr().out
    ref = line(small_config())[1].recipe.ref
    index = small_store.path(ref) / "index.json"
    intact = index.read_bytes()
    index.write_bytes(intact.replace(b"2", b"3", 1))
    try:
        assert str(ref) in fails(capsys, *words)
        assert str(ref) in fails(capsys, *words, ref.key)
    finally:
        index.write_bytes(intact)
    assert main((*words, ref.key)) == 0


def test_interrupt_is_status_130_and_the_build_goes_on_later(tmp_path: Path) -> None:
    # a shell's background job ignores Ctrl-C, and so would this process if the tests run in one
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from flows.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        [*command, "run", *DEMO, "--store", str(tmp_path), "--until", "scenes"], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(tmp_path.rglob("*.jpg")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 130
    assert message.splitlines()[-1].startswith("zs-seg: stopped")
    assert [path.parent.name for path in tmp_path.glob("*/.*.partial")] == ["scenes"]
    assert not Store(tmp_path).refs()


def test_a_file_that_the_system_refuses_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    long = "x" * 300
    message = fails(
        capsys, "predict", "--checkpoint", long, "--images", str(tmp_path / "a.png"), "--out", str(tmp_path)
    )
    assert long in message and "File name too long" in message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
            "by --v2c.accumulate 2, 4, ...; else lower --v2c.batch or --v2c.augment.size",
        ),
        (PermissionError(13, "Permission denied", "/data/a.jpg"), "/data/a.jpg: Permission denied"),
        # Without a path there is nothing to mend.
        (OSError(5, "Input/output error"), ""),
        (RuntimeError("a bug"), ""),
    ],
)
def test_what_the_user_can_mend_is_told_and_a_bug_is_not_hidden(error: Exception, message: str) -> None:
    assert message in _mistake(error)
    assert bool(_mistake(error)) == bool(message)


@pytest.mark.parametrize("facts", [None, "[]", "{", '{"stage": "g2s"}', '{"ids": [1]}'])
def test_predict_refuses_a_folder_that_is_no_checkpoint(
    facts: str | None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    folder = tmp_path / "text"
    folder.mkdir()
    if facts is not None:
        (folder / "meta.json").write_text(facts)
    words = ("--images", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"))
    assert f"{folder} is no checkpoint" in fails(capsys, "predict", "--checkpoint", str(folder), *words)


@pytest.mark.slow
def test_all_stages_report_and_prediction(
    small_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From scenes to a published report, then the checkpoint on images, one more class name included."""
    monkeypatch.chdir(tmp_path)
    store = ("--store", str(small_store.root))
    for building in (True, False):
        assert main(("run", *SMALL, *store)) == 0
        output = capsys.readouterr().out
        assert ("built in" in output) == building
    report = json.loads((tmp_path / "runs/demo/report.json").read_text())
    assert report["preset"] == "demo"
    assert list(report["lineage"]) == list(STAGES)
    assert {"inductive", "transductive"} <= report.keys()
    assert "</html>" in (tmp_path / "runs/demo/report.html").read_text()

    lineage = {stage: small_store.find(entry["ref"]) for stage, entry in report["lineage"].items()}
    scenes = small_store.open(lineage["scenes"]).path / "val2017"
    words = ("predict", "--checkpoint", lineage["cpa"].key, "--threads", "1", *store)
    assert main((*words, "--images", str(scenes), "--out", "seen")) == 0
    predicted = json.loads((tmp_path / "seen/panoptic.json").read_text())
    assert [image["id"] for image in predicted["images"]] == [1, 2, 3, 4, 5, 6]
    for image, annotation in zip(predicted["images"], predicted["annotations"], strict=True):
        png = np.asarray(Image.open(tmp_path / "seen/panoptic" / annotation["file_name"])).astype(np.int64)
        drawn = set(np.unique(png @ np.array([1, 256, 65536]))) - {0}
        assert drawn == {segment["id"] for segment in annotation["segments_info"]}
        assert png.shape[:2] == (image["height"], image["width"])
        assert (tmp_path / "seen/overlay" / annotation["file_name"]).is_file()
    capsys.readouterr()
    one = str(next(scenes.iterdir()))
    assert main((*words, "--images", one, "--out", "named", "--names", "cyan square, green square")) == 0
    named = json.loads((tmp_path / "named/panoptic.json").read_text())["categories"]
    assert [category["name"] for category in named[-2:]] == ["cyan square", "green square"]
    assert named[:-2] == predicted["categories"]
    shutil.copytree(small_store.path(lineage["cpa"]), tmp_path / "copied")
    elsewhere = ("predict", "--checkpoint", "copied", "--threads", "1", "--store", "no-store", "--images", one)
    for names, out in (("", "seen"), ("cyan square, green square", "named")):
        assert main((*elsewhere, "--out", "alone", "--names", names)) == 0
        alone, there = (json.loads((tmp_path / f / "panoptic.json").read_text()) for f in ("alone", out))
        assert alone["categories"] == there["categories"]
        assert alone["annotations"][0] in there["annotations"]
    capsys.readouterr()
    assert "red circle" in fails(capsys, *words, "--images", one, "--out", "named", "--names", "red circle,red circle")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    capsys.readouterr()
    assert main((*words, "--images", "broken.jpg", "--out", "named")) == 2
    assert "broken.jpg" in capsys.readouterr().err.splitlines()[-1]  # below the progress bar
    assert "no checkpoint" in fails(
        capsys, words[0], words[1], lineage["text"].key, *words[3:], "--images", one, "--out", "x"
    )
