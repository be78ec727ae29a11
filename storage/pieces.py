"""Parts of an artefact that are made on machines without the store's disk: what these read comes from a remote, what
they make is left there, and the process that builds the artefact brings it home.

A part is a folder. Whoever makes one sends it to `<kind>/.<key>.pieces/NAME.TOKEN/`, and then the list of its files with
their hashes to `NAME.json`, unless there is one: of two that made the same part the first counts. What a killed run
left is used by the next, and two builds with one key may read other bytes: so a part's name holds a hash over the bytes
that it is made of.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path

from storage.errors import UserError
from storage.keys import Ref, sha256_file
from storage.remote import Remote
from storage.store import PIECES, UNPARSABLE
from storage.transfer import fetch_file


def folder_of(ref: Ref) -> str:
    """Where the parts of an artefact are left."""
    return f"{ref.kind}/.{ref.key}{PIECES}"


def fetch(remote: Remote, source: Path, folder: Path, hashes: Mapping[str, str]) -> None:
    """Bring files of a complete artefact, whose folder in the builder's store is `source`, into a folder of this machine.
    `hashes`: the files' names, and the sha256 that each has in the builder's store.

    Raises UserError where the artefact is not in the remote, or has other bytes there, or a file is damaged, and as
    `Remote`.
    """
    ref = Ref(kind=source.parent.name, key=source.name)
    if (manifest := remote.manifest(ref)) is None:
        raise UserError(f"{ref} is not in {remote}, from which a worker without {source} reads; `zs-seg push {ref}`")
    for name, sha256 in hashes.items():
        if manifest.files.get(name, {}).get("sha256") != sha256:
            raise UserError(
                f"{ref} has other bytes in {remote} than in the run's store ({name}), and a worker without {source} "
                "reads there; pass a --remote without it, or delete it in the store and run again, which fetches it"
            )
        fetch_file(remote, manifest, folder, name)


def leave(remote: Remote, ref: Ref, part: Path) -> None:
    """Send a whole part of the artefact. Raises UserError as `Remote`."""
    target, files = f"{folder_of(ref)}/{part.name}.{secrets.token_hex(4)}", {}
    for path in sorted(part.rglob("*")):
        if path.is_file():
            name = path.relative_to(part).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            remote.make_folder(f"{target}/{name}".rpartition("/")[0])
            problem = remote.send(path, f"{target}/{name}", sha256=files[name]["sha256"], advance=abs)
            assert not problem, problem
    if not remote.create(_list(ref, part.name), json.dumps({"folder": target, "files": files}).encode()):
        remote.delete(target)


def is_there(remote: Remote, ref: Ref, name: str) -> bool:
    """Whether a part was left. Raises UserError as `Remote`."""
    return remote.size(_list(ref, name)) is not None


def bring(remote: Remote, ref: Ref, name: str, own: Path) -> None:
    """Fetch a part that was left into the folder `own`, which is made.

    Raises UserError where it is not there or damaged, and as `Remote`; a damaged one is forgotten, and made again.
    """
    text = remote.read(_list(ref, name)) or b""
    try:
        found = json.loads(text)
        for file, entry in found["files"].items():
            data = remote.read(f"{found['folder']}/{file}")
            if data is None or hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise ValueError(f"{file} has changed or is missing")
            path = (own / file).resolve()
            if not path.is_relative_to(own.resolve()):
                raise ValueError(f"{file} lies elsewhere")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    except UserError:
        raise
    except UNPARSABLE as error:
        remote.delete(_list(ref, name))
        raise UserError(
            f"part {name} of {ref} is damaged in {remote} ({error}); run again, which makes it anew"
        ) from error


def forget(remote: Remote, ref: Ref) -> None:
    """Delete all parts there, once the artefact is built."""
    remote.delete(folder_of(ref))


def _list(ref: Ref, name: str) -> str:
    return f"{folder_of(ref)}/{name}.json"
