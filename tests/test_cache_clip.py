"""Tokens: every row is what a single call of open_clip says about that image or instance, however it was batched or
interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_reference import embed, masked, small_clip
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tiny import QUIET, build, tiny_config
from torch import Tensor

import pipeline.teacher.encode
from pipeline import cache_clip, scenes
from pipeline.data.benchmarks import Benchmark, Protocol
from pipeline.line import Stage
from pipeline.teacher.config import TeacherConfig, TokensConfig
from pipeline.teacher.encode import kept_for_training
from storage.keys import Ref
from storage.shards import Sample, Segment, Shards, decode_ids, decode_image, read_shard, write_shard
from storage.store import Artefact, Store
from storage.tokens import TokenGroup, read_tokens

CONFIG = replace(tiny_config(), data=scenes.ScenesConfig(train_images=20, val_images=5, unseen_share=0.5))
BENCHMARK = scenes.benchmark(scenes.ScenesConfig())
UNSEEN = set(BENCHMARK.unseen_ids)
Row = tuple[str, Sample, bool, Tensor, Tensor]  # split, sample, kept, global token, instance tokens


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Ref]:
    store = Store(tmp_path_factory.mktemp("store"))
    return store, build(store, CONFIG, until="shard")["shard"].recipe.ref


def encode(
    shards: tuple[Store, Ref],
    *,
    batch: int = 128,
    benchmark: Benchmark = BENCHMARK,
    store: Store | None = None,
    teacher: TeacherConfig = CONFIG.teacher,
    min_area: int = 0,
) -> Artefact:
    """The tokens; in another `store` than the shards' when one is given."""
    source, ref = shards
    if store is not None and not store.path(ref).exists():
        store.path(ref).parent.mkdir(parents=True)
        store.path(ref).symlink_to(source.path(ref))
    store = store or source
    made = Stage.of(
        cache_clip, TokensConfig(batch=batch, min_area=min_area), teacher=teacher, benchmark=benchmark, shards=ref
    ).run(store, QUIET)
    return store.open(made)


def groups(shards: tuple[Store, Ref], tokens: Artefact) -> Iterator[tuple[str, Path, TokenGroup]]:
    opened = Shards(shards[0].path(shards[1]))
    for split in ("train", "val"):
        for tar in opened.tars(split):
            yield split, tar, read_tokens(tokens.path / f"{tar.stem}.zarr")


def rows(shards: tuple[Store, Ref], tokens: Artefact) -> Iterator[Row]:
    for split, tar, group in groups(shards, tokens):
        samples = list(read_shard(tar))
        assert len(samples) == len(group.kept)
        for i, sample in enumerate(samples):
            own = group.instance[group.offsets[i] : group.offsets[i + 1]]
            ids = group.segment_id[group.offsets[i] : group.offsets[i + 1]]
            if group.kept[i]:
                assert ids.tolist() == [s.id for s in sample.segments]
            yield split, sample, bool(group.kept[i]), torch.from_numpy(group.global_[i]), torch.from_numpy(own)


def arrays(shards: tuple[Store, Ref], tokens: Artefact) -> dict[str, np.ndarray]:
    found = [group.arrays() for _, _, group in groups(shards, tokens)]
    names = ("global", "instance", "offsets", "segment_id", "kept")
    return {name: np.concatenate([f[name] for f in found]) for name in names}


def test_every_row_is_a_single_call_of_open_clip(shards: tuple[Store, Ref]) -> None:
    """The whole image prepared by PIL, each instance masked by a slow loop, one at a time."""
    clip, _ = small_clip()
    prepare: Any = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
    compared = 0
    for _, sample, kept, own, instances in rows(shards, encode(shards, batch=7)):
        if not kept:
            continue
        prepared = prepare(Image.fromarray(decode_image(sample)))
        ids = decode_ids(sample)
        inputs = [prepared, *(masked(prepared, ids == s.id, torch.zeros(3)) for s in sample.segments)]
        assert len(instances) == len(sample.segments)
        for token, image in zip([own, *instances], inputs, strict=True):
            assert float(torch.cosine_similarity(token.double(), embed(clip, image), dim=0)) >= 0.9995
            assert abs(float(token.double().norm()) - 1) < 1e-3
            compared += 1
    assert compared > 60


def test_rows_of_different_images_do_not_resemble_each_other_by_accident(shards: tuple[Store, Ref]) -> None:
    """The bound above separates: a neighbour's row does not pass it."""
    tokens = torch.from_numpy(arrays(shards, encode(shards, batch=7))["instance"]).float()
    assert (torch.cosine_similarity(tokens[1:], tokens[:-1]) >= 0.9995).float().mean() < 0.05


