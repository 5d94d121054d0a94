"""Imports inside the package point one way; only `ops/_native.py` touches compiled code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import bmm_engine

PACKAGE = Path(bmm_engine.__file__).parent

# The lower floors: what each may import from the package beside itself.
MAY_IMPORT = {
    "errors": set(),
    "progress": set(),
    "memory": set(),
    "ops": {"errors"},
    "lowrank": {"errors", "ops"},
    "architecture": {"errors"},
    "calibration": {"errors"},
    "checkpoint": {"errors", "lowrank", "progress"},
    "anchors": {"errors", "ops", "progress"},
    "records": {"errors"},
    "roles": set(),
    "scores": {"errors"},
    "sections": set(),
    "executors": {"errors", "progress"},
    "evaluators": {"architecture", "calibration", "errors", "progress", "scores", "sections"},
    "live": {"align", "architecture", "checkpoint", "errors", "evaluators"},
    "posterior": {"errors", "moments", "ops", "parallel", "solve"},
    "grams": {"errors", "ops", "progress", "records"},
    "collect": {"architecture", "errors", "grams", "progress"},
    "moments": {"errors", "lowrank", "ops"},
    "solve": {"errors", "moments", "ops"},
    "blocks": {"architecture", "collect", "errors"},
    "measured": {"errors", "grams", "records"},
    "metrics": {"errors"},
    "weighted": {"errors", "metrics", "moments", "solve"},
    "fisher": {"architecture", "collect", "errors", "grams", "measured", "progress"},
    "sensitivity": {"architecture", "collect", "errors", "fisher", "grams", "measured", "ops", "progress"},
    "sequential_grams": {"anchors", "architecture", "blocks", "collect", "errors", "grams", "moments", "progress"},
    "parallel": set(),
    "locks": set(),
    "identity": {"checkpoint"},
    "ordering": {"align", "checkpoint"},
    "spectral": {"errors", "moments", "ops", "solve"},
    "references": {"sections"},
    "expert_parameters": {"anchors", "errors", "references"},
    "recipe": {"anchors", "errors", "expert_parameters", "mergekit", "references", "sections"},
    "mergekit": {"checkpoint", "errors"},
    "sources": {"architecture", "checkpoint", "errors"},
    "align": {"checkpoint", "errors"},
}
# The upper floors, top first: whatever stands below one may not import it.
TOP_DOWN = [
    "cli",
    "commands",
    "demo",
    "inspection",
    "report",
    "sampling",
    "searching",
    "pipeline",
    "measure",
    "continual",
    "sequential",
    "merging",
    "output",
    "stream",
    "factors",
    "groups",
    "inputs",
    "plan",
]


def source_modules():
    """(dotted name, path) of every module in the package's source tree."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports(name, path):
    """Dotted names that a module imports from the package, wherever in the file the import stands."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return {target for target in found if target.split(".")[0] == PACKAGE.name}


def floor(name):
    return name.split(".")[1] if "." in name else ""


def forbidden(name, path):
    here = floor(name)
    used = {floor(target) for target in imports(name, path)} - {here}
    if here in MAY_IMPORT:
        return used - MAY_IMPORT[here]
    above = TOP_DOWN[: TOP_DOWN.index(here)] if here in TOP_DOWN else TOP_DOWN
    return used & set(above) if here not in ("", "__main__") else set()


each_module = pytest.mark.parametrize(
    ("name", "path"), [pytest.param(name, path, id=name) for name, path in source_modules()]
)


@each_module
def test_imports_point_one_way(name, path):
    assert not forbidden(name, path), f"{name} may not import {sorted(forbidden(name, path))}"


@each_module
def test_only_native_touches_compiled_modules(name, path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    words |= imports(name, path)
    touched = {word for word in words if word.split(".")[-1] in ("_cpu", "_cuda")}
    assert not touched or name == "bmm_engine.ops._native"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("bmm_engine.solve", "def f():\n    from bmm_engine import merging", {"merging"}),
        ("bmm_engine.ops.gram.cpu", "from ... import grams", {"grams"}),
        ("bmm_engine.merging", "import bmm_engine.searching", {"searching"}),
        ("bmm_engine.anything", "from .cli import main", {"cli"}),
        ("bmm_engine.searching", "from bmm_engine.merging import merge", set()),
        ("bmm_engine.solve", "import torch\nfrom bmm_engine.ops.gram import accumulate_gram", set()),
    ],
)
def test_the_rule_bites(tmp_path, name, text, expected):
    path = tmp_path / "module.py"
    path.write_text(text)
    assert forbidden(name, path) == expected


def test_only_bind_cpp_sees_pybind11():
    csrc = PACKAGE.parent / "csrc"
    if not csrc.is_dir():
        pytest.skip("the C++ sources are not beside the installed package")
    users = {path.relative_to(csrc).as_posix() for path in csrc.rglob("*.*") if "pybind11" in path.read_text()}
    assert users == {"cpu/bind.cpp", "cuda/bind.cpp"}
