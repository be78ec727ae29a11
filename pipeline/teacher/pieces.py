"""One group of rows for each tar, made by Dask's workers: what the process that builds the artefact does, and what a worker
does around a group. The same job may run twice, even at the same time, on any machine."""

from __future__ import annotations

import ctypes
import hashlib
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pipeline.runtime import Runtime
from pipeline.teacher.cluster import Progress, run_tasks
from storage import pieces
from storage.atomic import clean, delete
from storage.errors import UserError
from storage.inputs import vouch
from storage.keys import KEY_LENGTH, Ref
from storage.remote import Remote
from storage.store import Build
from storage.through import there


@dataclass(frozen=True, kw_only=True)
class TarJob:
    """One tar, with its sha256, of which `images` samples get rows, and the group for them, a part of the artefact."""

    tar: Path
    sha256: str
    group: Path
    images: int
    artefact: Ref

    def __str__(self) -> str:
        return str(self.tar)

    @property
    def made_of(self) -> tuple[str, ...]:
        """The sha256 of every file of the build's inputs that the group is made of."""
        return (self.sha256,)

    @property
    def part(self) -> str:
        """The group's name in a remote, where groups made of other bytes have other names."""
        return f"{self.group.name}.{hashlib.sha256(' '.join(self.made_of).encode()).hexdigest()[:KEY_LENGTH]}"


Job = TypeVar("Job", bound=TarJob)


def make_groups(
    build: Build,
    jobs: Sequence[Job],
    encode: Callable[[Job, Runtime, Progress], str],
    runtime: Runtime,
    *,
    check: Callable[[Path], object],
    files: Callable[[Path], Iterable[Path]],
    title: str,
    unit: str,
) -> None:
    """Make the group of every job by `encode`, one Dask task each; groups that an earlier build left and that `check`
    takes are kept, and those that workers without the store's disk make are brought home. Names the `files` of all
    groups, and notes devices and number of workers. `title` and `unit` are the progress bar's.

    Raises UserError as `run_tasks` and `Remote`, and if a worker lacks the store and has no remote.
    """
    missing = [job for job in jobs if not build.holds(job.group, check)]
    remote = None if runtime.local or not runtime.remote else Remote(runtime.remote)
    if remote:  # what an earlier run's workers have left
        missing = [job for job in missing if not _bring(job, remote)]
    images, left = (sum(job.images for job in some) for some in (jobs, missing))
    rows, started = 0, time.monotonic()
    with runtime.bar(images, title, "image", initial=images - left) as bar:

        def progress(more_images: int, more_rows: int) -> None:
            nonlocal rows
            rows += more_rows
            bar.set_postfix_str(f"{rows / (time.monotonic() - started):.0f} {unit}/s", refresh=False)
            bar.update(more_images)

        devices, workers = run_tasks(encode, missing, runtime, progress=progress)
    if remote:
        for job in missing:
            if not job.group.exists():
                _bring(job, remote)
        pieces.forget(remote, build.recipe.ref)
    clean(build.path)  # unfinished files of lost workers
    build.add(*(file for job in jobs for file in files(job.group)))
    build.provenance |= {"device": ", ".join(sorted(set(devices))), "workers": workers}


def _bring(job: TarJob, remote: Remote) -> bool:
    """Whether a worker had left the job's group in the remote; it is here now."""
    if not pieces.is_there(remote, job.artefact, job.part):
        return False
    write_once(job.group, lambda own: pieces.bring(remote, job.artefact, job.part, own))
    return True


def make_group(
    job: Job,
    write: Callable[[Job, Path], object],
    runtime: Runtime,
    progress: Progress,
    *,
    reads: Sequence[Path] = (),
) -> str:
    """Write the job's group by `write(job, path)` unless it exists, and return the device's name. `reads`: what it reads
    beside the tar.

    On a machine without the store the tar comes from the remote of `runtime`, and the group is left there. Raises
    UserError where there is none, and as `pieces.fetch`.
    """
    device = str(runtime.torch_device())
    if runtime.remote and not job.group.parent.exists():
        remote = Remote(runtime.remote)
        if pieces.is_there(remote, job.artefact, job.part):
            progress(job.images, 0)
            return device
        with tempfile.TemporaryDirectory(prefix="zs-seg-") as name:
            own = replace(job, tar=Path(name) / job.tar.name, group=Path(name) / job.part)
            pieces.fetch(remote, job.tar.parent, Path(name), {job.tar.name: job.sha256})
            write_once(own.group, lambda path: write(own, path))
            pieces.leave(remote, job.artefact, own.group)
        return device
    require_here(job.tar, *reads, job.group.parent)
    if job.group.exists():
        progress(job.images, 0)
    else:
        write_once(job.group, lambda path: write(job, path))
    return device


def require_here(*paths: Path) -> None:
    """Raises UserError, with the cure, for a path that a worker does not find."""
    for path in paths:
        if not there(path):
            raise UserError(
                f"a worker on {socket.gethostname()} does not find {path}; pass --store FOLDER with a folder that all "
                "machines share under the same path"
            )


def write_once(group: Path, write: Callable[[Path], object]) -> None:
    """Make the folder `group` by `write(path)`, which writes under a name of its own; the first of several to end
    renames its folder to `group`, and the others delete theirs."""
    own = group.with_name(f".{group.name}.{uuid.uuid4().hex}.writing")
    write(own)
    _return_freed_memory()
    vouch(group.parent)
    try:
        own.rename(group)
    except OSError:
        if not group.exists():
            raise
        delete(own)


def _return_freed_memory() -> None:
    """Make glibc return freed memory to the system, as other C libraries do by themselves.

    Buffers of many sizes fragment its heap, by which a worker grew 5 to 10 MB per tar. Once per tar the call costs next
    to nothing; Dask's setting, which returns memory all the time, is expensive.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
