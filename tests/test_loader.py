"""The loader: every sample once an epoch, in an order that resuming does not change, tokens beside their own
segments.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import build, tiny_config

from pipeline.data.config import AugmentConfig, ResizeConfig
from pipeline.teacher.text_bank import TextBank, open_text
from pipeline.training import loader
from pipeline.training.loader import TrainingData
from storage.shards import Shards, read_shard
from storage.store import Store
from storage.tokens import read_tokens, write_tokens


@pytest.fixture(scope="module")
def parts(shared_store: Store) -> tuple[Path, Path, TextBank]:
    steps = build(shared_store, tiny_config(), until="cache-clip")
    shards, text, tokens = (shared_store.open(steps[s].recipe.ref) for s in ("shard", "text", "cache-clip"))
    return shards.path, tokens.path, open_text(text.path, text.ref.key)


def data(parts: tuple[Path, Path, TextBank], *, seed: int = 0, workers: int = 1, size: int = 96) -> TrainingData:
    return TrainingData(*parts, AugmentConfig(size=size, jitter=(0.5, 1.5)), seed=seed, workers=workers)


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
    from storage.shards import decode_ids, decode_image

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
    item = next(source.items(0, view=0, resize=ResizeConfig(short=96, longest=96)))
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
    test_view = next(two.items(0, view=0, resize=ResizeConfig(short=96, longest=96)))
    assert test_view.global_row < len(two)
    assert torch.equal(
        test_view.instance_tokens, next(one.items(0, view=0, resize=ResizeConfig(short=96, longest=96))).instance_tokens
    )
