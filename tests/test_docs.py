"""The docs: the site builds without a broken link or a network request, matches the code, and its examples run."""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from browser import open_browser
from conftest import REPO

from ogls.analysis.study import load_study
from ogls.config import build_config
from ogls.stages.run import Run

PAGES = REPO / "docs" / "pages"
_PYTHON_BLOCK = re.compile(r"^(?:<!-- not run: (.+?) -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_IMPORTS = (ast.Import, ast.ImportFrom)
_DOCUMENTED = re.compile(r"^::: (\S+)$(?:\n    options:)?((?:\n      .*)*)", re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    tool = Path(sys.executable).with_name("mkdocs")
    command = [str(tool), "build", "--strict", "--config-file", "docs/mkdocs.yml", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]  # a broken link is a warning, and --strict makes it an error
    return out


@pytest.mark.slow
def test_the_reference_has_every_setting_command_and_table(site: Path) -> None:
    text = {
        name: (site / "reference" / f"{name}.html").read_text() for name in ("config", "commands", "tables", "python")
    }
    for setting in ("reference_exemplar", "keep_states", "min_stop_mass", "registered_model", "checker"):
        assert f"<code>{setting}</code>" in text["config"]
    for command in ("train", "query", "dataset", "view", "report", "up", "gc"):
        assert f">ogls {command}<" in text["commands"]
    assert "steered" in text["tables"]
    for name in (
        "ogls.store.store.Store",
        "ogls.distillation.steering.steer_tokens",
        "ogls.analysis.export.select_rows",
        "ogls.analysis.token_numbers.compute_token_numbers",
    ):
        assert f'id="{name}"' in text["python"]


@pytest.mark.slow
def test_the_site_opens_from_a_folder_without_network_requests(site: Path) -> None:
    with open_browser() as page:  # fails the test if anything but files is requested
        for name in ("index", "method", "studies", "scale", "how-to/tokens", "reference/config", "troubleshooting"):
            page.goto(f"file://{site}/{name}.html")
            assert page.locator("h1").first.is_visible()
            broken = page.locator("article img").evaluate_all("all => all.filter(i => !i.naturalWidth).map(i => i.src)")
            assert broken == []


def test_every_explained_message_is_in_the_code() -> None:
    explained = re.findall(r"^`([^`]+)`\n:", (PAGES / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(explained) > 15
    source = "\n".join(p.read_text() for part in ("ogls", "tasks", "flows") for p in (REPO / part).rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # the code may split a message over two lines
    messages = re.sub(r"\{[^{}]*\}", "\x00", joined)
    from_torch = "operator torchvision::nms does not exist"
    assert [m for m in explained if m not in messages] == [from_torch]


def test_the_pages_name_only_existing_queries_and_commands() -> None:
    from flows.cli import app
    from ogls.store import named_queries

    text = "\n".join(p.read_text() for p in PAGES.rglob("*.md"))
    queries = set(re.findall(r"ogls query --name (\w+)", text)) - {"x"}
    assert queries <= set(named_queries())
    commands = {(c.name or c.callback.__name__) for c in app.registered_commands if c.callback}
    assert set(re.findall(r"\bogls ([a-z]+)(?= |`)", text)) - {"commands"} <= commands | {"config"}


def test_the_pages_name_only_existing_files_and_folders() -> None:
    text = "\n".join(p.read_text() for p in (*PAGES.rglob("*.md"), REPO / "data" / "studies" / "README.md"))
    paths = set(re.findall(r"`((?:ogls|tasks|flows|tests|deployments|docs)/[\w./-]*)`", text))
    assert len(paths) > 5
    assert [p for p in sorted(paths) if not (REPO / p).exists()] == []


class Example(NamedTuple):
    """A Python block of a page; `not_run` is the reason in the comment above it, empty if the block is run."""

    code: str
    not_run: str


def examples(page: Path) -> list[Example]:
    """The Python blocks of a page in their order."""
    text = page.read_text()
    found = [Example(code, reason) for reason, code in _PYTHON_BLOCK.findall(text)]
    assert len(found) == text.count("```python"), f"{page}: a Python block is indented or not closed"
    return found


EXAMPLE_PAGES = sorted(str(p.relative_to(PAGES)) for p in PAGES.rglob("*.md") if examples(p))


@pytest.fixture
def quickstart(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory as after `make quickstart`: a copy of the finished run in data/runs, and what ships."""
    shutil.copytree(finished.store.root, tmp_path / "data" / "runs")
    (tmp_path / "data" / "tiny").symlink_to(REPO / "data" / "tiny")
    (tmp_path / "deployments").symlink_to(REPO / "deployments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", EXAMPLE_PAGES)
def test_the_python_examples_run(page: str, request: pytest.FixtureRequest) -> None:
    """Runs all blocks of a page in their order in one namespace, in a working directory as after the quickstart."""
    blocks = examples(PAGES / page)
    if all(block.not_run for block in blocks):
        pytest.skip("; ".join(block.not_run for block in blocks))
    request.getfixturevalue("quickstart")
    namespace: dict[str, Any] = {"__name__": "example"}
    for number, block in enumerate(blocks):
        if not block.not_run:
            exec(compile(block.code, f"{page}, Python block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", EXAMPLE_PAGES)
def test_every_python_example_is_complete(page: str) -> None:
    """Each block imports or defines every name that it uses, so that readers can copy it alone."""
    for block in examples(PAGES / page):
        nodes = list(ast.walk(ast.parse(block.code)))
        defined = {alias.asname or alias.name for node in nodes if isinstance(node, _IMPORTS) for alias in node.names}
        defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        defined |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        defined |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        assert used - defined - set(dir(builtins)) == set(), block.code


def test_every_documented_python_name_has_one_import_line() -> None:
    modules: dict[str, set[str]] = {}  # by imported name, over the examples of all pages
    for page in EXAMPLE_PAGES:
        for node in (n for block in examples(PAGES / page) for n in ast.walk(ast.parse(block.code))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ogls"):
                for alias in node.names:
                    modules.setdefault(alias.name, set()).add(node.module or "")
    assert {name: found for name, found in modules.items() if len(found) > 1} == {}
    documented = documented_names((PAGES / "reference" / "python.md").read_text())
    assert len(documented) > 30
    assert [name for _, name in documented if name not in modules] == []
    for module, name in documented:
        (imported_from,) = modules[name]
        assert getattr(importlib.import_module(imported_from), name) is getattr(importlib.import_module(module), name)


def documented_names(page: str) -> list[tuple[str, str]]:
    """(module, name) of every class and function that the `:::` lines of a page document."""
    names = []
    for identifier, options in _DOCUMENTED.findall(page):
        module, _, last = identifier.rpartition(".")
        if not (REPO / identifier.replace(".", "/")).with_suffix(".py").exists():  # a class or a function
            names.append((module, last))
        else:
            members = re.search(r"members: \[(.+)\]", options)
            assert members, f"{identifier}: list the members of a module"
            names += [(identifier, name) for name in members[1].split(", ")]
    return names


NOTEBOOK = """
import json, runpy
_, defined = runpy.run_path("docs/notebooks/curve.py")["app"].run()
print(json.dumps([
    defined["curve"]["round"].to_list(), len(defined["figure"].axes[0].lines), len(defined["moved"])
]))
"""


def test_the_notebook_goes_from_a_run_to_a_figure(finished: Run) -> None:
    """In a process of its own: where marimo was imported, transformers takes the process for a notebook."""
    env = {**os.environ, "OGLS_STORE": finished.store.root, "OGLS_RUN": "tiny"}
    result = subprocess.run([sys.executable, "-c", NOTEBOOK], cwd=REPO, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rounds, lines, moved = json.loads(result.stdout.splitlines()[-1])
    assert (rounds, lines) == ([0, 1, 2], 2)
    assert moved > 5


def test_the_study_of_the_docs_can_be_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (PAGES / "how-to/compare.md").read_text(), re.DOTALL)
    text = "\n".join(blocks).replace("../runs", str(REPO / "deployments/runs"))
    (tmp_path / "mine.toml").write_text(text)
    study, tuning, runs = load_study(tmp_path / "mine.toml")
    assert {c.name for c in runs.values()} >= {"mine-short-opsd-s0", "mine-long-ogls-sd-s2"}
    assert len(runs) == 2 * 2 * 3
    assert len(tuning) == 2 * 2 * 3 * 1
    assert study.tune


def test_the_teachers_of_the_docs_are_valid_configurations() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (PAGES / "how-to/teacher.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        config = build_config({"evaluate": {"benchmarks": [{}]}, **tomllib.loads(block)})
        own = [p.name for p in config.teacher.pools if not isinstance(p, str)]
        weighed = {pool for recipe in config.steer.recipes() for pool in recipe.pools()}
        assert set(own) <= weighed
        assert set(own) <= set(config.pools())
