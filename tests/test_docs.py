"""The docs: they build with every link right, ask no address for anything, and say what the code says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from browser import open_browser
from conftest import REPO

from ogls.stages.run import Run

PAGES = REPO / "docs" / "pages"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    tool = Path(sys.executable).with_name("mkdocs")
    command = [str(tool), "build", "--strict", "--config-file", "docs/mkdocs.yml", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]  # a broken link is a warning, and strict makes it an error
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
    for name in ("ogls.store.Store", "ogls.steering.steer", "ogls.export.select", "ogls.tokenview.show"):
        assert f'id="{name}"' in text["python"]


@pytest.mark.slow
def test_the_site_opens_from_a_folder_and_fetches_nothing(site: Path) -> None:
    with open_browser() as page:  # which fails the test if anything but files is asked for
        for name in ("index", "method", "studies", "scale", "how-to/tokens", "reference/config", "troubleshooting"):
            page.goto(f"file://{site}/{name}.html")
            assert page.locator("h1").first.is_visible()
            broken = page.locator("article img").evaluate_all("all => all.filter(i => !i.naturalWidth).map(i => i.src)")
            assert broken == []


def test_every_message_that_is_explained_is_said_by_the_code() -> None:
    explained = re.findall(r"^`([^`]+)`\n:", (PAGES / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(explained) > 15
    source = "\n".join(p.read_text() for part in ("ogls", "tasks", "flows") for p in (REPO / part).rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # a message may be written over two lines
    shape = re.sub(r"\{[^{}]*\}", "\x00", joined)
    theirs = "operator torchvision::nms does not exist"  # torch says that
    assert [m for m in explained if m not in shape] == [theirs]


def test_the_pages_name_no_setting_query_or_command_that_there_is_not() -> None:
    from flows.cli import app
    from ogls.store import named_queries

    text = "\n".join(p.read_text() for p in PAGES.rglob("*.md"))
    queries = set(re.findall(r"ogls query --name (\w+)", text)) - {"x"}
    assert queries <= set(named_queries())
    commands = {(c.name or c.callback.__name__) for c in app.registered_commands if c.callback}
    assert set(re.findall(r"\bogls ([a-z]+)(?= |`)", text)) - {"commands"} <= commands | {"config"}


def test_the_notebook_goes_from_a_run_to_a_figure(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OGLS_STORE", finished.store.root)
    monkeypatch.setenv("OGLS_RUN", "tiny")
    spec = importlib.util.spec_from_file_location("curve", REPO / "docs" / "notebooks" / "curve.py")
    assert spec
    assert spec.loader
    notebook: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebook)
    _, defined = notebook.app.run()
    assert defined["curve"]["round"].to_list() == [0, 1, 2]
    assert len(defined["figure"].axes[0].lines) == 2
    assert len(defined["moved"]) > 5
