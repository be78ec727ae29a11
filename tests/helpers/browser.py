"""A real browser for tests: the machine's own Chromium, driven by playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser, playwright's `Browser`. The test is skipped where playwright or Chromium is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="no browser test was run: playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no browser test was run: there is no Chromium (Debian, Ubuntu: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        # without its sandbox, which root may not use and containers have not
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
