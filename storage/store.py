"""The artefact store: `<root>/<kind>/<key>/`, complete exactly when its `manifest.json` is there.

Work happens in `<root>/<kind>/.<key>.partial/`, under a lock that dies with its owner; the manifest is written last,
then one rename makes the artefact appear. A killed build finds its partial folder again and goes on.

What belongs to an artefact is what its manifest lists, and the manifest lists what the build has named (`Build.add`).
Any other file in its folder, such as those that editors and desktops leave, is never read, hashed or listed. What is
no longer used and was not asked to go is renamed (`ASIDE`) and never deleted.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from storage.atomic import ASIDE, clean, delete, fsync, write_text
from storage.errors import NO_FILE, UserError, anew, counted
from storage.inputs import NOTE, Inputs
from storage.keys import KEY_LENGTH, Recipe, Ref, canonical, recipe_key, sha256_file
from storage.lock import Lock
from storage.provenance import provenance, user_name

log = logging.getLogger(__name__)

State = Literal["fresh", "partial", "missing", "locked"]
MANIFEST = "manifest.json"
REMOVED = ".removed"  # the end of a folder's name that is on its way out
PULLING = ".pulling"  # the same of one whose files arrive from a remote
PUSHING = ".pushing"  # the same on a remote, while they are sent there
PIECES = ".pieces"  # the same of parts that machines without the store's disk have made (`storage/pieces.py`)
ELSEWHERE = "elsewhere.json"  # in the folder of an artefact whose tars stay in a remote (`storage/through.py`)
LARGE = 10**9  # bytes that take seconds to hash
UNPARSABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)  # what a damaged manifest raises


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record of a complete artefact, its manifest.json.

    `config` and `inputs` (name -> "kind/key") are those of its recipe; `counts` is what the stage counted (samples,
    segments, skipped ones with reasons); `files` gives each file's path below the artefact -> {"bytes", "sha256"};
    `provenance` (git commit, versions, seconds) is outside the key.
    """

    kind: str
    key: str
    stage: str
    version: int
    config: Any
    inputs: dict[str, str]
    counts: dict[str, Any]
    files: dict[str, dict[str, Any]]
    provenance: dict[str, Any]

    @property
    def ref(self) -> Ref:
        return Ref(kind=self.kind, key=self.key)

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file["bytes"] for file in self.files.values())

    def dumps(self) -> str:
        """The text of manifest.json; it ends with a checksum over the rest."""
        data = vars(self)
        return json.dumps({**data, "checksum": recipe_key("manifest", 1, data, {})}, indent=1) + "\n"

    @classmethod
    def parse(cls, text: bytes, ref: Ref) -> Manifest:
        """The inverse of `dumps`. Raises ValueError, TypeError, KeyError, AttributeError or RecursionError for what is
        no manifest of this artefact."""
        data = json.loads(text)
        checksum = data.pop("checksum")
        manifest = cls(**data)
        if checksum != recipe_key("manifest", 1, data, {}) or manifest.ref != ref:
            raise ValueError("it has been edited")
        return manifest


