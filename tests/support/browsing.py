"""A real browser on the server's page, which is watched for what it must not do."""

from __future__ import annotations

import contextlib
import gzip
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
WAIT = 30_000  # milliseconds


def chromium() -> str | None:
    """Where a browser is; None where none is installed."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    return found or (_MAC if Path(_MAC).exists() else None)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Chromium; skips where it or playwright is missing."""
    where = chromium()
    if where is None:
        pytest.skip("no Chromium is installed here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=where, args=ARGUMENTS)
        try:
            yield found
        finally:
            found.close()


@dataclass
class Visit:
    """A page in a browser profile of its own, and what it did."""

    page: Any
    url: str
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)  # of the browser: errors, violations

    def check(self) -> None:
        """Nothing left the machine, and nothing went wrong."""
        assert [url for url in self.requests if not url.startswith((self.url, "blob:"))] == []
        assert self.complaints == []

    def ask(self, text: str) -> None:
        """Send a message and wait for the end of the answer."""
        before = self.page.locator(".message").count()
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        self.page.locator(".message").nth(before + 1).get_by_text("Retry").wait_for()

    def serious(self) -> list[str]:
        """What axe-core finds of serious and critical faults."""
        source = gzip.decompress((Path(__file__).parent / "axe.min.js.gz").read_bytes()).decode()
        self.page.evaluate(source + ";0")
        found = self.page.evaluate(
            "axe.run(document, {resultTypes: ['violations']}).then(found => found.violations)"
        )
        return [
            f"{one['id']}: {node['html'][:120]}"
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]


@contextlib.contextmanager
def visit(browser: Any, url: str, path: str = "/", **options: Any) -> Iterator[Visit]:
    """The page of a server; fails at the end where it did what it must not."""
    context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}, **options})
    context.set_default_timeout(WAIT)
    page = context.new_page()
    found = Visit(page, url)
    page.on("request", lambda request: found.requests.append(request.url))
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.on(
        "console",
        lambda said: found.complaints.append(said.text) if said.type == "error" else None,
    )
    try:
        page.goto(url + path)
        yield found
        found.check()
    finally:
        context.close()
