"""Imports (DESIGN section 3): contracts, cycles, module sizes, and imports without optional packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from statistics import median

from conftest import REPO

PACKAGES = ("ogls", "tasks", "flows")
FILES = sorted(p for package in PACKAGES for p in (REPO / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imports_of(tree: ast.AST) -> set[str]:
    """The project modules that a syntax tree imports, with imports inside functions, without TYPE_CHECKING imports."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= submodules or {node.module or ""}
        found |= imports_of(node)
    return found & set(MODULES)


def find_cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """For each module on an import cycle, the path from the module back to itself."""
    cycles = []
    for start in graph:
        paths = [[start, imported] for imported in graph[start]]
        seen: set[str] = set()
        while paths:
            path = paths.pop()
            if path[-1] == start:
                cycles.append(path)
                break
            if path[-1] not in seen:
                seen.add(path[-1])
                paths += [[*path, imported] for imported in graph[path[-1]]]
    return cycles


def test_import_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_import_cycles() -> None:
    graph = {name: imports_of(ast.parse(path.read_text())) - {name} for name, path in MODULES.items()}
    assert len(graph["ogls.stages.train"]) > 5  # the graph is not empty
    assert find_cycles(graph) == []


def test_an_import_cycle_is_found() -> None:
    lazy_import = ast.parse("def f():\n    from ogls.store import Store\n")
    assert imports_of(lazy_import) == {"ogls.store"}
    assert find_cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"], ["c", "b", "c"]]


def test_modules_and_functions_stay_small() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: n for name, n in lengths.items() if n > 300} == {}
    assert median(n for n in lengths.values() if n > 12) <= 130  # without __init__ files that have only a docstring
    long_functions = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    }
    assert long_functions == {}


def test_ogls_imports_without_prefect_mlflow_duckdb_and_vllm() -> None:
    """A GPU machine may have only torch, transformers, peft and pyarrow; every module of ogls must import there."""
    missing = ("prefect", "mlflow", "duckdb", "vllm", "ray", "typer", "rich", "scipy")
    names = [name for name in MODULES if name.startswith("ogls")]
    code = (
        f"import sys\nfor name in {missing!r}: sys.modules[name] = None\n"
        f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
