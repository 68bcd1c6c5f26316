"""A page in Debian's Chromium, headless; in CI its absence is an error, elsewhere the tests are skipped."""

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

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = (  # nothing but the page itself may ask the network
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


@contextmanager
def open_browser() -> Iterator[Page]:
    """A page that fails the test if anything on it asks for more than loopback, or opens a dialog."""
    from playwright.sync_api import sync_playwright

    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if not found:
        assert not os.environ.get("CI"), "CI needs Chromium: apt-get install chromium"
        pytest.skip("no Chromium on this machine")
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(_QUIET))
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("request", lambda r: None if _allowed(r.url) else wrong.append(r.url))
        page.on("dialog", lambda d: (wrong.append(f"dialog: {d.message}"), d.dismiss()))
        yield page
        browser.close()
    assert not wrong, wrong


def _allowed(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:", "file:"))


def keep(page: Page, name: str) -> None:
    """Keep a screenshot, for the docs, where OGLS_SCREENSHOTS names a folder."""
    if folder := os.environ.get("OGLS_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))
