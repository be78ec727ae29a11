"""The page of `zs-seg app`: what its server answers, and the page itself in a real browser."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium
from lively import lively
from PIL import Image
from pycocotools import mask as coco_mask
from tiny import QUIET, build, tiny_config

from flows import app
from flows.cli import main
from pipeline.inference.predictor import Predictor
from storage.shards import Shards
from storage.store import Store

pytestmark = pytest.mark.slow  # the shared checkpoint


@pytest.fixture(scope="module")
def server(shared_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[app.Server]:
    """The page of a checkpoint with segments to look at, in the place of one of the shared store's."""
    ref = build(shared_store, tiny_config(), until="v2c")["v2c"].recipe.ref
    trained = shared_store.path(ref)
    folder = lively(trained, tmp_path_factory.mktemp("lively"))
    (folder / "manifest.json").write_bytes((trained / "manifest.json").read_bytes())
    server = app.listen("127.0.0.1", 0)
    server.page = app.Page(Predictor.load(folder, shared_store, QUIET), folder, shared_store, title="tiny")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def scene(server: app.Server) -> bytes:
    return server.page.validation(0).image


def ask(server: app.Server, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, str]:
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"))
    data = json.dumps(body) if isinstance(body, dict) else body
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), answer.headers["Content-Type"]


def look(server: app.Server, data: bytes) -> dict[str, Any]:
    status, body, _ = ask(server, "POST", "/look", data)
    assert status == 200, body
    return json.loads(body)


def wish(number: int, **more: Any) -> dict[str, Any]:
    return {"image": number, "object_threshold": 0.2, "overlap_threshold": 0.05, **more}


def test_the_checkpoint_and_its_validation_images(server: app.Server, shared_store: Store) -> None:
    about = json.loads(ask(server, "GET", "/about")[1])
    assert about["title"] == "tiny" and len(about["classes"]) == 56 and about["validation"] == 10
    assert about["defaults"]["object_threshold"] == server.page.predictor.model.meta.object_threshold
    shards = Shards(shared_store.path(build(shared_store, tiny_config(), until="shard")["shard"].recipe.ref))
    assert len(shards.counts("val")) > 1
    seen = set()
    for number in range(10):
        status, body, kind = ask(server, "GET", f"/validation/{number}")
        assert (status, kind) == (200, "image/jpeg")
        seen.add(body)
    assert len(seen) == 10
    assert ask(server, "GET", "/validation/10")[0] == 400


def test_an_image_is_looked_at_once_and_named_often(server: app.Server, scene: bytes) -> None:
    answer = look(server, scene)
    assert (answer["width"], answer["height"], answer["notes"]) == (96, 96, [])
    status, body, _ = ask(server, "POST", "/name", wish(answer["image"], words=["zebra:stuff", "<b>|c"], only=True))
    assert status == 200
    segments = json.loads(body)["segments"]
    assert {segment["name"] for segment in segments} <= {"zebra", "<b>, c"} and segments
    assert all(not segment["seen"] for segment in segments)

    found = ask(server, "POST", "/segments.json", wish(answer["image"], file_name="a.png"))
    coco = json.loads(found[1])
    assert found[2] == "application/json" and coco["images"][0]["file_name"] == "a.png"
    content = json.loads(ask(server, "POST", "/name", wish(answer["image"]))[1])
    assert [entry["category_id"] for entry in coco["annotations"]] == [s["category_id"] for s in content["segments"]]
    picture = Image.open(io.BytesIO(ask(server, "POST", "/segments.png", wish(answer["image"]))[1]))
    assert picture.format == "PNG" and max(picture.size) >= 640
    ids = np.asarray(Image.open(io.BytesIO(base64.b64decode(content["map"].partition(",")[2]))))
    for entry, segment in zip(coco["annotations"], content["segments"], strict=True):
        decoded: Any = coco_mask.decode(entry["segmentation"])
        assert np.array_equal(decoded.astype(bool), ids[..., 0] == segment["id"])


def test_large_images_are_reduced_and_it_is_said(server: app.Server) -> None:
    file = io.BytesIO()
    Image.new("RGB", (2560, 100), "red").save(file, format="PNG")
    answer = look(server, file.getvalue())
    assert (answer["width"], answer["height"]) == (1280, 50)
    assert answer["notes"][0] == "2560 x 100 pixels were reduced to 1280 x 50."
    assert "mean nothing on photographs" in answer["notes"][1]


def test_only_the_last_images_are_held(server: app.Server, scene: bytes) -> None:
    numbers = [look(server, scene)["image"] for _ in range(app.KEPT + 1)]
    statuses = [ask(server, "POST", "/name", wish(number))[0] for number in numbers]
    assert statuses == [400, *[200] * app.KEPT]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/look", b"no image", "the image is no JPEG"),
        ("/name", b"{", "a wish must be JSON"),
        ("/name", b"[]", "a wish must be a JSON object"),
        ("/name", {"image": 0}, "the image is no longer held"),
        ("/name", {"min_score": "x"}, "must be numbers"),
        ("/name", {"image": []}, "must be numbers"),
        ("/name", {"words": ["sky:stuf:thing"]}, "did you mean 'stuff'?"),
    ],
)
def test_mistakes_come_as_one_line(server: app.Server, path: str, body: Any, message: str) -> None:
    status, answer, _ = ask(server, "POST", path, body)
    assert status == 400 and message in json.loads(answer)["error"]


