"""Candidate regions of what has no label: found as a slow loop finds them, encoded as single calls of the teacher, matched
to the queries that are left; and no class of an unseen pixel reaches any byte.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_reference import covered_patches
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from tiny import QUIET, build, copy_artefacts, tiny_config, tiny_regions
from torch import Tensor
from whole_views import whole_item, whole_items

from pipeline import cache_clip, scenes
from pipeline.data.config import AugmentConfig, CocoConfig, ResizeConfig
from pipeline.data.transforms import channels_first
from pipeline.line import Stage, line
from pipeline.teacher.config import TokensConfig
from pipeline.teacher.instances import instance_box
from pipeline.teacher.regions import find_regions
from pipeline.teacher.text_bank import open_text
from pipeline.training.distributed import Ranks
from pipeline.training.loader import Batch, TrainingData, View, collate
from storage.errors import UserError
from storage.shards import Sample, Shards, decode_ids, decode_image, encode_ids, read_shard
from storage.store import Artefact, Store
from storage.tokens import TokenGroup, read_tokens, region_group, write_tokens

CONFIG = tiny_regions()
assert isinstance(CONFIG.data, scenes.ScenesConfig)
BENCHMARK = scenes.benchmark(replace(scenes.ScenesConfig(), shapes=CONFIG.data.shapes, protocol="pixel-ignore"))


@pytest.fixture(scope="module")
def made(shared_store: Store) -> tuple[Store, dict[str, Stage]]:
    return shared_store, build(shared_store, CONFIG, until="cache-clip")


def groups(store: Store, tokens: Artefact, shards: Path, split: str = "train") -> Iterator[tuple[Path, TokenGroup]]:
    for tar in Shards(shards).tars(split):
        yield tar, read_tokens(tokens.path / f"{tar.stem}.zarr")


def unlabelled(sample: Sample) -> np.ndarray:
    """(H, W): True where no segment of a seen class is."""
    seen = [s.id for s in sample.segments if s.category_id not in BENCHMARK.unseen_ids]
    return ~np.isin(decode_ids(sample), seen)


# ------------------------------------------------------------------------------------------------ what is a region


def flooded(free: np.ndarray) -> list[set[tuple[int, int]]]:
    """The connected components of the True pixels, each from its first pixel on."""
    left, found = {(int(y), int(x)) for y, x in zip(*np.nonzero(free), strict=True)}, []
    for first in sorted(left):
        if first in left:
            part, edge = {first}, [first]
            left.remove(first)
            while edge:
                y, x = edge.pop()
                for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                    if near in left:
                        left.remove(near)
                        part.add(near)
                        edge.append(near)
            found.append(part)
    return found


@examples(30)
@given(seed=st.integers(0, 9999), least=st.integers(1, 12), share=st.floats(0.2, 0.8))
def test_regions_are_the_connected_parts_of_what_has_no_label(seed: int, least: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    ids = np.where(rng.random((9, 14)) < share, rng.integers(0, 2**24, (9, 14)), 7).astype(np.int32)
    ids[rng.random((9, 14)) < 0.2] = 2**24 - 1
    found = find_regions(ids, [7, 2**24 - 1, 5], TokensConfig(region_min_area=least))
    parts = flooded(~np.isin(ids, [7, 2**24 - 1, 5]))
    large = [part for part in parts if len(part) >= least]
    assert (found.count, found.fragments) == (len(large), len(parts) - len(large))
    assert [set(zip(*map(list, np.nonzero(found.map == n + 1)), strict=True)) for n in range(found.count)] == large
    assert (found.map > 0).sum() == sum(map(len, large))


def test_more_regions_than_a_byte_counts() -> None:
    ids = np.ones((40, 40), np.int32)
    ids[::2, ::2] = 0
    found = find_regions(ids, [1], TokensConfig(region_min_area=1))
    assert found.count == 400 and found.map.dtype == np.uint16
    group = region_group(np.ones((1, 400, 4)), [found.map], [400], [0])
    np.testing.assert_array_equal(group.map(0), found.map)


def test_an_image_without_anything_unlabelled_has_none() -> None:
    found = find_regions(np.ones((4, 4), np.int32), [1], TokensConfig())
    assert (found.count, found.fragments) == (0, 0) and not found.map.any()
    whole = find_regions(np.ones((9, 9), np.int32), [], TokensConfig())
    assert whole.count == 1 and whole.map.all()


COLOURS = TokensConfig(regions="colours", region_min_area=20)


def test_things_of_two_colours_that_touch_are_two_regions() -> None:
    """A red disc half over a blue one, on a labelled ground whose colour does not reach them; noise cuts nothing."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    red, blue = np.hypot(y - 30, x - 24) < 12, np.hypot(y - 32, x - 40) < 12
    image = np.full((64, 64, 3), 255.0)
    image[blue], image[red] = (40, 60, 200), (200, 50, 40)
    image = np.clip(image + rng.normal(0, 20, image.shape), 0, 255).astype(np.uint8)
    ids = np.where(red | blue, 5, 1).astype(np.int32)
    assert find_regions(ids, [1], replace(COLOURS, regions="components")).count == 1
    found = find_regions(ids, [1], COLOURS, image)
    assert found.count == 2
    for truth in (red, blue & ~red):
        overlap = max((truth & (found.map == r)).sum() / (truth | (found.map == r)).sum() for r in (1, 2))
        assert overlap > 0.85
    alone = find_regions(np.where(red, 5, 1).astype(np.int32), [1], COLOURS, image)
    assert alone.count == 1 and np.array_equal(alone.map > 0, red)


