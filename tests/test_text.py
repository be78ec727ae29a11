"""The text bank: every row by a slow loop, in the benchmark's order, under a key of its own."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_reference import embed_text, small_clip
from coco_factory import CATEGORIES, make_coco
from tiny import QUIET, build

from flows.presets import preset
from models.projector import Projector
from pipeline import scenes, text
from pipeline.data.benchmarks import Benchmark, Category, load_benchmark
from pipeline.data.config import AugmentConfig, CocoConfig, ResizeConfig
from pipeline.inference.model import load_model
from pipeline.inference.vocabulary import Lexicon
from pipeline.inference.words import read_words
from pipeline.line import Stage
from pipeline.runtime import Runtime
from pipeline.teacher.config import TeacherConfig, TextConfig
from pipeline.teacher.prompts import Prompts, alike, brief, synonyms
from pipeline.teacher.text_bank import TextBank, join, open_text
from storage.store import Store

TEACHER = TeacherConfig(name="small", pretrained="shipped", fill="mean")
BENCHMARK = scenes.benchmark(scenes.ScenesConfig())
CONFIG = TextConfig(templates=("{}", "a photo of a {}", "a {}"))


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> TextBank:
    return make(tmp_path_factory.mktemp("store"))


def make(root: Path, config: TextConfig = CONFIG, benchmark: Benchmark = BENCHMARK) -> TextBank:
    store = Store(root)
    ref = Stage.of(text, config, teacher=TEACHER, benchmark=benchmark).run(store, Runtime(progress=False))
    return open_text(store.open(ref).path, ref.key)


def key(config: TextConfig = CONFIG, teacher: TeacherConfig = TEACHER, benchmark: Benchmark = BENCHMARK) -> str:
    return text.recipe(config, teacher=teacher, benchmark=benchmark).key


def test_each_row_is_the_documented_mean(bank: TextBank) -> None:
    """Unit sentence rows, averaged, made unit length: one class and one sentence at a time, in float64."""
    clip, tokenizer = small_clip()
    assert bank.embedding.shape == (len(BENCHMARK.categories), 128)
    for row, category in zip(bank.embedding, BENCHMARK.categories, strict=True):
        total = torch.zeros(128, dtype=torch.float64)
        for template in CONFIG.templates:
            total += embed_text(clip, tokenizer, template.replace("{}", category.name))
        assert torch.allclose(row.double(), total / total.square().sum().sqrt(), atol=1e-5)


def test_an_opened_bank_is_what_was_written(bank: TextBank) -> None:
    categories = BENCHMARK.categories
    assert bank.key == key()
    assert bank.embedding.dtype == torch.float32
    assert bank.ids == [c.id for c in categories]
    assert bank.names == [c.name for c in categories]
    assert bank.isthing == [c.isthing for c in categories]
    assert bank.seen == [c.id not in BENCHMARK.unseen_ids for c in categories]
    assert not all(bank.seen) and any(bank.seen)
    assert bank.teacher == TEACHER.identity
    listed = asdict(bank.classes())
    assert listed.pop("text") == bank.key
    assert listed == {
        name: getattr(bank, name) for name in ("ids", "names", "isthing", "seen", "teacher", "clean_names")
    }


def test_the_order_is_the_benchmarks(bank: TextBank, tmp_path: Path) -> None:
    backwards = make(tmp_path, benchmark=replace(BENCHMARK, categories=BENCHMARK.categories[::-1]))
    assert backwards.names == bank.names[::-1] and backwards.seen == bank.seen[::-1]
    assert torch.allclose(backwards.embedding, bank.embedding.flip(0), atol=1e-5)
    assert backwards.key != bank.key


def test_keys_follow_everything_that_decides_the_rows() -> None:
    random = TeacherConfig(name="small", pretrained="random", fill="mean")
    first, *others = BENCHMARK.categories
    keys = [
        key(),
        key(replace(CONFIG, templates=CONFIG.templates[:2])),
        key(replace(CONFIG, templates=CONFIG.templates[::-1])),
        key(replace(CONFIG, clean_names=True)),
        key(teacher=random),
        key(teacher=replace(random, seed=1)),
        key(teacher=replace(random, fill="zero")),
        key(benchmark=replace(BENCHMARK, categories=(replace(first, name="crimson circle"), *others))),
        key(benchmark=replace(BENCHMARK, unseen_ids=BENCHMARK.unseen_ids[1:])),
    ]
    assert len(set(keys)) == len(keys)
    again = TeacherConfig(name="small", pretrained="shipped", fill="mean")
    assert key(TextConfig(templates=CONFIG.templates), again) == keys[0]


@pytest.mark.parametrize("templates", [(), ("a photo", "{}"), ("{}", "{} and {}")])
def test_a_template_without_exactly_one_place_is_refused(templates: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="exactly one {} for the class name"):
        TextConfig(templates=templates)


def test_a_set_of_templates_stands_in_the_config_in_full() -> None:
    config = TextConfig(templates=("published",))
    assert len(config.templates) == 8 and config.templates[0] == "itap of a {}."
    assert key(config) == key(TextConfig(templates=config.templates))
    with pytest.raises(ValueError, match=r"'publshed' needs exactly one \{\}.*plain, short, published"):
        TextConfig(templates=("publshed",))


def test_the_counts_are_in_the_manifest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ref = Stage.of(text, CONFIG, teacher=TEACHER, benchmark=BENCHMARK).run(store, Runtime(progress=False))
    unseen = len(BENCHMARK.unseen_ids)
    total = len(BENCHMARK.categories)
    counts = {"classes": total, "seen": total - unseen, "templates": 3, "cut_names": []}
    assert store.open(ref).manifest.counts == counts


# ------------------------------------------------------------------------------------------------ names and synonyms


def named(*names: str) -> Benchmark:
    """A benchmark of these class names, the last one unseen."""
    categories = tuple(Category(id=i, name=name, isthing=True) for i, name in enumerate(names, 1))
    return Benchmark(name="named", categories=categories, unseen_ids=(len(names),), protocol="none")


def test_cleaned_names_get_the_rows_of_what_they_say(tmp_path: Path) -> None:
    cleaned = make(tmp_path, replace(CONFIG, clean_names=True), named("red circle", "green-other-merged", "fog-stuff"))
    plain = make(tmp_path, CONFIG, named("red circle", "green", "fog"))
    assert torch.equal(cleaned.embedding, plain.embedding)
    assert cleaned.names == ["red circle", "green-other-merged", "fog-stuff"] and cleaned.clean_names


def test_a_class_with_synonyms_gets_the_largest_of_their_logits(tmp_path: Path) -> None:
    """Against every name as a class of its own: the same numbers, reduced by hand."""
    bank = make(tmp_path, benchmark=named("red circle, red disc, disc", "blue star", "fog, mist"))
    alone = make(tmp_path, benchmark=named("red circle", "red disc", "disc", "blue star", "fog", "mist"))
    assert bank.embedding.shape == (3, 3, 128)
    torch.testing.assert_close(bank.first, alone.embedding[[0, 3, 4]])
    torch.manual_seed(0)
    projector = Projector(dim=8, text_dim=128, hidden=8, layers=1)
    projector.text_center.copy_(alone.embedding.mean(0))
    v = torch.randn(5, 7, 128)
    one = projector.logits(v, alone.embedding)
    expected = torch.stack([one[..., :3].amax(-1), one[..., 3], one[..., 4:].amax(-1)], dim=-1)
    torch.testing.assert_close(projector.logits(v, bank.embedding), expected)
    assert (one[..., :3].argmax(-1) != 0).any()  # a synonym does win somewhere


def test_classes_with_and_without_synonyms_can_be_joined() -> None:
    one, two, three = torch.randn(2, 4), torch.randn(1, 2, 4), torch.randn(3, 3, 4)
    assert torch.equal(join(one, one), torch.cat([one, one]))
    joined = join(join(one, two), three)
    assert joined.shape == (6, 3, 4)
    assert torch.equal(joined[:2], one[:, None].expand(-1, 3, -1)) and torch.equal(joined[3:], three)
    assert torch.equal(joined[2], torch.stack([two[0, 0], two[0, 1], two[0, 0]]))


@pytest.mark.parametrize(
    ("names", "clean", "message"),
    [
        (
            ("floor-other", "wall", "floor-merged"),
            True,
            "'floor-other' and 'floor-merged' would both be called 'floor'",
        ),
        (("person, human", "man, human"), False, "'person, human' and 'man, human' would both be called 'human'"),
        (("person,", "man"), False, "'person,' has an empty part"),
        (("-other", "man"), True, "'-other' has an empty part"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(names: tuple[str, ...], clean: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        key(replace(CONFIG, clean_names=clean), benchmark=named(*names))


PAIRS = {
    "case": ("person", "Person", True),
    "blanks": ("traffic light", "traffic  light", True),
    "a blank of another kind": ("traffic light", "traffic\u00a0light", True),
    "Unicode form": ("café", unicodedata.normalize("NFD", "café"), True),
    "full width": ("cat", "ｃａｔ", True),
    "a ligature": ("fish", "ﬁsh", True),
    "quotes": ("men's room", "men’s room", True),
    "an HTML entity": ("salt & pepper", "salt &amp; pepper", True),
    "a blank before a number": ("route66", "route 66", True),
    "a hyphen": ("traffic light", "traffic-light", False),
    "an accent": ("cafe", "café", False),
    "signs": ("c++", "c#", False),
    "Japanese": ("自動車", "自転車", False),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_names_are_one_class_where_the_text_encoder_cannot_tell_them_apart(kind: str) -> None:
    """Against open_clip's own embeddings: refused, both named, exactly where these are equal bit by bit."""
    one, other, same = PAIRS[kind]
    clip, tokenizer = small_clip()
    assert torch.equal(embed_text(clip, tokenizer, one), embed_text(clip, tokenizer, other)) == same
    names = named("boat", f"{one}, first", f"second, {other}")
    if not same:
        key(benchmark=names)
        return
    first, second, *words = (brief(name) for name in (f"{one}, first", f"second, {other}", one, other))
    with pytest.raises(ValueError, match=re.escape(f"classes {first} and {second} are one to the teacher")):
        key(benchmark=names)
    # told apart also where both look alike; the command line writes runs of blanks as one
    assert len({unicodedata.normalize("NFC", " ".join(word.split())) for word in words}) == 2