@dataclass(kw_only=True)
class Build:
    """A build of `recipe` under way: what it reads, where it writes, and what goes into the manifest.

    `path` is the partial folder; it may already hold what a killed build of the same recipe left, each file whole if it
    was written with `storage.atomic`. `files` become the artefact; `scratch` is deleted once that is complete.
    """

    store: Store
    recipe: Recipe
    path: Path
    files: list[Path] = field(default_factory=list)
    scratch: list[Path] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def open(self, name: str) -> Artefact:
        """The recipe's input of that name. Raises UserError as `Store.open`."""
        return self.store.open(self.recipe.inputs[name])

    def add(self, *files: Path) -> None:
        """Name files below `path` as the artefact's. What else lies there is not part of it."""
        self.files += files

    def holds(self, piece: Path, read: Callable[[Path], object]) -> bool:
        """Whether a killed build left this file or folder whole. A damaged one, for which `read` raises UserError, is
        deleted."""
        if not piece.exists():
            return False
        try:
            read(piece)
        except UserError:
            log.warning("%s, which a killed build left, is damaged; making it again", piece)
            delete(piece)
            return False
        return True


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A complete artefact, opened for reading."""

    ref: Ref
    path: Path
    manifest: Manifest

    def folders(self, suffix: str) -> list[Path]:
        """Its folders of files whose names end so, such as zarr groups, in order."""
        names = {name.partition("/")[0] for name in self.manifest.files if "/" in name}
        return [self.path / name for name in sorted(names) if name.endswith(suffix)]


class Store:
    """Artefacts below the folder `root`, which is made by the first build."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()

    def path(self, ref: Ref) -> Path:
        """Where the artefact is when it is complete."""
        return self.root / ref.kind / ref.key

    def state(self, ref: Ref) -> State:
        """ "fresh" = complete, "locked" = being built now, "partial" = a build was cut off, else "missing"."""
        with self.mistakes_as_user_errors(ref):
            if (self.path(ref) / MANIFEST).is_file():
                return "fresh"
            if self._lock(ref).held():
                return "locked"
            return "partial" if self.partial(ref).is_dir() else "missing"

    def holder(self, ref: Ref) -> str:
        """Who builds a "locked" artefact: "process 12 on host since ..."."""
        return self._lock(ref).holder()

    def locked(self) -> dict[Ref, list[Ref]]:
        """Every artefact that is being built now -> the artefacts that its build reads."""
        found = {}
        for path in self.root.glob(f"*/.{'[0-9a-f]' * KEY_LENGTH}.lock"):
            ref = Ref(kind=path.parent.name, key=path.name[1 : KEY_LENGTH + 1])
            if self._lock(ref).held():
                found[ref] = [Ref.parse(name) for name in self._lock(ref).owner().get("inputs", [])]
        return found

    def build(self, recipe: Recipe, work: Callable[[Build], None]) -> Ref:
        """Make the recipe's artefact by `work`, unless it is complete already.

        One writer at a time: while another process builds the same artefact this one waits, and then finds it complete.
        When `work` raises, the partial folder stays for the next attempt and the exception passes on. Where a push into
        the store's folder completes the artefact meanwhile, that one stays and what `work` made is set aside.

        Raises UserError when the store's folder is full or cannot be written.
        """
        ref = recipe.ref
        if self.state(ref) == "fresh":
            return ref
        with self.mistakes_as_user_errors(ref):
            self.path(ref).parent.mkdir(parents=True, exist_ok=True)
            with self._lock(ref, note={"inputs": [str(source) for source in recipe.inputs.values()]}) as lock:
                if self.state(ref) != "fresh":
                    self._build(recipe, work, lock)
                else:
                    log.info("%s: %s is complete now, somebody else built it", recipe.stage, ref)
        return ref

    def under_way(self, recipe: Recipe) -> Build:
        """The build as another process of this machine has it that computes along and leaves writing to the first."""
        return Build(store=self, recipe=recipe, path=self.partial(recipe.ref))

    def compute_along(self, recipe: Recipe, work: Callable[[Build], None]) -> None:
        """Take part in a build that another machine's store completes, with inputs of this store, which are hashed first.
        Nothing stays here.

        Raises UserError for an input that is missing or damaged, and as `build`.
        """
        ref, inputs = recipe.ref, Inputs()
        for source in recipe.inputs.values():
            inputs.look(self.root, source, self.open(source).manifest.files)
            self.require_intact(source)
        with self.mistakes_as_user_errors(ref):
            folder = self.path(ref).with_name(f".{ref.key}.{secrets.token_hex(4)}{ASIDE}")
            folder.mkdir(parents=True)
            try:
                inputs.write(folder)
                work(Build(store=self, recipe=recipe, path=folder))
            finally:
                delete(folder)

    def _build(self, recipe: Recipe, work: Callable[[Build], None], lock: Lock) -> None:
        ref, partial, started = recipe.ref, self.partial(recipe.ref), time.monotonic()
        inputs = self._check_inputs(recipe)
        resumed = self._made_of(inputs, recipe)
        log.info("%s: %s %s", recipe.stage, "going on with" if resumed else "building", ref)
        partial.mkdir(exist_ok=True)
        (partial / MANIFEST).unlink(missing_ok=True)
        clean(partial)
        inputs.write(partial)
        build = self.under_way(recipe)
        try:
            work(build)
        except Exception:
            self._check_inputs(recipe)  # a damaged input is the better reason
            raise
        if self._check_inputs(recipe).hashes != inputs.hashes:
            left = self._spare(recipe)
            raise UserError(f"an input of {ref} was rebuilt meanwhile, with other bytes; run again ({left})")
        files = self._list(build)
        manifest = Manifest(
            kind=ref.kind,
            key=ref.key,
            stage=recipe.stage,
            version=recipe.version,
            config=json.loads(canonical(recipe.config)),
            inputs={name: str(source) for name, source in recipe.inputs.items()},
            counts=build.counts,
            files=files,
            provenance={
                **provenance(),
                "seconds": round(time.monotonic() - started, 1),
                "resumed": resumed,
                **build.provenance,
            },
        )
        if not self._complete(manifest, partial, lock):
            return
        # Only now, so that a kill a moment earlier costs no training.
        for file in (partial / NOTE, *build.scratch):
            delete(self.path(ref) / file.relative_to(partial))
        size = manifest.bytes / 1e6
        log.info("%s: %s complete, %s, %.1f MB", recipe.stage, ref, counted(len(files), "file"), size)

    def _complete(self, manifest: Manifest, folder: Path, lock: Lock) -> bool:
        """A folder that holds all files becomes the artefact. Where a push, which takes no lock, has brought that
        meanwhile, the folder is set aside instead: False."""
        ref, path = manifest.ref, self.path(manifest.ref)
        lock.require()
        write_text(folder / MANIFEST, manifest.dumps())
        if (path / MANIFEST).is_file():
            aside = self._rename(ref, folder, ASIDE)
            log.warning("%s was pushed into %s meanwhile and is kept; ours is set aside as %s", ref, self.root, aside)
            return False
        if path.exists():
            aside = self._rename(ref, path, ASIDE)
            log.warning("%s had lost its %s; what was left of it is set aside as %s", ref, MANIFEST, aside)
        os.rename(folder, path)
        fsync(path.parent)
        return True

    def receive(self, manifest: Manifest, fetch: Callable[[Path], None]) -> bool:
        """Make the artefact of files that were built elsewhere, unless it is complete already, or a push completes it
        meanwhile; False if so.

        `fetch` brings the manifest's files, each with its sha256, into a folder in which an earlier attempt may have
        left some of them, or parts. What a killed build left is set aside.

        Raises BlockingIOError while another process builds or receives it, UserError as `build`, and what `fetch`
        raises.
        """
        ref = manifest.ref
        folder = self.arriving(ref)
        with self.mistakes_as_user_errors(ref):
            self.path(ref).parent.mkdir(parents=True, exist_ok=True)
            with self._lock(ref, wait=False) as lock:
                if self.state(ref) == "fresh":
                    return False
                folder.mkdir(exist_ok=True)
                fetch(folder)
                for name in _names(folder):
                    if name not in (ELSEWHERE, *manifest.files):
                        delete(folder / name)
                received = self._complete(manifest, folder, lock)
                if self.partial(ref).is_dir():
                    aside = self._rename(ref, self.partial(ref), ASIDE)
                    log.warning("what a build of %s had made here is set aside as %s", ref, aside)
        return received

    def _list(self, build: Build) -> dict[str, dict[str, Any]]:
        """The files that a build has named, flushed to the disk and hashed, for its manifest; others are logged."""
        names = sorted({file.relative_to(build.path).as_posix() for file in build.files})
        if (size := sum((build.path / name).stat().st_size for name in names)) > LARGE:
            log.info("%s: hashing %.1f GB", build.recipe.stage, size / 1e9)
        ours = {MANIFEST, NOTE, *names, *(file.relative_to(build.path).as_posix() for file in build.scratch)}
        strays = [name for name in _names(build.path) if name not in ours]
        assert names or not strays, f"stage {build.recipe.stage} writes files and names none with Build.add"
        if strays:
            log.info("%s: not part of %s: %s", build.recipe.stage, build.recipe.ref, ", ".join(strays))
        files = {}
        for name in names:
            fsync(build.path / name)
            size = (build.path / name).stat().st_size
            files[name] = {"bytes": size, "sha256": sha256_file(build.path / name)}
        return files

    def _made_of(self, inputs: Inputs, recipe: Recipe) -> bool:
        """Whether a killed build has left something that was made of the same bytes. What was made of others, or of
        nobody knows what, is set aside."""
        if not (partial := self.partial(recipe.ref)).is_dir():
            return False
        note = Inputs.read(partial)
        if note and note.hashes != inputs.hashes:
            changed = sorted(name for name in inputs.hashes if note.hashes.get(name) != inputs.hashes[name])
            why = f"{changed[0]} had other bytes then" if changed and note.hashes else f"its {NOTE} is damaged"
            log.warning("%s: %s (%s)", recipe.stage, self._spare(recipe), why)
            return False
        return True

    def _check_inputs(self, recipe: Recipe) -> Inputs:
        """Hash all inputs of a build, before it and after it: nothing becomes complete that was made from a changed
        byte.

        Raises UserError as `require_intact`, with what becomes of what the build has made: it was vouched for and stays
        where it is, to go on when the input is back with the same bytes.
        """
        found, size, started = Inputs(), 0, time.monotonic()
        for ref in recipe.inputs.values():
            try:
                manifest = self.open(ref).manifest
            except UserError as error:
                if self.state(ref) == "fresh":  # damaged, and not just gone
                    raise self._with_fate(error, recipe, ()) from error
                raise
            found.look(self.root, ref, manifest.files)
            if problems := self._problems(manifest):
                raise self._with_fate(_damaged(manifest, problems), recipe, (f"{ref}/{name}" for name in problems))
            size += manifest.bytes
        if size > LARGE:
            log.info("%s: checked %.1f GB of inputs in %.0f s", recipe.stage, size / 1e9, time.monotonic() - started)
        return found

    def _with_fate(self, error: UserError, recipe: Recipe, damaged: Iterable[str]) -> UserError:
        """The error over a damaged input, and what becomes of what the build has made."""
        if not (partial := self.partial(recipe.ref)).is_dir():
            return error
        if (note := Inputs.read(partial)) and note.touched(self.root, damaged):
            return UserError(f"{error}; {recipe.stage} then goes on where it was, if the bytes are the same")
        return UserError(f"{error}; {self._spare(recipe)}")

    def _spare(self, recipe: Recipe) -> str:
        """Set aside what a build has made; the text for the user where it is, and how to go on with it."""
        partial = self.partial(recipe.ref)
        aside = self._rename(recipe.ref, partial, ASIDE)
        return (
            f"what {recipe.stage} had made is set aside as {aside}; to go on with it nevertheless, rename it to "
            f"{partial.name} and delete its {NOTE}"
        )

    def open(self, ref: Ref) -> Artefact:
        """The complete artefact, its files present and of the right size.

        Raises UserError when it is missing, partial, or damaged as far as that shows without reading the files
        (`verify` reads them).
        """
        while True:
            # Before `state`: an artefact that is removed between the two is missing on the next turn, and not damaged.
            seen = self._folder(ref)
            if (state := self.state(ref)) != "fresh":
                raise UserError(
                    f"{ref} is {state} in {self.root}; `zs-seg plan` shows what is there, `zs-seg run` makes it"
                )
            try:
                return self._open(ref)
            except UserError:
                if self._folder(ref) == seen:
                    raise  # else it was removed, or built again, meanwhile

    def _folder(self, ref: Ref) -> tuple[int, int] | None:
        """Inode and time of change, which distinguish the folder from another in its place; None when there is none."""
        try:
            stat = self.path(ref).stat()
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def _open(self, ref: Ref) -> Artefact:
        manifest = self._manifest(ref)
        if problems := _size_problems(self.path(ref), manifest):
            raise _damaged(manifest, problems)
        return Artefact(ref=ref, path=self.path(ref), manifest=manifest)

    def require_intact(self, ref: Ref) -> Manifest:
        """Read every byte of a complete artefact. Raises UserError as `open`, and when a byte has changed."""
        manifest = self.open(ref).manifest
        if problems := self._problems(manifest):
            raise _damaged(manifest, problems)
        return manifest

    def refs(self) -> list[Ref]:
        """Every complete artefact, sorted by kind and key."""
        found, key = [], re.compile(rf"[0-9a-f]{{{KEY_LENGTH}}}")
        for kind in sorted(os.listdir(self.root)) if self.root.is_dir() else ():
            if os.path.isdir(folder := f"{self.root}/{kind}"):
                keys = sorted(name for name in os.listdir(folder) if key.fullmatch(name))
                found += [Ref(kind=kind, key=name) for name in keys if os.path.isfile(f"{folder}/{name}/{MANIFEST}")]
        return found

    def find(self, key_prefix: str) -> Ref:
        """The one complete artefact whose key, or whose "kind/key", starts with `key_prefix`.

        Raises UserError when there is none or more than one.
        """
        found = [ref for ref in self.refs() if (str(ref) if "/" in key_prefix else ref.key).startswith(key_prefix)]
        if not key_prefix or not found:
            raise UserError(f"no artefact {key_prefix!r} in {self.root}; `zs-seg list` shows what is there")
        if len(found) > 1:
            raise UserError(f"{key_prefix!r} fits {', '.join(map(str, found[:4]))}; give more digits of the key")
        return found[0]

    def file_names(self, ref: Ref) -> list[str]:
        """The files of a complete artefact; [] when its manifest cannot be used, which `verify` reports."""
        try:
            return list(self._manifest(ref).files)
        except UserError:
            return []

    def verify(self, ref: Ref, *, files: Collection[str] | None = None) -> list[str]:
        """Compare with the manifest: which of its files are there, their sizes, and every byte of those in `files`
        (None = of all).

        One line a problem, [] = intact; `strays` has what else is there.
        """
        try:
            manifest = self._manifest(ref)
        except UserError as error:
            return [str(error)]
        return [f"{name} {problem}" for name, problem in self._problems(manifest, files=files).items()]

    def _problems(self, manifest: Manifest, *, files: Collection[str] | None = None) -> dict[str, str]:
        """File of the artefact -> what is wrong with it."""
        path = self.path(manifest.ref)
        problems = _size_problems(path, manifest)
        with suppress(FileNotFoundError):  # whoever opens it next is told
            if (path / MANIFEST).read_text(encoding="utf-8") != manifest.dumps():
                problems[MANIFEST] = "was edited"
        for name, entry in manifest.files.items():
            if name in problems or (files is not None and name not in files):
                continue
            try:
                if sha256_file(path / name) != entry["sha256"]:
                    problems[name] = "has changed (sha256 differs)"
            except FileNotFoundError:
                if not _stays(path, name):  # it was there when its size was looked at
                    problems[name] = "is missing"
        return problems

    def strays(self, ref: Ref) -> list[str]:
        """The files in the artefact's folder that do not belong to it, which nothing reads; [] when its manifest cannot
        be used."""
        listed = {MANIFEST, ELSEWHERE, *self.file_names(ref)}
        return [name for name in _names(self.path(ref)) if name not in listed] if len(listed) > 2 else []

    def remove(self, ref: Ref) -> None:
        """Remove the artefact and what a killed build of it left; nothing happens when there is neither.

        Raises UserError while it is being built, and when the store cannot be written.
        """
        with self.mistakes_as_user_errors(ref):
            try:
                for path in self.set_aside(ref, self.partial(ref), self.path(ref), suffix=REMOVED):
                    delete(path)
            except BlockingIOError:
                raise UserError(
                    f"{ref} is being built by {self.holder(ref)}; wait for that or stop it, then try again"
                ) from None

    def set_aside(self, ref: Ref, *paths: Path, suffix: str = ASIDE) -> list[Path]:
        """Rename folders of the artefact that are there, each in one step, to a hidden name that ends with `suffix`:
        from then on nobody finds them. Those of `REMOVED` can be deleted at leisure.

        Raises BlockingIOError while it is being built, UserError when the store cannot be written.
        """
        if not any(path.exists() for path in paths):
            return []
        with self.mistakes_as_user_errors(ref), self._lock(ref, wait=False):
            return [self._rename(ref, path, suffix) for path in paths if path.exists()]

    def _rename(self, ref: Ref, path: Path, suffix: str) -> Path:
        hidden = path.with_name(f".{ref.key}.{secrets.token_hex(4)}{suffix}")
        os.rename(path, hidden)
        return hidden

    def partial(self, ref: Ref) -> Path:
        return self.root / ref.kind / f".{ref.key}.partial"

    def arriving(self, ref: Ref) -> Path:
        """Where the files of an artefact arrive from a remote."""
        return self.root / ref.kind / f".{ref.key}{PULLING}"

    def _lock(self, ref: Ref, **options: Any) -> Lock:
        return Lock(self.root / ref.kind / f".{ref.key}.lock", what=str(ref), **options)

    def _manifest(self, ref: Ref) -> Manifest:
        path = self.path(ref) / MANIFEST
        try:
            return Manifest.parse(path.read_bytes(), ref)
        except (*NO_FILE, *UNPARSABLE) as error:
            reason = f"{ref} is damaged, its {MANIFEST} cannot be used"
            raise UserError(f"{reason}; {anew(ref.key)}") from error

    @contextmanager
    def mistakes_as_user_errors(self, what: object) -> Iterator[None]:
        """A full or read-only store is for the user to mend; an OSError about a file elsewhere passes through."""
        try:
            yield
        except OSError as error:
            path = Path(error.filename).absolute() if isinstance(error.filename, str) else self.root
            if not path.is_relative_to(self.root):
                raise
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                reason = "has no space left; free some and run again (the build goes on where it stopped)"
            elif error.errno == errno.EFBIG:
                reason = "takes no file of that size; raise the limit (ulimit -f, or the file system's) and run again"
            elif error.errno in (errno.EACCES, errno.EPERM):
                reason = f"cannot be used{_closed(path)}; mend its permissions"
            elif error.errno in (errno.EROFS, errno.ENOTDIR):
                reason = "cannot be used; mend its permissions"
            elif error.errno == errno.EEXIST and error.filename == str(self.root):
                reason = "is a file, not a folder; remove it"
            else:
                raise
            raise UserError(
                f"store {self.root} {reason}, or pass another --store ({what}: {error.strerror})"
            ) from error


