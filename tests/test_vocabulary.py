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
from pipeline.inference.vocabulary import Lexicon, Vocabulary, vocabulary_of
from pipeline.inference.words import Word, read_words
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


# ------------------------------------------------------------------------------------------------ words


def further(model: Model, texts: Sequence[str], *, only: bool = False) -> Vocabulary:
    return Lexicon(model, "", QUIET).vocabulary(read_words(texts), only=only)


def test_words_have_marks_and_synonyms() -> None:
    assert read_words(["zebra", " grass : Stuff", "", "sofa | couch:thing"]) == [
        Word(name="zebra"),
        Word(name="grass", isthing=False),
        Word(name="sofa, couch", isthing=True),
    ]
    assert read_words(["grass", "cow:thing"], isthing=False) == [
        Word(name="grass", isthing=False),
        Word(name="cow", isthing=True),
    ]
    for text, message in (
        ("sky:stuf", r"ends in the mark 'stuf' \(did you mean 'stuff'\?\)"),
        ("a||b", "has an empty part"),
        (":stuff", "has an empty part"),
    ):
        with pytest.raises(ValueError, match=message):
            read_words([text])


def test_words_alone_are_the_vocabulary_in_their_order() -> None:
    model = checkpoint()
    asked = further(model, ["zebra", "grass-merged:stuff", "Traffic  Light", "sky:stuff"], only=True)
    assert asked.classes.names == ["zebra", "grass-merged", "traffic light", "sky"]
    assert asked.classes.ids == [6, 5, 2, 7]  # the checkpoint's own where it has the class
    assert asked.classes.isthing == [True, False, True, False]
    assert asked.classes.seen == [False, False, True, False]
    assert asked.embedding[[1, 2]].equal(model.text[[4, 1]])
    torch.testing.assert_close(asked.embedding[[0, 3]], embed_names(teacher(), ["zebra", "sky"], TEMPLATES))
    with pytest.raises(ValueError, match="nothing to choose from"):
        further(model, [], only=True)


def test_words_beside_the_checkpoints_classes() -> None:
    model = checkpoint()
    asked = further(model, ["Person:stuff", "zebra"])
    assert asked.classes.names == [*NAMES, "zebra"] and asked.classes.isthing == [False, *[True] * 5]
    assert asked.classes.seen == [*SEEN, False]
    assert asked.embedding[:5].equal(model.text)


@pytest.mark.parametrize("only", [False, True])
def test_synonyms_are_further_rows_of_one_class(only: bool) -> None:
    """The class scores the largest of its rows: as if the best synonym alone were its name."""
    model = checkpoint()
    asked = further(model, ["boat|ship", "human|person|man"], only=only)
    place = asked.classes.names.index
    rows = {name: embed_names(teacher(), [name], TEMPLATES)[0] for name in ("boat", "ship", "person", "human", "man")}
    for name, expected in (("boat, ship", ["boat", "ship"]), ("person", ["person", "human", "man"])):
        found = asked.embedding[place(name)]
        padded = [*expected, expected[0]][: len(found)]
        torch.testing.assert_close(found, torch.stack([rows[part] for part in padded]))
    assert asked.classes.seen[place("person")] and asked.classes.ids[place("person")] == 1
    with pytest.raises(ValueError, match="'person, bridge' is both 'person' and 'bridge' to the checkpoint"):
        further(model, ["person|bridge"], only=only)


def test_a_word_is_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lexicon, asked = Lexicon(checkpoint(), "", QUIET), list[str]()
    encode = Teacher.encode_texts
    monkeypatch.setattr(Teacher, "encode_texts", lambda self, texts: asked.extend(texts) or encode(self, texts))
    for words in (["zebra"], ["zebra", "boat"], ["boat", "zebra", "person"], ["PERSON"]):
        lexicon.vocabulary(read_words(words), only=True)
    assert asked == ["zebra", "a photo of a zebra", "boat", "a photo of a boat"]


def test_the_checkpoints_own_names_need_no_teacher() -> None:
    model = checkpoint()
    model.meta.classes.teacher.update(pretrained="sha256:lost", name="ViT-B-16")
    assert further(model, ["bridge", "person"], only=True).classes.ids == [4, 1]
    with pytest.raises(ValueError, match="had local weights"):
        further(model, ["zebra"], only=True)


# ------------------------------------------------------------------------------------------------ one class twice


def test_a_further_name_that_is_given_twice_is_refused_with_both_named() -> None:
    with pytest.raises(ValueError, match="^classes 'zebra' and 'Zebra' are one to the teacher: .*; rename one of them"):
        further(checkpoint(), ["zebra", "Zebra"])
    with pytest.raises(ValueError, match="^class name 'zebra' is given twice"):
        further(checkpoint(), ["zebra", "zebra"])
    model = checkpoint(["person, human", "boat"], [True, False])
    with pytest.raises(
        ValueError, match="^class names 'human' and 'Person' are both 'person, human' to the checkpoint"
    ):
        further(model, ["human", "Person"])


def test_a_benchmark_with_one_class_twice_is_refused_with_both_named() -> None:
    with pytest.raises(ValueError, match="classes 'Bus' and 'bus' are one to the teacher"):
        vocabulary_of(checkpoint(), asked(["Bus", "airship", "bus"]), "", QUIET)


def test_names_that_are_cut_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = checkpoint()
    with caplog.at_level(logging.WARNING):
        further(model, ["boat", f"{LONG}red"])
    (record,) = caplog.records
    assert "takes 24 tokens" in record.message and "'a thing that is" in record.message
    assert "red' (549 characters)" in record.message and "boat" not in record.message
    with pytest.raises(ValueError, match="are one to the teacher: .* for it takes only 24; rename"):
        further(model, [f"{LONG}red", f"{LONG}blue"])


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