def test_who_may_ask(server: app.Server, scene: bytes) -> None:
    """The page, and no page of another site: neither by this machine's address nor by a name that leads here."""
    own = server.address.removeprefix("http://")
    assert ask(server, "GET", "/about", Origin=f"http://{own}")[0] == 200
    assert ask(server, "POST", "/look", scene, Origin="http://evil.example")[0] == 403
    assert ask(server, "GET", "/about", Host="evil.example:80")[0] == 403
    assert ask(server, "GET", "/../pyproject.toml")[0] == 404
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"))
    connection.putrequest("POST", "/look")
    connection.putheader("Content-Length", str(app.LARGEST + 1))
    connection.endheaders()
    answer = connection.getresponse()
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert answer.status == 400 and b"20 MB at most" in answer.read()


def test_a_port_that_is_taken_is_named_before_anything_is_loaded(
    server: app.Server, shared_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    key = build(shared_store, tiny_config(), until="v2c")["v2c"].recipe.ref.key
    start = time.perf_counter()
    words = ("app", "--store", str(shared_store.root), "--checkpoint", key, "--port", str(server.server_address[1]))
    assert main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be served (Address already in use); pass another --port" in line
    assert time.perf_counter() - start < 5


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def test_in_a_browser(browser: Any, server: app.Server, tmp_path: Path) -> None:  # noqa: PLR0915
    """Upload, words, things and stuff, sliders, hover, downloads; every request goes to the page's own server."""
    with Image.open(io.BytesIO(server.page.validation(1).image)) as scene:
        scene.resize((288, 192)).save(tmp_path / "photo.png")
    # the policy also forbids what Playwright evaluates
    page = browser.new_page(viewport={"width": 1440, "height": 900}, bypass_csp=True)
    problems: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.address)
    page.wait_for_selector("#strip img")

    def draws() -> int:
        return int(page.evaluate("document.body.dataset.draws || 0"))

    def after(step: Any) -> None:
        before = draws()
        step()
        page.wait_for_function(f"(document.body.dataset.draws || 0) > {before}")

    def slide(name: str, value: float) -> None:
        page.evaluate(f"document.getElementById('{name}').value = {value}; document.getElementById('{name}').oninput()")

    def names() -> list[str]:
        return page.locator("#list li span").all_inner_texts()

    after(lambda: page.set_input_files("#file", tmp_path / "photo.png"))
    assert page.locator("#picture").evaluate("image => image.naturalWidth") == 576
    assert "mean nothing on photographs" in page.locator("#note").inner_text()

    page.click("text=only these")
    assert "Add a word first" in page.locator("#error").inner_text()
    page.fill("#word", "zebra, grass:stuff, sofa|couch")
    after(lambda: page.click("#form button"))
    assert page.locator(".chip b").all_inner_texts() == ["zebra", "grass", "sofa|couch"]
    assert page.locator(".chip button:nth-of-type(1)").all_inner_texts() == ["thing", "stuff", "thing"]
    after(lambda: page.click("text=only these"))
    after(lambda: slide("object_threshold", 0))
    after(lambda: slide("overlap_threshold", 0))
    assert set(names()) <= {"zebra", "grass", "sofa, couch"} and names()
    assert page.locator("#error").is_hidden()
    many = len(names())
    after(lambda: slide("min_score", 0.99))
    assert len(names()) < many
    after(lambda: slide("min_score", 0))
    assert len(names()) == many
    times = []
    for value in (0.01, 0.02, 0.03):
        after(lambda value=value: slide("seen_offset", value))
        times.append(int(page.locator("#time").get_attribute("data-ms")))
    assert min(times) < 300  # of one thread, beside other tests

    # hover shows name and score
    page.locator("#list li").first.hover()
    assert page.locator("#list li.on").count() == 1 and page.locator("#glow").is_visible()
    box = page.locator("#picture").bounding_box()
    found = set()
    for x, y in ((x, y) for x in (0.1, 0.3, 0.5, 0.7, 0.9) for y in (0.1, 0.3, 0.5, 0.7, 0.9)):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        if page.locator("#tip").is_visible():
            found.add(page.locator("#tip").inner_text().split(" 0.")[0].split(" 1.")[0])
    assert found and found <= set(names())

    for button, suffix in (("#png", ".png"), ("#json", ".json")):
        with page.expect_download() as waiting:
            page.click(button)
        assert waiting.value.suggested_filename == f"photo_segments{suffix}"
        waiting.value.save_as(tmp_path / f"found{suffix}")
    assert len(json.loads((tmp_path / "found.json").read_text())["annotations"]) == many
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.size == (576, 384)

    after(lambda: page.locator("#strip button").nth(2).click())
    assert page.locator("#picture").evaluate("image => image.naturalWidth") == 672
    for _ in range(3):
        after(page.locator(".chip button:nth-of-type(2)").first.click)
    assert page.locator("[name=only]").first.is_checked()  # nothing is left to choose from alone
    after(lambda: page.check("#teacher"))
    assert page.locator("#alpha").is_visible()

    page.set_viewport_size({"width": 420, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    assert not problems
    assert {url.partition(":")[0] for url in asked} <= {"http", "data", "blob"}
    assert all(url.startswith((server.address, "data:", f"blob:{server.address}")) for url in asked)
    page.close()
