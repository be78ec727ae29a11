"""The layers: flows -> pipeline -> {models, storage}; and inside pipeline/ the wings, which import one way as well."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
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


# ------------------------------------------------------------------------------------------------ the wings of pipeline/

# A wing imports only wings of lower levels; the stages and line.py stand above all of LEVELS, and only ABOVE may import
# them.
LEVELS = ({"data"}, {"world", "teacher"}, {"training", "inference"}, {"scoring"}, {"report"})
ABOVE = {"ablation", "planning", "bench"}
ANYWHERE = {"pipeline.runtime"}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for layer in MAY_IMPORT for file in (ROOT / layer).rglob("*.py")}


def imports_of(source: str) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & MODULES.keys()) or {node.module}
    return found & MODULES.keys()


GRAPH = {module: imports_of(file.read_text(encoding="utf-8")) for module, file in MODULES.items()}


def wing_of(module: str) -> str:
    """ "training" for pipeline.training.loop, "" for a stage, line.py or another file directly in pipeline/."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else ""


def test_a_module_of_a_package_counts_as_itself() -> None:
    source = "from pipeline.training import loop\nfrom pipeline.runtime import Runtime\nimport storage.keys"
    assert imports_of(source) == {"pipeline.training.loop", "pipeline.runtime", "storage.keys"}


def test_every_wing_has_its_place() -> None:
    wings = {file.parent.name for file in (ROOT / "pipeline").glob("*/__init__.py")}
    assert wings == set().union(*LEVELS) | ABOVE
    assert len(list((ROOT / "pipeline").glob("*.py"))) - 1 <= 13  # files to know at the front; __init__.py is none


def test_wings_import_only_wings_below_them() -> None:
    level = {wing: number for number, wings in enumerate(LEVELS) for wing in wings}
    wrong = []
    for module, imports in GRAPH.items():
        if not module.startswith("pipeline."):
            continue
        mine = wing_of(module)
        for other in imports:
            theirs = wing_of(other)
            if not other.startswith("pipeline.") or other in ANYWHERE or theirs == mine or mine in ABOVE:
                continue
            above = theirs in ABOVE
            backwards = mine in level and (theirs == "" or level.get(theirs, len(LEVELS)) >= level[mine])
            if above or backwards:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_no_import_cycles() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from error


@pytest.mark.parametrize("wing", sorted(file.parent.name for file in (ROOT / "pipeline").glob("*/config.py")))
def test_a_config_imports_nothing_heavy(wing: str) -> None:
    """So that the command line answers at once."""
    code = f"import sys, pipeline.{wing}.config; print(*{{'torch', 'open_clip', 'timm', 'zarr'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.split()
