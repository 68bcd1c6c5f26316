"""The token view and the report in a browser: filters, hovering, keyboard, contrast in light and dark, hostile text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import open_browser, save_screenshot
from conftest import carry_out, small_config

from ogls.analysis.report import render_report
from ogls.analysis.token_view import build_token_view, render_token_view
from ogls.stages.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HOSTILE = (
    "</script><script>window.hit=1</script>",
    '<img src=x onerror="window.hit=1">',
    "\u202eevil\u202c \u0000\u001b[31m",
    "${window.hit=1}{{window.hit=1}}",
)
_CONTRAST = """element => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const blend = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3]));
  const background = (node) => {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour.slice(0, 3);
    return blend(colour, node.parentElement ? background(node.parentElement) : [255, 255, 255]);
  };
  const luminance = (rgb) => rgb.map((c) => c / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ink = parse(getComputedStyle(element).color).slice(0, 3);
  const [a, b] = [luminance(ink), luminance(background(element))].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""


@pytest.fixture(scope="module")
def data(finished: Run) -> dict[str, Any]:
    return build_token_view(finished, max_rollouts=15, per_round=1)


@pytest.fixture(scope="module")
def view(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("view") / "v.html", render_token_view(data))


@pytest.fixture
def page() -> Iterator[Any]:
    with open_browser() as page:
        messages: list[str] = []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        yield page
        assert messages == []  # no error, and nothing blocked by the content security policy


def write_page(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def steered(data: dict[str, Any]) -> dict[str, Any]:
    """Return a steered rollout, for which the page has numbers under every recipe."""
    return next(r for r in data["rollouts"] if "steered" in r["tags"])


def address(path: Path, data: dict[str, Any], rollout: dict[str, Any]) -> str:
    """Return the address of a rollout in a page."""
    anchor = f"{data['run']}/r{rollout['round']:03d}/{rollout['problem_id']}/{rollout['sample']}"
    return f"file://{path}#{anchor.replace('/', '%2F')}"


def test_hovering_a_token_shows_its_distributions(page: Any, view: Path, data: dict[str, Any]) -> None:
    rollout = steered(data)
    numbers = rollout["numbers"]
    gains = [abs(lp[0]) for lp in numbers["logprobs"]["base"]]
    t = gains.index(max(gains))
    page.goto(address(view, data, rollout))
    page.locator(f"#t0-{t}").hover()
    inspect = page.locator("[data-inspect]")
    assert f"Token {t}:" in inspect.locator("h3").inner_text()
    heads = inspect.locator("thead th").all_inner_texts()
    assert heads[0] == "token"
    assert {"base", "correct", "incorrect", "student", "after training", "target"} <= set(heads)
    cells = inspect.locator("tr.sampled td").all_inner_texts()
    own = data["points"][0]
    mixed = sum(w * numbers["logprobs"][d][t][0] for d, w in own["weights"].items()) / own["temperature"]
    for head, value in (
        ("base", numbers["logprobs"]["base"][t][0]),
        ("incorrect", numbers["logprobs"]["incorrect"][t][0]),
        ("target", mixed - numbers["points"]["own"]["log_z"][t]),
    ):
        expected = f"{100 * math.exp(value):.1f}%" if math.exp(value) >= 0.0005 else "<0.1%"
        assert cells[heads.index(head) - 1] == expected
    assert inspect.locator("tbody tr").count() >= 5
    save_screenshot(page, "token-view")


def test_the_first_mistake_is_marked(page: Any, view: Path, data: dict[str, Any]) -> None:
    """The first token that the target lowers by a nat has a mark, under the recipe that is shown."""
    page.goto(address(view, data, steered(data)))
    shown = page.locator(".flow .mistake")
    assert shown.count() <= 1
    text = page.locator(".pane .sum").first.inner_text()
    if shown.count():
        assert text.endswith(f"first mistake at token {shown.get_attribute('id').split('-')[1]}")
        assert "lowered by at least 1 nats" in shown.get_attribute("title")
    else:
        assert text.endswith("no mistake")


def test_the_view_works_by_keyboard(page: Any, view: Path, data: dict[str, Any]) -> None:
    page.goto(address(view, data, steered(data)))
    flow = page.get_by_role("listbox", name="Tokens under")
    flow.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert flow.get_attribute("aria-activedescendant") == "t0-2"
    assert page.locator(".flow [aria-selected=true]").get_attribute("id") == "t0-2"
    assert "token 2: " in page.locator("#t0-2").get_attribute("aria-label")
    page.keyboard.press("End")
    assert page.locator("#t0-0").get_attribute("aria-selected") == "false"
    page.keyboard.press("Home")
    page.keyboard.press("n")  # the first token with a large change
    moved = int(page.locator(".flow [aria-selected=true]").get_attribute("id").split("-")[1])
    shades = page.locator(".flow .t").evaluate_all("all => all.map(t => t.className)")
    assert shades[moved].split()[1] in ("up", "down")
    heading = page.locator(".pane h3")
    assert heading.inner_text() == "target of this run (ogls-sd 0.5)"
    page.keyboard.press("r")
    assert heading.inner_text().startswith("ogls-sd ")
    before = kl(page)
    page.keyboard.press("]")
    page.keyboard.press("]")
    assert kl(page) > before  # a higher strength increases the KL to the base
    assert page.evaluate("document.activeElement.className") == "flow"  # the focus stays in the text
    page.keyboard.press("[")
    compare = page.get_by_label("Compare with a second recipe")
    compare.focus()
    page.keyboard.press("Space")
    assert page.locator(".pane").count() == 2
    page.get_by_label("Recipe B").select_option("contrastive")
    assert page.locator(".pane h3").nth(1).inner_text().startswith("contrastive")
    assert {"target A", "target B"} <= set(page.locator("[data-inspect] thead th").all_inner_texts())
    page.get_by_label("Colour").select_option("kl")
    assert "KL(target || base)" in page.locator("[data-legend]").inner_text()
    page.emulate_media(color_scheme="dark")
    save_screenshot(page, "token-view-compared")


def kl(page: Any) -> float:
    return float(page.locator(".pane .sum").first.inner_text().split("mean KL ")[1].split()[0])


def test_filters_and_links(page: Any, view: Path, data: dict[str, Any]) -> None:
    page.goto(f"file://{view}")
    for name, label in (("steered", "most steered"), ("failed", "failed ("), ("correct", "correct")):
        expected = sum(name in r["tags"] for r in data["rollouts"])
        page.get_by_role("radio", name=label).first.check()
        assert page.locator("[data-list] li").count() == expected > 0
        assert page.get_by_role("status").inner_text() == f"{expected} of {len(data['rollouts'])} rollouts"
        assert name in page.locator("[data-facts]").inner_text()
    page.get_by_role("radio", name="all").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("input[value=fixed]").is_checked() or page.locator("input[value=all]").is_checked()
    page.get_by_role("radio", name="all").check()
    page.locator("[data-list] button").nth(2).click()
    assert page.locator("[data-list] button[aria-current=true]").count() == 1
    shown = page.locator("[data-heading]").inner_text()
    page.reload()
    assert page.locator("[data-heading]").inner_text() == shown  # the address contains the rollout
    page.get_by_text("Problem, reference solution and exemplars").click()
    assert data["rollouts"][2]["problem"].split("\n")[0] in page.locator("[data-texts]").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark(page: Any, view: Path, data: dict[str, Any], scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.goto(address(view, data, steered(data)))
    for selector in ("h1", ".legend", ".keys", ".facts dd", "[data-list] button", ".pane .sum", ".flow .t"):
        for element in page.locator(selector).all():
            assert element.evaluate(_CONTRAST) >= 4.5, selector
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Light or dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background


def test_no_text_of_a_run_is_markup_or_script(page: Any, data: dict[str, Any], tmp_path: Path) -> None:
    rollout = dict(steered(data))
    texts = [HOSTILE[i % len(HOSTILE)] for i in range(len(rollout["text"]))]
    exemplars = {"pool": "correct", "texts": [{"sample": 0, "text": t} for t in HOSTILE]}
    fields = dict.fromkeys(("problem_id", "problem", "solution", "expected", "answer", "verdict"), " ".join(HOSTILE))
    rollout |= {
        **fields,
        "text": texts,
        "exemplars": [exemplars],
        "later": {"round": 1, "how": HOSTILE[0], "text": HOSTILE[1]},
    }
    vocabulary = dict.fromkeys(data["vocabulary"], HOSTILE[0])
    hostile = data | {"run": HOSTILE[0], "model": HOSTILE[1], "rollouts": [rollout], "vocabulary": vocabulary}
    page.goto(f"file://{write_page(tmp_path / 'h.html', render_token_view(hostile))}")
    page.get_by_text("Problem, reference solution and exemplars").click()
    page.locator("#t0-1").hover()
    assert page.evaluate("window.hit") is None
    assert page.locator("main img, main script:not([type])").count() == 0
    assert HOSTILE[0] in page.locator("[data-texts]").inner_text()
    assert "\\u202eevil\\u202c" in page.locator("#t0-2").inner_text()  # direction marks are escaped


def test_the_report_links_to_the_token_view(page: Any, finished: Run, tmp_path: Path) -> None:
    other = carry_out(small_config(tmp_path / "store", "name=in-browser", "steer.recipe=sdpo", "rounds=1"))
    path = write_page(tmp_path / "r.html", render_report([finished, other]))
    page.goto(f"file://{path}")
    assert page.get_by_role("img").count() == 5
    for heading in ("Summary", "Curve", "Health", "Steering", "Configuration, and how to reproduce it"):
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
    assert heading.endswith(name)
    page.emulate_media(color_scheme="dark")
    ink = page.locator("#curve svg text").first.evaluate("t => getComputedStyle(t).fill")
    assert ink == page.evaluate("getComputedStyle(document.body).color")  # figures use the colours of the page
