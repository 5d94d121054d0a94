"""Imports inside the package point one way, those of the bench in no circle; only `ops/_native.py` touches compiled code."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import bmm_engine

PACKAGE = Path(bmm_engine.__file__).parent
BENCH = Path(__file__).parents[1] / "bench"

# The rooms from top to bottom. A module imports from its own room and from those below it, never from one above.
ROOMS = [
    "cli",
    "commands",
    "demo",
    "report",
    "searching",
    "pipeline",
    "sequential",
    "merging",
    "evaluators",
    "recipe",
    "statistics",
    "anchors",
    "checkpoint",
    "solving",
    "models",
    "executors",
    "ops",
    "disk",
    "parallel",
    "memory",
    "locks",
    "progress",
    "errors",
]
# The doors of the package stand outside: they may name every room.
DOORS = ("", "__main__")


def source_modules(package=PACKAGE):
    """(dotted name, path) of every module in a package's source tree."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports(name, path):
    """Dotted names that a module imports from its own package, wherever in the file the import stands."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return {target for target in found if target.split(".")[0] == name.split(".")[0]}


def room(name):
    return name.split(".")[1] if "." in name else ""


def forbidden(name, path):
    """The rooms above its own that a module imports from."""
    here = room(name)
    above = [] if here in DOORS else ROOMS[: ROOMS.index(here)]
    return {room(target) for target in imports(name, path)} & set(above)


def circle(package):
    """Modules of a package, each of which imports the next one and the last one the first; empty where there are none."""
    modules = dict(source_modules(package))

    def module_of(target):
        while target not in modules:  # a name in a module
            target = target.rpartition(".")[0]
        return target

    graph = {name: {module_of(target) for target in imports(name, path)} for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][1:]
    return []


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


def test_every_room_is_in_the_list():
    found = {room(name) for name, _ in source_modules()} - set(DOORS)
    assert found == set(ROOMS)
    loose = {path.name for path in PACKAGE.glob("*.py")}
    assert len(loose) <= 8, "what belongs to a stage lies in its folder"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("bmm_engine.solving.solve", "def f():\n    from bmm_engine import merging", {"merging"}),
        ("bmm_engine.ops.gram.cpu", "from ... import statistics", {"statistics"}),
        ("bmm_engine.merging.merge", "import bmm_engine.searching.run", {"searching"}),
        ("bmm_engine.errors", "from .cli import main", {"cli"}),
        ("bmm_engine.searching.run", "from bmm_engine.merging.merge import merge", set()),
        ("bmm_engine.solving.solve", "import torch\nfrom bmm_engine.ops.gram import accumulate_gram", set()),
    ],
)
def test_the_rule_bites(tmp_path, name, text, expected):
    path = tmp_path / "module.py"
    path.write_text(text)
    assert forbidden(name, path) == expected


def test_the_bench_imports_in_no_circle():
    if not BENCH.is_dir():
        pytest.skip("the bench is not beside the tests")
    assert circle(BENCH) == []


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"a": "from suite import b", "b": "from suite.a import name"}, {"suite.a", "suite.b"}),
        (
            {"a": "import suite.b", "b": "def f():\n    from .c import name", "c": "from . import a"},
            {"suite.a", "suite.b", "suite.c"},
        ),
        ({"a": "if TYPE_CHECKING:\n    from suite.b import Name", "b": "import suite.a"}, {"suite.a", "suite.b"}),
        ({"a": "from suite import b, c", "b": "from suite.c import name", "c": "import torch"}, set()),
    ],
)
def test_a_circle_is_found(tmp_path, texts, expected):
    package = tmp_path / "suite"
    package.mkdir()
    for name, text in {"__init__": "", **texts}.items():
        (package / f"{name}.py").write_text(text)
    assert set(circle(package)) == expected


def test_only_bind_cpp_sees_pybind11():
    csrc = PACKAGE.parent / "csrc"
    if not csrc.is_dir():
        pytest.skip("the C++ sources are not beside the installed package")
    users = {path.relative_to(csrc).as_posix() for path in csrc.rglob("*.*") if "pybind11" in path.read_text()}
    assert users == {"cpu/bind.cpp", "cuda/bind.cpp"}
