"""What an installation gets: the lock files against pyproject.toml and the sources, and the Makefile's choice of a
Python.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# what the developers' extra takes in
TAKEN_IN = [
    wanted
    for requirement in map(Requirement, EXTRAS["dev"])
    if requirement.name == PROJECT["name"]
    for extra in requirement.extras
    for wanted in EXTRAS[extra]
]
PACKAGES = ("flows", "models", "pipeline", "storage")
PIN = re.compile(r"([a-z0-9-]+)==(\S+)( ; .+)? \\")
MAKE, SH = shutil.which("make"), shutil.which("sh")


def pins(name: str) -> dict[str, dict[str, str]]:
    """Of a lock file: package -> marker ("" for always) -> version."""
    found: dict[str, dict[str, str]] = {}
    for package, version, marker in re.findall(PIN, (ROOT / name).read_text()):
        found.setdefault(package, {})[marker] = version
    return found


LOCKS = ("requirements.lock", "requirements-remote.lock", "requirements-dev.lock")
USERS, IMAGE, DEVELOPERS = map(pins, LOCKS)


# Lock files


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_every_package_by_hash_and_names_no_address(name: str) -> None:
    text = (ROOT / name).read_text()
    entries = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip())
    assert len(entries) == sum(len(versions) for versions in pins(name).values()) > 100
    assert all(PIN.match(entry) and "--hash=sha256:" in entry for entry in entries)
    assert "://" not in text


@pytest.mark.parametrize(
    ("locked", "wanted"),
    [
        (USERS, PROJECT["dependencies"]),
        (IMAGE, [*PROJECT["dependencies"], *EXTRAS["remote"]]),
        (DEVELOPERS, [*PROJECT["dependencies"], *EXTRAS["dev"], *TAKEN_IN]),
    ],
    ids=["users", "image", "developers"],
)
def test_a_lock_has_every_direct_dependency_in_a_version_that_pyproject_allows(
    locked: dict[str, dict[str, str]], wanted: list[str]
) -> None:
    for requirement in map(Requirement, wanted):
        if requirement.name == PROJECT["name"]:  # an extra that takes in another one
            assert requirement.extras <= EXTRAS.keys()
            continue
        versions = locked[canonicalize_name(requirement.name)].values()
        assert all(requirement.specifier.contains(version) for version in versions), requirement


def test_the_images_lock_is_the_users_and_more_and_the_developers_has_all() -> None:
    assert USERS.items() < IMAGE.items() < DEVELOPERS.items()
    more = DEVELOPERS.keys() - USERS.keys()
    assert {"pytest", "pytest-xdist", "hypothesis", "ruff", "basedpyright", "transformers"} <= more


def test_what_the_sources_import_is_in_the_users_lock() -> None:
    """But for the references of the benchmarks, for video files and for remotes, which extras bring."""
    owners = packages_distributions()
    missing = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for module in imported(path) - set(PACKAGES) - sys.stdlib_module_names:
            if not USERS.keys() & {canonicalize_name(name) for name in owners[module]}:
                missing.add((path.parent.relative_to(ROOT).as_posix(), module))
    assert missing == {("pipeline/bench", "transformers"), ("pipeline/data", "av"), ("storage", "paramiko")}


def imported(path: Path) -> set[str]:
    """The first words of the modules that a source file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


# The Makefile's choice of a Python


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A copy of the Makefile beside a folder `bin`, all that is on PATH: a shell's tools, and no Python yet."""
    if not MAKE:
        pytest.skip("needs make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "sed", "rm"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or "")
    return tmp_path


def put(machine: Path, *names: str) -> None:
    """Pythons that run, under these names: this one's interpreter."""
    pytest.importorskip("ensurepip")
    for name in names:
        (machine / "bin" / name).symlink_to(os.path.realpath(sys.executable))


def put_shims(machine: Path, *names: str) -> None:
    """What a version manager leaves on PATH for a version that is not installed."""
    for name in names:
        shim = machine / "bin" / name
        shim.write_text(f'#!{SH}\necho "{name}: command not found" >&2\nexit 127\n')
        shim.chmod(0o755)


def make(machine: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(MAKE), "--no-print-directory", *arguments],
        cwd=machine, env={"PATH": str(machine / "bin")}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("works", "broken", "chosen"),
    [
        (["python3.11", "python3.12", "python3.13"], [], "python3.11"),
        (["python3.12", "python3.13"], ["python3.11"], "python3.12"),
        (["python3.13"], ["python3.11", "python3.12"], "python3.13"),
        (["python3.12", "python3", "python3.10"], [], "python3.12"),
    ],
)
def test_the_first_python_that_runs_is_chosen(machine: Path, works: list[str], broken: list[str], chosen: str) -> None:
    put(machine, *works)
    put_shims(machine, *broken)
    ran = make(machine, "python")
    assert (ran.returncode, ran.stdout.strip()) == (0, str(machine / "bin" / chosen)), ran.stderr


def test_a_python_can_be_named_and_then_no_other_is_chosen(machine: Path) -> None:
    put(machine, "python3.11", "mine")
    put_shims(machine, "python3.13")
    path = str(machine / "bin" / "mine")
    assert make(machine, "python", f"PYTHON3={path}").stdout.strip() == path
    ran = make(machine, "python", "PYTHON3=python3.13")
    assert (ran.returncode, ran.stdout) == (2, "") and "none of python3.13 runs" in ran.stderr


@pytest.mark.parametrize("target", ["python", "install"])
def test_without_a_python_one_line_says_what_is_missing_and_how_to_get_it(machine: Path, target: str) -> None:
    put_shims(machine, "python3.11", "python3.12", "python3.13", "python3")
    ran = make(machine, target)
    ours = [line for line in ran.stderr.splitlines() if not line.startswith("make: ***")]
    assert ran.returncode == 2 and len(ours) == 1, ran.stderr
    for part in ("python3.11 python3.12 python3.13", "apt-get install python3-venv", "PYTHON3=", "uv python install"):
        assert part in ours[0]
    assert not (machine / ".venv").exists()
