"""A store with an address: the artefacts and runs of a store in its own layout, behind fsspec.

`<root>/<kind>/<key>/` is complete exactly when its `manifest.json` is there, which is written last; `<root>/runs/NAME.json`
lists the lines of a run. So a remote `file:///folder` is a store.

Where files are renamed (`storage/remote_files.py`) an artefact arrives in a hidden folder that is renamed when it is
whole; elsewhere in place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storage import lease, runs
from storage.atomic import write_text
from storage.errors import UserError, did_you_mean
from storage.keys import KEY_LENGTH, Ref
from storage.remote_files import RemoteFiles, require_address
from storage.runs import RunRecord, Runs
from storage.store import MANIFEST, UNPARSABLE, Manifest, Store

LIST = "remotes.json"  # below the store: name -> address
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_KEY = re.compile(rf"[0-9a-f]{{{KEY_LENGTH}}}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Remotes:
    """The remotes that a store knows by a name, in `<store>/remotes.json`. It holds no credentials."""

    def __init__(self, store: Store) -> None:
        self.store, self.path = store, store.root / LIST

    def all(self) -> dict[str, str]:
        """Name -> address. Raises UserError for a damaged file."""
        try:
            found = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError:
            found = None
        if not isinstance(found, dict) or not all(isinstance(url, str) for url in found.values()):
            raise UserError(f"{self.path} is damaged and no list of remotes; delete it, and add them again")
        return found

    def add(self, name: str, url: str) -> None:
        """Raises UserError for a name or an address that cannot be one, and for a name that has another address."""
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} cannot name a remote; use letters, digits, '.', '-' and '_'")
        require_address(url)
        found = self.all()
        if found.get(name, url) != url:
            raise UserError(f"remote {name} is {found[name]} already; `zs-seg remote remove {name}` first")
        self._write({**found, name: url})

    def remove(self, name: str) -> None:
        """Forget a remote; nothing that lies there changes. Raises UserError for an unknown name."""
        found = self.all()
        self._require(name, found)
        self._write({other: url for other, url in found.items() if other != name})

    def open(self, text: str = "", *, threads: int = 8) -> Remote:
        """The remote of that name or address; "" = the only one that there is. Raises UserError where there is none."""
        if "://" in text:
            require_address(text)
            return Remote(text, threads=threads)
        found = self.all()
        if not text:
            if len(found) != 1:
                there = f"there are {', '.join(found)}; name one" if found else "there is none; `zs-seg remote add` one"
                raise UserError(
                    f"which remote? In {self.store.root} {there}, or give an address such as s3://bucket/folder"
                )
            text = next(iter(found))
        self._require(text, found)
        return Remote(found[text], name=text, threads=threads)

    def _require(self, name: str, found: Mapping[str, str]) -> None:
        if name not in found:
            there = ", ".join(found) or "none"
            raise UserError(
                f"no remote {name!r} in {self.store.root}{did_you_mean(name, found)}; there are {there}, and "
                "`zs-seg remote add NAME ADDRESS` adds one"
            )

    def _write(self, remotes: Mapping[str, str]) -> None:
        with self.store.mistakes_as_user_errors("remotes"):
            self.store.root.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(remotes, indent=1) + "\n")


class Remote(RemoteFiles):
    """The store at an address."""

    def kinds(self) -> list[str]:
        """The folders of artefacts."""
        return [name for name in self.names() if re.fullmatch(r"[a-z][a-z0-9-]*", name) and name != "runs"]

    def refs(self) -> list[Ref]:
        """Every artefact's folder, complete or not, sorted by kind and key. Lists folders, none of their files."""
        return [Ref(kind=kind, key=name) for kind in self.kinds() for name in self.names(kind) if _KEY.fullmatch(name)]

    def manifest(self, ref: Ref) -> Manifest | None:
        """The manifest of a complete artefact, in one request; None where there is none.

        Raises UserError for one that is damaged, or that names files outside of its folder.
        """
        if (text := self.read(f"{ref}/{MANIFEST}")) is None:
            return None
        return self.parsed(text, ref)

    def has_manifest(self, ref: Ref) -> bool:
        """Whether there is one, usable or not."""
        return self.size(f"{ref}/{MANIFEST}") is not None

    def parsed(self, text: bytes, ref: Ref) -> Manifest:
        """The manifest in a file of the remote. Raises UserError as `manifest`."""
        try:
            manifest = Manifest.parse(text, ref)
            if all(_is_sound(name, entry) for name, entry in manifest.files.items()):
                return manifest
        except UNPARSABLE:
            pass
        raise UserError(f"{ref} is damaged in {self}, its {MANIFEST} cannot be used; {self.anew(ref)}")

    def anew(self, ref: Ref) -> str:
        """What mends a damaged artefact there."""
        command = f"zs-seg verify {ref} --remote {self} --set-aside"
        return f"`{command}` sets it aside there, and the next push from a whole store sends it anew"

    def run_names(self) -> list[str]:
        """Sorted."""
        return [name.removesuffix(".json") for name in self.names("runs") if name.endswith(".json") and name[0] != "."]

    def lines(self, name: str) -> list[RunRecord]:
        """The lines of a run, the last one last; [] for no run. Raises UserError for a damaged file."""
        if not _NAME.fullmatch(name) or (text := self.read(f"runs/{name}.json")) is None:
            return []
        try:
            return runs.parse(text)
        except UNPARSABLE:
            raise UserError(
                f"runs/{name}.json in {self} is damaged and no list of runs; delete it there, and push {name} again"
            ) from None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Inside, no other process changes the list of runs."""
        if self.protocol == "file":
            with Runs(Store(Path(self._opened[1]))).exclusive():
                yield
            return
        self.make_folder("runs")
        with lease.Lease(_Place(self, "runs/.lease"), what=f"the list of runs in {self}") as held:
            yield
            held.require()

    def merge(self, name: str, lines: list[RunRecord]) -> None:
        """Add lines to a run. Call it inside `exclusive`."""
        before = self.lines(name)
        if (merged := runs.merge(before, lines)) != before:
            self.make_folder("runs")
            self.write(f"runs/{name}.json", runs.dumps(merged).encode())


class _Place:
    """A file of a remote, for a lease."""

    def __init__(self, remote: Remote, path: str) -> None:
        self.remote, self.path = remote, path

    def create(self, data: bytes) -> bool:
        return self.remote.create(self.path, data)

    def read(self) -> bytes | None:
        return self.remote.read(self.path)

    def write(self, data: bytes) -> None:
        self.remote.write(self.path, data)

    def delete(self) -> None:
        self.remote.delete(self.path)


def _is_sound(name: str, entry: Any) -> bool:
    """Whether an entry of a manifest names a file below its folder."""
    parts = name.split("/")
    below = all(part not in ("", ".", "..") for part in parts) and not re.search(r"[\\\x00]", name) and name != MANIFEST
    return below and type(entry["bytes"]) is int and entry["bytes"] >= 0 and bool(_SHA256.fullmatch(entry["sha256"]))
