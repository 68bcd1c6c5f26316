"""The Prefect UI in a browser: it shows the expected texts, and no markup in a rollout is executed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser import open_browser, save_screenshot
from conftest import small_config
from services_fixture import ServiceStack

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
def trained_run(services: ServiceStack, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Train the run `shown` with the services."""
    tracking = ("tracking.enabled=true", f"tracking.uri=http://127.0.0.1:{services.ports[1]}")
    process = services.start_training(small_config(tmp_path_factory.mktemp("runs"), "name=shown", *tracking))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


@pytest.fixture
def page() -> Iterator[Any]:
    with open_browser() as page:
        yield page


def test_the_page_of_a_run(services: ServiceStack, page: Any) -> None:
    (run,) = services.request("POST", "/flow_runs/filter", {"flow_runs": {"name": {"any_": ["train shown"]}}})
    page.goto(f"http://127.0.0.1:{services.ports[0]}/runs/flow-run/{run['id']}")
    for text in ("train shown", "Completed", "method: ogls-sd", "model: tiny/model", "teach r001: ", "rows in"):
        page.get_by_text(text).first.wait_for(timeout=30_000)
    page.wait_for_timeout(1000)  # wait for the graph of the stages
    save_screenshot(page, "run")
    page.get_by_role("tab", name="Artifacts").or_(page.get_by_text("Artifacts", exact=True)).first.click()
    for text in ("shown-r002", "shown-sample", "shown-train"):
        page.get_by_text(text).first.wait_for(timeout=30_000)


def test_the_artifact_of_a_round(services: ServiceStack, page: Any) -> None:
    (artifact,) = services.request("POST", "/artifacts/filter", {"artifacts": {"key": {"any_": ["shown-r002"]}}})
    page.goto(f"http://127.0.0.1:{services.ports[0]}/artifacts/artifact/{artifact['id']}")
    page.get_by_text("shown, round 2").first.wait_for(timeout=30_000)
    cells = page.locator("table tr").last.inner_text().split()
    assert cells[0] == "2"
    assert page.locator("pre").count() >= 6  # of each rollout its problem and its text
    image = page.locator("img[alt='accuracy and length by round']")
    image.wait_for(timeout=10_000)
    assert image.evaluate("image => image.naturalWidth") > 300
    save_screenshot(page, "artifact")
    address = page.get_by_role("link", name="MLflow run").get_attribute("href")
    assert address.startswith(f"http://127.0.0.1:{services.ports[1]}/#/experiments/")
    page.goto(address)
    page.get_by_text("shown").first.wait_for(timeout=60_000)
    page.get_by_text("evaluate/accuracy").first.wait_for(timeout=30_000)
    save_screenshot(page, "mlflow")


def test_the_form_of_a_deployment(services: ServiceStack, page: Any) -> None:
    (tiny,) = [d for d in services.request("POST", "/deployments/filter", {}) if d["name"] == "tiny"]
    page.goto(f"http://127.0.0.1:{services.ports[0]}/deployments/deployment/{tiny['id']}/run")
    descriptions = (
        "Number of training rounds. Raise it to continue a finished run.",
        "The teacher pass.",
        "The base model.",
    )
    for text in descriptions:
        page.get_by_text(text).first.wait_for(timeout=30_000)
    values = page.locator("input, textarea").evaluate_all("fields => fields.map(field => field.value)")
    assert {"tiny", "12", "data/tiny/model", "0.0005", "ogls-gpu"} <= set(values)
    save_screenshot(page, "form")


def test_live_progress(services: ServiceStack, page: Any) -> None:
    (latest,) = services.request("POST", "/artifacts/latest/filter", {"artifacts": {"key": {"any_": ["shown-train"]}}})
    page.goto(f"http://127.0.0.1:{services.ports[0]}/artifacts/artifact/{latest['latest_id']}")
    page.get_by_text("shown r002 train: done").first.wait_for(timeout=30_000)


def test_no_markup_in_a_rollout_is_executed(services: ServiceStack, page: Any) -> None:
    texts = ("text", "problem", "expected", "answer")
    rows = [
        {"problem_id": f"p{i}{t}", "sample": 0, "verdict": "correct", **dict.fromkeys(texts, t)}
        for i, t in enumerate(HOSTILE)
    ]
    body = {"key": "hostile", "type": "markdown", "data": f"# Hostile\n\n{rollouts_markdown(rows)}"}
    artifact = services.request("POST", "/artifacts/", body)
    page.goto(f"http://127.0.0.1:{services.ports[0]}/artifacts/artifact/{artifact['id']}")
    page.get_by_role("heading", name="Hostile").wait_for(timeout=30_000)
    page.wait_for_timeout(1500)
    assert page.evaluate("window.hit") is None
    assert page.locator("pre").count() == 2 * len(HOSTILE)  # the problem and the rollout
    text = "\n".join(page.locator("pre").all_inner_texts())
    for line in ("<script>window.hit=1</script>", "[click](javascript:window.hit=1)", "| 1 | 2 |"):
        assert line in text
    assert page.locator("a[href^='javascript:']").count() == 0
