"""`zs-seg show` and `zs-seg verify --rows` of tokens: counted by a slow loop, and finding what was put there by
hand.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import QUIET, build, copy_artefacts, tiny_config

from flows.cli import main
from pipeline.line import line
from pipeline.teacher.checks import encode_again, summary
from storage.keys import Ref
from storage.shards import Shards, read_shard
from storage.store import Store
from storage.tokens import read_tokens, token_files, write_tokens


@pytest.fixture(scope="module")
def made(shared_store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Ref]:
    """A store with nothing but the tiny line's tokens and what they were made from."""
    stages, store = build(shared_store, tiny_config(), until="cache-clip"), Store(tmp_path_factory.mktemp("store"))
    copy_artefacts(shared_store, store, [stage.recipe.ref for stage in stages.values()])
    return store, stages["cache-clip"].recipe.ref


def check(store: Store, ref: Ref, rows: int, seed: int = 0) -> tuple[list[str], str]:
    return encode_again(store, ref, rows=rows, seed=seed, teacher_weights="", runtime=QUIET)


def test_a_summary_counts_what_is_there(made: tuple[Store, Ref]) -> None:
    store, ref = made
    counts, found = store.open(ref).manifest.counts, summary(store.open(ref).folders(".zarr"))
    assert list(found) == ["train images", "train instances", "val images", "val instances"]
    for split in ("train", "val"):
        assert found[f"{split} images"]["rows"] == counts[split]["encoded"]
        assert found[f"{split} instances"]["rows"] == counts[split]["instances"]
    assert found["train images"]["left_out"] == counts["train"]["left_out_by_image_filter"] > 0
    for row in found.values():
        assert (row["zero"], row["duplicates"]) == (0, 0)
        least, mean, largest = row["norm"]
        assert 0.999 < least <= mean <= largest < 1.001


def test_a_summary_finds_zero_rows_duplicates_and_lengths(tmp_path: Path) -> None:
    rows = np.eye(6, 4, dtype=np.float16) * np.arange(1, 7, dtype=np.float16)[:, None]  # lengths 1 2 3 4 0 0
    write_tokens(
        tmp_path / "train-000000.zarr", global_=rows[:3] * np.array([[1], [0], [1]]), instance=rows,
        offsets=np.array([0, 2, 2, 6]), segment_id=np.arange(6), kept=np.array([True, False, True]),
    )  # fmt: skip
    write_tokens(
        tmp_path / "train-000001.zarr", global_=rows[:1], instance=rows[:0], offsets=np.array([0, 0]),
        segment_id=np.zeros(0), kept=np.array([True]),
    )  # fmt: skip
    found = summary(sorted(tmp_path.iterdir()))
    assert found["train instances"] == {"rows": 6, "norm": [0.0, 1.6667, 4.0], "zero": 2, "duplicates": 1}
    assert found["train images"] == {"rows": 3, "norm": [1.0, 1.6667, 3.0], "zero": 0, "duplicates": 1, "left_out": 1}
    assert found["val images"]["rows"] == 0


def test_show_prints_it(made: tuple[Store, Ref], capsys: pytest.CaptureFixture[str]) -> None:
    store, ref = made
    assert main(("show", ref.key, "--store", str(store.root))) == 0
    rows = capsys.readouterr().out.partition("\nrows\n")[2]
    assert "train instances" in rows and "duplicates: 0" in rows and "left_out: " in rows


def test_every_row_is_what_the_teacher_says(made: tuple[Store, Ref]) -> None:
    store, ref = made
    counts = store.open(ref).manifest.counts
    total = sum(counts[split][what] for split in ("train", "val") for what in ("encoded", "instances"))
    problems, message = check(store, ref, 10_000)
    assert problems == [] and message.startswith(f"{total} rows encoded again, least cosine 1.000")


def test_a_sample_is_of_its_seed(made: tuple[Store, Ref]) -> None:
    store, ref = made
    message = {seed: check(store, ref, 5, seed)[1] for seed in (0, 1)}
    assert message[0] == check(store, ref, 5, 0)[1] and all(t.startswith("5 rows") for t in message.values())


def spoiled(made: tuple[Store, Ref], root: Path, what: str) -> tuple[Store, Ref, str]:
    """A second store, whose tokens differ in one row from what the teacher says; and how the check names it."""
    store, ref = made
    other, steps = Store(root), line(tiny_config())
    copy_artefacts(store, other, [step.recipe.ref for step in steps[:2]])
    sample = next(read_shard(Shards(other.path(steps[1].recipe.ref)).tars("val")[0]))

    def work(there) -> None:
        source = store.path(ref)
        for path in sorted(source.glob("*.zarr")):
            group = read_tokens(path)
            arrays = group.arrays()
            columns: dict[str, Any] = {"global_": arrays.pop("global"), **arrays}
            if path.stem == "val-000000":
                columns["global_" if what == "image" else "instance"][0] = columns["instance"][1]
            write_tokens(there.path / path.name, **columns)
            there.add(*token_files(there.path / path.name))
        there.counts |= store.open(ref).manifest.counts

    other.build(steps[3].recipe, work)
    segment = int(read_tokens(other.path(ref) / "val-000000.zarr").segment_id[0])
    return other, ref, f"image {sample.image_id}, {'its image' if what == 'image' else f'segment {segment}'}"


@pytest.mark.parametrize("what", ["image", "instance"])
def test_one_row_of_another_image_is_named(
    made: tuple[Store, Ref], tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store, ref, name = spoiled(made, tmp_path, what)
    problems, _ = check(store, ref, 10_000)
    assert len(problems) == 1 and problems[0].startswith(f"{name}: cosine ")
    words = ("verify", ref.key, "--store", str(tmp_path), "--threads", "1")
    assert main(words) == 0  # the bytes are what was written
    capsys.readouterr()
    assert main((*words, "--rows", "10000")) == 2
    output = capsys.readouterr()
    assert name in output.out and "1 of 1 artefact is damaged" in output.err


def test_verify_says_how_many_rows_agree(made: tuple[Store, Ref], capsys: pytest.CaptureFixture[str]) -> None:
    store, ref = made
    words = ("verify", "--store", str(store.root), "--threads", "1")
    assert main((*words, "--rows", "3")) == 0
    message = [row for row in capsys.readouterr().out.splitlines() if str(ref) in row]
    assert "intact; 3 rows encoded again" in message[0]
    assert main((*words, "--rows", "-1")) == 2


def test_another_teacher_is_refused(
    made: tuple[Store, Ref], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokens say whose they are; a file that is not that teacher must not be compared with."""
    weights = tmp_path / "a.pt"
    weights.write_bytes(b"not those")
    store, ref = made
    words = ("verify", ref.key, "--store", str(store.root), "--rows", "1", "--teacher.pretrained", str(weights))
    assert main(words) == 2
    assert "not those the" in capsys.readouterr().err


def test_rows_made_otherwise_are_not_checked(made: tuple[Store, Ref], tmp_path: Path) -> None:
    store, steps = Store(tmp_path), line(tiny_config())
    copy_artefacts(made[0], store, [step.recipe.ref for step in steps[:2]])
    recipe = steps[3].recipe
    boxed = replace(recipe, config={**recipe.config, "tokens": {"batch": 1, "crop": "box"}})
    ref = store.build(boxed, lambda there: None)
    assert check(store, ref, 3) == ([], "rows not checked for crop=box")