def test_a_pair_that_shows_only_in_the_tokens_is_refused_when_the_names_are_encoded(tmp_path: Path) -> None:
    """The tokenizer mends wrongly decoded text, which planning, without it, takes for another name."""
    names = named("café", "boat", "cafÃ©")
    key(benchmark=names)
    with pytest.raises(ValueError, match="classes 'café' and 'cafÃ©' are one to the teacher: .* the same tokens"):
        make(tmp_path, benchmark=names)


def test_names_that_are_cut_are_in_the_manifest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """This CLIP takes 24 tokens, two of them start and end: 22 words fit, alone; behind "a photo of a" 18 do."""
    store, config = Store(tmp_path), replace(CONFIG, templates=("{}", "a photo of a {}"))
    short, long = " ".join(["red"] * 18), " ".join(["blue"] * 19)
    ref = Stage.of(text, config, teacher=TEACHER, benchmark=named("fog", short, long)).run(store, QUIET)
    assert store.open(ref).manifest.counts["cut_names"] == [long]
    assert [record.message for record in caplog.records if "takes 24 tokens" in record.message]
    bare = Stage.of(text, replace(config, templates=("{}",)), teacher=TEACHER, benchmark=named("fog", short, long))
    assert store.open(bare.run(store, QUIET)).manifest.counts["cut_names"] == []
    with pytest.raises(ValueError, match=r"classes 'blue.*\(193 characters\) and .*, for it takes only 24; rename"):
        make(tmp_path / "equal", config, named(f"{long} {long} one", f"{long} {long} two"))


