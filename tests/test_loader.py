"""The loader: every sample once an epoch, in an order that resuming does not change, tokens beside their own
segments.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import build, tiny_config
from whole_views import whole_item, whole_items, whole_test_view

from pipeline import v2c
from pipeline.data.config import AugmentConfig, ResizeConfig, SemanticAugmentConfig
from pipeline.data.transforms import Placement
from pipeline.teacher.text_bank import TextBank, open_text
from pipeline.training import loader
from pipeline.training.distributed import Ranks
from pipeline.training.loader import SHIPPED, Batch, TrainingData, View, collate
from storage.shards import Sample, Shards, decode_ids, decode_image, read_shard
from storage.store import Store
from storage.tokens import read_tokens, write_tokens


@pytest.fixture(scope="module")
def parts(shared_store: Store) -> tuple[Path, Path, TextBank]:
    steps = build(shared_store, tiny_config(), until="cache-clip")
    shards, text, tokens = (shared_store.open(steps[s].recipe.ref) for s in ("shard", "text", "cache-clip"))
    return shards.path, tokens.path, open_text(text.path, text.ref.key)


def data(parts: tuple[Path, Path, TextBank], *, seed: int = 0, workers: int = 1, size: int = 96) -> TrainingData:
    return TrainingData(*parts, AugmentConfig(size=size, jitter=(0.5, 1.5)), seed=seed, workers=workers)


def fingerprint(batch: Batch) -> list[object]:
    """Every byte of a batch, with shapes and types."""
    tensors = [batch.images, batch.global_rows, *batch.labels, *batch.masks, *batch.instance_tokens]
    return [batch.image_ids, *((t.dtype, t.shape, t.is_contiguous(), t.numpy().tobytes()) for t in tensors)]


@pytest.mark.parametrize(("jitter", "side"), [((0.1, 2.0), 96), ((2.0, 5.0), 64)])
@pytest.mark.parametrize("world", [1, 2])
def test_batches_are_byte_for_byte_those_of_the_plain_way(
    parts: tuple[Path, Path, TextBank],
    jitter: tuple[float, float],
    side: int,
    world: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over more than one epoch of several windows, from the beginning and resumed, for one process and for two."""
    monkeypatch.setattr(loader, "WINDOW", 2)
    source = TrainingData(*parts, AugmentConfig(size=side, jitter=jitter), seed=3, workers=2)
    size, count = 6, len(source) // 6 + 3
    stream = whole_items(source, window=2)
    expected = [collate(list(itertools.islice(stream, size))) for _ in range(count)]
    assert any(len(batch.labels[0]) for batch in expected)
    for start in (0, 2, count - 2):
        ranks = [source.batches(size, start=start, ranks=Ranks(rank=rank, world=world)) for rank in range(world)]
        for whole in expected[start:]:
            for own, part in zip(ranks, whole.split(world), strict=True):
                assert fingerprint(next(own)) == fingerprint(part)


def test_one_tars_views_are_byte_for_byte_those_of_the_plain_way(parts: tuple[Path, Path, TextBank]) -> None:
    source, resize = data(parts, workers=3), ResizeConfig(short=70, longest=130)
    every = enumerate(read_shard(source.tars[1]))
    samples = [(row, sample) for row, sample in every if source.groups[1].kept[row]]
    plain, random = (source.items(1, view=view, resize=resize, most=1) for view in (0, 2))
    for (place, ((at, item),)), (_, sample) in zip(enumerate(plain), samples, strict=True):
        image, ids = torch.from_numpy(decode_image(sample)).permute(2, 0, 1), torch.from_numpy(decode_ids(sample))
        image, ids = whole_test_view(image, ids, resize)
        masks = [ids == segment.id for segment in sample.segments]
        assert at == place and item.image_id == sample.image_id and torch.equal(item.image, image)
        assert item.segments.tolist() == [i for i, mask in enumerate(masks) if mask.any()]
        assert torch.equal(item.masks, torch.stack([mask for mask in masks if mask.any()]))
    for ((_, item),), (row, sample) in zip(random, samples, strict=True):
        expected = whole_item(source, 2, 1, row, sample)
        assert torch.equal(item.segments, expected.segments)
        assert fingerprint(collate([item])) == fingerprint(collate([expected]))


