"""The layers: flows -> pipeline -> {models, storage}; models and storage import none of the others."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "flows": {"flows", "pipeline", "models", "storage"},
    "pipeline": {"pipeline", "models", "storage"},
    "models": {"models"},
    "storage": {"storage"},
}


def imported(source: str) -> set[str]:
    """The top-level packages a file imports, anywhere in it; a relative import counts as "."."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else (node.module or "").partition(".")[0])
    return found


def test_imports_inside_functions_and_type_checking_blocks_count() -> None:
    source = "import a.b\nif X:\n    from c.d import e\ndef f():\n    import g as h\n    from . import i"
    assert imported(source) == {"a", "c", "g", "."}


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_layer_imports_only_what_lies_below_it(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    ours = set(MAY_IMPORT) | {"tests", "docker", "."}
    wrong = {
        str(file.relative_to(ROOT)): sorted(bad)
        for file in files
        if (bad := imported(file.read_text(encoding="utf-8")) & ours - MAY_IMPORT[layer])
    }
    assert not wrong


def test_every_package_folder_is_known() -> None:
    packages = {folder.parent.name for folder in ROOT.glob("*/__init__.py")}
    assert packages == set(MAY_IMPORT)  # docker/ above all must never have one: it would shadow the docker SDK


def test_prefect_is_imported_by_the_flow_alone() -> None:
    files = [file for layer in MAY_IMPORT for file in (ROOT / layer).rglob("*.py")]
    users = {str(f.relative_to(ROOT)) for f in files if "prefect" in imported(f.read_text(encoding="utf-8"))}
    assert users == {"flows/flow.py"}