def _damaged(manifest: Manifest, problems: Mapping[str, str]) -> UserError:
    name, problem = next(iter(problems.items()))
    return UserError(f"{manifest.ref} is damaged ({name} {problem}); {anew(manifest.key)}")


def _closed(path: Path) -> str:
    """The file or folder that this user may not use, and its owner, as text."""
    there = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    shut = there.parent if os.access(there, os.R_OK | os.W_OK) else there
    owner = user_name(shut.lstat().st_uid)
    return f": {shut} belongs to {owner}, who must let the group read and write (umask 002, chmod -R g+rwX)"


def _names(folder: Path) -> list[str]:
    """All that is no folder below a folder, by its path from there; folders that may not be read are left out."""
    found = (os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)
    return sorted(Path(path).relative_to(folder).as_posix() for path in found)


def _stays(path: Path, name: str) -> bool:
    """Whether a file of the artefact in this folder is not here, but in a remote."""
    return name.endswith(".tar") and (path / ELSEWHERE).is_file()


def _size_problems(path: Path, manifest: Manifest) -> dict[str, str]:
    problems = {}
    for name, entry in manifest.files.items():
        try:
            size = (path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            if not _stays(path, name):
                problems[name] = "is missing"
        else:
            if size != entry["bytes"]:
                problems[name] = f"has {size} bytes instead of {entry['bytes']}"
    return problems
