"""`zs-seg predict` on files of one's own: turned photos, files that cannot be read, failures in the middle; words, folders
in depth, standard input, videos, JSON and the page."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from lively import lively
from PIL import Image
from tiny import build, tiny_config

from flows.cli import main
from pipeline.data.video import VideoWriter, read_frames
from pipeline.predict import find_sources
from storage.store import Store

pytestmark = pytest.mark.slow  # the shared checkpoint

STORED = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE}


@pytest.fixture(scope="module")
def checkpoint(shared_store: Store, tmp_path_factory: pytest.TempPathFactory) -> str:
    trained = shared_store.path(build(shared_store, tiny_config(), until="v2c")["v2c"].recipe.ref)
    return str(lively(trained, tmp_path_factory.mktemp("lively")))


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
    assert [source.name for source in find_sources([str(images)])] == ["a.png", "b.png", "c.png", "d.JPEG"]
    assert f"{images}: 2 other files left out, such as Photo.HEIC" in caplog.text
    assert [source.name for source in find_sources([str(images / "._a.png")])] == ["._a.png"]


def test_folders_are_opened_in_depth_and_keep_their_shape(
    run: Callable[..., tuple[int, str]], images: Path, tmp_path: Path
) -> None:
    (images / "deep" / "er").mkdir(parents=True)
    (images / ".thumbnails").mkdir()
    for name in ("deep/a.png", "deep/er/a.png", ".thumbnails/a.png"):
        (images / name).write_bytes((images / "a.png").read_bytes())
    assert run()[0] == 0
    content = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    assert names(content, "images") == ["a.png", "b.png", "c.png", "deep/a.png", "deep/er/a.png"]
    for entry in content["annotations"]:
        for folder in ("panoptic", "overlay"):
            assert (tmp_path / "out" / folder / entry["file_name"]).is_file()
    (images / "deep" / "a.jpg").write_bytes(b"")
    assert "deep/a.jpg and " in run()[1] and "would be written to one file" in run()[1]


def test_only_the_words_that_are_given(
    run: Callable[..., tuple[int, str]], images: Path, tmp_path: Path, scene: Image.Image
) -> None:
    words = ("--names", "red circle,zebra,grey fog|mist:thing", "--stuff", "sea", "--object-threshold", "0")
    file = tmp_path / "found.json"
    assert run(*words, "--only", "--json", file)[0] == 0
    found, panoptic = json.loads(file.read_text()), result(tmp_path / "out")
    assert [(entry["name"], entry["isthing"], entry["seen"]) for entry in found["classes"]] == [
        ("red circle", True, False),
        ("zebra", True, False),
        ("grey fog", True, True),
        ("sea", False, False),
    ]
    assert [c["name"] for c in panoptic["categories"]] == [entry["name"] for entry in found["classes"]]
    for entry, annotation in zip(found["images"], panoptic["annotations"], strict=True):
        assert (entry["width"], entry["height"]) == scene.size and entry["ms"] > 0 and entry["segments"]
        for segment, same in zip(entry["segments"], annotation["segments_info"], strict=True):
            assert all(segment[field] == same[field] for field in ("id", "category_id", "area", "bbox"))
    assert run(*words)[0] == 0
    assert len(result(tmp_path / "out")["categories"]) == 56 + 2


def test_a_smaller_score_leaves_out_segments_and_moves_no_other(
    run: Callable[..., tuple[int, str]], images: Path, tmp_path: Path
) -> None:
    file = tmp_path / "found.json"

    def found(*words: str) -> tuple[list[Any], np.ndarray]:
        assert run("--object-threshold", "0", "--overlap-threshold", "0.01", "--json", file, *words)[0] == 0
        with Image.open(tmp_path / "out" / "panoptic" / "a.png") as png:
            return json.loads(file.read_text())["images"][0]["segments"], np.asarray(png)[..., 0]

    every, ids = found()
    scores = sorted(segment["score"] for segment in every)
    assert len(scores) > 2 and scores[0] < scores[-1]
    limit = (scores[0] + scores[-1]) / 2
    some, fewer = found("--min-score", str(limit))
    kept = [segment for segment in every if segment["score"] >= limit]
    assert [{**segment, "id": 0} for segment in some] == [{**segment, "id": 0} for segment in kept]
    for old, new in zip(kept, some, strict=True):
        assert np.array_equal(ids == old["id"], fewer == new["id"])
    assert (fewer[np.isin(ids, [segment["id"] for segment in kept], invert=True)] == 0).all()
    assert run("--min-score", "2")[1].endswith("min_score must lie between 0 and 1, not 2")


def test_a_seen_offset_turns_segments_to_unseen_classes(
    run: Callable[..., tuple[int, str]], images: Path, tmp_path: Path
) -> None:
    file = tmp_path / "found.json"
    for offset, seen in (("1", False), ("-1", True)):
        assert run("--seen-offset", offset, "--json", file)[0] == 0
        segments = [s for entry in json.loads(file.read_text())["images"] for s in entry["segments"]]
        assert segments and all(segment["seen"] == seen for segment in segments)


def test_standard_input_to_standard_output(
    checkpoint: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stdin:
        buffer = io.BytesIO((images / "a.png").read_bytes())
        isatty = staticmethod(lambda: False)

    monkeypatch.setattr(sys, "stdin", Stdin)
    monkeypatch.chdir(tmp_path)
    words = ("predict", "--checkpoint", checkpoint, "--images", "-", "--json", "-", "--threads", "1")
    capsys.readouterr()
    assert main(words) == 0
    output = capsys.readouterr()
    content = json.loads(output.out)  # and nothing else
    assert names(content, "images") == ["stdin"] and content["skipped"] == content["unfinished"] == []
    assert "stdin" in output.err and "96 x 64" in output.err  # the table
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    monkeypatch.setattr(Stdin, "isatty", staticmethod(lambda: True))
    assert main(words) == 2 and "is a terminal" in capsys.readouterr().err


def test_the_frames_of_a_video_are_images_and_its_overlay_a_video(
    run: Callable[..., tuple[int, str]], images: Path, tmp_path: Path, scene: Image.Image, capsys: Any
) -> None:
    for path in images.iterdir():
        path.unlink()
    clip = VideoWriter(images / "clip.mp4", Fraction(10))
    still = np.asarray(scene)
    for shift in range(6):
        clip.add(np.roll(still, 8 * shift, axis=1))
    clip.close()
    scene.save(images / "photo.png")
    file = tmp_path / "found.json"
    assert run("--every", "2", "--json", file)[0] == 0
    content = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    assert names(content, "images") == ["clip/000000.png", "clip/000002.png", "clip/000004.png", "photo.png"]
    assert [image["id"] for image in content["images"]] == [1, 2, 3, 4]
    assert all((tmp_path / "out" / "panoptic" / e["file_name"]).is_file() for e in content["annotations"])
    entries = json.loads(file.read_text())["images"]
    assert [(e.get("video"), e.get("frame")) for e in entries] == [*(("clip.mp4", n) for n in (0, 2, 4)), (None, None)]

    drawn = [image for _, image in read_frames(tmp_path / "out" / "overlay" / "clip.mp4")]
    assert len(drawn) == 3
    with Image.open(tmp_path / "out" / "overlay" / "photo.png") as overlay:
        assert drawn[0].shape[:2] == overlay.size[::-1]
        # the same picture, but for H.264, which halves the resolution of colours: its first frame is the photo
        assert np.abs(drawn[0].astype(int) - np.asarray(overlay.convert("RGB"))).mean() < 12
    page = (tmp_path / "out" / "index.html").read_text()
    assert 'src="overlay/clip.mp4" controls' in page and 'src="overlay/photo.png"' in page and "3 frames" in page

    (images / "broken.mp4").write_bytes(b"no video")
    assert f"video {images / 'broken.mp4'} cannot be read" in run()[1]
    assert run("--skip-bad")[0] == 0


def test_the_page_leads_to_every_picture_and_needs_no_network(
    run: Callable[..., tuple[int, str]], images: Path, tmp_path: Path
) -> None:
    (images / "a.png").rename(images / "a & <b>.png")
    assert run()[0] == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "a &amp; &lt;b&gt;.png" in page and "<b>.png" not in page and "http" not in page
    for path in (tmp_path / "out" / "overlay").iterdir():
        assert f'src="overlay/{quote(path.name)}"' in page


def test_photographs_of_a_teacher_that_knows_scenes_alone_are_warned_of_once(
    run: Callable[..., tuple[int, str]], images: Path, scene: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    assert run()[0] == 0
    assert "photographs" not in caplog.text
    for name in "bc":
        scene.resize((480, 320)).save(images / f"{name}.png")
    assert run()[0] == 0
    (warning,) = [record.message for record in caplog.records if "photographs" in record.message]
    assert warning.startswith("b.png: ") and "480 x 320" in warning and "\n" not in warning


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only",), "--only chooses among --names and --stuff alone"),
        (("--every", "0"), "--every must be at least 1"),
        (("--names", "sky:stuf"), "did you mean 'stuff'?"),
        (("--json", "no/such/file.json"), "folder no/such not found"),
        (("--names", "zebra,zebra"), "'zebra' is given twice"),
        (("--seen-offset", "nan"), "seen_offset must be a finite number"),
    ],
)
def test_mistakes_in_the_words(
    run: Callable[..., tuple[int, str]], images: Path, words: tuple[str, ...], message: str
) -> None:
    status, line = run(*words)
    assert status == 2 and message in line