def test_black_fill_reaches_the_tokens(shards: tuple[Store, Ref], tmp_path: Path) -> None:
    """A teacher of black fill gets black, not its mean colour, around the instances."""
    teacher = TeacherConfig(name="small", pretrained="random", fill="zero", seed=5)
    tokens = encode(shards, teacher=teacher, store=Store(tmp_path))
    clip = teacher.load(QUIET)
    colour = -clip.mean.flatten() / clip.std.flatten()
    _, sample, _, _, instances = next(row for row in rows(shards, tokens) if row[2])
    prepared = clip.prepare(torch.from_numpy(decode_image(sample)).permute(2, 0, 1))
    for token, segment in zip(instances, sample.segments, strict=True):
        expected = embed(clip.clip, masked(prepared, decode_ids(sample) == segment.id, colour))
        assert float((token.double() - expected).abs().max()) < 1e-3


@pytest.mark.parametrize("batch", [1, 3])
def test_packing_across_images_moves_nothing_but_the_last_bits(shards: tuple[Store, Ref], batch: int) -> None:
    small, large = arrays(shards, encode(shards, batch=batch)), arrays(shards, encode(shards, batch=128))
    for name in ("global", "instance"):
        assert np.abs(small[name].astype(np.float64) - large[name]).max() <= 1e-3
    for name in ("offsets", "segment_id", "kept"):
        assert np.array_equal(small[name], large[name])


def test_a_killed_build_ends_with_the_bytes_of_an_undisturbed_one(
    shards: tuple[Store, Ref], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = encode(shards, store=Store(tmp_path / "calm"))
    shaken = Store(tmp_path / "shaken")
    real = pipeline.teacher.encode.write_tokens

    written: list[Path] = []

    def write_and_die(path: Path, **content: Any) -> None:
        real(path, **content)
        written.append(path)
        if len(written) == 2:  # the second group is written and has no name yet
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.teacher.encode, "write_tokens", write_and_die)
        encode(shards, store=shaken)
    assert shaken.state(calm.ref) == "partial"
    (partial,) = shaken.root.glob("tokens/.*.partial")
    (group,) = partial.glob("train-*.zarr")  # a killed writer's leftovers begin with a dot
    before = {p.relative_to(partial): p.stat().st_mtime_ns for p in group.rglob("*") if p.is_file()}
    again = encode(shards, store=shaken)
    assert again.manifest.files == calm.manifest.files  # sizes and sha256 of every file
    assert again.manifest.counts == calm.manifest.counts
    assert {p: (again.path / p).stat().st_mtime_ns for p in before} == before, "a group that was there is made again"


def test_the_image_filter_leaves_no_trace_of_an_unseen_class(shards: tuple[Store, Ref]) -> None:
    tokens = encode(shards)
    left_out = instances = 0
    for split, sample, kept, own, own_instances in rows(shards, tokens):
        hidden = split == "train" and any(s.category_id in UNSEEN for s in sample.segments)
        assert kept == (not hidden)
        if hidden:
            left_out += 1
            assert not own.any() and len(own_instances) == 0
        elif split == "train":
            instances += len(sample.segments)
    assert 0 < left_out < 20
    assert tokens.manifest.counts["train"] == {
        "images": 20, "encoded": 20 - left_out, "instances": instances, "too_small": 0, "left_out_by_image_filter": left_out,
    }  # fmt: skip
    val = [sample for split, sample, *_ in rows(shards, tokens) if split == "val"]
    assert any(s.category_id in UNSEEN for sample in val for s in sample.segments)
    assert tokens.manifest.counts["val"] == {
        "images": 5,
        "encoded": 5,
        "instances": sum(len(s.segments) for s in val),
        "too_small": 0,
    }


def test_no_protocol_keeps_every_image(shards: tuple[Store, Ref]) -> None:
    tokens = encode(shards, benchmark=replace(BENCHMARK, protocol="none"))
    assert all(kept for _, _, kept, _, _ in rows(shards, tokens))
    assert tokens.manifest.counts["train"]["left_out_by_image_filter"] == 0


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (
            "image-filter",
            "image filter of benchmark scenes-test leaves 0 of 20 training images, .* shorten its unseen_ids",
        ),
        ("none", "leaves 20 of 20 training images, and none of them has a segment of a seen class"),
        ("pixel-ignore", "leaves 20 of 20 training images, and none of them has a segment of a seen class"),
    ],
)
def test_images_without_a_target_are_refused_before_any_is_encoded(
    shards: tuple[Store, Ref], tmp_path: Path, protocol: Protocol, message: str
) -> None:
    nothing = replace(BENCHMARK, unseen_ids=tuple(c.id for c in BENCHMARK.categories), protocol=protocol)
    with pytest.raises(ValueError, match=message):
        encode(shards, benchmark=nothing, store=Store(tmp_path))
    assert not [path for path in (tmp_path / "tokens").rglob("*") if path.suffix == ".zarr"]