@examples(15)
@given(seed=st.integers(0, 9999), least=st.integers(1, 40))
def test_a_split_divides_each_component_and_loses_no_pixel(seed: int, least: int) -> None:
    """Every part is connected but for fragments that went to their nearest part, large enough, and of one component;
    the same image gives the same regions."""
    rng = np.random.default_rng(seed)
    ids = np.kron(rng.integers(0, 3, (6, 7)), np.ones((6, 6), int)).astype(np.int32)
    image = np.kron(rng.integers(0, 256, (6, 7, 3)), np.ones((6, 6, 1), int)).astype(np.uint8)
    config = TokensConfig(regions="colours", region_min_area=least)
    whole, found = find_regions(ids, [1], replace(config, regions="components")), find_regions(ids, [1], config, image)
    assert np.array_equal(found.map > 0, whole.map > 0) and found.fragments == whole.fragments
    for number in range(1, found.count + 1):
        part = found.map == number
        assert part.sum() >= least and len(np.unique(whole.map[part])) == 1
    again = find_regions(np.where(ids == 1, 1, rng.integers(3, 99, ids.shape)).astype(np.int32), [1], config, image)
    assert np.array_equal(again.map, found.map)


# ------------------------------------------------------------------------------------------------ their tokens


@pytest.mark.parametrize(
    "change", [{"views": 2}, {"crop": "box", "margin": 0.2, "views": 2}, {"method": "attention", "views": 2}]
)
def test_a_regions_rows_are_single_calls_of_the_teacher(
    made: tuple[Store, dict[str, Stage]], change: dict[str, Any]
) -> None:
    """Of the image and of its mirrored version, with the token of every region beside its own mask."""
    store, steps = made
    tokens = encode(store, steps, **change, region_min_area=90)
    teacher = CONFIG.teacher.load(QUIET)
    compared = 0
    shards = store.path(steps["shard"].recipe.ref)
    for tar, group in itertools.islice(groups(store, tokens, shards), 2):
        assert group.regions and group.views == 2
        for row, sample in enumerate(read_shard(tar)):
            parts = [part for part in flooded(unlabelled(sample)) if len(part) >= 90]
            assert group.regions.counts[row] == len(parts)
            rows = [group.regions.of(row, mirrored=mirrored) for mirrored in (False, True)]
            for number, part in enumerate(parts):
                mask = group.regions.map(row) == number + 1
                assert {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)} == part
                for mirrored in (False, True):
                    expected = single_call(teacher, sample, mask, change, mirrored=mirrored)
                    token = torch.from_numpy(rows[mirrored][number]).float()
                    assert float(torch.cosine_similarity(token, expected, dim=0)) > 0.9995
                    compared += 1
    assert compared > 20


def encode(store: Store, steps: dict[str, Stage], **change: Any) -> Artefact:
    config = replace(CONFIG.tokens, **change)
    stage = Stage.of(cache_clip, config, teacher=CONFIG.teacher, benchmark=BENCHMARK, shards=steps["shard"].recipe.ref)
    return store.open(stage.run(store, QUIET))


