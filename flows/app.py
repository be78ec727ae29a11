"""`zs-seg app`: a page on this machine to drop an image and type words.

The standard library's server and one HTML file, `app.html`: the page asks for nothing but this server (its security
policy forbids more), and no package is needed beyond those of the commands.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import logging
import threading
import time
from collections import OrderedDict
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flows.request import open_runtime, open_store
from pipeline.data.images import decode_image
from pipeline.inference.config import ALPHA, BETA
from pipeline.inference.model import checkpoint_folder
from pipeline.inference.words import read_words
from storage.errors import UserError
from storage.keys import Ref
from storage.lineage import Lineage
from storage.store import MANIFEST, Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from pipeline.inference.predictor import Chooser, Prediction, Predictor, Seen
    from storage.shards import Sample

log = logging.getLogger(__name__)

LARGEST = 20 * 2**20  # bytes of an uploaded file
LONGEST = 1280  # pixels: larger images are shown and segmented at this long side
KEPT = 4  # images whose masks are held
NUMBERS = ("object_threshold", "overlap_threshold", "seen_offset", "min_score", "alpha", "beta")
POLICY = "default-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'"
HERE = ("127.0.0.1", "localhost")


def app(options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C. Raises UserError where the port is taken, and as `predict` for the checkpoint."""
    store = open_store(options)
    folder = checkpoint_folder(store, options.checkpoint)
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port must lie in 0..65535, not {options.port}")
    server = listen(options.host, options.port)  # before the slow imports
    with server:
        from pipeline.inference.predictor import Predictor

        predictor = Predictor.load(folder, store, open_runtime(options), options.teacher)
        server.page = Page(predictor, folder, store, title=options.checkpoint)
        if options.host not in HERE:
            log.warning("%s: whoever reaches this address can use the page", options.host)
        print(f"zs-seg app: {server.address} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


class Page:
    """What the page asks for. One image is computed at a time."""

    def __init__(self, predictor: Predictor, folder: Path, store: Store, *, title: str) -> None:
        self.predictor, self.folder, self.store, self.title = predictor, folder, store, title
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._seen: OrderedDict[int, Seen] = OrderedDict()

    def about(self) -> dict[str, Any]:
        """The checkpoint: its classes, thresholds, and the number of validation images at hand."""
        meta = self.predictor.model.meta
        columns = zip(meta.classes.names, meta.classes.isthing, meta.classes.seen, strict=True)
        return {
            "title": self.title,
            "stage": {"v2c": "inductive, stage 1", "cpa": "transductive, stage 3"}[meta.stage],
            "classes": [{"name": name, "isthing": isthing, "seen": seen} for name, isthing, seen in columns],
            "defaults": {**vars(meta.thresholds), "min_score": 0.0, "alpha": ALPHA, "beta": BETA},
            "validation": sum(self._counts),
            "megabytes": LARGEST // 2**20,
        }

    @cached_property
    def _tars(self) -> Sequence[Path]:
        """Those of the validation images that the checkpoint's run had; none where the store lacks them."""
        return self._shards.tars("val") if self._shards else []

    @cached_property
    def _counts(self) -> Sequence[int]:
        return self._shards.counts("val") if self._shards else []

    @cached_property
    def _shards(self) -> Any:
        from storage.shards import Shards

        try:
            made = json.loads((self.folder / MANIFEST).read_bytes())
            line = Lineage(self.store).line(Ref(kind=made["kind"], key=made["key"]))
        except (OSError, ValueError, KeyError):
            return None
        ref = line["shard"].ref if "shard" in line else None
        return Shards(self.store.path(ref)) if ref and self.store.state(ref) == "fresh" else None

    def validation(self, number: int) -> Sample:
        """A validation image, counted from 0. Raises UserError where there is none."""
        from storage.shards import read_shard

        first = 0
        for tar, size in zip(self._tars, self._counts, strict=True):
            if first <= number < first + size:
                return next(iter(read_shard(tar, {number - first})))
            first += size
        raise UserError(f"there is no validation image {number}")

    def look(self, data: bytes) -> dict[str, Any]:
        """An image file's content through the network; the number by which `name` knows it.

        Raises UserError for what is no image.
        """
        import numpy as np
        from PIL import Image

        from pipeline.inference.predictor import foreign

        image = decode_image(data, "the image")
        height, width = image.shape[:2]
        notes = []
        if max(height, width) > LONGEST:
            share = LONGEST / max(height, width)
            size = max(1, round(width * share)), max(1, round(height * share))
            image = np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
            notes.append(f"{width} x {height} pixels were reduced to {size[0]} x {size[1]}.")
        if reason := foreign(self.predictor.model, image):
            notes.append(f"{reason[0].upper()}{reason[1:]}.")
        with self._lock:
            start = time.perf_counter()
            seen = self.predictor.look(image)
            seconds = time.perf_counter() - start
            number = next(self._numbers)
            self._seen[number] = seen
            while len(self._seen) > KEPT:
                self._seen.popitem(last=False)
        height, width = image.shape[:2]
        return {"image": number, "width": width, "height": height, "ms": 1000 * seconds, "notes": notes}

    def name(self, wish: dict[str, Any]) -> dict[str, Any]:
        """The segments of an image for these words and numbers, with the picture (JPEG) and the map of ids (PNG) as
        data addresses."""
        from pipeline.report.overlay import colours_of
        from storage.shards import encode_ids

        start = time.perf_counter()
        seen, _, found = self._named(wish)
        colours = colours_of(segment.name for segment in found.segments)
        picture = _picture(seen.image, found)
        content = {
            "segments": [{**segment.plain(), "colour": colours[segment.name]} for segment in found.segments],
            "picture": _address(_file(picture, "JPEG", quality=92), "image/jpeg"),
            "map": _address(encode_ids(found.ids), "image/png"),
        }
        return {**content, "ms": 1000 * (time.perf_counter() - start)}

    def png(self, wish: dict[str, Any]) -> bytes:
        """The picture as a PNG."""
        seen, _, found = self._named(wish)
        return _file(_picture(seen.image, found), "PNG")

    def coco(self, wish: dict[str, Any]) -> bytes:
        """The segments in COCO's format."""
        from pipeline.inference.export import ImagePrediction, coco_instances

        _, chooser, found = self._named(wish)
        name = str(wish.get("file_name") or "image.png")
        prediction = ImagePrediction(image_id=1, file_name=name, ids=found.ids, segments=found.segments)
        return json.dumps(coco_instances(prediction, chooser.vocabulary.categories), indent=1).encode()

    def _named(self, wish: dict[str, Any]) -> tuple[Seen, Chooser, Prediction]:
        """Raises UserError for words and numbers that cannot be, and for an image that is held no more."""
        try:
            words = read_words([str(word) for word in wish.get("words", [])])
            number = int(wish.get("image", 0))
            numbers: dict[str, Any] = {name: float(wish[name]) for name in NUMBERS if wish.get(name) is not None}
        except (TypeError, ValueError) as error:
            raise (
                error if isinstance(error, UserError) else UserError("the numbers of a wish must be numbers")
            ) from error
        with self._lock:
            seen = self._seen.get(number)
            if seen is None:
                raise UserError("the image is no longer held; open it again")
            flags: dict[str, Any] = {name: bool(wish.get(name)) for name in ("only", "with_teacher")}
            chooser = self.predictor.chooser(words, **flags, **numbers)
            return seen, chooser, self.predictor.name(seen, chooser)


def _picture(image: np.ndarray, found: Prediction) -> Any:
    from pipeline.report.overlay import labels_of, overlay

    return overlay(image, found.ids, labels_of(found.segments, found.named))


def _file(picture: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return file.getvalue()


def _address(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


class Server(ThreadingHTTPServer):
    """Serves one `Page`."""

    daemon_threads = True
    page: Page

    @property
    def address(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"


def listen(host: str, port: int) -> Server:
    """A server on that address; port 0 takes a free one. Raises UserError where it cannot be had."""
    try:
        return Server((host, port), Handler)
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be served ({error.strerror}); pass another --port or --host") from error


class Handler(BaseHTTPRequestHandler):
    """The addresses of the page."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _get(self) -> tuple[bytes, str]:
        path, page = urlsplit(self.path).path, self.server.page
        if path == "/":
            return (Path(__file__).parent / "app.html").read_bytes(), "text/html; charset=utf-8"
        if path == "/about":
            return json.dumps(page.about()).encode(), "application/json"
        if path.startswith("/validation/") and (number := path.rsplit("/", 1)[1]).isdecimal():
            image = page.validation(int(number)).image
            return image, "image/png" if image.startswith(b"\x89PNG") else "image/jpeg"
        raise LookupError(path)

    def _post(self) -> tuple[bytes, str]:
        path, page, body = urlsplit(self.path).path, self.server.page, self._body()
        if path == "/look":
            return json.dumps(page.look(body)).encode(), "application/json"
        if path not in ("/name", "/segments.png", "/segments.json"):
            raise LookupError(path)
        try:
            wish = json.loads(body)
        except ValueError as error:
            raise UserError("a wish must be JSON") from error
        if not isinstance(wish, dict):
            raise UserError("a wish must be a JSON object")
        if path == "/segments.png":
            return page.png(wish), "image/png"
        if path == "/segments.json":
            return page.coco(wish), "application/json"
        return json.dumps(page.name(wish)).encode(), "application/json"

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            self.close_connection = True  # what was sent stays unread
            raise UserError(f"a file may have {LARGEST // 2**20} MB at most; make it smaller")
        return self.rfile.read(int(length))

    def _answer(self, make: Any) -> None:
        """Sends what `make` returns; a user's mistake as JSON with its line."""
        try:
            if not self._from_here():
                self.close_connection = True
                self._send(HTTPStatus.FORBIDDEN, b"asked from another page", "text/plain")
                return
            body, kind = make()
            self._send(HTTPStatus.OK, body, kind)
        except LookupError:
            self._send(HTTPStatus.NOT_FOUND, b"there is nothing here", "text/plain")
        except UserError as error:
            self._send(HTTPStatus.BAD_REQUEST, json.dumps({"error": str(error)}).encode(), "application/json")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _from_here(self) -> bool:
        """Is it the page itself that asks? Another site's page may send requests to this machine, by its address or by
        a name of its own that leads here."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if origin and urlsplit(origin).netloc != host:
            return False
        return self.server.server_address[0] not in HERE or urlsplit(f"//{host}").hostname in HERE

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request."""
