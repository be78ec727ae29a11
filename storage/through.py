"""Read-through: an artefact of which the tars stay in a remote, and are fetched when they are read.

Its folder holds the manifest, all files but the tars, and a note of where these are (`store.ELSEWHERE`). A tar is
downloaded into a cache beside the store's artefacts under a temporary name, hashed, and renamed; what was used least of
late goes when the cache is full. Every time that a tar is opened its bytes are hashed: what is read is the manifest's, always.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

from storage.atomic import delete, write_text
from storage.errors import UserError
from storage.keys import Ref
from storage.remote import Remote
from storage.store import ELSEWHERE, MANIFEST, Manifest, Store
from storage.transfer import BLOCK, receive

log = logging.getLogger(__name__)

CACHE = ".cache"  # below the store
TARS = ".tar"  # the end of the names of files that stay in the remote
THREADS = 4  # files fetched ahead at a time
ABANDONED = 600.0  # seconds without a write after which nobody is fetching a file any more
# Tars that must fit at once: those that a training reads and those that it reads next, four of each.
AT_ONCE = 8


def leave(store: Store, remote: Remote, manifest: Manifest, *, size: int) -> None:
    """Make an artefact complete in the store whose tars are read through a cache of at most `size` bytes.

    Raises UserError where `AT_ONCE` tars do not fit into the cache, and as `Remote`.
    """
    tars = [entry["bytes"] for name, entry in manifest.files.items() if name.endswith(TARS)]
    if size < (need := sum(sorted(tars)[-AT_ONCE:])):
        raise UserError(
            f"a cache of {size / 1e9:.3g} GB is too small for {manifest.ref}, of which {AT_ONCE} tars are used at once; "
            f"it takes {need / 1e9:.3g} GB or more"
        )
    small = {name: entry for name, entry in manifest.files.items() if not name.endswith(TARS)}

    def fetch(folder: Path) -> None:
        # A cut-off pull may have left tars, which would count as they are, torn ones too.
        for left in folder.iterdir():
            delete(left)
        for name, entry in small.items():
            data = remote.read(f"{manifest.ref}/{name}")
            if data is None or hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise UserError(f"{manifest.ref} is damaged in {remote} ({name}); {remote.anew(manifest.ref)}")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        write_text(folder / ELSEWHERE, json.dumps({"url": remote.url, "bytes": size}))

    receive(store, remote, manifest, fetch)


def opened(path: Path) -> IO[bytes]:
    """A file of an artefact for reading, from the cache if it stayed in a remote.

    Raises FileNotFoundError for a file that is neither here nor noted, UserError as `Remote` and where the bytes there
    are not the manifest's.
    """
    elsewhere = None if path.exists() else _elsewhere(path)
    return path.open("rb") if elsewhere is None else elsewhere.open(path.name)


def there(path: Path) -> bool:
    """Whether a file of an artefact can be read, here or through the cache."""
    return path.exists() or _elsewhere(path) is not None


def ahead(paths: Iterable[Path]) -> None:
    """Begin to fetch files that are soon read, where they are not here."""
    for path in paths:
        if not path.exists() and (elsewhere := _elsewhere(path)):
            elsewhere.begin(path.name)


def _elsewhere(path: Path) -> _Elsewhere | None:
    note = path.parent / ELSEWHERE
    return _open(path.parent, note.stat().st_mtime_ns) if note.is_file() else None


@cache
def _open(folder: Path, _changed: int) -> _Elsewhere:
    return _Elsewhere(folder)


class _Elsewhere:
    """The files of one artefact that stayed in a remote."""

    def __init__(self, folder: Path) -> None:
        note = json.loads((folder / ELSEWHERE).read_bytes())
        self.ref = Ref(kind=folder.parent.name, key=folder.name)
        self.remote, self.size = Remote(note["url"]), int(note["bytes"])
        self.files = Manifest.parse((folder / MANIFEST).read_bytes(), self.ref).files
        self.cache = folder.parents[1] / CACHE
        self.pool = ThreadPoolExecutor(THREADS)
        self.begun: dict[str, Future[None]] = {}

    def begin(self, name: str) -> Future[None]:
        """Fetch a file in another thread, unless that has begun."""
        if (future := self.begun.get(name)) is None:
            future = self.begun[name] = self.pool.submit(self._fetch, name)
            future.add_done_callback(lambda _: self.begun.pop(name, None))
        return future

    def open(self, name: str) -> IO[bytes]:
        """The file, its bytes hashed; fetched where it is not in the cache, or damaged there."""
        while True:
            try:
                file = self._path(name).open("rb")
            except FileNotFoundError:
                self.begin(name).result()
                continue
            if hashlib.file_digest(file, "sha256").hexdigest() == self.files[name]["sha256"]:
                # What was used least of late goes first; the system's own clock for this ticks too slowly.
                os.utime(file.fileno(), ns=(now := time.time_ns(), now))
                file.seek(0)
                return file
            file.close()
            log.warning("%s/%s is damaged in %s; fetching it again", self.ref, name, self.cache)
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.cache / self.files[name]["sha256"]

    def _fetch(self, name: str) -> None:
        path = self._path(name)
        if path.exists():
            return
        self.cache.mkdir(exist_ok=True)
        temporary = self.cache / f".{path.name}.{secrets.token_hex(4)}.writing"
        try:
            if self._download(name, temporary) and (problem := self._download(name, temporary)):
                # twice: what went wrong on the way may go right
                raise UserError(
                    f"{self.ref} is damaged in {self.remote} ({name} {problem}); {self.remote.anew(self.ref)}"
                )
            self._make_room()
            # After a machine's sleep it may have counted as abandoned: `open` then fetches it again.
            with suppress(FileNotFoundError):
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _download(self, name: str, path: Path) -> str:
        """What is wrong with the file there in words, "" = it is the manifest's."""
        entry, digest = self.files[name], hashlib.sha256()
        with path.open("wb") as file:
            for start in range(0, entry["bytes"], BLOCK):
                block = self.remote.read(f"{self.ref}/{name}", start, min(start + BLOCK, entry["bytes"]))
                if block is None:
                    return "is missing"
                digest.update(block)
                file.write(block)
        return "" if digest.hexdigest() == entry["sha256"] else "has changed (sha256 differs)"

    def _make_room(self) -> None:
        """Let the least recently used files go until all fit, with what is on its way. A file that is open stays readable.
        What a killed process was fetching goes."""
        files, full = [], 0
        for entry in os.scandir(self.cache):
            with suppress(FileNotFoundError):
                stat = entry.stat()
                if entry.name.startswith(".") and time.time() - stat.st_mtime > ABANDONED:
                    os.unlink(entry.path)
                    continue
                full += stat.st_size
                if not entry.name.startswith("."):
                    files.append((stat.st_mtime_ns, stat.st_size, entry.path))
        for _, size, path in sorted(files):
            if full <= self.size:
                return
            with suppress(FileNotFoundError):
                os.unlink(path)
            full -= size