def single_call(teacher: Any, sample: Sample, mask: np.ndarray, change: dict[str, Any], *, mirrored: bool) -> Tensor:
    image = channels_first(decode_image(sample))
    if change.get("crop") == "box":
        top, left, bottom, right = instance_box(mask, change["margin"])
        image, mask = image[:, top:bottom, left:right], mask[top:bottom, left:right]
    prepared = teacher.prepare(image)
    if change.get("method") == "attention":
        own = torch.from_numpy(covered_patches(mask, teacher, "squeeze"))
        prepared, own = (prepared.flip(-1), own.flip(-1)) if mirrored else (prepared, own)
        return teacher.encode_by_instance(prepared[None], own.flatten()[None, None])[0, 1]
    inputs = teacher.mask(prepared, torch.from_numpy(mask.copy())[None])
    return teacher.encode_images(inputs.flip(-1) if mirrored else inputs)[0]


def test_regions_stand_beside_the_other_rows_and_are_counted(made: tuple[Store, dict[str, Stage]]) -> None:
    """Images and segments have the rows that they have without regions, but for the packing's last bits; validation
    images have the very bytes; and the arrays of a group without regions are those of ever."""
    store, steps = made
    shards = store.path(steps["shard"].recipe.ref)
    tokens, plain = (encode(store, steps, **change) for change in ({}, {"regions": "none"}))
    regions = images = fragments = 0
    for (_, group), (_, other) in zip(groups(store, tokens, shards), groups(store, plain, shards), strict=True):
        assert group.regions and other.regions is None
        assert list(other.arrays()) == ["global", "instance", "mirrored_global", "mirrored_instance", "offsets", "segment_id", "kept"]  # fmt: skip
        for name, array in other.arrays().items():
            np.testing.assert_allclose(group.arrays()[name].astype(float), array.astype(float), atol=1e-3, err_msg=name)
        regions, images = regions + len(group.regions.tokens), images + int((group.regions.counts > 0).sum())
        fragments += int(group.regions.fragments.sum())
    assert 0 < images < sum(Shards(shards).counts("train"))
    counts = tokens.manifest.counts["train"]
    assert (counts["regions"], counts["images_with_regions"], counts["region_fragments"]) == (
        regions,
        images,
        fragments,
    )
    for tar in Shards(shards).tars("val"):
        for file in (plain.path / f"{tar.stem}.zarr").rglob("*"):
            assert file.is_dir() or file.read_bytes() == (tokens.path / file.relative_to(plain.path)).read_bytes()
    assert "regions" not in plain.manifest.counts["train"]


