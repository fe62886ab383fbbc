"""A headless Chromium of the system, driven by Playwright, for the tests marked `browser`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.results.report.pages import write_pages

COMMANDS = ("chromium", "chromium-browser", "google-chrome")
REMEDY = (
    "No Chromium found; the report tests need one. On Debian: "
    "apt-get install -y chromium fonts-dejavu"
)
# the sandbox does not work as root; the other flags keep the browser off the network
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
)
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pages(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Start the browser with a new profile; fail with a remedy if it is not installed."""
    program = next(filter(None, map(shutil.which, COMMANDS)), None)
    if program is None:
        pytest.fail(REMEDY, pytrace=False)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any, pages: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """Open a page by name; at the end there must be no console messages and no requests."""
    contexts, messages, requests = [], [], []

    def opened(
        name: str, size: tuple[int, int] = DESKTOP, scheme: str = "light", script: bool = True
    ) -> Any:
        context = chromium.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme=scheme,
            java_script_enabled=script,
            offline=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(pages[name].as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert messages == []
    own = {path.as_uri() for path in pages.values()}
    assert [url[:80] for url in requests if url not in own and not url.startswith("data:")] == []