def test_a_name_without_a_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="name 'fog, &nbsp;': the teacher's tokenizer makes no token of '&nbsp;'; rename"
    ):
        make(tmp_path, benchmark=named("red circle", "fog, &nbsp;"))


@pytest.mark.parametrize(("sign", "code"), [("\u200b", "200B"), ("\u00ad", "00AD"), ("\ufeff", "FEFF")])
def test_a_name_with_an_invisible_character_is_refused(sign: str, code: str) -> None:
    """The tokenizer takes some of them for letters: nobody could see that "person" and "person" are two classes."""
    with pytest.raises(ValueError, match=rf"class name 'per{re.escape(repr(sign)[1:-1])}son' .* U\+{code}; remove it"):
        key(benchmark=named("person", f"per{sign}son"))
    key(benchmark=named("person", "می\u200cخواهم"))  # Persian needs this one


def test_the_published_benchmarks_have_no_class_twice() -> None:
    tokenizer = TEACHER.load_tokenizer()
    for name in ("coco-panoptic-zps", "coco-stuff-zss", "voc20", "pc59", "ade150"):
        benchmark = load_benchmark(name)
        for cleaned in (False, True):
            prompts = Prompts(tokenizer=tokenizer, templates=CONFIG.templates, clean_names=cleaned)
            assert len(prompts.classes(benchmark.names)) == len(benchmark.names)
            assert prompts.cut(benchmark.names) == []
            # planning a run imports no torch
            assert not alike(benchmark.names, clean_names=cleaned)


