"""A real headless Chromium on a page of a real server, and what it asked for and complained of."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

FOUND = next(
    (path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None
)
FLAGS = (
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@contextlib.contextmanager
def browsing(folder: Path, **options) -> Iterator:
    """A page of a browser with an empty profile; `page.asked` are the hosts, `page.errors` the
    console's."""
    if FOUND is None:
        pytest.skip("there is no Chromium: install Debian's package chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(folder),
            executable_path=FOUND,
            headless=True,
            chromium_sandbox=False,
            args=list(FLAGS),
            ignore_https_errors=True,
            **options,
        )
        try:
            page = context.pages[0]
            page.asked, page.errors = set(), []
            page.on("request", lambda request: page.asked.add(urlsplit(request.url).netloc))
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            page.on(
                "console",
                lambda said: page.errors.append(said.text) if said.type == "error" else None,
            )
            yield page
        finally:
            context.close()
