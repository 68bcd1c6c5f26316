"""A page in headless Chromium. Without Chromium, tests are skipped; in CI they fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

_EXECUTABLES = ("chromium", "chromium-browser", "google-chrome")
_ARGUMENTS = (  # no network requests except those of the page
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


# The contrast of an element's text with what is behind it, as WCAG defines it.
CONTRAST = """element => {
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


@contextmanager
def open_quiet_page() -> Iterator[Page]:
    """A page on which the test fails if it logs anything: an error, or what the content security policy blocked."""
    with open_browser() as page:
        messages: list[str] = []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        yield page
        assert messages == []


def write_page(path: Path, text: str) -> Path:
    """Write a page to a file, and return its path."""
    path.write_text(text, encoding="utf-8")
    return path


@contextmanager
def open_browser() -> Iterator[Page]:
    """A page. The test fails if the page requests anything that is not on loopback, or opens a dialog."""
    from playwright.sync_api import sync_playwright

    executable = next((path for name in _EXECUTABLES if (path := shutil.which(name))), None)
    if not executable:
        assert not os.environ.get("CI"), "CI needs Chromium: apt-get install chromium"
        pytest.skip("no Chromium on this machine")
    violations: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(_ARGUMENTS))
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("request", lambda r: None if _allowed(r.url) else violations.append(r.url))
        page.on("dialog", lambda d: (violations.append(f"dialog: {d.message}"), d.dismiss()))
        yield page
        browser.close()
    assert not violations, violations


def _allowed(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:", "file:"))


def save_screenshot(page: Page, name: str) -> None:
    """Save a screenshot for the docs as NAME.png in the folder OGLS_SCREENSHOTS; do nothing if it is not set."""
    if folder := os.environ.get("OGLS_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))
