"""The report: one HTML file with every section and without external links."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import carry_out, small_config
from typer.testing import CliRunner

from flows.cli import app
from ogls.analysis.report import render_report
from ogls.errors import UserError
from ogls.stages.run import Run
from ogls.store import run_query

VOID = {"meta", "input", "br", "img", "link", "path", "use", "rect", "line", "circle"}


class Outline(HTMLParser):
    """Ids, links and unclosed elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.unclosed: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if element_id := dict(attrs).get("id"):
            self.ids.append(element_id)
        self.links += [v for n, v in attrs if n in ("href", "src", "xlink:href") and v]
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.unclosed.pop() == tag


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A second run with another method."""
    root = tmp_path_factory.mktemp("sibling")
    return carry_out(small_config(root, "name=sibling", "train.objective=grpo", "rounds=1"))


@pytest.fixture(scope="module")
def page(finished: Run, other: Run) -> str:
    return render_report([finished, other])


def test_the_report_is_one_file_with_every_section(page: str) -> None:
    outline = Outline()
    outline.feed(page)
    assert outline.unclosed == []
    sections = {"summary", "curve", "health", "costs", "problems", "steering", "rollouts", "tokens", "configuration"}
    assert sections | {"training-curves", "steering-curves", "token-data"} <= set(outline.ids)
    assert len(outline.ids) == len(set(outline.ids)), "two elements have the same id"
    for link in outline.links:
        assert link.startswith("#")
        if "/" not in link and "%2F" not in link:
            assert link[1:] in outline.ids
    before_settings = page.split("Configuration with all values")[0]  # settings contain addresses of servers
    addresses = set(re.findall(r"https?://[^\"' <)]+", before_settings))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in html.unescape(page)


def test_the_report_has_the_results_of_the_runs_at_equal_rounds(page: str, finished: Run, other: Run) -> None:
    assert "tiny: 2 rounds, sibling: 1 rounds" in page
    assert "compares them at round 1" in page
    for run in (finished, other):
        (at_round_1,) = run.records.read("summaries", 1).to_pylist()
        assert f"<td>{at_round_1['accuracy']:.3f}</td>" in page.split('id="curve"')[0]
    assert "train.objective" in page.split("Settings in which the runs differ")[1]
    assert "Compared with tiny" in page
    assert "ogls train sibling.toml --set name=sibling-again" in page
    assert "rank = 32" in page
    costs = run_query(
        finished.store, "SELECT sum(seconds) AS s FROM stages WHERE stage = 'train' AND round = 1", "tiny"
    )
    assert f"train {costs.to_pylist()[0]['s']:.1f} s" in page


def test_the_curves_have_every_round_and_every_step(page: str, finished: Run, other: Run) -> None:
    curves = embedded(page, "training-curves")
    assert (curves["runs"], curves["common"]) == (["tiny", "sibling"], 1)
    panels = {p["title"]: p for p in curves["panels"]}
    assert {
        "Accuracy",
        "pass@k, k = samples per problem",
        "Loss",
        "Learning rate",
        "Entropy",
        "KL(policy || base)",
    } <= set(panels)
    assert [line["x"] for line in panels["Loss"]["round"]] == [[1, 2], [1]]
    updates = run_query(finished.store, "SELECT step, loss FROM updates ORDER BY step", "tiny").to_pylist()
    by_step = panels["Loss"]["step"][0]
    assert (by_step["x"], len(by_step["x"])) == ([u["step"] for u in updates], len(updates))
    assert by_step["y"] == pytest.approx([u["loss"] for u in updates], rel=1e-4)
    assert panels["Accuracy"]["step"][0]["x"][0] == 0  # round 0 is before the first step
    assert max(panels["Accuracy"]["step"][0]["x"]) == updates[-1]["step"]
    assert curves["zero"]
    for title in curves["zero"]:
        assert title not in panels  # a measure that is 0 everywhere is named, not drawn


def embedded(page: str, name: str) -> Any:
    """Return the data that a page has under an id."""
    return json.loads(page.split(f'id="{name}">')[1].split("</script>")[0])


def test_a_run_compared_with_itself_has_difference_zero(finished: Run) -> None:
    from ogls.analysis.report import _comparison

    (row,) = _comparison([finished, finished], 2)
    assert (row["difference"], row["low"], row["high"]) == (0, 0, 0)
    assert row["problems"] == 8


def test_a_run_that_cannot_be_reported_raises(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="named twice"):
        render_report([finished, finished])
    new_run = Run(small_config(tmp_path, "name=fresh"))
    new_run.records.open(new_run.config)
    with pytest.raises(UserError, match="fresh has not been evaluated yet"):
        render_report([new_run])


def test_report_and_view_write_their_files(finished: Run, tmp_path: Path) -> None:
    root = finished.store.root
    for command in (
        ["report", "tiny", "--no-tokens", "--out", str(tmp_path / "r.html"), "--root", root],
        ["view", "tiny", "--no-policy", "--most", "3", "--out", str(tmp_path / "v.html"), "--root", root],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert "The token view was left out" in (tmp_path / "r.html").read_text()
    assert "token-data" in (tmp_path / "v.html").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"r.html", "v.html"}
    unknown = CliRunner().invoke(app, ["view", "tiny", "--show", "pretty", "--root", root])
    assert "all, steered, collapsed" in str(unknown.exception)


def test_view_serves_the_page_on_loopback(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr("ogls.analysis.serve.serve", lambda app, bound: served.append((app, bound)))
    command = ["view", "tiny", "--serve", "--port", "0", "--no-policy", "--most", "1", "--root", finished.store.root]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    ((_, bound),) = served
    assert f"all 64 rollouts of tiny at http://127.0.0.1:{bound.getsockname()[1]}/" in " ".join(result.output.split())
    bound.close()
    assert not Path("tiny-tokens.html").exists()
