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
