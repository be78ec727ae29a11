"""One tar's tokens: whatever is packed, cropped, mirrored, left out or attended to, a row is what a slow loop says it
is.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_factory import VISION, tiny_clip
from clip_reference import attended_by_resnet, attended_by_vit, covered_patches, embed, masked, small_clip
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.teacher import Teacher, load_teacher
from pipeline.bench.cache import coco_samples
from pipeline.data.benchmarks import Benchmark, Category
from pipeline.teacher import encode as encoding
from pipeline.teacher.config import TokensConfig
from pipeline.teacher.encode import encode_tar
from pipeline.teacher.instances import instance_box, own_patches
from storage.shards import Sample, Segment, decode_ids, decode_image, encode_ids, read_shard, write_shard
from storage.tokens import TokenGroup, read_tokens

SHARED = Path(__file__).parents[2] / "shared" / "coco-sample"  # real COCO files, on machines that have them
SHAPES = [(50, 70), (96, 64), (40, 40), (64, 120), (33, 47)]
BENCHMARK = Benchmark(
    name="test", categories=(Category(id=1, name="a", isthing=True), Category(id=2, name="b", isthing=True)),
    unseen_ids=(2,), protocol="image-filter",
)  # fmt: skip


def sample(number: int, shape: tuple[int, int], segments: int, *, unseen: bool = False) -> Sample:
    """A smooth picture with so many rectangles, one over the other, of which each shows something."""
    rng = np.random.default_rng([number, segments])
    ids = np.zeros(shape, np.int32)
    while len(np.unique(ids[ids > 0])) < segments:
        top, left = (int(rng.integers(0, size - 1)) for size in shape)
        spread = max(3, min(shape) // (2 if segments < 20 else 8))
        ids[top : top + int(rng.integers(1, spread)), left : left + int(rng.integers(1, spread))] = rng.integers(
            1, 2**24
        )
    keep = np.unique(ids[ids > 0])[:segments]
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8))
    file = io.BytesIO()
    coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC).save(file, format="JPEG")
    found = tuple(
        Segment(id=int(i), category_id=2 if unseen else 1, area=int((ids == i).sum()), iscrowd=False) for i in keep
    )
    return Sample(
        image_id=number, image=file.getvalue(), png=encode_ids(ids), height=shape[0], width=shape[1], segments=found
    )


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of five shapes with 5, 0, 3, 7 and 1 segments; the third is hidden from training."""
    counts = (5, 0, 3, 7, 1)
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    write_shard(
        path,
        [sample(i + 1, shape, n, unseen=i == 2) for i, (shape, n) in enumerate(zip(SHAPES, counts, strict=True))],
    )
    return path


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(name="small", pretrained="shipped", fill="mean")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teacher]:
    with pytest.MonkeyPatch.context() as patch:
        yield tiny_clip("tiny-vit", tmp_path_factory.mktemp("vit"), patch)


def encode(teacher: Teacher, tar: Path, folder: Path, *, hide: bool = False, **config: Any) -> TokenGroup:
    encode_tar(
        teacher, tar, folder / "a.zarr", TokensConfig(**config), BENCHMARK, hide=hide, progress=lambda *counts: None
    )
    return read_tokens(folder / "a.zarr")


def pictures(tar: Path) -> Iterator[tuple[Sample, Tensor, np.ndarray]]:
    for item in read_shard(tar):
        yield item, torch.from_numpy(decode_image(item)).permute(2, 0, 1), decode_ids(item)


def same(tokens: np.ndarray, expected: list[Tensor]) -> bool:
    """Equal but for the rounding of half precision, at which rows are stored."""
    return np.allclose(tokens, torch.stack(expected).double().numpy(), atol=1e-3)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("batch", [1, 3, 5, 21])
@pytest.mark.parametrize("method", ["pixels", "attention"])
def test_packing_moves_no_row(teacher: Teacher, tar: Path, tmp_path: Path, batch: int, method: str) -> None:
    whole = encode(teacher, tar, tmp_path, batch=128, method=method)
    packed = encode(teacher, tar, tmp_path, batch=batch, method=method)
    for name, array in whole.arrays().items():
        assert np.allclose(packed.arrays()[name].astype(float), array, atol=1e-3), name
    assert np.diff(whole.offsets).tolist() == [5, 0, 3, 7, 1]


