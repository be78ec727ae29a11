"""Shards: what is written comes back, in the same bytes each time; damage never passes for data."""

from __future__ import annotations

import io
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from storage.shards import (
    Sample,
    Segment,
    Shards,
    check_shard,
    decode_ids,
    decode_image,
    encode_ids,
    read_shard,
    write_index,
    write_shard,
)

SEGMENTS = st.builds(
    Segment,
    id=st.integers(1, 256**3 - 1),
    category_id=st.integers(0, 300),
    area=st.integers(1, 10**6),
    iscrowd=st.booleans(),
)
SAMPLES = st.lists(
    st.builds(
        Sample,
        image_id=st.integers(0, 10**12 - 1),
        image=st.binary(max_size=2000),
        png=st.binary(max_size=600),
        height=st.integers(1, 999),
        width=st.integers(1, 999),
        segments=st.lists(SEGMENTS, max_size=3).map(tuple),
    ),
    max_size=4,
    unique_by=lambda sample: sample.image_id,
)
SAMPLE = Sample(
    image_id=42,
    image=b"j" * 700,
    png=b"p" * 10,
    height=3,
    width=4,
    segments=(Segment(id=7, category_id=1, area=12, iscrowd=False),),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=SAMPLES)
def test_what_is_written_comes_back(tmp_path: Path, samples: list[Sample]) -> None:
    write_shard(tmp_path / "a.tar", samples)
    assert list(read_shard(tmp_path / "a.tar")) == samples
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=SAMPLES, rows=st.sets(st.integers(0, 5)))
def test_some_rows_are_those_of_all(tmp_path: Path, samples: list[Sample], rows: set[int]) -> None:
    write_shard(tmp_path / "a.tar", samples)
    assert list(read_shard(tmp_path / "a.tar", rows)) == [s for i, s in enumerate(samples) if i in rows]


def test_of_other_rows_only_the_headers_are_read(tmp_path: Path) -> None:
    """A flipped byte of a sample shows where that sample is read; a broken header and a missing end show anyway."""
    path = tmp_path / "a.tar"
    write_shard(path, [replace(SAMPLE, image_id=i) for i in range(4)])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        second = tar.getmembers()[3]  # the JPEG of the second sample
    damaged = bytearray(whole)
    damaged[second.offset_data] ^= 1
    path.write_bytes(damaged)
    assert [sample.image_id for sample in read_shard(path, {0, 2})] == [0, 2]
    with pytest.raises(ValueError, match="sample 000000000001 is not what its checksum says"):
        list(read_shard(path, {1}))
    damaged[second.offset + 150] ^= 1  # within the header's checksum
    for content in (bytes(damaged), whole[: second.offset]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.tar is damaged.*zs-seg verify"):
            list(read_shard(path, {0}))


def test_same_samples_same_bytes_and_fixed_members(tmp_path: Path) -> None:
    samples = [SAMPLE, replace(SAMPLE, image_id=5)]
    write_shard(tmp_path / "a.tar", samples)
    time.sleep(1.1)  # tar headers count whole seconds
    write_shard(tmp_path / "b.tar", iter(samples))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:  # any tar program reads it
        members = tar.getmembers()
    assert [member.name for member in members] == [
        f"{image_id:012d}.{kind}" for image_id in (42, 5) for kind in ("jpg", "json", "png")
    ]
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "zs-seg")}


def test_a_failing_source_leaves_no_tar(tmp_path: Path) -> None:
    def broken():
        yield SAMPLE
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "a.tar", broken())
    assert list(tmp_path.iterdir()) == []


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """Small samples, so that whole ones fit into the padding at the end of the tar."""
    write_shard(tmp_path / "whole.tar", [replace(SAMPLE, image_id=i) for i in range(5)])
    whole = (tmp_path / "whole.tar").read_bytes()
    cut = tmp_path / "cut.tar"
    content = len(whole.rstrip(b"\0"))
    for length in [0, 1, *range(256, content, 256), content]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.tar is damaged.*zs-seg verify") as caught:
            list(read_shard(cut))
        assert "\n" not in str(caught.value)


