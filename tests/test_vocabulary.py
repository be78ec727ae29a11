"""Which classes a checkpoint is asked for: names by its teacher's tokens, rows by name, and its teacher found again from
what the checkpoint records of it, or refused."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_reference import embed_text, small_clip
from tiny import QUIET
from torch import nn

from models.teacher import Teacher
from pipeline.data.benchmarks import Benchmark, Category
from pipeline.data.config import AugmentConfig, ResizeConfig
from pipeline.inference.model import CheckpointMeta, Model
from pipeline.inference.vocabulary import extend, vocabulary_of
from pipeline.teacher.config import TeacherConfig, teacher_of
from pipeline.teacher.text_bank import ClassList, embed_names

TEACHER = TeacherConfig(name="small", pretrained="shipped", fill="mean")
TEMPLATES = ["{}", "a photo of a {}"]
NAMES = ["person", "traffic light", "café", "bridge", "grass-merged"]
SEEN = [True, True, True, True, False]
LONG = "a thing that is described at great length and " + "very " * 100


@cache
def teacher() -> Teacher:
    return TEACHER.load(QUIET)


@cache
def reference() -> tuple[Any, Any]:
    return small_clip()


def checkpoint(
    names: Sequence[str] = NAMES, seen: Sequence[bool] = SEEN, *, clean_names: bool = False, imported: bool = False
) -> Model:
    """A checkpoint of these classes with their real text embeddings and no network."""
    text = embed_names(teacher(), names, TEMPLATES, clean_names=clean_names)
    classes = ClassList(
        text="0", ids=list(range(1, len(names) + 1)), names=list(names), isthing=[True] * len(names), seen=list(seen),
        teacher=TEACHER.identity, clean_names=clean_names,
    )  # fmt: skip
    meta = CheckpointMeta(
        architecture={"projector": {}}, stage="v2c", classes=classes, templates=[] if imported else TEMPLATES,
        resize=ResizeConfig(), augment=AugmentConfig(), matching={}, overlap_threshold=0.8, object_threshold=0.5,
    )  # fmt: skip
    network: Any = nn.Identity()
    return Model(segmenter=network, projector=network, text=text, meta=meta)


def asked(names: Sequence[str], unseen_ids: tuple[int, ...] = (), ids: Sequence[int] = ()) -> Benchmark:
    pairs = zip(ids or range(1, len(names) + 1), names, strict=True)
    categories = tuple(Category(id=i, name=name, isthing=True) for i, name in pairs)
    return Benchmark(name="asked", categories=categories, unseen_ids=unseen_ids, protocol="none")


# ------------------------------------------------------------------------------------------------ seen by tokens


def test_the_checkpoints_classes_in_capitals_are_its_classes() -> None:
    """No zero-shot score for trained classes: what is unseen is what was unseen in training, and the rows are its own."""
    model = checkpoint()
    capitals = [name.upper() for name in NAMES]
    known = vocabulary_of(model, asked(capitals), "", QUIET)
    assert known.benchmark.seen == SEEN and known.vocabulary.classes.seen == SEEN
    assert torch.equal(known.vocabulary.embedding, model.text)
    assert known.vocabulary.classes.names == capitals
    assert known.respelled == dict(zip(capitals, NAMES, strict=True))


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("Person", True),
        (" traffic  light", True),
        ("traffic\u00a0light", True),
        (unicodedata.normalize("NFD", "café"), True),
        ("caf&eacute;", True),
        ("ｂｒｉｄｇｅ", True),
        ("people", False),
        ("traffic-light", False),
        ("trafficlight", False),
        ("cafe", False),
        ("grass", False),
    ],
)
def test_a_name_is_seen_where_the_text_encoder_gets_what_it_got_in_training(name: str, same: bool) -> None:
    """Against open_clip's own embedding of the name: seen exactly where it is that of a class that was trained on."""
    clip, tokenizer = reference()
    rows = [embed_text(clip, tokenizer, trained) for trained in NAMES[:4]]
    assert any(torch.equal(embed_text(clip, tokenizer, name), row) for row in rows) == same
    model = checkpoint()
    known = vocabulary_of(model, asked([name, "airship", "grass-merged"]), "", QUIET)
    assert known.benchmark.seen == [same, False, False]
    expected = embed_names(teacher(), [name, "airship", "grass-merged"], TEMPLATES)
    torch.testing.assert_close(known.vocabulary.embedding, expected)


def test_one_trained_synonym_makes_a_class_seen() -> None:
    model = checkpoint(["person, human", "wall-other, wall", "boat"], [True, True, False])
    known = vocabulary_of(model, asked(["Human", "man, person", "barrier, WALL", "Boat", "ship"]), "", QUIET)
    assert known.benchmark.seen == [True, True, True, False, False]
    assert known.vocabulary.embedding.shape == (5, 2, 128) and known.respelled == {"Boat": "boat"}


