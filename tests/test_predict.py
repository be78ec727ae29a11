"""`zs-seg predict` on files of one's own: turned photos, files that cannot be read, failures in the middle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import build, tiny_config

from flows.cli import main
from pipeline.predict import find_images
from storage.store import Store

pytestmark = pytest.mark.slow  # the shared checkpoint

STORED = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE}


@pytest.fixture(scope="module")
def checkpoint(shared_store: Store) -> str:
    return str(shared_store.path(build(shared_store, tiny_config(), until="v2c")["v2c"].recipe.ref))


@pytest.fixture(scope="module")
def scene(shared_store: Store) -> Image.Image:
    """A scene of the generated world that is not square."""
    ref = build(shared_store, tiny_config(), until="scenes")["scenes"].recipe.ref
    with Image.open(next((shared_store.path(ref) / "val2017").iterdir())) as image:
        return image.crop((0, 0, 96, 64))


@pytest.fixture
def run(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command on the folder `images`, to `out`: exit status and the last line on stderr."""

    def run(*words: str) -> tuple[int, str]:
        given = ("--checkpoint", checkpoint, "--images", tmp_path / "images", "--out", tmp_path / "out", *words)
        capsys.readouterr()
        status = main(["predict", "--store", str(tmp_path / "none"), "--threads", "1", *map(str, given)])
        return status, (capsys.readouterr().err.splitlines() or [""])[-1]

    return run


@pytest.fixture
def images(tmp_path: Path, scene: Image.Image) -> Path:
    """Three good images, a, b, c, of which the last bytes of b may be taken away."""
    (tmp_path / "images").mkdir()
    for name in "abc":
        scene.save(tmp_path / "images" / f"{name}.png")
    return tmp_path / "images"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def result(out: Path) -> dict[str, Any]:
    content = json.loads((out / "panoptic.json").read_text())
    names = {entry["file_name"] for entry in content["annotations"]}
    assert {path.name for path in (out / "panoptic").iterdir()} == names
    return content


def names(content: dict[str, Any], field: str) -> list[str]:
    return [entry["file_name"] for entry in content[field]]


def test_turned_photos_get_the_upright_ones_segments(
    run: Callable[..., tuple[int, str]], images: Path, scene: Image.Image, tmp_path: Path
) -> None:
    for path in images.iterdir():
        path.unlink()
    scene.save(images / "1.png")
    for orientation, turn in STORED.items():
        exif = Image.Exif()
        exif[274] = orientation
        scene.transpose(turn).save(images / f"{orientation}.webp", lossless=True, exif=exif)
        scene.transpose(turn).save(images / f"1{orientation}.tif", tiffinfo={274: orientation})
    assert run()[0] == 0
    content = result(tmp_path / "out")
    assert len(content["images"]) == 7 and content["skipped"] == content["unfinished"] == []
    assert {(image["height"], image["width"]) for image in content["images"]} == {(64, 96)}
    maps = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out" / "panoptic").iterdir())]
    assert all(np.array_equal(found, maps[0]) for found in maps)
    drawn = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out" / "overlay").iterdir())]
    assert all(np.array_equal(found, drawn[0]) for found in drawn)


def test_bad_headers_are_found_before_anything_runs(
    run: Callable[..., tuple[int, str]], images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (images / "b.png").write_bytes(b"no image")
    (images / "z.jpg").write_bytes(b"")
    status, line = run()
    assert status == 2 and not (tmp_path / "out").exists()
    assert line.startswith("zs-seg: 2 of 4 images cannot be read: ") and line.endswith(", or pass --skip-bad")
    assert f"{images / 'b.png'} is no JPEG" in line

    assert run("--skip-bad")[0] == 0
    assert f"2 of 4 images left out; {tmp_path / 'out' / 'panoptic.json'} lists them" in caplog.text
    content = result(tmp_path / "out")
    assert names(content, "images") == ["a.png", "c.png"] and [i["id"] for i in content["images"]] == [1, 3]
    assert names(content, "skipped") == ["b.png", "z.jpg"] and content["unfinished"] == []
    assert all("is no JPEG" in bad["reason"] for bad in content["skipped"])


def test_pixels_that_cannot_be_decoded(run: Callable[..., tuple[int, str]], images: Path, tmp_path: Path) -> None:
    cut(images / "b.png")
    status, line = run()
    assert status == 2 and f"1 of 3 images cannot be read: {images / 'b.png'} is damaged" in line
    content = result(tmp_path / "out")
    assert names(content, "images") == ["a.png"]  # the one before it is not lost
    assert names(content, "skipped") == ["b.png"] and content["unfinished"] == ["c.png"]

    assert run("--skip-bad")[0] == 0
    content = result(tmp_path / "out")
    assert names(content, "images") == ["a.png", "c.png"]
    assert names(content, "skipped") == ["b.png"] and content["unfinished"] == []


@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(b""), cut])
def test_where_all_are_bad(run: Callable[..., tuple[int, str]], images: Path, harm: Callable[[Path], Any]) -> None:
    for path in images.iterdir():
        harm(path)
    status, line = run("--skip-bad")
    assert status == 2 and "3 of 3 images cannot be read: " in line and "--skip-bad" not in line


def test_what_was_done_is_in_the_json_whatever_fails_later(
    run: Callable[..., tuple[int, str]], images: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "overlay" / "b.png").mkdir(parents=True)  # where a picture is to be written
    status, line = run()
    assert status == 2 and "b.png: Is a directory" in line
    content = result(tmp_path / "out")
    assert names(content, "images") == ["a.png"] and content["unfinished"] == ["b.png", "c.png"]
    assert len(json.loads((tmp_path / "out" / "panoptic_rle.json").read_text())) == len(
        content["annotations"][0]["segments_info"]
    )


def test_hidden_files_are_no_images_and_other_files_are_named(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    (images / "._a.png").write_bytes(b"\0\5\x16\7")
    (images / "Photo.HEIC").write_bytes(b"")
    (images / "Thumbs.db").write_bytes(b"")
    (images / "sub.jpg").mkdir()
    (images / "d.JPEG").write_bytes(b"")
    assert [path.name for path in find_images([str(images)])] == ["a.png", "b.png", "c.png", "d.JPEG"]
    assert f"{images}: 2 other files left out, such as Photo.HEIC" in caplog.text
    assert [path.name for path in find_images([str(images / "._a.png")])] == ["._a.png"]
