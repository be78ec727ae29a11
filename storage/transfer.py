"""Artefacts from a store to a remote and back: files first, the manifest last, `threads` files at a time.

To push: whoever first writes a note of what is to come decides the bytes of that key there, and others with the same
bytes join. A cut-off push goes on with the files that are missing, a cut-off pull in the middle of a file. Every file
is hashed before it is sent, and as it arrives.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from storage.atomic import ASIDE, fsync
from storage.errors import UserError, anew
from storage.keys import Ref
from storage.remote import Remote
from storage.remote_files import PIECE, Stopped
from storage.runs import Runs
from storage.store import ELSEWHERE, MANIFEST, PUSHING, Manifest, Store

log = logging.getLogger(__name__)

NOTE = "push.json"  # in the folder of a push under way: the manifest that it will have
REMOVING = b"being removed\n"  # the note while `gc` removes the artefact
BLOCK = 8 << 20  # bytes of one request
STREAM = 6 * BLOCK  # bytes up to which a file comes as one stream; a larger one, or the rest of one, by blocks
AHEAD = 2  # requests under way of one file, beside the one whose bytes are hashed
ARTEFACTS = 4  # at a time
FLUSHES = 64  # files at most that are here and not yet on the disk
END = object()
Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], object]


@dataclass(kw_only=True)
class Comparison:
    """Artefacts of a store beside those of a remote. `same`: complete on both sides with the same bytes; `other`: with other
    bytes of the same key; `here`, `there`: complete only on one side; `nowhere`: on none. The manifests are those of the
    side from which they would be sent."""

    same: list[Ref] = field(default_factory=list)
    other: list[Ref] = field(default_factory=list)
    here: list[Manifest] = field(default_factory=list)
    there: list[Manifest] = field(default_factory=list)
    nowhere: list[Ref] = field(default_factory=list)


def each(remote: Remote, function: Callable[[Item], Result], items: Iterable[Item], threads: int = 0) -> list[Result]:
    """The function's results in the order of the items, computed in threads. The first exception ends all."""
    with _pool(remote, threads or remote.threads) as pool:
        return _results(remote, [pool.submit(function, item) for item in items])


