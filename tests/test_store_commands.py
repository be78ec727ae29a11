"""list, show, verify, diff, gc and plan on the command line: what they say, and how quickly with 2,000 artefacts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from children import ENVIRONMENT, command
from many_artefacts import demo_line, fill, many, note
from probe import probe

from flows.cli import main
from pipeline.line import STAGES
from storage.keys import recipe_key
from storage.runs import Runs
from storage.store import Build, Store

DEMO = ("--preset", "demo")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The demo's line as run "demo", and one with another v2c that no run names."""
    store = Store(tmp_path_factory.mktemp("store"))
    fill(store, demo_line(), files=30)
    fill(store, demo_line(100))
    note(store, "demo", demo_line())
    return store


@pytest.fixture
def copied(filled: Store, tmp_path: Path) -> Store:
    shutil.copytree(filled.root, tmp_path / "copy")
    return Store(tmp_path / "copy")


def says(capsys: pytest.CaptureFixture[str], store: Store, *words: str, status: int = 0) -> list[str]:
    """The lines on stdout, or on stderr of a command that fails."""
    assert main((*words, "--store", str(store.root))) == status
    output = capsys.readouterr()
    return (output.err if status else output.out).splitlines()


def keys(number: int = 0) -> dict[str, str]:
    return {step.name: step.recipe.key for step in demo_line(number)}


def test_list_in_the_order_of_the_line_with_users_and_runs(filled: Store, capsys: pytest.CaptureFixture[str]) -> None:
    *rows, total = says(capsys, filled, "list")
    assert [row.split()[0] for row in rows[1:]] == [
        stage for stage in STAGES for _ in range(1 + (STAGES.index(stage) > 3))
    ]
    assert total.startswith("16 artefacts, ")
    users = {row.split()[1].partition("/")[2]: row.split()[-2:] for row in rows[1:]}
    assert users[keys()["shard"]] == ["9", "demo"]  # tokens, and of both lines v2c, queries, mask-tokens and evaluate
    assert users[keys(100)["v2c"]] == ["5", "-"]
    assert users[keys()["evaluate"]] == ["-", "demo"]


def test_list_of_one_kind_as_json(filled: Store, capsys: pytest.CaptureFixture[str]) -> None:
    entries = json.loads("\n".join(says(capsys, filled, "list", "--kind", "checkpoint", "--json")))
    assert {entry["key"] for entry in entries} == {keys(n)[stage] for n in (0, 100) for stage in ("v2c", "cpa")}
    (v2c,) = (entry for entry in entries if entry["key"] == keys()["v2c"])
    manifest = filled.open(filled.find(f"checkpoint/{v2c['key']}")).manifest
    assert (v2c["bytes"], v2c["files"], v2c["runs"], v2c["stage"]) == (manifest.bytes, 30, ["demo"], "v2c")
    assert set(v2c["used_by"]) == {
        f"{kind}/{keys()[stage]}" for kind, stage in
        (("queries", "queries"), ("generator", "g2s"), ("checkpoint", "cpa"),
         ("mask-tokens", "mask-tokens"), ("report", "evaluate"))
    }  # fmt: skip
    assert "checkpoint" in says(capsys, filled, "list", "--kind", "no-such", status=2)[0]