def test_any_broken_header_is_refused(tmp_path: Path) -> None:
    """tarfile takes a header with a wrong checksum for the end of the archive and says nothing."""
    write_shard(tmp_path / "a.tar", [replace(SAMPLE, image_id=i) for i in range(5)])
    whole = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        headers = [member.offset for member in tar.getmembers()]
    assert len(headers) == 15
    for offset in headers:
        damaged = bytearray(whole)
        damaged[offset + 150] ^= 1  # within the checksum
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.tar is damaged"):
            list(read_shard(tmp_path / "a.tar"))


def tar_of(path: Path, members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), "elsewhere"
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "name",
    ["../000000000001.jpg", "/000000000001.jpg", "a/000000000001.jpg", "x.jpg", "1.jpg", "000000000001.txt", "__a__/b"],
)
def test_foreign_members_are_refused(tmp_path: Path, name: str) -> None:
    path = tar_of(tmp_path / "a.tar", {name: b"x"})
    with pytest.raises(ValueError, match=r"a\.tar is damaged: member "):
        list(read_shard(path))


def test_links_and_incomplete_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="damaged"):
        list(read_shard(tar_of(tmp_path / "a.tar", {"000000000001.jpg": b""}, tarfile.SYMTYPE)))
    with pytest.raises(ValueError, match="000000000001 lacks"):
        list(read_shard(tar_of(tmp_path / "a.tar", {"000000000001.jpg": b"", "000000000001.png": b""})))


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"{}", b'{"image_id":1,"height":1,"width":1,"segments":[{"id":1}]}']
)
def test_a_broken_json_is_refused(tmp_path: Path, text: bytes) -> None:
    members = {"000000000001.jpg": b"", "000000000001.json": text, "000000000001.png": b""}
    with pytest.raises(ValueError, match="sample 000000000001 has a broken json"):
        list(read_shard(tar_of(tmp_path / "a.tar", members)))


def test_a_missing_tar_and_no_tar_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.tar is missing"):
        list(read_shard(tmp_path / "a.tar"))
    (tmp_path / "a.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(ValueError, match=r"a\.tar is damaged"):
        list(read_shard(tmp_path / "a.tar"))


@given(arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 256**3 - 1)))
def test_ids_go_through_png(ids: np.ndarray) -> None:
    decoded = decode_ids(replace(SAMPLE, png=encode_ids(ids)))
    assert decoded.dtype == np.int32
    np.testing.assert_array_equal(decoded, ids)


def test_ids_are_cocos() -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([[[1, 2, 3], [0, 0, 0]]], np.uint8)).save(file, format="PNG")
    assert decode_ids(replace(SAMPLE, png=file.getvalue())).tolist() == [[1 + 2 * 256 + 3 * 256 * 256, 0]]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_images_of_any_mode_become_rgb(mode: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (200, 200, 200)).convert(mode).save(file, format="JPEG", quality=100)
    pixels = decode_image(replace(SAMPLE, image=file.getvalue()))
    assert pixels.shape == (3, 4, 3) and pixels.dtype == np.uint8
    assert abs(pixels.astype(int) - 200).max() <= 2


def test_another_file_format_is_refused() -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 3)).save(file, format="BMP")
    with pytest.raises(OSError):
        decode_image(replace(SAMPLE, image=file.getvalue()))


def test_an_image_may_be_a_png(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    samples = [SAMPLE, replace(SAMPLE, image_id=43, image=file.getvalue())]
    write_shard(tmp_path / "a.tar", samples)
    check_shard(tmp_path / "a.tar")
    assert list(read_shard(tmp_path / "a.tar")) == samples
    np.testing.assert_array_equal(decode_image(samples[1]), pixels)
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames()[3:] == [f"{43:012d}.image.png", f"{43:012d}.json", f"{43:012d}.png"]


def test_shards_reads_its_index(tmp_path: Path) -> None:
    index = {"train": [{"tar": "train-000000.tar", "samples": 3, "segments": 9}], "val": []}
    write_index(tmp_path, index)
    shards = Shards(tmp_path)
    assert shards.tars("train") == [tmp_path / "train-000000.tar"]
    assert shards.counts("train") == [3]
    assert shards.tars("val") == [] == shards.counts("val")


@pytest.mark.parametrize("text", [None, "", "[]", '{"train": [{}]}', '{"train": 3}'])
def test_a_broken_index_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is missing or damaged"):
        Shards(tmp_path)