def test_a_rank_reads_its_own_samples_and_no_other(
    parts: tuple[Path, Path, TextBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one epoch the ranks read every sample that the protocol leaves once, together, and none that it leaves out."""
    source, read = data(parts), Counter()
    real = loader.read_shard

    def noted(path: Path, rows: set[int]) -> Iterator[Sample]:
        read.update((path, row) for row in rows)
        return real(path, rows)

    monkeypatch.setattr(loader, "read_shard", noted)
    world = 4
    size = len(source) // world * world
    for rank in range(world):
        windows = source._read(size, 0, Ranks(rank=rank, world=world))
        own = list(itertools.islice(itertools.chain.from_iterable(windows), size // world))
        assert len(own) == size // world
    kept = {(tar, int(row)) for tar, rows in zip(source.tars, source.kept, strict=True) for row in rows}
    assert len(kept) < sum(Shards(parts[0]).counts("train"))
    assert set(read) <= kept and len(kept) - len(read) <= len(source) - size


def test_what_is_shipped_to_a_device_is_the_image_and_one_map(parts: tuple[Path, Path, TextBank]) -> None:
    """Images and masks are computed there, here without any number ("meta"); counts stay at hand on the CPU."""
    source, meta = data(parts), torch.device("meta")
    here, there = (next(source.batches(8, start=1, device=device)) for device in (torch.device("cpu"), meta))
    assert here.image_ids == there.image_ids and torch.equal(here.global_rows, there.global_rows)
    assert there.images.device == meta and there.images.shape == here.images.shape
    for masks, same in zip(there.masks, here.masks, strict=True):
        assert masks.device == meta and masks.shape == same.shape and masks.dtype == same.dtype == torch.bool
    for name in ("labels", "instance_tokens"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(there, name), getattr(here, name), strict=True))
    epoch, tar, row, sample = next(iter(source._read(8, 1, Ranks())))[0]
    view = source._view(epoch, tar, row, sample)
    shipped = sum(getattr(view, name).nbytes for name in SHIPPED)
    height, width = sample.height, sample.width
    assert shipped == 4 * height * width + 8 * (len(view.rows) + len(view.columns)) + len(view.labels)
    moved = view.to(meta)
    assert {name for name in ("labels", "segments", "instance_tokens") if getattr(moved, name).device == meta} == set()


@pytest.mark.parametrize(("count", "dtype"), [(255, torch.uint8), (256, torch.int32), (700, torch.int32)])
def test_any_number_of_targets_keeps_its_masks(count: int, dtype: torch.dtype) -> None:
    ids = np.random.default_rng(0).permutation(np.r_[np.arange(1, 901), 2**24 - 1, np.zeros(99)]).reshape(25, 40)
    ids = ids.astype(np.int32)
    segments = [2**24 - 1, *range(900, 901 - count, -1)]
    assert len(segments) == count
    targets = torch.from_numpy(loader._targets(ids, segments))
    assert targets.dtype == dtype
    placement = Placement(size=(25, 40), view=(32, 64), mirrored=True)
    numbers = torch.arange(1, count + 1).to(dtype)
    rows, columns = placement.sources(25, 40)
    nothing = torch.zeros(0)
    item = View(
        image_id=1, placement=placement, image=torch.zeros(3, 25, 40, dtype=torch.uint8), targets=targets, rows=rows,
        columns=columns, numbers=numbers, labels=nothing, segments=nothing, instance_tokens=nothing,
        region_tokens=nothing, global_row=0,
    ).item()  # fmt: skip
    expected = torch.from_numpy(np.stack([ids == segment for segment in segments])).flip(-1)
    assert torch.equal(item.masks[:, :25, :40], expected)
    assert item.masks.sum() == expected.sum() == count


def test_each_sample_comes_exactly_once_an_epoch(
    parts: tuple[Path, Path, TextBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "WINDOW", 2)  # several windows an epoch even on so few tars
    source = data(parts)
    ids = [i for batch in itertools.islice(source.batches(len(source), start=0), 3) for i in batch.image_ids]
    assert len(ids) == 3 * len(source)
    for epoch in range(3):
        assert set(Counter(ids[epoch * len(source) : (epoch + 1) * len(source)]).values()) == {1}
    assert ids[: len(source)] != ids[len(source) : 2 * len(source)]


def test_left_out_images_never_come(parts: tuple[Path, Path, TextBank]) -> None:
    source = data(parts)
    unseen = {i for i, seen in zip(parts[2].ids, parts[2].seen, strict=True) if not seen}
    every = [s for tar in Shards(parts[0]).tars("train") for s in read_shard(tar)]
    allowed = {s.image_id for s in every if not any(g.category_id in unseen for g in s.segments)}
    assert 0 < len(allowed) < len(every)
    assert set(next(source.batches(len(source), start=0)).image_ids) == allowed


def test_images_with_more_targets_than_a_number_are_counted(
    parts: tuple[Path, Path, TextBank], caplog: pytest.LogCaptureFixture
) -> None:
    """Against the targets of views that hold the whole image, one by one."""
    source = data(parts)
    targets = {
        item.image_id: len(item.labels)
        for number in range(len(source.tars))
        for ((_, item),) in source.items(number, view=0, resize=ResizeConfig(short=96, longest=96), most=1)
    }
    most = sorted(targets.values())[len(targets) // 2]
    expected = {image: count for image, count in targets.items() if count > most}
    assert expected and source.beyond(most) == expected
    assert source.beyond(max(targets.values())) == {}
    v2c._warn_of_crowded(source, most)
    (record,) = caplog.records
    assert (
        f"{len(expected)} of {len(source)} training images have more segments than the {most} queries" in record.message
    )
    assert f"up to {sum(expected.values()) - most * len(expected)} segments an epoch" in record.message


@pytest.mark.parametrize("start", [1, 5, 13])
def test_resuming_goes_on_where_an_undisturbed_run_would_be(parts: tuple[Path, Path, TextBank], start: int) -> None:
    whole = list(itertools.islice(data(parts).batches(4, start=0), start + 2))
    again = list(itertools.islice(data(parts, workers=3).batches(4, start=start), 2))
    for one, other in zip(whole[start:], again, strict=True):
        assert one.image_ids == other.image_ids
        assert torch.equal(one.images, other.images) and torch.equal(one.global_rows, other.global_rows)
        assert all(torch.equal(a, b) for a, b in zip(one.masks, other.masks, strict=True))


def test_another_seed_gives_another_order(parts: tuple[Path, Path, TextBank]) -> None:
    one, other = (next(data(parts, seed=s).batches(16, start=0)).image_ids for s in (0, 1))
    assert one != other


def test_tokens_labels_and_masks_belong_together(parts: tuple[Path, Path, TextBank]) -> None:
    """A segment's token must be the nearest to the teacher's token of that very segment, made anew here."""
    from pipeline.runtime import Runtime
    from pipeline.teacher.config import TeacherConfig

    teacher = TeacherConfig(name="small", pretrained="shipped", fill="mean").load(Runtime(device="cpu"))
    source = data(parts)
    samples = {s.image_id: s for tar in source.tars for s in read_shard(tar)}
    bank = source.global_tokens()
    for batch in itertools.islice(source.batches(8, start=0), 2):
        for i, image_id in enumerate(batch.image_ids):
            sample = samples[image_id]
            prepared = teacher.prepare(torch.from_numpy(decode_image(sample)).permute(2, 0, 1))
            ids = torch.from_numpy(decode_ids(sample))
            fresh = {
                s.category_id: teacher.encode_images(teacher.mask(prepared, (ids == s.id)[None]))[0]
                for s in sample.segments
            }
            assert (
                torch.cosine_similarity(bank[batch.global_rows[i]], teacher.encode_images(prepared[None])[0], dim=0)
                > 0.999
            )
            repeated = Counter(s.category_id for s in sample.segments)
            for label, token in zip(batch.labels[i], batch.instance_tokens[i], strict=True):
                category = parts[2].ids[label]
                if repeated[category] == 1:
                    assert torch.cosine_similarity(token, fresh[category], dim=0) > 0.999


def test_segments_that_a_crop_removes_take_their_tokens_with_them(parts: tuple[Path, Path, TextBank]) -> None:
    source = TrainingData(*parts, AugmentConfig(size=32, jitter=(6.0, 6.0)), seed=0, workers=1)
    batch = next(source.batches(len(source), start=0))
    kept = sum(len(label) for label in batch.labels)
    assert 0 < kept < sum(int(g.kept.sum()) and len(g.instance) for g in source.groups)
    for labels, masks, tokens in zip(batch.labels, batch.masks, batch.instance_tokens, strict=True):
        assert len(labels) == len(masks) == len(tokens)
        assert masks.flatten(1).any(1).all()


def test_the_test_view_of_an_image_is_itself(parts: tuple[Path, Path, TextBank]) -> None:
    source = data(parts)
    ((_, item),) = next(source.items(0, view=0, resize=ResizeConfig(short=96, longest=96), most=1))
    sample = next(s for s, kept in zip(read_shard(source.tars[0]), source.groups[0].kept, strict=True) if kept)
    assert item.image_id == sample.image_id and item.image.shape == (3, 96, 96)
    areas = np.array([s.area for s in sample.segments])
    assert item.masks.flatten(1).sum(1).tolist() == areas[item.segments.numpy()].tolist()


def test_a_mirrored_view_comes_with_the_mirrored_tokens(parts: tuple[Path, Path, TextBank], tmp_path: Path) -> None:
    """Every row of the second view has its sign turned, so a token says by itself which view it belongs to."""
    for group in sorted(parts[1].glob("*.zarr")):
        old = read_tokens(group)
        write_tokens(
            tmp_path / group.name, global_=old.global_, instance=old.instance, offsets=old.offsets,
            segment_id=old.segment_id, kept=old.kept, mirrored_global=-old.global_[None],
            mirrored_instance=-old.instance[None],
        )  # fmt: skip
    config = AugmentConfig(size=96, jitter=(1.0, 1.0))
    one = TrainingData(*parts, config, seed=0, workers=1)
    two = TrainingData(parts[0], tmp_path, parts[2], config, seed=0, workers=1)
    plain = TrainingData(*parts, replace(config, flip=False), seed=0, workers=1)
    assert (one.token_views, two.token_views) == (1, 2)
    assert torch.equal(two.global_tokens(), torch.cat([one.global_tokens(), -one.global_tokens()]))
    mirrored = 0
    a, b, c = (next(source.batches(24, start=0)) for source in (one, two, plain))
    assert a.image_ids == b.image_ids == c.image_ids
    for i in range(24):
        flipped = torch.equal(a.images[i], c.images[i].flip(-1))
        assert flipped or torch.equal(a.images[i], c.images[i])
        sign = -1 if flipped else 1
        assert torch.equal(b.instance_tokens[i], sign * a.instance_tokens[i])
        assert torch.equal(two.global_tokens()[b.global_rows[i]], sign * one.global_tokens()[a.global_rows[i]])
        mirrored += flipped
    assert 4 < mirrored < 20
    ((_, test_view),), ((_, plain_view),) = (
        next(source.items(0, view=0, resize=ResizeConfig(short=96, longest=96), most=1)) for source in (two, one)
    )
    assert test_view.global_row < len(two)
    assert torch.equal(test_view.instance_tokens, plain_view.instance_tokens)


def test_colours_of_a_semantic_view_depend_on_its_image_epoch_and_seed_alone(
    parts: tuple[Path, Path, TextBank],
) -> None:
    """They move no mask and nothing of the padding, differ between epochs, and are drawn after the view's place."""
    coloured, plain = (
        TrainingData(*parts, SemanticAugmentConfig(size=96, colours=colours), seed=3, workers=2)
        for colours in (True, False)
    )
    batches = [list(itertools.islice(source.batches(6, start=0), 4)) for source in (coloured, plain)]
    changed = total = 0
    for one, other in zip(*batches, strict=True):
        assert fingerprint(replace(one, images=other.images)) == fingerprint(other)
        for image, before in zip(one.images, other.images, strict=True):
            # exact zeros are padding: no pixel of 0..255 is the mean colour
            assert not image[:, (before == 0).all(0)].any()
            changed, total = changed + (not torch.equal(image, before)), total + 1
    assert 0.7 * total < changed
    again = TrainingData(*parts, SemanticAugmentConfig(size=96), seed=3, workers=1)
    resumed = list(itertools.islice(again.batches(6, start=2), 2))
    assert [fingerprint(batch) for batch in resumed] == [fingerprint(batch) for batch in batches[0][2:]]
    views = [
        [item.image for ((_, item),) in coloured.items(0, view=view, resize=ResizeConfig(), most=1)]
        for view in (1, 2, 1)
    ]
    assert all(torch.equal(a, b) for a, b in zip(views[0], views[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(views[0], views[1], strict=True))