def test_images_whose_only_seen_segments_are_crowds_are_refused(shards: tuple[Store, Ref], tmp_path: Path) -> None:
    """Crowds are no targets; one segment that is no crowd is enough."""
    samples = [sample for tar in Shards(shards[0].path(shards[1])).tars("train") for sample in read_shard(tar)]
    crowds = [replace(s, segments=tuple(replace(g, iscrowd=True) for g in s.segments)) for s in samples]
    write_shard(tmp_path / "train-000000.tar", crowds)
    with pytest.raises(ValueError, match="none of them has a segment of a seen class that is no crowd"):
        cache_clip._require_targets([tmp_path / "train-000000.tar"], replace(BENCHMARK, protocol="none"))
    seen = next(s for s in samples if any(g.category_id not in UNSEEN for g in s.segments))
    write_shard(tmp_path / "train-000001.tar", [seen])
    both = [tmp_path / "train-000000.tar", tmp_path / "train-000001.tar"]
    cache_clip._require_targets(both, replace(BENCHMARK, protocol="none"))


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [("image-filter", [True, False, False, True]), ("none", [True] * 4)],
)
def test_who_is_kept_for_training(protocol: Protocol, expected: list[bool]) -> None:
    seen, unseen = BENCHMARK.categories[BENCHMARK.seen.index(True)].id, BENCHMARK.unseen_ids[-1]
    benchmark = replace(BENCHMARK, protocol=protocol)
    for categories, keeps in zip([[seen, seen], [seen, unseen], [unseen], []], expected, strict=True):
        segments = tuple(Segment(id=i + 1, category_id=c, area=1, iscrowd=False) for i, c in enumerate(categories))
        sample = Sample(image_id=1, image=b"", png=b"", height=1, width=1, segments=segments)
        assert kept_for_training(sample, benchmark) == keeps


def test_an_unseen_crowd_counts_too() -> None:
    crowd = Segment(id=1, category_id=BENCHMARK.unseen_ids[0], area=1, iscrowd=True)
    assert not kept_for_training(
        Sample(image_id=1, image=b"", png=b"", height=1, width=1, segments=(crowd,)), BENCHMARK
    )


CHANGES: list[dict[str, Any]] = [
    {"batch": 64}, {"method": "attention"}, {"crop": "box"}, {"margin": 0.2}, {"resize": "letterbox"}, {"min_area": 9},
    {"views": 2}, {"dtype": "bfloat16"},
]  # fmt: skip


def test_keys_follow_what_decides_the_rows() -> None:
    def key(config: TokensConfig, benchmark: Benchmark, shards: str) -> str:
        ref = Ref(kind="shards", key=shards * 16)
        return cache_clip.recipe(config, teacher=CONFIG.teacher, benchmark=benchmark, shards=ref).key

    keys = [
        key(TokensConfig(), BENCHMARK, "0"),
        *(key(replace(TokensConfig(), **change), BENCHMARK, "0") for change in CHANGES),
        key(TokensConfig(), replace(BENCHMARK, protocol="none"), "0"),
        key(TokensConfig(), replace(BENCHMARK, unseen_ids=BENCHMARK.unseen_ids[1:]), "0"),
        key(TokensConfig(), BENCHMARK, "1"),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"method": "magic"}, "method must be one of pixels, attention, not 'magic'"),
        ({"crop": "tight"}, "crop must be one of full, box, not 'tight'"),
        ({"resize": "centre"}, "resize must be one of squeeze, letterbox, not 'centre'"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, not 'int8'"),
        ({"views": 3}, "views must be one of 1, 2, not 3"),
        ({"min_area": -1}, "min_area and margin must be 0 or more"),
        ({"method": "attention", "crop": "box"}, "set crop 'full', or method 'pixels'"),
    ],
)
def test_a_wrong_config_says_what_to_set(change: dict[str, Any], cure: str) -> None:
    with pytest.raises(ValueError, match="^tokens: ") as caught:
        TokensConfig(**change)
    assert cure in str(caught.value)


def test_segments_that_are_too_small_are_counted(shards: tuple[Store, Ref]) -> None:
    tokens = encode(shards, min_area=900)
    small = [s for split, sample, kept, *_ in rows(shards, tokens) if kept for s in sample.segments if s.area < 900]
    counts = tokens.manifest.counts
    assert len(small) == counts["train"]["too_small"] + counts["val"]["too_small"] > 0
