"""The documents and what they name: decisions, files, headings, commands, make targets, presets and settings."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import parser
from flows.presets import PRESETS, preset

ROOT = Path(__file__).parents[1]
PAPER = "Semantic-Centric Alignment for Zero-Shot Panoptic and Semantic Segmentation"
CODE = ("flows", "models", "pipeline", "storage", "tests")
WINGS = ("ablation", "bench", "data", "world")  # those of pipeline/ with a README of their own
FOLDERS = ("pipeline", *(f"pipeline/{wing}" for wing in WINGS), "models", "storage", "flows", "docker", "tests")
READMES = ("README.md", *(f"{folder}/README.md" for folder in FOLDERS))
GUIDES = (*READMES, ".github/CONTRIBUTING.md")  # CHANGELOG.md may name what is gone
SOURCE = r"(?<![\w./<*-])(?:[\w-]+/)*[\w-]+\.(?:py|yaml|toml|lock)\b"


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code(document: str) -> list[str]:
    """A document's fenced blocks and, from the rest of it, its code spans."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", document, re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", document, flags=re.M | re.S)
    return blocks + re.findall(r"`([^`\n]+)`", rest)


def named(pattern: str, name: str) -> set[str]:
    """What `pattern` finds in the code of the document `name`."""
    return {found for part in code(text(name)) for found in re.findall(pattern, part)}


def anchors(document: str) -> set[str]:
    """The headings as the fragments of a link, as GitHub makes them."""
    outside = re.sub(r"^```.*?^```", "", document, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", outside, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def settings(config: Any) -> set[str]:
    """The flags that change single fields of a configuration: "--v2c.segmenter.dim"."""

    def walk(value: Any, prefix: str) -> Iterator[str]:
        for field in fields(value):
            inner = getattr(value, field.name)
            path = f"{prefix}{field.name.replace('_', '-')}"
            if is_dataclass(inner):
                yield from walk(inner, f"{path}.")
            else:
                yield f"--{path}"
                if isinstance(inner, bool):
                    yield f"--{prefix}no-{field.name.replace('_', '-')}"

    return set(walk(config, ""))


COMMANDS = next(a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", text("Makefile"), re.M))
DEPLOYMENTS = {deployment["name"] for deployment in yaml.safe_load(text("prefect.yaml"))["deployments"]}
SETTINGS = set().union(*(settings(preset(name)) for name in PRESETS))


def test_every_decision_that_is_cited_has_its_row_and_every_row_is_cited() -> None:
    table = ROOT / "models/README.md"
    rows = re.findall(r"^\| (D\d+) \|", table.read_text(encoding="utf-8"), re.M)
    files = [file for folder in CODE for file in (ROOT / folder).rglob("*.py")]
    files += [ROOT / name for name in (*GUIDES, "CHANGELOG.md") if ROOT / name != table]
    cited = {d for file in files for d in re.findall(r"\bD\d+\b", file.read_text(encoding="utf-8"))}
    assert sorted(rows) == sorted(cited)  # as lists: no row stands twice


def test_the_code_of_every_equation_exists() -> None:
    sources = [*(ROOT / "models").glob("*.py"), ROOT / "pipeline/training/criteria.py"]
    defined = set(re.findall(r"^ *(?:def|class) (\w+)", "\n".join(map(Path.read_text, sources)), re.M))
    table = text("models/README.md").split("\n## The method\n")[1].split("\n## Decisions\n")[0]
    cells = [line.split("|")[-2] for line in table.splitlines() if re.match(r"\| (Eq\.|class logits)", line)]
    names = [name for cell in cells for name in re.findall(r"[\w.]+", cell)]
    assert len(cells) == 10 and all(names)
    assert {part for name in names for part in name.split(".")} <= defined


def test_the_readme_fits_on_a_few_screens_and_leads_to_every_folder() -> None:
    readme = text("README.md")
    assert len(readme.encode()) < 12_288
    for folder in FOLDERS:
        assert f"]({folder}/README.md)" in readme, f"no link to {folder}/README.md"


@pytest.mark.parametrize("name", (*GUIDES, "CHANGELOG.md"))
def test_links_lead_somewhere(name: str) -> None:
    document, broken = ROOT / name, []
    for target in re.findall(r"\]\(([^)\s]+)\)", text(name)):
        if re.match(r"https?://", target):
            continue
        path, _, fragment = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (fragment and fragment not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("name", GUIDES)
def test_files_of_the_repository_that_are_named_exist(name: str) -> None:
    """Paths below one of its folders; sources also from the document's folder, Python files by their bare name, too."""
    below = rf"(?<![\w./<-])(?:{'|'.join((*CODE, 'docker'))})/[\w./*-]*"
    paths = {path.rstrip(".") for path in named(below, name)} | named(SOURCE, name)
    bare = {file.name for folder in CODE for file in (ROOT / folder).rglob("*.py")}
    starts = ROOT, (ROOT / name).parent
    missing = [path for path in sorted(paths - bare) if not any(list(start.glob(path)) for start in starts)]
    assert not missing


@pytest.mark.parametrize("name", GUIDES)
def test_commands_targets_deployments_presets_and_settings_exist(name: str) -> None:
    assert named(r"\bzs-seg ([a-z][\w-]*)", name) <= set(COMMANDS)
    assert named(r"\bmake ([a-z][\w-]*)", name) <= TARGETS
    assert named(r"\bzs-seg/([\w-]+)", name) <= DEPLOYMENTS
    assert named(r"(?:--preset |\bpreset=)([a-z][\w-]*)", name) <= set(PRESETS)
    assert named(r"(?<!\w)(--[a-z0-9]+\.[\w.-]*\w)", name) <= SETTINGS
    stages = {setting.split(".")[0][2:] for setting in SETTINGS if "." in setting}
    paths = named(rf"^((?:{'|'.join(stages)})\.[a-z_]+)$", name)  # as in the table of decisions: `v2c.bank`
    assert {f"--{path.replace('_', '-')}" for path in paths if not path.endswith(".py")} <= SETTINGS


def test_every_command_is_in_the_readme_of_the_commands() -> None:
    assert named(r"\bzs-seg ([a-z][\w-]*)", "flows/README.md") == set(COMMANDS)


def test_the_paper_is_named_in_full_wherever_its_method_is_introduced() -> None:
    for name in ("README.md", "models/README.md", "models/losses.py", "models/__init__.py", "pipeline/__init__.py"):
        assert PAPER in " ".join(text(name).split()), name
    citation = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "license", "version"} <= citation.keys()
    assert PAPER in [reference["title"] for reference in citation["references"]]
    assert all(reference["authors"] and reference["type"] for reference in citation["references"])


def test_the_files_at_the_root_agree() -> None:
    project = text("pyproject.toml")
    citation = yaml.safe_load(text("CITATION.cff"))
    assert f'version = "{citation["version"]}"' in project and f'license = "{citation["license"]}"' in project
    assert "Apache License" in text("LICENSE") and "Version 2.0, January 2004" in text("LICENSE")
    for package in CODE[:-1]:
        assert (ROOT / package / "py.typed").is_file()
    assert [run["run"] for run in _steps() if "run" in run] == [".ci/run"]


def _steps() -> list[dict[str, Any]]:
    jobs = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]
