"""The Prefect UI in a real browser: what people read there, and that no rollout's text runs there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser import keep, open_browser
from conftest import small_config
from upped import Up

from tasks.publish import rollouts_markdown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HOSTILE = (
    "<script>window.hit=1</script>",
    '<img src=x onerror="window.hit=1">',
    "```\n</code></pre><svg onload=window.hit=1>",
    "[click](javascript:window.hit=1)\n\n![x](http://10.0.0.1/pixel.png)",
    '    </pre><iframe srcdoc="<script>parent.hit=1</script>"></iframe>',
    "# heading\n\n| a | b |\n| - | - |\n| 1 | 2 |\r\r<style>*{display:none}</style>",
)


@pytest.fixture(scope="module", autouse=True)
def shown(up: Up, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A run that was trained with the services."""
    tracking = ("tracking.enabled=true", f"tracking.uri=http://127.0.0.1:{up.ports[1]}")
    training = up.training(small_config(tmp_path_factory.mktemp("runs"), "name=shown", *tracking))
    said, _ = training.communicate(timeout=300)
    assert training.returncode == 0, said


@pytest.fixture
def page() -> Iterator[Any]:
    with open_browser() as page:
        yield page


def test_the_page_of_a_run(up: Up, page: Any) -> None:
    (run,) = up.ask("POST", "/flow_runs/filter", {"flow_runs": {"name": {"any_": ["train shown"]}}})
    page.goto(f"http://127.0.0.1:{up.ports[0]}/runs/flow-run/{run['id']}")
    for text in ("train shown", "Completed", "method: ogls-sd", "model: tiny/model", "teach r001: ", "rows in"):
        page.get_by_text(text).first.wait_for(timeout=30_000)
    page.wait_for_timeout(1000)  # the graph of stages is drawn
    keep(page, "run")
    page.get_by_role("tab", name="Artifacts").or_(page.get_by_text("Artifacts", exact=True)).first.click()
    for text in ("shown-r002", "shown-sample", "shown-train"):
        page.get_by_text(text).first.wait_for(timeout=30_000)


def test_the_artifact_of_a_round(up: Up, page: Any) -> None:
    (artifact,) = up.ask("POST", "/artifacts/filter", {"artifacts": {"key": {"any_": ["shown-r002"]}}})
    page.goto(f"http://127.0.0.1:{up.ports[0]}/artifacts/artifact/{artifact['id']}")
    page.get_by_text("shown, round 2").first.wait_for(timeout=30_000)
    cells = page.locator("table tr").last.inner_text().split()
    assert cells[0] == "2"
    assert page.locator("pre").count() >= 3  # rollouts, each under its verdict
    picture = page.locator("img[alt='accuracy and length by round']")
    picture.wait_for(timeout=10_000)
    assert picture.evaluate("image => image.naturalWidth") > 300
    keep(page, "artifact")
    address = page.get_by_role("link", name="MLflow run").get_attribute("href")
    assert address.startswith(f"http://127.0.0.1:{up.ports[1]}/#/experiments/")
    page.goto(address)
    page.get_by_text("shown").first.wait_for(timeout=60_000)
    page.get_by_text("evaluate/accuracy").first.wait_for(timeout=30_000)
    keep(page, "mlflow")


def test_the_form_of_a_deployment(up: Up, page: Any) -> None:
    (tiny,) = [d for d in up.ask("POST", "/deployments/filter", {}) if d["name"] == "tiny"]
    page.goto(f"http://127.0.0.1:{up.ports[0]}/deployments/deployment/{tiny['id']}/run")
    described = (
        "Number of training rounds. Raise it to continue a finished run.",
        "The teacher pass.",
        "The base model.",
    )
    for text in described:
        page.get_by_text(text).first.wait_for(timeout=30_000)
    values = page.locator("input, textarea").evaluate_all("fields => fields.map(field => field.value)")
    assert {"tiny", "12", "data/tiny/model", "0.0005", "ogls-gpu"} <= set(values)
    keep(page, "form")


def test_live_progress(up: Up, page: Any) -> None:
    (latest,) = up.ask("POST", "/artifacts/latest/filter", {"artifacts": {"key": {"any_": ["shown-train"]}}})
    page.goto(f"http://127.0.0.1:{up.ports[0]}/artifacts/artifact/{latest['latest_id']}")
    page.get_by_text("shown r002 train: done").first.wait_for(timeout=30_000)


def test_no_text_of_a_rollout_runs(up: Up, page: Any) -> None:
    rows = [{"problem_id": f"p{i}{t}", "sample": 0, "verdict": "correct", "text": t} for i, t in enumerate(HOSTILE)]
    body = {"key": "hostile", "type": "markdown", "data": f"# Hostile\n\n{rollouts_markdown(rows)}"}
    made = up.ask("POST", "/artifacts/", body)
    page.goto(f"http://127.0.0.1:{up.ports[0]}/artifacts/artifact/{made['id']}")
    page.get_by_role("heading", name="Hostile").wait_for(timeout=30_000)
    page.wait_for_timeout(1500)
    assert page.evaluate("window.hit") is None
    assert page.locator("pre").count() == len(HOSTILE)
    text = "\n".join(page.locator("pre").all_inner_texts())
    for line in ("<script>window.hit=1</script>", "[click](javascript:window.hit=1)", "| 1 | 2 |"):
        assert line in text
    assert page.locator("a[href^='javascript:']").count() == 0
