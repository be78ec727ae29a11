"""Where an artefact came from, for people to read; nothing of it is part of a key."""

from __future__ import annotations

import os
import platform
import pwd
import socket
import subprocess
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "zs-seg",
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "numpy",
    "zarr",
    "webdataset",
    "pillow",
    "safetensors",
)


def provenance() -> dict[str, Any]:
    """Time, user and machine, git commit (None outside a git checkout), Python and package versions, platform."""
    return {
        "created": time.strftime("%FT%T%z"),
        "user": user_name(os.getuid()),
        "host": socket.gethostname(),
        "git": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _packages(),
    }


@cache
def _packages() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            continue
    return found


@cache
def _commit() -> str | None:
    project = Path(__file__).parents[1]
    if not (project / ".git").exists():  # installed as a package: a git repository around it would not be ours
        return None
    command = ["git", "-C", str(project), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or no commit yet
        return None


def user_name(number: int) -> str:
    """The name of a user, or "user 1234" for an id without a name on this machine, as in a container."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
