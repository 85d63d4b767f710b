"""A headless Chromium for tests of pages: the one that is installed, with a profile of its own and without a network life."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
REQUIRED = "FTRAY_NEEDS_BROWSER"  # set where the tests must not be skipped, as CI does
FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator[Any]:
    """A Browser of Playwright. Without an installed one the test is skipped, or fails where CI says so."""
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    if program is None:
        told = "no Chromium is installed; `make browser` installs it where apt-get is"
        if os.environ.get(REQUIRED):
            pytest.fail(told)
        pytest.skip(told)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, chromium_sandbox=False, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