def test_names_are_cleaned_as_they_were_in_training() -> None:
    names = ["sky-other-merged", "wall-brick"]
    for clean_names in (False, True):
        known = vocabulary_of(checkpoint(names, [True, True], clean_names=clean_names), asked(["Sky", "x"]), "", QUIET)
        assert known.benchmark.seen == [clean_names, False]


def test_some_of_the_checkpoints_classes_have_its_rows_and_need_no_teacher() -> None:
    model = checkpoint(imported=True)
    known = vocabulary_of(model, asked(["bridge", "Person"], ids=(7, 3)), "", QUIET)
    assert torch.equal(known.vocabulary.embedding, model.text[[3, 0]])
    assert known.benchmark.seen == [True, True] and known.vocabulary.classes.ids == [7, 3]
    with pytest.raises(ValueError, match="embeddings were imported"):
        vocabulary_of(model, asked(["bridge", "boat"]), "", QUIET)


# ------------------------------------------------------------------------------------------------ another order


@pytest.mark.parametrize("spell", [str, str.upper])
def test_another_order_or_other_ids_are_matched_on_request(spell: Any) -> None:
    model, order = checkpoint(), [3, 0, 4, 1, 2]
    other = asked([spell(NAMES[i]) for i in order], ids=[9, 8, 7, 6, 5])
    with pytest.raises(ValueError, match=r"'person' \(id 1\) in the checkpoint, '\w+' \(id 9\).* --match-names"):
        vocabulary_of(model, other, "", QUIET)
    known = vocabulary_of(model, other, "", QUIET, match_names=True)
    assert torch.equal(known.vocabulary.embedding, model.text[order])
    assert known.benchmark.seen == [SEEN[i] for i in order]
    assert known.vocabulary.classes.ids == [9, 8, 7, 6, 5] and known.vocabulary.classes.names == other.names


def test_a_trained_class_cannot_be_called_unseen() -> None:
    model = checkpoint()
    assert vocabulary_of(model, asked(NAMES, (5,)), "", QUIET).benchmark.unseen_ids == (5,)
    for names in (NAMES, [name.upper() for name in NAMES]):
        with pytest.raises(ValueError, match=rf"calls '{names[3]}' unseen, but the checkpoint was trained on it"):
            vocabulary_of(model, asked(names, (4, 5)), "", QUIET)


# ------------------------------------------------------------------------------------------------ one class twice


@pytest.mark.parametrize(
    ("names", "one", "other"),
    [
        (["Person"], "'person'", "'Person'"),
        (["boat", "traffic  light"], "'traffic light'", r"'traffic \\x20light'"),
        (["zebra", "Zebra"], "'zebra'", "'Zebra'"),
        (["cafe\u0301"], "'café'", r"'cafe\\u0301'"),
        (["boat, Caf&eacute;"], "'café'", "'boat, Caf&eacute;'"),
    ],
)
def test_a_further_name_that_is_there_is_refused_with_both_named(names: list[str], one: str, other: str) -> None:
    with pytest.raises(ValueError, match=f"^classes {one} and {other} are one to the teacher: .*; rename one of them"):
        extend(checkpoint(), names, "", QUIET)


def test_a_benchmark_with_one_class_twice_is_refused_with_both_named() -> None:
    with pytest.raises(ValueError, match="classes 'Bus' and 'bus' are one to the teacher"):
        vocabulary_of(checkpoint(), asked(["Bus", "airship", "bus"]), "", QUIET)


def test_names_that_are_cut_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = checkpoint()
    with caplog.at_level(logging.WARNING):
        extend(model, ["boat", f"{LONG}red"], "", QUIET)
    (record,) = caplog.records
    assert "takes 24 tokens" in record.message and "'a thing that is" in record.message
    assert "red' (549 characters)" in record.message and "boat" not in record.message
    with pytest.raises(ValueError, match="are one to the teacher: .* for it takes only 24; rename"):
        extend(model, [f"{LONG}red", f"{LONG}blue"], "", QUIET)


# ------------------------------------------------------------------------------------------------ the teacher


def test_the_teacher_comes_back_from_its_identity(tmp_path: Path) -> None:
    weights = tmp_path / "clip.pt"
    weights.write_bytes(b"weights")
    for config in (
        TeacherConfig(),
        TeacherConfig(name="small", pretrained="shipped", fill="mean"),
        TeacherConfig(name="small", pretrained="random", seed=5),
    ):
        assert teacher_of(config.identity, "") == config
    local = TeacherConfig(pretrained=str(weights), fill="mean")
    assert teacher_of(local.identity, str(weights)) == local


def test_other_weights_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "clip.pt"
    weights.write_bytes(b"weights")
    identity = TeacherConfig(pretrained=str(weights)).identity
    with pytest.raises(ValueError, match="pass --teacher.pretrained FILE"):
        teacher_of(identity, "")
    weights.write_bytes(b"others")
    with pytest.raises(ValueError, match="are not those the checkpoint was trained with"):
        teacher_of(identity, str(weights))