def test_the_published_benchmarks_stay_apart_when_cleaned() -> None:
    for name in ("coco-panoptic-zps", "coco-stuff-zss", "voc20", "pc59"):
        names = load_benchmark(name).names
        said = dict(zip(names, synonyms(names, clean_names=True), strict=True))
        assert not any("-" in part for parts in said.values() for part in parts)
        if name == "coco-panoptic-zps":
            assert said["sky-other-merged"] == ("sky",) and said["wall-brick"] == ("wall brick",)


# ------------------------------------------------------------------------------------------------ imported rows


def files(folder: Path, rows: np.ndarray, names: list[str], suffix: str = ".txt") -> TextConfig:
    np.save(folder / "rows.npy", rows)
    written = json.dumps(names) if suffix == ".json" else "\n".join(names) + "\n"
    (folder / f"names{suffix}").write_text(written)
    return TextConfig(embeddings=str(folder / "rows.npy"), names=str(folder / f"names{suffix}"))


ROWS = np.random.default_rng(0).normal(size=(3, 128)).astype(np.float16) * 7
THREE = named("red circle", "blue star", "fog")


@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_imported_rows_are_the_files_made_unit_length(tmp_path: Path, suffix: str) -> None:
    config = files(tmp_path, ROWS, THREE.names, suffix)
    bank = make(tmp_path / "store", config, THREE)
    expected = ROWS.astype(np.float64) / np.linalg.norm(ROWS.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(bank.embedding.numpy(), expected, atol=1e-6)
    assert bank.templates == [] and bank.names == THREE.names


def test_classes_that_encode_almost_alike_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the log and in the manifest, with their cosine; where there are none, the manifest is without the field."""
    rows = ROWS.astype(np.float64)
    rows[2] = rows[0] / np.linalg.norm(rows[0]) + 0.1 * rows[1] / np.linalg.norm(rows[1])
    config = files(tmp_path, rows, THREE.names)
    make(tmp_path / "store", config, THREE)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    store = Store(tmp_path / "store")
    (ref,) = store.refs()
    ((one, other, cosine),) = store.open(ref).manifest.counts["alike_names"]
    assert (one, other) == ("red circle", "fog") and abs(cosine - unit[0] @ unit[2]) < 1e-3 and cosine > 0.98
    assert "1 pair of classes encode almost alike, the nearest 'red circle' and 'fog' (cosine 0.99" in caplog.text
    make(tmp_path / "other", files(tmp_path, ROWS, THREE.names), THREE)
    assert all(
        "alike_names" not in Store(tmp_path / "other").open(ref).manifest.counts
        for ref in Store(tmp_path / "other").refs()
    )


def test_imported_rows_count_by_content_not_by_path(tmp_path: Path) -> None:
    keys = []
    for folder, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS + 1)):
        (tmp_path / folder).mkdir()
        keys.append(key(files(tmp_path / folder, rows, THREE.names), benchmark=THREE))
    assert keys[0] == keys[1] != keys[2]
    assert key(benchmark=THREE) not in keys


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        (ROWS, ["red circle", "fog", "blue star"], "name 2 is 'fog', but class 2 of benchmark named is 'blue star'"),
        (ROWS, ["red circle", "blue star"], "name 3 is None, but class 3 of benchmark named is 'fog'"),
        (ROWS, [*THREE.names, "mist"], "'mist' is no class of benchmark named"),
        (ROWS[:, :64], THREE.names, r"shape \(3, 64\), but 3 classes of width 128"),
        (ROWS[:2], THREE.names, r"shape \(2, 128\), but 3 classes"),
        (
            np.where(np.arange(3)[:, None] == 1, np.nan, ROWS),
            THREE.names,
            "row of class 'blue star' is zero or not finite",
        ),
        (ROWS * (np.arange(3)[:, None] != 2), THREE.names, "row of class 'fog' is zero or not finite"),
        (np.array([{}]), THREE.names, "cannot be read as a .npy array"),
        (ROWS[[0, 1, 0]] * 2, THREE.names, "classes 'red circle' and 'fog' have the same row"),
        (ROWS.astype(np.int32), THREE.names, "holds no floating-point array"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, rows: np.ndarray, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(tmp_path / "store", files(tmp_path, rows, names), THREE)
    assert "\n" not in str(caught.value)


def test_rows_and_names_belong_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass --text.embeddings and --text.names"):
        TextConfig(embeddings="rows.npy")
    with pytest.raises(ValueError, match=r"gone.npy not found; correct --text.embeddings"):
        key(replace(files(tmp_path, ROWS, THREE.names), embeddings="gone.npy"), benchmark=THREE)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["synonyms", "imported"])
def test_the_whole_line_runs_on_synonyms_and_on_imported_rows(tmp_path: Path, how: str) -> None:
    """Real files whose JSON says "person" where the benchmark says "person, human"; then a further name."""
    coco = make_coco(tmp_path / "coco", train=8)
    names = {"person": "person, human, man", "giraffe": "giraffe, tall animal"} if how == "synonyms" else {}
    facts = {
        "categories": [{**c, "name": names.get(str(c["name"]), c["name"])} for c in CATEGORIES],
        "unseen_ids": [25, 193], "protocol": "none",
    }  # fmt: skip
    (tmp_path / "own.json").write_text(json.dumps(facts))
    sample = preset("coco-sample")
    config = replace(
        sample,
        data=CocoConfig(root=str(coco), benchmark=str(tmp_path / "own.json")),
        v2c=replace(
            sample.v2c, steps=2, batch=2, calibration_images=2, text_centering=True,
            augment=AugmentConfig(size=64), resize=ResizeConfig(short=64, longest=96),
        ),
        g2s=replace(sample.g2s, steps=2, batch=4),
        cpa=replace(sample.cpa, steps=2, batch=4),
    )  # fmt: skip
    if how == "imported":
        rows = np.random.default_rng(0).normal(size=(5, 128))
        config = replace(config, text=files(tmp_path, rows, [str(c["name"]) for c in CATEGORIES]))
    store = Store(tmp_path / "store")
    steps = build(store, config)
    report = json.loads((store.path(steps["evaluate"].recipe.ref) / "report.json").read_text())
    assert {"inductive", "transductive"} <= report.keys()
    model = load_model(store.path(steps["cpa"].recipe.ref))
    assert model.text.shape == ((5, 3, 128) if how == "synonyms" else (5, 128))
    if how == "imported":
        with pytest.raises(ValueError, match="embeddings were imported, so no other name can be embedded alike"):
            Lexicon(model, "", QUIET).vocabulary(read_words(["boat"]))
        return
    vocabulary = Lexicon(model, "", QUIET).vocabulary(read_words(["boat, ship", "tree"]))
    assert vocabulary.embedding.shape == (7, 3, 128)
    plain = make(tmp_path / "plain", sample.text, named("boat", "ship", "tree")).embedding
    torch.testing.assert_close(vocabulary.embedding[5:, :2], plain[torch.tensor([[0, 1], [2, 2]])])
    human = Lexicon(model, "", QUIET).vocabulary(read_words(["human"]), only=True)  # a name of a class is that class
    assert human.classes.names == ["person, human, man"] and human.embedding.equal(model.text[:1])
