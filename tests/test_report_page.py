"""The report in a browser: curves with values and zoom, contrast, a phone's width, links to the token view."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CONTRAST, open_quiet_page, save_screenshot, write_page
from conftest import carry_out, small_config

from ogls.analysis.report import render_report
from ogls.stages.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def page() -> Iterator[Any]:
    with open_quiet_page() as page:
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_curves_have_values_zoom_and_contrast(page: Any, finished: Run, tmp_path: Path, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.goto(f"file://{write_page(tmp_path / 'r.html', render_report([finished], tokens=False))}")
    loss = page.locator(".chart", has=page.get_by_text("Loss", exact=True))
    (summary,) = finished.records.read("summaries", 1).to_pylist()
    accuracy = page.locator(".chart", has=page.get_by_text("Accuracy", exact=True))
    accuracy.locator("svg").focus()
    page.keyboard.press("Escape")
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")  # from round 0 to round 1
    assert f"round 1 avg@k {summary['accuracy']:.4g}" in " ".join(accuracy.locator(".readout").inner_text().split())
    assert "round 1" in loss.locator(".readout").inner_text()  # one cursor for all panels
    page.get_by_label("per optimizer step").check()
    updates = finished.records.read("updates", 2).to_pylist()
    box = loss.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 40)
    assert f"step {updates[-1]['step']}" in loss.locator(".readout").inner_text()
    assert f"{updates[-1]['loss']:.3g}"[:5] in loss.locator(".readout").inner_text()
    before = loss.locator("svg text").all_inner_texts()
    page.mouse.move(box["x"] + 60, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 40)
    page.mouse.up()
    assert loss.locator("svg text").all_inner_texts() != before
    page.get_by_role("button", name="Show everything").first.click()
    page.mouse.move(0, 0)
    assert loss.locator("svg text").all_inner_texts() == before
    for selector, property_ in ((".chart text", "fill"), (".chart .line", "stroke"), (".readout span", "color")):
        for element in page.locator(selector).all()[:30]:
            element.evaluate(f"(e) => {{ e.style.color = getComputedStyle(e).{property_}; }}")
            assert element.evaluate(CONTRAST) >= 4.5, selector


def test_the_report_fits_a_telephone(page: Any, finished: Run, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    page.goto(f"file://{write_page(tmp_path / 'r.html', render_report([finished]))}")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    cut = page.evaluate(
        "() => [...document.querySelectorAll('h1, h2, h3, p, figcaption, summary')]"
        ".filter((e) => e.offsetParent && e.getBoundingClientRect().right > 400).map((e) => e.textContent)"
    )
    assert cut == []


def test_the_report_links_to_the_token_view(page: Any, finished: Run, tmp_path: Path) -> None:
    other = carry_out(small_config(tmp_path / "store", "name=in-browser", "steer.recipe=sdpo", "rounds=1"))
    path = write_page(tmp_path / "r.html", render_report([finished, other]))
    page.goto(f"file://{path}")
    assert page.locator(".chart svg").count() >= 8
    for heading in ("Summary", "Training curves", "Health", "Steering", "Configuration, and how to reproduce it"):
        assert page.get_by_role("heading", name=heading, exact=True).is_visible()
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0  # wide tables scroll inside the page
    save_screenshot(page, "report")
    page.locator("#rollouts summary").nth(1).click()
    link = page.locator("#rollouts details").nth(1).get_by_role("link").first
    name = link.inner_text()
    link.click()
    page.wait_for_timeout(200)
    heading = page.locator("[data-heading]").inner_text()
    assert heading.startswith("in-browser, round 1, ")
    assert name in heading