@contextmanager
def _pool(remote: Remote, threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    except BaseException:
        remote.stop.set()
        pool.shutdown(cancel_futures=True)
        remote.stop.clear()
        raise
    pool.shutdown()


def _results(remote: Remote, futures: list[Future[Result]]) -> list[Result]:
    """Of all futures. Where one fails the others are stopped, and none goes on when this raises."""
    done, others = wait(futures, return_when=FIRST_EXCEPTION)
    if any(future.exception() for future in done):
        remote.stop.set()
        for future in others:
            future.cancel()
        wait(futures)
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        raise min(errors, key=lambda error: isinstance(error, Stopped))
    return [future.result() for future in futures]


def _spread(
    remote: Remote, pool: ThreadPoolExecutor, function: Callable[[Item], object], items: Collection[Item]
) -> None:
    """Call the function of every item in threads of the pool. The first exception ends all. Takes no memory an item."""
    waiting, lock = iter(items), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                item = next(waiting, END)
            if item is END:
                return
            if remote.stop.is_set():
                raise Stopped()
            function(item)  # pyright: ignore[reportArgumentType]

    _results(remote, [pool.submit(work) for _ in range(min(remote.threads, len(items)))])


def compare(store: Store, remote: Remote, refs: Collection[Ref]) -> Comparison:
    """What is where, by one request an artefact. Raises UserError for a damaged manifest on either side."""
    found = Comparison()

    def look(ref: Ref) -> Callable[[], None]:
        # Of two manifests of the same artefact none stays: those of large ones are long.
        far = remote.manifest(ref)
        near = store.open(ref).manifest if store.state(ref) == "fresh" else None
        if near and far:
            return partial((found.same if near.files == far.files else found.other).append, ref)
        if near:
            return partial(found.here.append, near)
        return partial(found.there.append, far) if far else partial(found.nowhere.append, ref)

    for note in each(remote, look, refs):
        note()
    return found


def missing(store: Store, remote: Remote, refs: Collection[Ref]) -> tuple[list[Manifest], list[Ref]]:
    """Of artefacts those that the store lacks: the manifests of those that the remote has, and the others. What is complete
    in the store costs no request."""
    lacking = [ref for ref in refs if store.state(ref) != "fresh"]
    found = each(remote, remote.manifest, lacking)
    there = [manifest for manifest in found if manifest]
    return there, [ref for ref, manifest in zip(lacking, found, strict=True) if not manifest]


def arrived(store: Store, manifests: Iterable[Manifest]) -> int:
    """Bytes that a cut-off pull of these artefacts has left."""
    folders, size = [(store.arriving(manifest.ref), manifest) for manifest in manifests], 0
    for path in (folder / name for folder, manifest in folders if folder.is_dir() for name in manifest.files):
        # Another process that receives it may complete it meanwhile.
        with suppress(FileNotFoundError, NotADirectoryError):
            size += path.stat().st_size
    return size


# -------------------------------------------------------------------------------------------------------------- pull


def pull(store: Store, remote: Remote, manifests: Collection[Manifest], *, advance: Advance) -> list[Ref]:
    """Fetch artefacts; returns those that were not complete meanwhile. `advance` is called, from any thread, with the
    bytes that came.

    Raises UserError as `Store.receive` and `Remote`, and where a file there is not the manifest's.
    """
    count = _counter(advance)
    with _pool(remote, remote.threads) as files, _pool(remote, remote.threads) as blocks:

        def pull_one(manifest: Manifest) -> bool:
            def fetch(folder: Path) -> None:
                def bring(name: str) -> None:
                    _fetch(remote, manifest, folder, name, blocks, count)
                    # Flushed beside the next files' transfers.
                    flushes.append(blocks.submit(fsync, folder / name))
                    if len(flushes) > FLUSHES:
                        flushes.popleft().result()

                flushes: deque[Future[None]] = deque()
                # Left where the tars were to be read through: here they come, too.
                (folder / ELSEWHERE).unlink(missing_ok=True)
                _spread(remote, files, bring, manifest.files)
                _results(remote, list(flushes))
                for parent in {(folder / name).parent for name in manifest.files}:
                    fsync(parent)

            return receive(store, remote, manifest, fetch)

        received = each(remote, pull_one, manifests, ARTEFACTS)
    return [manifest.ref for manifest, new in zip(manifests, received, strict=True) if new]


def receive(store: Store, remote: Remote, manifest: Manifest, fetch: Callable[[Path], None]) -> bool:
    """`Store.receive`, which waits while another process builds or receives the artefact. Raises UserError as that."""
    logged = False
    while True:
        try:
            return store.receive(manifest, fetch)
        except BlockingIOError:
            if not logged:
                log.info("waiting for %s, held by %s", manifest.ref, store.holder(manifest.ref))
            logged = True
            if remote.stop.wait(0.2):
                raise Stopped() from None


def fetch_file(remote: Remote, manifest: Manifest, folder: Path, name: str) -> None:
    """Bring one file of an artefact into a folder, not flushed to the disk. Raises UserError as `pull`."""
    with _pool(remote, remote.threads) as blocks:
        _fetch(remote, manifest, folder, name, blocks, abs)


def _fetch(
    remote: Remote, manifest: Manifest, folder: Path, name: str, blocks: ThreadPoolExecutor, advance: Advance
) -> None:
    """Bring one file, or the rest of it, into the folder."""
    path, entry = folder / name, manifest.files[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    source = f"{manifest.ref}/{name}"
    # A first try may go on with bytes of another version, and what went wrong on the way may go right.
    for last in (False, True):
        problem = _fetch_once(remote, source, path, entry, blocks, advance)
        if not problem:
            return
        path.unlink(missing_ok=True)
        if last:
            raise UserError(f"{manifest.ref} is damaged in {remote} ({name} {problem}); {remote.anew(manifest.ref)}")


def _fetch_once(
    remote: Remote, source: str, path: Path, entry: dict[str, Any], blocks: ThreadPoolExecutor, advance: Advance
) -> str:
    """What is wrong with the file in words, "" = it is the manifest's."""
    digest, size, new = hashlib.sha256(), entry["bytes"], not path.exists()
    with open(path, "ab+") as file:
        if file.tell() > size:
            file.truncate(0)
        file.seek(0)
        while block := file.read(1 << 20):
            digest.update(block)
        began = file.tell()

        def take(block: bytes) -> None:
            if remote.stop.is_set():
                raise Stopped()
            file.write(block)
            digest.update(block)
            advance(len(block))

        if new and PIECE < size <= STREAM:
            for block in remote.stream(source):
                take(block)
        for block in _blocks(remote, source, file.tell(), size, blocks):
            if block is None:
                advance(began - file.tell())
                return "is missing"
            take(block)
        file.flush()
        if file.tell() != size:
            advance(began - file.tell())
            return f"has {file.tell()} bytes instead of {size}"
        if digest.hexdigest() != entry["sha256"]:
            advance(-size)
            return "has changed (sha256 differs)"
    return ""


def _blocks(remote: Remote, source: str, start: int, size: int, pool: ThreadPoolExecutor) -> Iterator[bytes | None]:
    """The bytes of a remote file from `start`, in order, with the next requests under way; None where it is missing."""
    if size - start <= BLOCK:
        if size > start:
            yield remote.read(source, start, size)
        elif not size and remote.size(source) is None:
            yield None
        return
    waiting: deque[Future[bytes | None]] = deque()
    offsets = iter(range(start, size, BLOCK))
    try:
        while True:
            while len(waiting) <= AHEAD and (at := next(offsets, None)) is not None:
                waiting.append(pool.submit(remote.read, source, at, min(at + BLOCK, size)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _counter(advance: Advance) -> Advance:
    """`advance` for one thread at a time."""
    lock = threading.Lock()

    def count(number: int) -> None:
        with lock:
            advance(number)

    return count


# -------------------------------------------------------------------------------------------------------------- push


def push(store: Store, remote: Remote, manifests: Collection[Manifest], *, advance: Advance) -> list[Ref]:
    """Send complete artefacts; returns those that are there now. One with other bytes that is there, or that another
    process is sending, stays as it is: it is logged and left out.

    Raises UserError as `Remote`, and where a local file is not the manifest's.
    """
    count = _counter(advance)
    with _pool(remote, remote.threads) as files:
        sent = each(remote, lambda manifest: _push(store, remote, manifest, files, count), manifests, ARTEFACTS)
    return [manifest.ref for manifest, ours in zip(manifests, sent, strict=True) if ours]


def _push(store: Store, remote: Remote, manifest: Manifest, files: ThreadPoolExecutor, advance: Advance) -> bool:
    """Whether the artefact is there now, with our bytes."""
    while True:
        try:
            return _push_once(store, remote, manifest, files, advance)
        except FileNotFoundError as error:
            if not store.path(manifest.ref).is_dir():
                raise UserError(
                    f"{manifest.ref} was removed from {store.root} meanwhile; run the same again"
                ) from error
            if not remote.renames:
                raise
            # Another process that sent the same bytes has renamed the folder: the next turn finds its manifest.


def _push_once(store: Store, remote: Remote, manifest: Manifest, files: ThreadPoolExecutor, advance: Advance) -> bool:
    ref = manifest.ref
    if (store.path(ref) / ELSEWHERE).is_file():
        raise UserError(f"the tars of {ref} are read through from a remote and are not here; push it from there")
    hidden = f"{ref.kind}/.{ref.key}{PUSHING}"
    folder, note = hidden if remote.renames else str(ref), f"{hidden}/{NOTE}"
    remote.make_folder(hidden)
    # Of this push alone: `create` takes a note of the same text for ours.
    text = replace(manifest, provenance={**manifest.provenance, "push": secrets.token_hex(8)}).dumps()
    begun = not remote.create(note, text.encode())
    if begun and (text := remote.read(note)) is not None:
        if text == REMOVING:
            raise UserError(
                f"{ref} is being removed from {remote} by a gc; wait for that, or finish it, and push again"
            )
        noted = remote.parsed(text, ref)
        if noted.files != manifest.files:
            log.warning(
                "%s: another push of it to %s has begun, of other bytes (made %s); left out. Where that push was given up, "
                "`zs-seg gc --remote %s --partial-age 0 --delete` forgets it",
                ref, remote, noted.provenance.get("created", "?"), remote,
            )  # fmt: skip
            return False
    # Now that the bytes are decided: a push that ended a moment ago has left its manifest.
    if (there := remote.manifest(ref)) is not None:
        return _settle(remote, hidden, manifest, there)
    have = remote.sizes(folder) if begun else {}
    if any(name.startswith(MANIFEST + ASIDE) for name in have):
        have = {}  # among what was sent lies what is left of a damaged artefact
    due = [name for name, entry in manifest.files.items() if have.get(name) != entry["bytes"]]
    advance(sum(entry["bytes"] for name, entry in manifest.files.items() if name not in due))
    for parent in {f"{folder}/{name}".rpartition("/")[0] for name in due if "/" in name}:
        remote.make_folder(parent)

    # `_push` goes on from these; raised in `_spread` they would stop the other artefacts of the push for good.
    gone: list[FileNotFoundError] = []

    def send(name: str) -> None:
        if gone:
            return
        source, sha256 = store.path(ref) / name, manifest.files[name]["sha256"]
        if not source.is_file() and store.path(ref).is_dir():
            raise UserError(f"{ref} is damaged ({name} is missing); {anew(ref.key)}")
        try:
            problem = remote.send(source, f"{folder}/{name}", sha256=sha256, advance=advance)
        except FileNotFoundError as error:
            gone.append(error)
            return
        if problem:
            raise UserError(f"{ref} is damaged ({name} {problem}); {anew(ref.key)}")

    _spread(remote, files, send, due)
    if gone:
        raise gone[0]
    remote.write(f"{folder}/{MANIFEST}", manifest.dumps().encode())
    if remote.renames:
        _rename(remote, hidden, ref)
    remote.delete(f"{ref}/{NOTE}" if remote.renames else hidden)
    return True


def _settle(remote: Remote, hidden: str, manifest: Manifest, there: Manifest) -> bool:
    """The artefact is complete there: what is left of pushes goes. Whether it has the same bytes."""
    remote.delete(hidden)
    if there.files == manifest.files:
        return True
    log.warning("%s is in %s with other bytes (made %s); left out", manifest.ref, remote, there.provenance["created"])
    return False


def _rename(remote: Remote, hidden: str, ref: Ref) -> None:
    """Let the whole artefact appear. A folder in its place that has no manifest is set aside."""
    try:
        remote.rename(hidden, str(ref))
    except FileExistsError:
        if remote.manifest(ref) is not None:
            remote.delete(hidden)
            return
        aside = f"{ref.kind}/.{ref.key}.{os.urandom(4).hex()}{ASIDE}"
        log.warning("%s in %s had lost its %s; what was left of it is set aside as %s", ref, remote, MANIFEST, aside)
        remote.rename(str(ref), aside)
        remote.rename(hidden, str(ref))


def push_run(store: Store, remote: Remote, name: str) -> None:
    """Note a run's lines there, so that `gc` keeps what they reach. Before the artefacts: an earlier `gc` is over."""
    with remote.exclusive():
        remote.merge(name, Runs(store).lines(name))


def pull_run(store: Store, remote: Remote, name: str) -> None:
    """Note the remote's lines of a run here."""
    local = Runs(store)
    with local.exclusive():
        local.merge(name, remote.lines(name))