def test_the_bytes_depend_on_tar_and_config_alone(teacher: Teacher, tar: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        encode(teacher, tar, tmp_path / name, batch=4, views=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_what_the_protocol_hides_is_not_even_decoded(
    teacher: Teacher, tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encode(teacher, tar, tmp_path, views=2)
    decoded: list[int] = []
    monkeypatch.setattr(encoding, "decode_image", lambda one: (decoded.append(one.image_id), decode_image(one))[1])
    hidden = encode(teacher, tar, tmp_path, hide=True, views=2)
    assert sorted(decoded) == [1, 2, 4, 5]
    assert hidden.kept.tolist() == [True, True, False, True, True]
    assert np.diff(hidden.offsets).tolist() == [5, 0, 0, 7, 1]
    assert np.allclose(np.delete(whole.instance, range(5, 8), 0), hidden.instance, atol=1e-3)
    assert np.allclose(np.delete(whole.mirrored_global, 2, 1), hidden.mirrored_global[:, hidden.kept], atol=1e-3)


def test_progress_counts_every_image_and_the_instances_encoded(teacher: Teacher, tar: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    encode_tar(
        teacher, tar, tmp_path / "a.zarr", TokensConfig(), BENCHMARK, hide=True, progress=lambda *c: calls.append(c)
    )
    assert np.sum(calls, axis=0).tolist() == [5, 13]


@pytest.mark.parametrize("method", ["pixels", "attention"])
def test_a_tar_of_which_nothing_is_left(teacher: Teacher, tmp_path: Path, method: str) -> None:
    write_shard(tmp_path / "a.tar", [sample(1, (40, 40), 2, unseen=True)])
    group = encode(teacher, tmp_path / "a.tar", tmp_path, hide=True, method=method)
    assert group.global_.shape == (1, teacher.dim) and group.instance.shape == (0, teacher.dim) and not group.kept.any()


@pytest.mark.parametrize("method", ["pixels", "attention"])
def test_images_without_segments(vit: Teacher, tmp_path: Path, method: str) -> None:
    write_shard(tmp_path / "a.tar", [sample(i, (40, 40), 0) for i in (1, 2)])
    group = encode(vit, tmp_path / "a.tar", tmp_path, method=method)
    assert same(group.global_, [embed(vit.clip, vit.prepare(image)) for _, image, _ in pictures(tmp_path / "a.tar")])


@pytest.mark.parametrize("resize", ["squeeze", "letterbox"])
@pytest.mark.parametrize("crop", ["full", "box"])
def test_rows_and_mirrored_rows_are_single_calls(
    teacher: Teacher, tar: Path, tmp_path: Path, crop: str, resize: Any
) -> None:
    group = encode(teacher, tar, tmp_path, batch=4, crop=crop, margin=0.2, resize=resize, views=2)
    images, instances = [], []
    for item, image, ids in pictures(tar):
        images.append(teacher.prepare(image, resize))
        for segment in item.segments:
            mask = ids == segment.id
            box = (0, 0, *ids.shape) if crop == "full" else instance_box(mask, 0.2)
            cut = (slice(box[0], box[2]), slice(box[1], box[3]))
            shown = torch.from_numpy(mask[cut])[None]
            instances.append(teacher.mask(teacher.prepare(image[:, *cut], resize), shown, resize)[0])
    for view, (global_, instance) in enumerate((group.view(mirrored=False), group.view(mirrored=True))):
        assert same(global_, [embed(teacher.clip, i.flip(-1) if view else i) for i in images])
        assert same(instance, [embed(teacher.clip, i.flip(-1) if view else i) for i in instances])
    assert not np.allclose(group.instance, group.mirrored_instance[0], atol=1e-2)


def test_the_mirrored_row_is_the_mirrored_images(teacher: Teacher, tar: Path, tmp_path: Path) -> None:
    """Flipping before the resize, image and mask, gives what flipping the teacher's input gives."""
    group = encode(teacher, tar, tmp_path, views=2)
    images, instances = [], []
    for item, image, ids in pictures(tar):
        prepared = teacher.prepare(image.flip(-1))
        images.append(embed(teacher.clip, prepared))
        flipped = torch.from_numpy(ids).flip(-1)
        instances += [embed(teacher.clip, teacher.mask(prepared, (flipped == s.id)[None])[0]) for s in item.segments]
    assert same(group.mirrored_global[0], images) and same(group.mirrored_instance[0], instances)


@examples(50)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 0.5), st.data())
def test_a_box_holds_its_instance_and_is_square_where_the_image_allows(
    height: int, width: int, margin: float, data: st.DataObject
) -> None:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    mask = np.zeros((height, width), bool)
    mask[top, left] = mask[bottom - 1, right - 1] = True
    box = instance_box(mask, margin)
    assert 0 <= box[0] <= top < bottom <= box[2] <= height and 0 <= box[1] <= left < right <= box[3] <= width
    side = int(np.ceil(max(bottom - top, right - left) * (1 + 2 * margin)))
    assert (box[2] - box[0], box[3] - box[1]) == (min(side, height), min(side, width))


def test_small_segments_have_zero_rows_and_the_others_stay(teacher: Teacher, tar: Path, tmp_path: Path) -> None:
    areas = np.array([s.area for item in read_shard(tar) for s in item.segments])
    bound = int(np.sort(areas)[len(areas) // 2])
    assert (areas == bound).any() and (areas < bound).any()
    for method in ("pixels", "attention"):
        whole = encode(teacher, tar, tmp_path, method=method, views=2)
        group = encode(teacher, tar, tmp_path, method=method, views=2, min_area=bound, batch=3)
        assert (group.encoded == (areas >= bound)).all() and whole.encoded.all()
        assert not group.instance[areas < bound].any() and not group.mirrored_instance[:, areas < bound].any()
        for name in ("instance", "mirrored_instance"):
            one, other = group.arrays()[name], whole.arrays()[name]
            assert np.allclose(one[..., areas >= bound, :], other[..., areas >= bound, :], atol=1e-3)
        assert np.allclose(group.global_, whole.global_, atol=1e-3)
        assert (group.segment_id == whole.segment_id).all() and (group.offsets == whole.offsets).all()


@pytest.mark.parametrize("resize", ["squeeze", "letterbox"])
@pytest.mark.parametrize("which", ["vit", "resnet"])
def test_attention_is_one_pass_an_instance_with_an_explicit_mask(
    request: pytest.FixtureRequest, tar: Path, tmp_path: Path, which: str, resize: Any
) -> None:
    teacher = request.getfixturevalue("vit" if which == "vit" else "teacher")
    attended = attended_by_vit if which == "vit" else attended_by_resnet
    group = encode(teacher, tar, tmp_path, method="attention", resize=resize, views=2, batch=3)
    images, instances, mirrored = [], [], []
    for item, image, ids in pictures(tar):
        prepared = teacher.prepare(image, resize)
        images.append(embed(teacher.clip, prepared))
        for segment in item.segments:
            own = covered_patches(ids == segment.id, teacher, resize)
            assert own.any()
            instances.append(attended(teacher.clip.visual, prepared, own.flatten()))
            mirrored.append(attended(teacher.clip.visual, prepared.flip(-1), own[:, ::-1].flatten()))
    assert same(group.global_, images)
    assert same(group.instance, instances)
    assert same(group.mirrored_instance[0], mirrored)


@pytest.mark.parametrize("which", ["vit", "teacher"])
def test_an_instance_that_owns_every_patch_is_the_image(request: pytest.FixtureRequest, which: str) -> None:
    teacher = request.getfixturevalue(which)
    inputs = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    rows, columns = teacher.patches
    own = torch.zeros(2, 3, rows * columns, dtype=torch.bool)
    own[:, 0], own[:, 1, 0] = True, True  # all, one, none
    found = teacher.encode_by_instance(inputs, own)
    plain = teacher.encode_images(inputs)
    assert torch.allclose(found[:, 0], plain, atol=1e-5) and torch.allclose(found[:, 1], plain, atol=1e-5)
    assert torch.isfinite(found).all() and not torch.allclose(found[:, 2], plain, atol=1e-2)


def test_a_segment_that_covers_no_centre_gets_the_patch_it_covers_most() -> None:
    ids = np.zeros((40, 40), np.int32)  # 4 x 4 patches of 10 pixels
    ids[9:12, 0:3] = 7  # one row of pixels in patch (0, 0), two in patch (1, 0)
    ids[30:40, 20:40] = 8
    own = own_patches(ids, np.array([7, 8]), grid=(4, 4), patch=10, place=(0, 0, 40, 40))
    assert [np.flatnonzero(row).tolist() for row in own] == [[4], [14, 15]]


def test_towers_without_patches_are_refused_and_work_by_pixels(
    tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in sorted(VISION.keys() - {"tiny-vit"}):
        other = tiny_clip(name, tmp_path, monkeypatch)
        group = encode(other, tar, tmp_path, views=2, batch=4)
        assert same(group.global_, [embed(other.clip, other.prepare(image)) for _, image, _ in pictures(tar)])
        with pytest.raises(ValueError, match="attention.*; use --tokens.method pixels") as caught:
            encode(other, tar, tmp_path, method="attention")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["pixels", "attention"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close_and_leaves_the_teacher_alone(
    vit: Teacher, tar: Path, tmp_path: Path, dtype: str, method: str
) -> None:
    full = encode(vit, tar, tmp_path, method=method)
    half = encode(vit, tar, tmp_path, method=method, dtype=dtype)
    for name in ("global", "instance"):
        one, other = (torch.from_numpy(group.arrays()[name]).double() for group in (full, half))
        assert float(torch.cosine_similarity(one, other).min()) >= 0.999
    assert not np.array_equal(full.instance, half.instance)
    again = encode(vit, tar, tmp_path, method=method)
    assert np.array_equal(again.instance, full.instance)


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize(("method", "size", "batches"), [("pixels", 64, 1.7), ("attention", 4, 3.0)])
def test_an_image_of_300_segments_takes_no_more_memory_than_a_batch(
    vit: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, size: int, batches: float
) -> None:
    monkeypatch.setattr(encoding, "MASK_PIXELS", 2**16)
    write_shard(tmp_path / "a.tar", [sample(1, (120, 200), 300), sample(2, (60, 60), 2)])
    batch = size * 3 * 64 * 64 * 4
    with _Largest() as largest:
        group = encode(vit, tmp_path / "a.tar", tmp_path, batch=size, method=method)
    assert len(group.instance) == 302 and group.encoded.all()
    assert largest.size <= batches * batch, largest.size / batch
    whole = encode(vit, tmp_path / "a.tar", tmp_path, batch=512, method=method)
    assert np.allclose(whole.instance.astype(float), group.instance, atol=1e-3)


def test_decoding_runs_ahead_but_not_away() -> None:
    """In order, however long each takes, and never more than 2 * threads that wait."""
    lock, alive, most = threading.Lock(), set[int](), 0
    samples = [replace(sample(1, (8, 8), 0), image_id=i) for i in range(40)]

    def decode(one: Sample) -> Any:
        nonlocal most
        time.sleep(0.002 * (one.image_id % 3))
        with lock:
            alive.add(one.image_id)
            most = max(most, len(alive))
        return one.image_id

    for i, (one, result) in enumerate(encoding._ahead(iter(samples), decode, threads=3)):
        assert one.image_id == result == i
        with lock:
            alive.discard(i)
        time.sleep(0.003)
    assert 3 <= most <= 6


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/coco-sample is not here")
def test_real_images(teacher: Teacher, tmp_path: Path) -> None:
    """Every row of 20 of COCO's images is a plain open_clip call's, and near to what PIL's preprocessing gives.

    PIL masks the image before it shrinks it, which the teacher's inputs do after: at the 64 pixels of this teacher the
    border of an instance, where its neighbours' colours mix in, is a large part of it.
    """
    write_shard(tmp_path / "a.tar", coco_samples(SHARED, 20))
    clip, _ = small_clip()
    group = encode(teacher, tmp_path / "a.tar", tmp_path, batch=16)
    prepare: Any = image_transform_v2(
        PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False
    )  # the shipped teacher's own mode is to squash
    mean = np.round(255 * np.array(clip.visual.preprocess_cfg["mean"]))
    single, by_pil = [], []
    for item, image, ids in pictures(tmp_path / "a.tar"):
        prepared, pixels = teacher.prepare(image), decode_image(item)
        single.append(embed(clip, prepared))
        by_pil.append(embed(clip, prepare(Image.fromarray(pixels))))
        for segment in item.segments:
            mask = ids == segment.id
            single.append(embed(clip, masked(prepared, mask, torch.zeros(3))))
            shown = np.where(mask[..., None], pixels, mean).astype(np.uint8)
            by_pil.append(embed(clip, prepare(Image.fromarray(shown))))
    rows = np.insert(group.instance.astype(np.float64), group.offsets[:-1], group.global_, axis=0)
    own = torch.from_numpy(rows)
    assert len(own) == len(single) > 150
    assert float(torch.cosine_similarity(own, torch.stack(single)).min()) >= 0.9995
    pil = torch.cosine_similarity(own, torch.stack(by_pil))
    images = group.offsets[:-1] + np.arange(20)
    assert float(pil[images].min()) >= 0.999
    assert float(pil.mean()) >= 0.995 and float((pil >= 0.99).double().mean()) >= 0.9
