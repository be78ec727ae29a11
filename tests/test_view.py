"""The pages of all validation images: their numbers are the report's, their files stand alone, and in a browser they
sort, filter and enlarge."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium
from many_artefacts import demo_line, fill, note
from PIL import Image
from quarters import BENCHMARK, CLASSES, THRESHOLDS, perfect, quarters
from tiny import QUIET, build, tiny_config

from flows.cli import main
from pipeline.inference.maps import panoptic_map
from pipeline.report import view
from pipeline.report.page import SETTINGS
from pipeline.report.view import FATES, MAPS, PANELS, PREDICTIONS, is_fresh, write_versus, write_view
from pipeline.report.write import VIEW_PLACE, link_view, publish
from pipeline.scoring.metrics import PanopticQuality
from pipeline.scoring.records import PanopticScores, read_report
from pipeline.scoring.rows import GroundTruth
from pipeline.scoring.waterfall import pair
from storage.errors import UserError
from storage.keys import Ref
from storage.shards import Sample, Shards, decode_ids, decode_image, read_shard
from storage.store import Store

pytestmark = pytest.mark.slow  # a tiny run


@pytest.fixture(scope="module")
def report(shared_store: Store) -> Ref:
    """Of a network that was trained for long enough, and whose thresholds are low enough, to predict some segments."""
    tiny = tiny_config()
    network = replace(tiny.v2c, steps=60, batch=8, overlap_threshold=0.3, threshold_slack=100.0)
    return build(shared_store, replace(tiny, v2c=network))["evaluate"].recipe.ref


@pytest.fixture(scope="module")
def folder(shared_store: Store, report: Ref, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs") / "ti <b>ny" / "view"
    write_view(made, name="ti <b>ny", store=shared_store, report=report, runtime=QUIET)
    return made


def data_of(folder: Path) -> dict[str, Any]:
    text = (folder / "data.js").read_text()
    return json.loads(text[text.index("...{") + 3 : text.rindex("});")])


def map_of(folder: Path, image: int) -> dict[str, Any]:
    text = (folder / "maps" / f"{image:012d}.js").read_text()
    assert f', {image}, {{"truth"' in text
    return json.loads(text[text.index('{"truth"') : text.rindex(");")])


def places_of(png: str) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).astype(int)
    return pixels[..., 0] + 256 * pixels[..., 1]


def samples_of(store: Store, report: Ref) -> list[Sample]:
    shards = Shards(store.path(Ref.parse(store.open(report).manifest.inputs["shards"])))
    return [sample for tar in shards.tars("val") for sample in read_shard(tar)]


def test_found_lost_and_spurious_segments_are_the_reports_counts(
    shared_store: Store, report: Ref, folder: Path
) -> None:
    data, numbers = data_of(folder), read_report(shared_store.path(report) / "report.json")
    assert len(data["images"]) == numbers.settings.images == 10
    for c, name in enumerate(PREDICTIONS):
        row = numbers.rows[name]
        assert isinstance(row, PanopticScores)
        fates = [(k, of[c]) for image in data["images"] for k, *of in image[4]]
        tp, fn = (Counter(k for k, fate in fates if (fate == 0) == found and fate >= 0) for found in (True, False))
        fp = Counter(k for image in data["images"] for k in image[5][c])
        for k, one in enumerate(row.per_class):
            assert (tp[k], fp[k], fn[k]) == (one.tp, one.fp, one.fn), (name, one.name)
            assert data["classes"][k]["name"] == one.name and data["classes"][k]["seen"] == one.seen
        assert data["rows"][name] == {key: getattr(row, key) for key in ("sPQ", "uPQ", "hPQ")}
        assert {fate for _, fate in fates} - {0}, "nothing is lost, so nothing is tested"


def test_maps_and_images_are_those_of_the_shards(shared_store: Store, report: Ref, folder: Path) -> None:
    data = data_of(folder)
    for sample, entry in zip(samples_of(shared_store, report), data["images"], strict=True):
        assert entry[:3] == [sample.image_id, sample.width, sample.height]
        content, ids = map_of(folder, sample.image_id), decode_ids(sample)
        places = places_of(content["truth"]["png"])
        known = [0, *(segment.id for segment in sample.segments)]
        np.testing.assert_array_equal(np.array(known)[places], ids)
        for c, name in enumerate(PREDICTIONS):
            found, over = places_of(content[name]["png"]), content["over"][name]
            assert found.max() <= len(content[name]["segments"])
            for i, (j, share) in enumerate(over):
                mine = places == i + 1
                assert share == pytest.approx((mine & (found == j + 1)).sum() / mine.sum(), abs=1e-3)
                assert (mine & (found == j + 1)).sum() == np.bincount(found[mine]).max()
            spurious = [one["class"] for one in content[name]["segments"] if one.get("spurious")]
            assert spurious == entry[5][c]
            matched = [one["iou"] for one in content[name]["segments"] if "iou" in one]
            assert len(matched) == sum(of[c] == 0 for _, *of in entry[4]) and all(iou > 0.5 for iou in matched)
        stem = f"{sample.image_id:012d}.webp"
        with Image.open(folder / "images" / stem) as image, Image.open(folder / "thumbs" / stem) as strip:
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - decode_image(sample)).mean() < 8
            assert strip.size == (len(PANELS) * 160, 160)


def test_the_fate_of_a_segment_is_the_first_step_at_which_nothing_matches_it() -> None:
    """A perfect output, and one thing wrong at a time: the mask, the class within its group, the group, the score."""
    shown = quarters()
    gt = GroundTruth(shown, BENCHMARK)
    seen = np.array(BENCHMARK.seen)
    same = {k: next((j for j in range(len(seen)) if j != k and seen[j] == seen[k]), None) for k in range(len(seen))}
    other = {k: next(j for j in range(len(seen)) if seen[j] != seen[k]) for k in range(len(seen))}

    def fates(change: str) -> list[int]:
        output, logits = perfect(shown)
        pairs = pair(gt, output)
        query, k = int(pairs.query[0]), int(pairs.classes[0])
        if change == "masks":
            output.masks[query] = -20.0
            output.masks[query, 0, 0] = 20.0
        elif change == "classification":
            assert same[k] is not None
            logits[query, k], logits[query, same[k]] = -20.0, 20.0
        elif change == "bias":
            logits[query, k], logits[query, other[k]] = 10.0, 20.0
        elif change == "selection":
            logits[query] = -20.0
            logits[query, k] = -10.0
        pairs, quality = pair(gt, output), PanopticQuality([c.id for c in BENCHMARK.categories])
        names = pairs.classes, *pairs.choices(logits, seen)
        levels = [panoptic_map(output, pairs.certain(one, logits), CLASSES, THRESHOLDS) for one in names]
        levels.append(panoptic_map(output, logits, CLASSES, THRESHOLDS))
        matches = [quality.match(gt.ids, shown.segments, *level, image=1) for level in levels]
        return view.fates(shown.segments, matches)

    assert set(fates("nothing")) == {0}
    for number, name in enumerate(list(FATES)[1:], 1):
        assert fates(name)[0] == number, name


def test_a_folder_belongs_to_one_report_and_appears_whole_or_not_at_all(
    shared_store: Store, report: Ref, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_fresh(folder, report)
    assert not is_fresh(folder, Ref(kind="report", key="0" * 16)) and not is_fresh(tmp_path, report)
    with monkeypatch.context() as patch:
        patch.setattr(view, "VERSION", view.VERSION + 1)
        assert not is_fresh(folder, report)
    older = tmp_path / "view"
    older.mkdir()
    (older / "kept").touch()

    def full(*_: object, **__: object) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_view(older, name="x", store=shared_store, report=report, runtime=QUIET)
    assert [path.name for path in tmp_path.rglob("*")] == ["view", "kept"]


def test_pages_name_only_files_of_their_own_and_escape_names(folder: Path) -> None:
    html = (folder / "index.html").read_text()
    assert "<title>zs-seg ti &lt;b&gt;ny</title>" in html and "<b>" not in html and "http" not in html
    for name in re.findall(r"(?:src|href)=\"?([^\s\">]+)", html):
        assert (folder / name).is_file()
    for name in ("view.js", "view.css"):
        text = (folder / name).read_text()
        assert "http" not in text and "innerHTML" not in text and "@import" not in text


def test_two_runs_lie_side_by_side_if_they_have_the_same_images_and_classes(folder: Path, tmp_path: Path) -> None:
    about = json.loads((folder / "view.json").read_text())
    for what, change in (("validation images", {"shards": "shards/0"}), ("classes", {"classes": "0"})):
        (tmp_path / "view.json").write_text(json.dumps(about | change))
        with pytest.raises(UserError, match=f"runs one and other have other {what}"):
            write_versus(folder, tmp_path, names=("one", "other"))
    (tmp_path / "view.json").write_text(json.dumps(about))
    page = write_versus(folder, tmp_path, names=("one", "other"))
    first, second = re.findall(r'<script src="([^"]+)/data.js">', page.read_text())
    assert first == "." and (folder / second).resolve() == tmp_path.resolve()
    page.unlink()


def test_the_published_report_links_to_pages_of_its_own_artefact_only(
    shared_store: Store, report: Ref, folder: Path
) -> None:
    runs, source = folder.parent, shared_store.path(report)
    link = '<a href="view/index.html">all validation images</a>'
    lineage = {"evaluate": {"ref": str(report), "seconds": 1.0}}
    publish(source, runs, preset="demo", lineage=lineage)
    assert link in (runs / "report.html").read_text()
    publish(source, runs, preset="demo", lineage={"evaluate": {"ref": "report/0123456789abcdef", "seconds": 1.0}})
    html = (runs / "report.html").read_text()
    assert link not in html and html.count(VIEW_PLACE) == 1
    publish(source, runs / "bare", preset="demo", lineage=lineage)
    assert link not in (runs / "bare" / "report.html").read_text()
    (runs / "bare" / "view").symlink_to(folder)
    for _ in range(2):
        link_view(runs / "bare")
        assert (runs / "bare" / "report.html").read_text().count(link) == 1
    link_view(runs / "nowhere")


def test_the_command_refuses_in_one_line_what_is_no_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "store")
    fill(store, demo_line()[:-1])
    note(store, "demo", demo_line())
    for words, reason in (
        (("demo",), "evaluate of run demo"),
        (("demo:v2c",), "is no report"),
        (("demo", "demo", "demo"), "at most two"),
        (("no-such",), "no artefact and no run 'no-such'"),
    ):
        assert main(("view", *words, "--store", str(store.root))) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def opened(browser: Any, folder: Path, name: str = "index.html", **options: Any) -> Any:
    page = browser.new_page(**options)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto((folder / name).as_uri())
    page.wait_for_selector(".card")
    return page


def test_in_a_browser_it_sorts_and_filters(browser: Any, folder: Path) -> None:
    """Opened from the disk; the images shown, and their order, are those that the data has."""
    data, page = data_of(folder), opened(browser, folder)

    def shown() -> list[int]:
        return [int(text.split()[1]) for text in page.eval_on_selector_all(".card", "all => all.map(one => one.title)")]

    quality = {image[0]: image[3][1] for image in data["images"]}
    assert shown() == sorted(quality, key=lambda image: (quality[image], image))
    page.select_option("[name=order]", "highest")
    assert shown() == sorted(quality, key=lambda image: (-quality[image], image))
    page.select_option("[name=order]", "number")
    for cause in (number for number, _ in enumerate(FATES)):
        page.select_option("[name=cause]", str(cause))
        assert shown() == [i[0] for i in data["images"] if any(of[1] == cause for _, *of in i[4])], cause
    page.select_option("[name=cause]", "lost")
    page.select_option("[name=group]", "unseen")
    unseen = {k for k, one in enumerate(data["classes"]) if not one["seen"]}
    assert shown() == [i[0] for i in data["images"] if any(k in unseen and of[1] > 0 for k, *of in i[4])]
    page.select_option("[name=cause]", "spurious")
    page.select_option("[name=group]", "")
    page.select_option("[name=checkpoint]", "inductive")
    k = next(k for image in data["images"] for k in image[5][0])
    page.select_option("[name=class]", data["classes"][k]["name"])
    expected = [image[0] for image in data["images"] if k in image[5][0]]
    assert shown() == expected and f"{len(expected)} of 10 images" in page.inner_text("#count")
    address = page.url
    page.reload()
    page.wait_for_selector(".card")
    assert page.url == address and shown() == expected  # the address keeps the choice
    assert page.faults == []


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (420, "dark")])
def test_in_a_browser_an_image_is_enlarged_and_truth_and_predictions_are_toggled(
    browser: Any, folder: Path, width: int, scheme: str
) -> None:
    page = opened(browser, folder, viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")
    broken = "() => [...document.images].filter(one => one.complete && !one.naturalWidth).map(one => one.src)"
    assert page.evaluate(broken) == []
    page.click(".card >> nth=0")
    page.wait_for_selector("dialog[open] .segments")
    pixels = "() => { const one = document.querySelector('dialog canvas'); return one.toDataURL() }"
    shown = []
    titles = [SETTINGS[name].name for name in PREDICTIONS]
    for number, name in enumerate(("image", "ground truth", *titles), 1):
        page.keyboard.press(str(number))
        page.wait_for_selector(f"dialog button[aria-pressed=true]:text-is('{name}')")
        shown.append(page.evaluate(pixels))
    assert len(set(shown)) == 1 + len(MAPS)  # the predictions differ from each other and from the truth
    page.keyboard.press("2")
    page.wait_for_selector("dialog button[aria-pressed=true]:text-is('ground truth')")
    image = next(i for i in data_of(folder)["images"] if i[0] == int(page.inner_text("dialog h2").split()[1]))
    places = places_of(map_of(folder, image[0])["truth"]["png"])
    y, x = np.argwhere(places > 0)[len(places) // 2]
    box = page.locator("dialog canvas").bounding_box()
    page.mouse.move(
        *((at + 0.5) / places.shape[1] * box["width"] + start for at, start in ((x, box["x"]), (y, box["y"])))
    )
    name = data_of(folder)["classes"][image[4][places[y, x] - 1][0]]["name"]
    assert page.inner_text(".tip").split(",")[0] == name
    before = page.inner_text("dialog h2")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("before => document.querySelector('dialog h2').innerText !== before", arg=before)
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="hidden")
    assert page.faults == []


def test_in_a_browser_two_runs_lie_side_by_side(browser: Any, folder: Path) -> None:
    made = write_versus(folder, folder, names=("one", "other"))
    page = opened(browser, folder, made.name)
    assert page.locator(".card >> nth=0").locator("img").count() == 4
    page.select_option("[name=order]", "behind")
    page.click(".card >> nth=0")
    page.wait_for_selector("dialog[open] .segments")
    assert page.locator("dialog canvas").count() == page.locator("dialog .segments").count() == 2
    assert page.faults == []
    made.unlink()
