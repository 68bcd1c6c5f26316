"""The token view and the report in a browser: search, groups, hovering, keys, contrast, narrow pages, hostile text."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import CONTRAST, open_quiet_page, save_screenshot, write_page

from ogls.analysis.serve import bind, create_app
from ogls.analysis.token_view import TokenViewer, build_token_view, render_token_view
from ogls.stages.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HOSTILE = (
    "</script><script>window.hit=1</script>",
    '<img src=x onerror="window.hit=1">',
    "\u202eevil\u202c \u0000\u001b[31m",
    "${window.hit=1}{{window.hit=1}}",
)


@pytest.fixture(scope="module")
def data(finished: Run) -> dict[str, Any]:
    return build_token_view(finished, max_rollouts=15, per_round=1)


@pytest.fixture(scope="module")
def view(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("view") / "v.html", render_token_view(data))


@pytest.fixture
def page() -> Iterator[Any]:
    with open_quiet_page() as page:
        yield page


def steered(data: dict[str, Any]) -> dict[str, Any]:
    """Return a steered rollout, for which the page has numbers under every recipe."""
    return next(r for r in data["rollouts"] if "steered" in r["tags"])


def gains_of(data: dict[str, Any], rollout: dict[str, Any]) -> list[float]:
    """Return the steering of each token by the run's target, rounded to two decimals, as the groups have it."""
    (group,) = [g for g in data["groups"] if (g["round"], g["problem_id"]) == (rollout["round"], rollout["problem_id"])]
    (light,) = [r for r in group["rollouts"] if r["sample"] == rollout["sample"]]
    return list(light["gains"])


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
    inspect = page.locator("[data-inspect]")
    own_gains = gains_of(data, rollout)
    opened = max(range(len(own_gains)), key=lambda t: abs(own_gains[t]))
    assert f"Token {opened}:" in inspect.locator("h3").inner_text()  # the most moved one
    page.locator(f"#t0-{t}").hover()
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
    page.keyboard.press("Home")
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
    assert page.locator(".pane h3").nth(0).inner_text() != page.locator(".pane h3").nth(1).inner_text()
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
        assert label.split(" (")[0] in page.locator("[data-facts]").inner_text()
    page.get_by_role("radio", name="all").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("input[value=fixed]").is_checked() or page.locator("input[value=all]").is_checked()
    page.get_by_role("radio", name="all").check()
    page.locator("[data-list] button").nth(2).click()
    assert page.locator("[data-list] button[aria-current=true]").count() == 1
    shown = page.locator("[data-heading]").inner_text()
    page.reload()
    assert page.locator("[data-heading]").inner_text() == shown  # the address contains the rollout
    problem = data["problems"][data["rollouts"][2]["problem_id"]]
    assert page.locator("[data-problem]").inner_text() == problem["problem"]
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    assert page.locator("[data-problem]").evaluate("e => e.getBoundingClientRect().top") >= 0  # in sight everywhere


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark(page: Any, view: Path, data: dict[str, Any], scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.goto(address(view, data, steered(data)))
    page.locator("[data-history] summary").first.click()
    selectors = ("h1", ".legend", ".keys", ".facts dd", "[data-list] button", ".verdict", ".pane .sum", ".flow .t")
    for selector in (*selectors, ".card .t", ".branch .good", ".branch .bad", ".inspect td", ".matrix .cell"):
        for element in page.locator(selector).all()[:40]:
            assert element.evaluate(CONTRAST) >= 4.5, selector
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Light or dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background


def test_no_text_of_a_run_is_markup_or_script(page: Any, data: dict[str, Any], tmp_path: Path) -> None:
    rollout = dict(steered(data))
    name, joined = " ".join(HOSTILE), " ".join(HOSTILE)
    texts = [HOSTILE[i % len(HOSTILE)] for i in range(len(rollout["text"]))]
    exemplars = {"pool": "correct", "texts": [{"sample": 0, "text": t} for t in HOSTILE]}
    rollout |= dict.fromkeys(("answer", "verdict"), joined) | {
        "problem_id": name,
        "text": texts,
        "exemplars": [exemplars],
        "later": {"round": 1, "how": HOSTILE[0], "text": HOSTILE[1]},
    }
    light = {"verdict": joined, "outcome": "failed", "answer": joined, "why": joined}
    group = [{**light, "sample": rollout["sample"], "text": texts}, {**light, "sample": 9, "text": texts[1:]}]
    cells = [[1, 2, True]] * 3
    hostile = data | {
        **{"run": HOSTILE[0], "model": HOSTILE[1], "rollouts": [rollout]},
        "vocabulary": dict.fromkeys(data["vocabulary"], HOSTILE[0]),
        "groups": [{"round": rollout["round"], "problem_id": name, "rollouts": group}],
        "problems": {name: dict.fromkeys(("problem", "solution", "expected"), joined)},
        "history": [
            {"split": HOSTILE[0], "rounds": [0, 1, 2], "total": 1}
            | {"problems": [{"id": name, "problem": joined, "expected": joined, "cells": cells}]}
        ],
    }
    page.goto(f"file://{write_page(tmp_path / 'h.html', render_token_view(hostile))}")
    page.locator("[data-contexts] > summary").click()
    page.locator("[data-history] summary").click()
    page.locator("#t0-1").hover()
    assert page.evaluate("window.hit") is None
    assert page.locator("main img, main script:not([type])").count() == 0
    assert HOSTILE[0] in page.locator("[data-texts]").text_content()
    assert "\\u202eevil\\u202c" in page.locator("#t0-2").inner_text()  # direction marks are escaped


def test_the_mouse_at_rest_selects_nothing(page: Any, view: Path, data: dict[str, Any]) -> None:
    """Keys select tokens and change the recipe; the text under the mouse stays where it is, and selects nothing."""
    page.goto(address(view, data, steered(data)))
    resting = page.locator("#t0-3")
    resting.hover()
    assert "Token 3:" in page.locator("[data-inspect] h3").inner_text()
    place = resting.bounding_box()
    flow = page.locator(".flow")
    flow.focus()
    for key in ("Home", "r", "]", "]", "ArrowRight"):
        page.keyboard.press(key)
        page.wait_for_timeout(60)  # a browser reports the mouse again after it has drawn
    assert page.locator(".flow [aria-selected=true]").get_attribute("id") == "t0-1"
    assert page.locator("#t0-3").bounding_box() == place


def test_two_panels_are_never_the_same(page: Any, view: Path, data: dict[str, Any]) -> None:
    page.goto(address(view, data, steered(data)))
    page.get_by_label("Compare with a second recipe").check()
    titles = page.locator(".pane h3")
    for recipe in page.get_by_label("Recipe A").locator("option").all_inner_texts():
        page.get_by_label("Recipe A").select_option(recipe)
        page.get_by_label("Recipe B").select_option(recipe)
        if titles.count() == 2:
            first, second = titles.all_inner_texts()
            assert first != second
    for key in "]]]]]]]]":
        page.locator(".flow").first.focus()
        page.keyboard.press(key)
        assert len(set(titles.all_inner_texts())) == 2
    page.get_by_label("Colour").select_option("entropy")  # the same under every recipe
    assert titles.count() == 1
    assert page.get_by_label("Compare with a second recipe").is_disabled()


def test_the_group_shows_where_rollouts_part(page: Any, view: Path, data: dict[str, Any]) -> None:
    rollout = steered(data)
    (group,) = [g for g in data["groups"] if (g["round"], g["problem_id"]) == (rollout["round"], rollout["problem_id"])]
    page.goto(address(view, data, rollout))
    cards = page.locator(".card")
    assert cards.count() == len(group["rollouts"])
    reference = next((r for r in group["rollouts"] if r["outcome"] == "correct"), group["rollouts"][0])
    for card, other in zip(cards.all(), group["rollouts"], strict=True):
        assert other["verdict"] in card.inner_text()
        pairs = zip(other["text"], reference["text"], strict=False)
        parts = next((t for t, (a, b) in enumerate(pairs) if a != b), None)
        if parts is not None:
            assert f"parts at token {parts}" in card.inner_text()
            assert card.locator(".parts").inner_text().strip("\u23ce\n") == other["text"][parts].strip("\n")
    leaves = page.locator(".tree li:not(:has(li)) .branch").all_inner_texts()
    assert len(leaves) == len({tuple(r["text"]) for r in group["rollouts"]})  # equal rollouts are one leaf
    other = next(r for r in group["rollouts"] if r["sample"] != rollout["sample"])
    page.get_by_role("article", name=f"sample {other['sample']}").get_by_role("button").click()
    assert page.locator("[data-heading]").inner_text().split(" sample ")[1].startswith(f"{other['sample']} ")
    save_screenshot(page, "token-view-group")


def test_search_in_the_page_finds_what_the_server_finds(
    page: Any, finished: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One page with all rollouts, and one that asks the server, find the same rollouts and open them."""
    viewer = TokenViewer(finished, policy=True)
    whole = viewer.page_data(max_rollouts=3, whole=True)
    assert whole["complete"]
    static = write_page(tmp_path / "whole.html", render_token_view(whole))
    (split,) = whole["history"]
    with served(create_app(viewer, viewer.page_data(max_rollouts=3))) as url:
        assert search_and_open(page, f"file://{static}") == search_and_open(page, url)
        page.locator("[data-history] summary").click()
        assert page.locator(".matrix tbody tr").count() == split["total"]
        page.get_by_label("Problems to show").select_option("learned")
        learned = sum(s[0] < 0.5 <= s[-1] for s in shares(split))
        assert page.locator(".matrix tbody tr").count() == learned
        page.get_by_label("Problems to show").select_option("all")
        page.locator(".matrix tbody tr").first.get_by_role("button").last.click()  # its completions after round 2
        page.get_by_role("button", name="Back to the rollout").wait_for()
        assert page.locator("[data-problem]").inner_text() == split["problems"][0]["problem"]
        assert page.locator(".card").count() == 3
        assert not page.locator(".flow").is_visible()
        page.get_by_role("button", name="Back to the rollout").click()
        page.locator(".flow").wait_for()
        page.wait_for_timeout(500)  # the list has been asked for


def shares(split: dict[str, Any]) -> list[list[float]]:
    return [[c[0] / c[1] for c in p["cells"]] for p in split["problems"]]


def search_and_open(page: Any, url: str) -> list[str]:
    """Search for failed rollouts of round 2 with a text, open the first one, and return what the page says."""
    page.goto(url)
    page.locator("[data-search] [name=verdict]").select_option("incorrect")
    page.locator("[data-search] [name=round]").select_option("2")
    page.locator("[data-search] [name=sort]").select_option("longest")
    page.get_by_role("searchbox", name="Search all 64 rollouts").fill("BOXED")
    page.locator("[data-list][aria-busy=false]").wait_for()
    status = page.get_by_role("status").inner_text()
    listed = page.locator("[data-list] button").all_inner_texts()
    assert len(listed) == int(status.split(" of ")[0]) > 0
    page.locator("[data-list] button").first.click()
    page.locator("[data-heading]", has_text=listed[0].split()[1]).wait_for()
    return [status, *listed, page.locator("[data-heading]").inner_text(), page.locator(".tree").inner_text()]


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of an application that is served until the end of the block."""
    import uvicorn

    bound, url = bind(0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    yield url
    server.should_exit = True
    thread.join(10)


def test_an_address_that_names_no_rollout_opens_the_first_one(page: Any, view: Path, data: dict[str, Any]) -> None:
    page.goto(f"file://{view}#%E0")  # no valid escape
    page.locator("[data-heading]", has_text=data["rollouts"][0]["problem_id"]).wait_for()
    page.locator("[data-list] button").last.click()
    page.locator("[data-heading]", has_text=data["rollouts"][-1]["problem_id"]).wait_for()
    page.go_back()
    page.locator("[data-heading]", has_text=data["rollouts"][0]["problem_id"]).wait_for()
