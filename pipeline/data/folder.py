"""The files of a data folder, unpacked or still in the .zip files in which COCO is published."""

from __future__ import annotations

import io
import logging
import os
import struct
import tempfile
import threading
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO

from storage.errors import UserError

log = logging.getLogger(__name__)

# Where COCO's .zip files are expected, relative to the data folder; each may hold others.
ZIP_FOLDERS = ("", "annotations")
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class DataFolder:
    """The files below `root` by their path relative to it, with "/".

    A folder that is not there is looked for in the .zip files of `root` and of its folder "annotations", and in those
    that lie in these: a .zip file stands for what unpacking it at its place, or into a folder of its name, would give.
    Nothing is unpacked, except a .zip that is itself compressed in another one, into an unnamed temporary file. Several
    threads may read at a time. A name that is not there is looked for in Unicode's other normal form, too.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def read(self, path: str) -> bytes:
        """The content of a file. Raises FileNotFoundError, another OSError, or UserError for a damaged .zip."""
        if (found := self._unpacked(path)) is not None:
            return found.read_bytes()
        if (packed := self._packed(path)) is not None:
            return packed[0].read(packed[1])
        raise FileNotFoundError(2, "No such file or directory", str(self.root / path))

    def open(self, path: str) -> IO[bytes]:
        """A file to be read. Raises as `read`."""
        found = self._unpacked(path)
        return io.BytesIO(self.read(path)) if found is None else found.open("rb")

    def holds(self, path: str) -> bool:
        """Whether there is such a file."""
        return self._unpacked(path) is not None or self._packed(path) is not None

    def sizes(self, folder: str, *, deep: bool = False) -> dict[str, int] | None:
        """Name -> bytes of each file in a folder, with `deep` also in those below it; None where there is no such
        folder, or, in a .zip, nothing in it."""
        at = self.root / folder
        if at.is_dir():
            return dict(_deep(at)) if deep else dict(_flat(at))
        below = [(name, size) for archive in self._archives for name, size in archive.below(folder)]
        return {name: size for name, size in below if deep or "/" not in name} or None

    def packed(self, folder: str) -> Path | None:
        """The .zip file in which a folder is found, None for one that is unpacked or not there."""
        if (self.root / folder).is_dir():
            return None
        return next((archive.path for archive in self._archives if next(archive.below(folder), None)), None)

    def names(self, suffix: str) -> list[str]:
        """The paths of the files in .zip files that end in `suffix`."""
        return [path for archive in self._archives for path in archive.paths() if path.endswith(suffix)]

    def _unpacked(self, path: str) -> Path | None:
        return next((at for spelled in _spellings(path) if os.path.exists(at := self.root / spelled)), None)

    def _packed(self, path: str) -> tuple[_Archive, zipfile.ZipInfo] | None:
        if (self.root / path).parent.is_dir():
            return None
        for archive in self._archives:
            for spelled in _spellings(path):
                if (info := archive.find(spelled)) is not None:
                    return archive, info
        return None

    @cached_property
    def _archives(self) -> list[_Archive]:
        found: list[_Archive] = []
        for folder in ZIP_FOLDERS:
            at = self.root / folder
            if at.is_dir():
                for path in sorted(at.iterdir()):
                    if path.suffix.lower() == ".zip" and path.is_file() and not path.name.startswith("."):
                        archive = _Archive(path, f"{folder}/{path.stem}" if folder else path.stem, path.open("rb"))
                        found += [archive, *archive.inner()]
        return found


class _Archive:
    """One .zip file: its members by path below the data folder, as if it were unpacked at `at`'s parent."""

    def __init__(self, path: Path, at: str, file: IO[bytes]) -> None:
        self.path, self.at = path, at
        self.parent = at.rpartition("/")[0]
        self._file, self._lock = file, threading.Lock()
        try:
            self._zip = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); download it again, or unpack what it holds") from error
        self._members = {info.filename: info for info in self._zip.infolist() if not info.is_dir()}

    def find(self, path: str) -> zipfile.ZipInfo | None:
        for folder in (self.parent, self.at):
            prefix = f"{folder}/" if folder else ""
            if path.startswith(prefix) and (info := self._members.get(path[len(prefix) :])) is not None:
                return info
        return None

    def below(self, folder: str) -> Iterator[tuple[str, int]]:
        """(name below the folder, bytes) of each member in it."""
        for place in (self.parent, self.at):
            inside = _relative(folder, place)
            if inside is None:
                continue
            prefix = f"{inside}/" if inside else ""
            for name, info in self._members.items():
                if name.startswith(prefix):
                    yield name[len(prefix) :], info.file_size

    def paths(self) -> Iterator[str]:
        return (f"{self.parent}/{name}" if self.parent else name for name in self._members)

    def read(self, info: zipfile.ZipInfo) -> bytes:
        try:
            with self._lock:
                return self._zip.read(info)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, zlib.error, EOFError, struct.error) as error:
            raise UserError(
                f"{self.path}: {info.filename} cannot be read ({error}); download the file again, or unpack it"
            ) from error

    def inner(self) -> Iterator[_Archive]:
        """The .zip files that lie in this one, and those in them."""
        for name, info in self._members.items():
            if name.lower().endswith(".zip"):
                at = f"{self.parent}/{name[:-4]}" if self.parent else name[:-4]
                archive = _Archive(self.path, at, self._open(info))
                yield archive
                yield from archive.inner()

    def _open(self, info: zipfile.ZipInfo) -> IO[bytes]:
        """A member as a file that can be read at any place: in place where it is stored as it is, else a copy."""
        if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
            with self._lock:
                self._file.seek(info.header_offset)
                _, name, extra = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
            start = info.header_offset + _LOCAL_HEADER.size + name + extra
            return io.BufferedReader(_Window(self._file, self._lock, start, info.file_size), 1 << 16)
        log.info("%s: %s is compressed, and is copied to a temporary file", self.path, info.filename)
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - stays open as long as the archive
        with self._lock, self._zip.open(info) as source:
            while block := source.read(1 << 22):
                copy.write(block)
        copy.seek(0)
        return copy


class _Window(io.RawIOBase):
    """`size` bytes of `file` from `start` on, as a file; `lock` guards the position in it."""

    def __init__(self, file: IO[bytes], lock: threading.Lock, start: int, size: int) -> None:
        super().__init__()
        self._file, self._lock, self._start, self._size, self._at = file, lock, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        with self._lock:
            self._file.seek(self._start + self._at)
            data = self._file.read(max(min(len(buffer), self._size - self._at), 0))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _relative(path: str, folder: str) -> str | None:
    """`path` below `folder`, "" for the folder itself; None for one that lies elsewhere."""
    if path in (folder, "."):
        return "" if path == folder or not folder else None
    if not folder:
        return path
    return path[len(folder) + 1 :] if path.startswith(f"{folder}/") else None


def _spellings(path: str) -> list[str]:
    if path.isascii():
        return [path]
    return list(dict.fromkeys([path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)]))


def sized(name: str, sizes: dict[str, int]) -> int | None:
    """The bytes of the file of this name, in any of Unicode's normal forms; None where there is none."""
    return next((sizes[spelled] for spelled in _spellings(name) if spelled in sizes), None)


def _flat(folder: Path) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as files:
        for file in files:
            if file.is_file():
                yield file.name, file.stat().st_size


def _deep(folder: Path) -> Iterator[tuple[str, int]]:
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = "" if path == str(folder) else Path(path).relative_to(folder).as_posix() + "/"
        for name in files:
            file = Path(path) / name
            if file.is_file():
                yield below + name, file.stat().st_size