def test_list_goes_on_after_a_damaged_artefact(copied: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (copied.path(copied.find(keys()["evaluate"])) / "manifest.json").write_text("{")
    rows = says(capsys, copied, "list")
    assert len(rows) == 18 and "damaged" in rows[-2] and keys()["evaluate"] in rows[-2]
    assert json.loads("\n".join(says(capsys, copied, "list", "--json")))[-1]["damaged"]


def test_show_tells_what_it_was_made_from_and_what_uses_it(filled: Store, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(says(capsys, filled, "show", keys()["g2s"]))
    inputs, _, rest = text.partition("\nused by\n")
    assert f"\n  checkpoint: checkpoint/{keys()['v2c']}" in inputs
    assert f"\n    shards: shards/{keys()['shard']} (shard)\n      scenes: scenes/{keys()['scenes']} (scenes)" in inputs
    assert inputs.count("scenes:") == 1 and "(as above)" in inputs
    users = rest.partition("\n\n")[0]
    assert f"checkpoint/{keys()['cpa']} (cpa)" in users and f"report/{keys()['evaluate']} (evaluate)" in users
    assert "runs: demo" in rest and "and 10 more in" in rest
    used = "\n".join(says(capsys, filled, "show", keys()["v2c"]))
    assert f"queries/{keys()['queries']} (queries)\n" in used.partition("\nruns")[0]
    used = "\n".join(says(capsys, filled, "show", keys()["text"]))
    assert f"generator/{keys(100)['g2s']} (g2s)\n" in used
    assert "through others" in "\n".join(says(capsys, filled, "show", keys()["scenes"]))
    assert "\nused by\n  nothing\n\nruns: none\n" in "\n".join(says(capsys, filled, "show", keys(100)["evaluate"]))


def test_verify_of_a_sample_reads_what_its_seed_draws(copied: Store, capsys: pytest.CaptureFixture[str]) -> None:
    first, last = says(capsys, copied, "verify", "--sample", "5")
    assert first.startswith("5 of 306 files, drawn with --seed ") and "the drawn ones are intact" in last
    assert first != says(capsys, copied, "verify", "--sample", "5")[0]  # another seed
    files = sorted(path for path in copied.root.glob("*/*/*") if path.suffix == ".tar")
    files[3].write_bytes(bytes(files[3].stat().st_size))  # of the same size
    found = [main(("verify", "--sample", "60", "--seed", str(seed), "--store", str(copied.root))) for seed in range(20)]
    assert set(found) == {0, 2}  # a seed finds it or does not
    assert found == [
        main(("verify", "--sample", "60", "--seed", str(seed), "--store", str(copied.root))) for seed in range(20)
    ]
    capsys.readouterr()
    assert "1 of 16 artefacts is damaged" in says(capsys, copied, "verify", "--sample", "999", status=2)[-1]
    files[-1].unlink()
    key = files[-1].parent.name
    assert key in says(capsys, copied, "verify", key, "--sample", "1", status=2)[-1]  # sizes are always compared
    assert "--sample" in says(capsys, copied, "verify", "--sample", "-1", status=2)[-1]


def test_verify_names_stray_files_and_sets_damage_aside(copied: Store, capsys: pytest.CaptureFixture[str]) -> None:
    shards, tokens = (copied.find(keys()[stage]) for stage in ("shard", "cache-clip"))
    for name in (".DS_Store", "manifest.json~"):
        (copied.path(shards) / name).write_text("x")
    row = next(row for row in says(capsys, copied, "verify") if row.startswith(str(shards)))
    assert row.endswith("intact; not part of it, and never read: .DS_Store, manifest.json~")
    assert not any("not part" in row for row in says(capsys, copied, "verify") if not row.startswith(str(shards)))
    assert "not part of it" in "\n".join(says(capsys, copied, "verify", "--sample", "3"))
    next(copied.path(tokens).glob("*.tar")).write_text("damaged")
    (copied.path(shards) / "manifest.json").write_text("{")
    last = says(capsys, copied, "verify", status=2)[-1]
    assert "2 of 16 artefacts are damaged" in last and "`zs-seg verify --set-aside`" in last and "--force" not in last
    rows = [row for row in says(capsys, copied, "verify", "--set-aside") if "is set aside as" in row]
    assert len(rows) == 2 and copied.state(shards) == copied.state(tokens) == "missing"
    assert len(list(copied.root.glob("*/.*.aside"))) == 2
    assert "14 artefacts" in says(capsys, copied, "verify", "--set-aside")[-1]
    assert not any("set aside" in row for row in says(capsys, copied, "gc", "--partial-age", "1"))
    rows = [
        row for row in says(capsys, copied, "gc", "--partial-age", "0", "--delete") if "set aside, untouched" in row
    ]
    assert len(rows) == 2 and not list(copied.root.glob("*/.*.aside"))


def test_diff_of_keys_and_runs(copied: Store, capsys: pytest.CaptureFixture[str]) -> None:
    head, row, total = says(capsys, copied, "diff", keys()["evaluate"], keys(100)["evaluate"])
    assert head.split() == ["field", f"report/{keys()['evaluate']}", f"report/{keys(100)['evaluate']}"]
    assert (row.split(), total) == (["v2c.lr", "0.001", "0.0011"], "1 field differs")
    note(copied, "other", demo_line(100))
    assert says(capsys, copied, "diff", "demo", "other")[0].split() == ["field", "demo", "other"]
    assert says(capsys, copied, "diff", "demo", "demo") == ["demo and demo differ in no field"]
    between = "\n".join(says(capsys, copied, "diff", keys()["v2c"], keys()["queries"]))
    assert "queries" in between and "v2c." not in between  # one has a stage more, all else is shared
    note(copied, "planned", demo_line(7)[4:])
    assert "run it" in says(capsys, copied, "diff", "demo", "planned", status=2)[0]


def test_show_and_verify_of_a_run(copied: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert says(capsys, copied, "show", "demo")[0].startswith(f"report/{keys()['evaluate']}, made by stage evaluate")
    assert says(capsys, copied, "show", "demo:v2c")[0].startswith(f"checkpoint/{keys()['v2c']}, made by stage v2c")
    *rows, total = says(capsys, copied, "verify", "demo")
    assert {row.split()[0].partition("/")[2] for row in rows} == set(keys().values())
    assert total.startswith("10 artefacts in ") and total.endswith(" are intact")
    assert says(capsys, copied, "verify", "demo:text")[-1] == f"1 artefact in {copied.root} is intact"
    copied.remove(copied.find(keys()["evaluate"]))
    rows = says(capsys, copied, "verify", "demo")
    assert rows[0].split() == [f"report/{keys()['evaluate']}", "missing,", "nothing", "to", "compare"]
    assert "9 artefacts" in rows[-1]
    note(copied, "planned", demo_line(7)[4:])
    assert "nothing of run planned" in says(capsys, copied, "verify", "planned", status=2)[0]


def test_show_as_json_is_the_manifest_and_what_is_around_it(filled: Store, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads("\n".join(says(capsys, filled, "show", keys()["g2s"], "--json")))
    ref = filled.find(keys()["g2s"])
    manifest = json.loads((filled.path(ref) / "manifest.json").read_text())
    del manifest["checksum"]
    assert {name: found[name] for name in manifest} == manifest
    assert found.keys() - manifest.keys() == {"path", "bytes", "used_by", "runs"}
    assert found["path"] == str(filled.path(ref)) and found["runs"] == ["demo"]
    assert found["bytes"] == sum(file["bytes"] for file in manifest["files"].values())
    assert set(found["used_by"]) == {f"checkpoint/{keys()['cpa']}", f"report/{keys()['evaluate']}"}


def test_gc_as_json_finds_and_removes_the_same(copied: Store, capsys: pytest.CaptureFixture[str]) -> None:
    look = json.loads("\n".join(says(capsys, copied, "gc", "--json")))
    assert {one["name"].partition("/")[2] for one in look["folders"]} == set(keys(100).values()) - set(keys().values())
    assert all(Path(one["path"]).is_dir() and one["reason"] == "no run reaches it" for one in look["folders"])
    assert look["bytes"] == sum(one["bytes"] for one in look["folders"]) and not look["deleted"] and not look["locked"]
    assert {ref.partition("/")[2] for ref in look["kept"]} == set(keys().values())
    gone = json.loads("\n".join(says(capsys, copied, "gc", "--json", "--delete")))
    assert gone == {**look, "deleted": True}
    assert not any(Path(one["path"]).exists() for one in gone["folders"])
    assert "10 artefacts with" in says(capsys, copied, "gc")[-1]


def test_gc_is_a_look_until_told(copied: Store, capsys: pytest.CaptureFixture[str]) -> None:
    refs = copied.refs()
    *rows, total = says(capsys, copied, "gc")
    assert {row.split()[0].partition("/")[2] for row in rows[1:]} == set(keys(100).values()) - set(keys().values())
    assert (
        "no run reaches it" in rows[1]
        and "6 folders with " in total
        and "`--delete`" in total
        and "10 artefacts with" in total
    )
    assert copied.refs() == refs
    assert "removed" in says(capsys, copied, "gc", "--delete")[0]
    assert {ref.key for ref in copied.refs()} == set(keys().values())
    assert says(capsys, copied, "gc")[0].startswith("0 folders")
    note(copied, "other", demo_line(100))
    assert "of an earlier run demo" in "\n".join(says(capsys, copied, "gc", "--forget", "demo"))
    says(capsys, copied, "gc", "--forget", "demo", "--delete")
    assert Runs(copied).names() == ["other"]
    assert {ref.key for ref in copied.refs()} == {keys()[stage] for stage in STAGES[:4]}  # both lines share these
    assert "--partial-age" in says(capsys, copied, "gc", "--partial-age", "-1", status=2)[0]


def test_plan_says_why_and_by_whom(copied: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (step,) = (step for step in demo_line(200) if step.name == "v2c")
    copied.remove(copied.find(keys()["scenes"]))  # they hold no images to count
    words = ("plan", *DEMO, "--v2c.lr", str(step.recipe.config.lr))

    def look(build: Build) -> None:
        rows = says(capsys, copied, *words)[1:10]
        assert [row.split()[2] for row in rows] == ["missing"] + ["fresh"] * 3 + ["locked"] + ["missing"] * 4
        assert f"by process {os.getpid()} on " in rows[4] and " since 20" in rows[4]
        assert "no scenes in this store yet" in rows[0] and "via checkpoint: v2c.lr 0.001" in rows[5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copied.build(step.recipe, look)
    row = says(capsys, copied, *words)[5]
    assert "partial" in row and "a run goes on with it; v2c.lr 0.001" in row


def test_a_run_is_noted_before_it_builds_and_under_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, small = Store(tmp_path), ("--data.train-images", "24", "--data.val-images", "6")
    for words in (("--name", "small"), ("--name", "small", "--v2c.lr", "2e-4"), ()):
        says(capsys, store, "run", *DEMO, *small, "--until", "scenes", *words)
    first, second = Runs(store).lines("small")
    assert first.refs["v2c"] != second.refs["v2c"] and list(first.refs) == list(STAGES)
    assert second.command.startswith("zs-seg run --preset demo --store") and second.command.endswith("--v2c.lr 2e-4")
    assert "--name small" in second.command
    assert Runs(store).lines("demo")[0].refs == first.refs and Runs(store).under_way() == []
    assert "cannot name" in says(capsys, store, "run", *DEMO, "--until", "scenes", "--name", "a/b", status=2)[0]


@pytest.fixture(scope="module")
def crowded(filled: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """2,000 artefacts whose manifests list 50 files each; the files themselves are left out where nothing reads
    them.
    """
    store = many(tmp_path_factory.mktemp("crowded"), 30)
    folder = next((store.root / "queries").iterdir())
    text = json.loads((folder / "manifest.json").read_text())
    for number in range(2000 - len(store.refs())):
        data = {**text, "config": {**text["config"], "views": 1000 + number}}
        inputs = {name: ref.partition("/")[2] for name, ref in data["inputs"].items()}
        data["key"] = recipe_key("queries", data["version"], data["config"], inputs)
        made = folder.parent / data["key"]
        made.mkdir()
        (made / "manifest.json").write_text(json.dumps(data, indent=1))
    assert len(store.refs()) == 2000
    return store


@pytest.mark.parametrize(
    "words",
    [
        ("list",),
        ("show", keys()["v2c"]),
        ("gc",),
        ("diff", "demo-0", keys(1)["evaluate"]),
        ("plan", *DEMO, "--data.seed", "7"),
    ],
    ids=lambda words: words[0],
)
def test_quick_with_2000_artefacts(words: Sequence[str], crowded: Store) -> None:
    """Counted, and not timed beside other tests: a manifest is opened about once, no file of an artefact, no numerical
    package.
    """
    root = str(crowded.root)
    done = subprocess.run(
        command(probe, root, *words, "--store", root), env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    *lines, last = done.stdout.splitlines()
    took = json.loads(last)
    assert lines
    names = {Path(path).name for path in took["opened"] if "/runs/" not in path}
    assert "manifest.json" in names and all(name.startswith(".") for name in names - {"manifest.json"})  # of locks
    assert sum(took["opened"].values()) < 2100
    assert not {"torch", "numpy", "zarr", "dask", "prefect"} & set(took["modules"])
    assert took["seconds"] < 10  # of CPU time; 0.3 to 0.6 where nothing else runs
