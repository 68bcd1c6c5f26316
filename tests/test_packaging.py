"""The wheel, a new project, and the container files. `make installed` builds the wheel and uses it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from conftest import REPO
from packaging.utils import canonicalize_name
from requirements import with_their_requirements

from flows import shipped
from flows.shipped import create_project, find_file
from ogls.app import _FLOWS, PROJECT
from ogls.config import load_config
from ogls.errors import ConfigError, UserError

BIN = Path(sys.executable).parent
CONTAINERFILE = REPO / "deployments/Containerfile"
COMPOSE = REPO / "deployments/compose.yaml"


def test_the_wheel_has_the_files_of_a_new_project() -> None:
    assignments = [n for n in ast.parse((REPO / "setup.py").read_text()).body if isinstance(n, ast.Assign)]
    (project,) = [a.value for a in assignments if getattr(a.targets[0], "id", "") == "PROJECT"]
    names = eval(compile(ast.Expression(project), "setup.py", "eval"))
    assert names == shipped._FILES
    copied = CONTAINERFILE.read_text()
    manifest = (REPO / "MANIFEST.in").read_text()
    for name in names:
        assert (PROJECT / name).exists()
        assert f"COPY {name} " in copied
        assert name in manifest


def test_a_name_is_a_configuration_here_or_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_file("tiny", "runs") == PROJECT / "deployments/runs/tiny.toml"
    assert find_file("qwen3-1.7b", "runs") == PROJECT / "deployments/runs/qwen3-1.7b.toml"
    assert find_file("family", "studies") == PROJECT / "deployments/studies/family.toml"
    assert find_file("a/b", "runs") == Path("a/b")
    assert find_file("mine.toml", "runs") == Path("mine.toml")
    with pytest.raises(UserError, match=r"no file xyz, and no shipped .*; runs: qwen3-1.7b, .*, tiny, "):
        find_file("xyz", "runs")
    with pytest.raises(UserError, match=r"no file tinny, .*; did you mean tiny\?"):
        find_file("tinny", "runs")
    (tmp_path / "deployments/runs").mkdir(parents=True)
    for name in ("tiny", "mine"):
        (tmp_path / f"deployments/runs/{name}.toml").write_text("rounds = 3\n")
        assert find_file(name, "runs").resolve() == tmp_path / f"deployments/runs/{name}.toml"
    with pytest.raises(UserError, match=r"no file xyz.*; runs: mine, qwen3"):
        find_file("xyz", "runs")


def test_files_that_a_configuration_names_are_found_in_its_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(PROJECT / "deployments/runs/tiny.toml")
    assert config.model.path == str(PROJECT / "data/tiny/model")
    assert config.problems.source == str(PROJECT / "data/tiny/train.jsonl")
    assert config.evaluate.benchmarks[0].source == str(PROJECT / "data/tiny/test.jsonl")
    assert config.root == "data/runs"  # what is written is written here
    create_project(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    assert load_config(find_file("tiny", "runs")).model.path == "data/tiny/model"


def test_a_new_project_is_complete_and_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    written = create_project(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert {str(name) for name in written} == {*shipped._FILES, ".gitignore"}
    for file in (PROJECT / "deployments/runs").glob("*.toml"):
        assert load_config(tmp_path / "deployments/runs" / file.name).name == file.stem
    with pytest.raises(UserError, match=r"has deployments/prefect.yaml, .*data/tiny already; choose another folder"):
        create_project(tmp_path)
    with pytest.raises(UserError, match=r"README.md is a file; choose another folder"):
        create_project(tmp_path / "README.md")
    assert create_project(tmp_path / "new/project")
    assert (tmp_path / "new/project/README.md").read_text().startswith("# project\n")


def test_the_deployments_name_flows_of_the_application() -> None:
    entries = yaml.safe_load((REPO / "deployments/prefect.yaml").read_text())["deployments"]
    assert {e["entrypoint"].removeprefix("ogls.app:") for e in entries} == set(_FLOWS)


def test_an_unknown_name_is_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "flows.cli", "compare", "nothing"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    known = "clip, divergences, family, long, paper, switches, terse, threshold, words, worlds"
    assert result.stderr == f"error: no file nothing, and no shipped configuration of that name; studies: {known}\n"


def test_the_container_files_pass_their_checkers() -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    for command in ([BIN / "hadolint", CONTAINERFILE], [BIN / "check-jsonschema", *schema, COMPOSE]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def test_the_services_in_containers_are_reachable_from_this_machine_only() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert {"postgres", "prefect", "mlflow", "deploy", "worker"} == set(services)
    published = [port for service in services.values() for port in service.get("ports", ())]
    assert published == ["127.0.0.1:4200:4200", "127.0.0.1:5000:5000"]
    assert "PASSWORD:?" in services["postgres"]["environment"]["POSTGRES_PASSWORD"]  # refused without one


def test_a_missing_configuration_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file .*none.toml; `ogls train tiny` takes a shipped one"):
        load_config(tmp_path / "none.toml")


def test_what_is_imported_is_declared() -> None:
    """`make installed` sees all packages of this Python, those of developers too."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = [name for extra, names in project["optional-dependencies"].items() if extra != "dev" for name in names]
    declared = with_their_requirements([*project["dependencies"], *extras])
    owners = packages_distributions()
    ours = {"ogls", "tasks", "flows", "_typeshed"}
    missing = {}
    for file in (f for package in ("ogls", "tasks", "flows") for f in (REPO / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for module in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - ours:
                owned = {canonicalize_name(name) for name in (module, *owners.get(module, ()))}
                if not owned & declared:
                    missing[module] = file.relative_to(REPO)
    assert missing == {}
