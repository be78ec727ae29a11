"""The bytes that a build is made of, noted in its partial folder: what it left is used again only with them.

Before a build saves what a later one may go on with (a training state, a tar, a group), it vouches for it: up to then
every file of its inputs was the file that was hashed when the build began. So an input that is damaged later costs
nothing of what was made before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from storage.atomic import write_text
from storage.errors import UserError
from storage.keys import Ref, sha256_file

NOTE = "inputs.json"


@dataclass(kw_only=True)
class Inputs:
    """The files of all inputs of a build, by their paths below the store, such as "shards/0123456789abcdef/index.json".

    `hashes`: sha256, as the manifests list them. `seen`: inode, size and the times of the last change, in ns, at the
    moment before the file was hashed.
    """

    hashes: dict[str, str] = field(default_factory=dict)
    seen: dict[str, list[int]] = field(default_factory=dict)

    def look(self, root: Path, ref: Ref, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Take the files of an input's manifest in, before they are hashed."""
        for name, entry in files.items():
            self.hashes[f"{ref}/{name}"] = entry["sha256"]
            self.seen[f"{ref}/{name}"] = _look(root / str(ref) / name)

    def touched(self, root: Path, names: Iterable[str]) -> bool:
        """Whether the system has noticed a write to each of these files, or its loss, since it was seen. Where it has
        not, a disk gives other bytes than it was given, and nobody knows since when."""
        return all(_look(root / name) != self.seen.get(name) for name in names)

    def write(self, partial: Path) -> None:
        write_text(partial / NOTE, json.dumps({"hashes": self.hashes, "seen": self.seen}))

    @classmethod
    def read(cls, partial: Path) -> Inputs | None:
        """The note of a partial folder; None where there is none, one without any file where it is damaged."""
        try:
            note = cls(**json.loads((partial / NOTE).read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, RecursionError):
            return cls()
        return note if isinstance(note.hashes, dict) and isinstance(note.seen, dict) else cls()


def vouch(partial: Path, *, again: bool = False) -> None:
    """Call this before something that a killed build leaves is saved in its partial folder. It costs a look at every
    file of the inputs, and hashing, once in a process, of those that were touched; with `again` all are hashed.

    Raises UserError when the bytes of one are others than when the build began, or it is gone. A folder without a note
    is none of a store's.
    """
    if (note := Inputs.read(partial)) is None:
        return
    root = partial.parents[1]
    for name, expected in note.hashes.items():
        now = _look(root / name)
        if now == note.seen.get(name) and not (again and now):
            continue
        if not now or (sha256_file(root / name) if again else _hash(root / name, *now)) != expected:
            raise UserError(f"{root / name} has changed while it was read; find out why with `zs-seg verify`")


@cache
def _hash(path: Path, *_seen: int) -> str:
    return sha256_file(path)


def _look(path: Path) -> list[int]:
    """[] for no file."""
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