def test_a_killed_build_ends_with_the_same_regions(
    made: tuple[Store, dict[str, Stage]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill is an exception after the third group; what stands is not encoded again."""
    import pipeline.teacher.encode

    store, steps = made
    shards, stage = steps["shard"].recipe.ref, steps["cache-clip"]
    calm = store.open(stage.recipe.ref).manifest
    shaken, real, written = Store(tmp_path / "shaken"), pipeline.teacher.encode.write_tokens, []

    def write_and_die(path: Path, **content: Any) -> None:
        real(path, **content)
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt

    copy_artefacts(store, shaken, [shards])
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.teacher.encode, "write_tokens", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            stage.run(shaken, QUIET)
    again = shaken.open(stage.run(shaken, QUIET)).manifest
    assert again.files == calm.files and again.counts == calm.counts and again.provenance["resumed"]


def test_nothing_unlabelled_is_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    """Scenes are labelled in every pixel, so the image filter leaves no region."""
    filtered = replace(CONFIG, data=replace(CONFIG.data, protocol="image-filter", train_images=10))
    with pytest.raises(
        UserError, match="protocol image-filter leaves has 40 connected pixels without a label"
    ) as caught:
        build(Store(tmp_path), filtered, until="cache-clip")
    assert "--tokens.regions none, --data.protocol pixel-ignore" in str(caught.value)
    assert not list(tmp_path.rglob("*.zarr"))


def test_weights_without_regions_are_refused_before_anything_is_built() -> None:
    for weight in ("candidate_mask_weight", "candidate_token_weight"):
        plain = tiny_config()
        with pytest.raises(UserError, match=r"pass --tokens\.regions components, or set both weights to 0"):
            line(replace(plain, v2c=replace(plain.v2c, **{weight: 0.1})))
        with pytest.raises(UserError, match="must be 0 or more"):
            replace(plain.v2c, **{weight: -1.0})
    with pytest.raises(UserError, match="region_min_area must be at least 1, not 0"):
        TokensConfig(region_min_area=0)


def test_both_protocols_share_scenes_and_shards() -> None:
    one, two = (
        {stage.name: stage.recipe.ref for stage in line(replace(CONFIG, data=replace(CONFIG.data, protocol=protocol)))}
        for protocol in ("image-filter", "pixel-ignore")
    )
    assert [name for name in one if one[name] == two[name]] == ["scenes", "shard", "text"]


# ------------------------------------------------------------------------------------------------ in views


@pytest.fixture(scope="module")
def source(made: tuple[Store, dict[str, Stage]]) -> Callable[..., TrainingData]:
    store, steps = made
    shards, text, tokens = (store.open(steps[name].recipe.ref) for name in ("shard", "text", "cache-clip"))
    bank = open_text(text.path, text.ref.key)

    def make(
        augment: AugmentConfig, *, groups: Path = tokens.path, regions: bool = True, workers: int = 2
    ) -> TrainingData:
        return TrainingData(shards.path, groups, bank, augment, seed=3, workers=workers, regions=regions)

    return make


def fingerprint(batch: Batch) -> list[object]:
    tensors = [batch.images, batch.global_rows, *batch.labels, *batch.masks, *batch.instance_tokens]
    return [(t.dtype, t.shape, t.numpy().tobytes()) for t in (*tensors, *batch.region_tokens)]


@pytest.mark.parametrize(("jitter", "side"), [((0.1, 2.0), 96), ((2.0, 5.0), 64)])
def test_batches_with_regions_are_byte_for_byte_those_of_the_plain_way(
    source: Callable[..., TrainingData], jitter: tuple[float, float], side: int
) -> None:
    """Cut, mirrored and resized as segments are, from the beginning, resumed, and for two processes."""
    data = source(AugmentConfig(size=side, jitter=jitter))
    stream = whole_items(data)
    expected = [collate(list(itertools.islice(stream, 8))) for _ in range(7)]
    every = [len(tokens) for batch in expected for tokens in batch.region_tokens]
    assert 0 in every and max(every) > 1
    for start, world in ((0, 1), (3, 2)):
        ranks = [data.batches(8, start=start, ranks=Ranks(rank=rank, world=world)) for rank in range(world)]
        for whole in expected[start:]:
            for own, part in zip(ranks, whole.split(world), strict=True):
                assert fingerprint(next(own)) == fingerprint(part)


def test_a_view_shows_regions_only_where_they_are_asked_for(source: Callable[..., TrainingData]) -> None:
    augment = AugmentConfig(size=96, jitter=(1.0, 1.0))
    with_, without = (next(source(augment, regions=regions).batches(40, start=0)) for regions in (True, False))
    assert sum(map(len, with_.region_tokens)) > 20 and sum(map(len, without.region_tokens)) == 0
    for both, own, labels in zip(with_.masks, without.masks, without.labels, strict=True):
        assert len(own) == len(labels) and torch.equal(both[: len(own)], own)
        # Regions and segments have no pixel in common.
        assert both.sum(0).max() == 1


def test_a_mirrored_view_comes_with_the_mirrored_regions(source: Callable[..., TrainingData], tmp_path: Path) -> None:
    """Every row of the second view has its sign turned, so a token shows by itself which view it belongs to."""
    augment = AugmentConfig(size=96, jitter=(1.0, 1.0))
    plain = source(augment)
    for tar, group in zip(plain.tars, plain.groups, strict=True):
        regions = group.regions
        assert regions
        both = replace(regions, mirrored=-regions.tokens[None])
        write_tokens(
            tmp_path / f"{tar.stem}.zarr", global_=group.global_, instance=group.instance, offsets=group.offsets,
            segment_id=group.segment_id, kept=group.kept, mirrored_global=-group.global_[None],
            mirrored_instance=-group.instance[None], regions=both,
        )  # fmt: skip
    two = source(augment, groups=tmp_path)
    a, b = (next(data.batches(40, start=0)) for data in (plain, two))
    straight = next(source(replace(augment, flip=False)).batches(40, start=0))
    turned = {True: 0, False: 0}
    for i in range(40):
        mirrored = not torch.equal(a.images[i], straight.images[i])
        if len(a.region_tokens[i]):
            turned[mirrored] += 1
            assert torch.equal(b.region_tokens[i], -a.region_tokens[i] if mirrored else a.region_tokens[i])
    assert min(turned.values()) > 3


def test_more_targets_and_regions_than_a_byte_counts() -> None:
    from pipeline.training.loader import _and_regions

    targets, regions = np.zeros((20, 30), np.uint8), np.zeros((20, 30), np.uint16)
    targets[:10] = np.arange(300).reshape(10, 30) % 200
    regions[10:] = np.arange(300).reshape(10, 30) + 1
    both = _and_regions(targets, 199, regions, 300)
    assert both.dtype == np.int32 and (both[:10] == targets[:10]).all() and (both[10:] == regions[10:] + 199.0).all()


def test_the_test_view_shows_the_regions_of_the_image(source: Callable[..., TrainingData]) -> None:
    data = source(AugmentConfig(size=96, jitter=(1.0, 1.0)))
    samples = list(read_shard(data.tars[0]))
    found = 0
    for ((place, item),) in data.items(0, view=0, resize=ResizeConfig(short=96, longest=96), most=1):
        parts = [part for part in flooded(unlabelled(samples[place])) if len(part) >= 40]
        masks = item.masks[len(item.labels) :]
        assert [set(zip(*(x.tolist() for x in mask.nonzero(as_tuple=True)), strict=True)) for mask in masks] == parts
        assert len(item.region_tokens) == len(parts)
        found += len(parts)
    assert found > 3
    view = data._view(1, 0, 0, samples[0])
    assert isinstance(view, View)
    assert fingerprint(collate([view.item()])) == fingerprint(collate([whole_item(data, 1, 0, 0, samples[0])]))


# ------------------------------------------------------------------------------------------------ no label reaches a byte


Segments = list[dict[str, Any]]


def swapped(ids: np.ndarray, segments: Segments) -> tuple[np.ndarray, Segments]:
    """Every unseen segment is of the next unseen class, and has another id."""
    unseen = list(BENCHMARK.unseen_ids)
    ids, changed = ids.copy(), []
    for segment in segments:
        if segment["category_id"] in unseen:
            other = unseen[(unseen.index(segment["category_id"]) + 1) % len(unseen)]
            ids[ids == segment["id"]] = segment["id"] + 1000
            segment = {**segment, "id": segment["id"] + 1000, "category_id": other}
        changed.append(segment)
    return ids, changed


def merged(ids: np.ndarray, segments: Segments) -> tuple[np.ndarray, Segments]:
    """All unseen segments of an image are one."""
    hidden = [segment for segment in segments if segment["category_id"] in BENCHMARK.unseen_ids]
    if not hidden:
        return ids, segments
    ids = np.where(np.isin(ids, [segment["id"] for segment in hidden]), 77, ids)
    one = {**hidden[0], "id": 77, "area": int((ids == 77).sum())}
    return ids, [one, *(segment for segment in segments if segment not in hidden)]


def split(ids: np.ndarray, segments: Segments) -> tuple[np.ndarray, Segments]:
    """Every unseen segment is two, of two unseen classes: its odd and its even columns."""
    ids, changed = ids.copy(), []
    odd = np.arange(ids.shape[1])[None] % 2 > 0
    for segment in segments:
        own = ids == segment["id"]
        if segment["category_id"] not in BENCHMARK.unseen_ids or not (own & odd).any() or not (own & ~odd).any():
            changed.append(segment)
            continue
        ids[own & odd] = segment["id"] + 500
        for number, part, category in ((0, own & ~odd, 0), (500, own & odd, 1)):
            unseen = BENCHMARK.unseen_ids[category]
            changed.append({**segment, "id": segment["id"] + number, "category_id": unseen, "area": int(part.sum())})
    return ids, changed


def blanked(ids: np.ndarray, segments: Segments) -> tuple[np.ndarray, Segments]:
    """Unseen segments are void."""
    hidden = [segment["id"] for segment in segments if segment["category_id"] in BENCHMARK.unseen_ids]
    return np.where(np.isin(ids, hidden), 0, ids), [segment for segment in segments if segment["id"] not in hidden]


def relabel(root: Path, change: Callable[[np.ndarray, Segments], tuple[np.ndarray, Segments]]) -> None:
    """Change the training annotations of a folder in COCO's layout."""
    listing = root / "annotations" / "panoptic_train2017.json"
    content = json.loads(listing.read_text())
    from storage.id_colours import ids_of

    for entry in content["annotations"]:
        file = root / "annotations" / "panoptic_train2017" / entry["file_name"]
        from PIL import Image

        ids, entry["segments_info"] = change(ids_of(np.asarray(Image.open(file))), entry["segments_info"])
        file.write_bytes(encode_ids(ids))
    listing.write_text(json.dumps(content))


def labelled_run(root: Path, store: Store) -> dict[str, Stage]:
    """The whole line up to stage 3 on a folder in COCO's layout, with regions."""
    file = root.parent / "world.json"
    categories = [{"id": c.id, "name": c.name, "isthing": int(c.isthing)} for c in BENCHMARK.categories]
    facts = {"categories": categories, "unseen_ids": BENCHMARK.unseen_ids, "protocol": "image-filter"}
    file.write_text(json.dumps(facts))
    short = replace(
        CONFIG,
        data=CocoConfig(root=str(root), benchmark=str(file), protocol="pixel-ignore"),
        tokens=replace(CONFIG.tokens, regions="colours"),
        v2c=replace(CONFIG.v2c, steps=4, calibration_images=4),
        queries=replace(CONFIG.queries, views=1),
        g2s=replace(CONFIG.g2s, steps=3),
        cpa=replace(CONFIG.cpa, steps=3),
    )
    return build(store, short, until="cpa")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store, dict[str, Stage]]:
    """Scenes as a COCO folder, and the line on it."""
    folder = tmp_path_factory.mktemp("world")
    drawn = replace(CONFIG, data=replace(CONFIG.data, train_images=14, val_images=3))
    stage = build(Store(folder / "scenes"), drawn, until="scenes")["scenes"]
    shutil.copytree(Store(folder / "scenes").path(stage.recipe.ref), folder / "data")
    store = Store(folder / "store")
    return folder / "data", store, labelled_run(folder / "data", store)


@pytest.mark.slow
@pytest.mark.parametrize("change", [swapped, merged, split, blanked])
def test_no_byte_depends_on_the_labels_of_unseen_pixels(
    world: tuple[Path, Store, dict[str, Stage]],
    tmp_path: Path,
    change: Callable[[np.ndarray, Segments], tuple[np.ndarray, Segments]],
) -> None:
    """Tokens with their regions, checkpoints, queries and generator, whatever unseen pixels are called and however they
    are divided."""
    root, store, steps = world
    shutil.copytree(root, tmp_path / "data")
    relabel(tmp_path / "data", change)
    other = Store(tmp_path / "store")
    found = labelled_run(tmp_path / "data", other)
    assert found["shard"].recipe.ref != steps["shard"].recipe.ref
    regions = store.open(steps["cache-clip"].recipe.ref).manifest.counts["train"]["regions"]
    assert regions > 5
    for name, kind in (("cache-clip", ".zarr"), ("v2c", ""), ("queries", ".zarr"), ("g2s", ""), ("cpa", "")):
        ours, theirs = store.path(steps[name].recipe.ref), other.path(found[name].recipe.ref)
        files = [f for f in ours.rglob("*") if f.is_file() and (kind in str(f) if kind else f.suffix == ".safetensors")]
        # Queries name a segment by its place in the annotation, which moves with the number of the others.
        files = [file for file in files if "segment" not in file.parts]
        assert files
        for file in files:
            assert file.read_bytes() == (theirs / file.relative_to(ours)).read_bytes(), file


@pytest.mark.slow
def test_a_seen_label_does_change_a_byte(world: tuple[Path, Store, dict[str, Stage]], tmp_path: Path) -> None:
    """So the test above can fail: one seen segment without its label is a region."""

    def forgotten(ids: np.ndarray, segments: Segments) -> tuple[np.ndarray, Segments]:
        lost = next(s["id"] for s in segments if s["category_id"] not in BENCHMARK.unseen_ids)
        return np.where(ids == lost, 0, ids), [s for s in segments if s["id"] != lost]

    root, store, steps = world
    shutil.copytree(root, tmp_path / "data")
    relabel(tmp_path / "data", forgotten)
    other = Store(tmp_path / "store")
    found = labelled_run(tmp_path / "data", other)
    for name in ("v2c", "g2s", "cpa"):
        ours, theirs = (at.path(one[name].recipe.ref) for at, one in ((store, steps), (other, found)))
        assert (ours / "weights.safetensors").read_bytes() != (theirs / "weights.safetensors").read_bytes()
