"""The page that a browser shows: files beside this one, and what a browser may do with them.

Nothing is fetched from elsewhere, no script or style stands in the markup, and only DOMPurify may
make markup of a text: a browser refuses the rest, whatever a model writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
BELOW = "/page/"
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript",
          ".svg": "image/svg+xml"}  # fmt: skip
POLICY = "; ".join(
    [
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'",
        "img-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        "require-trusted-types-for 'script'", "trusted-types dompurify",
    ]
)  # fmt: skip
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # ask again, which costs nothing: the files are known by a tag
}


def is_page(path: str) -> bool:
    """Is it a file of the page? They hold nothing that needs a key."""
    return path == "/" or path.startswith(BELOW)


def routes() -> list[Route]:
    """A route for every file."""
    found = []
    for file in sorted(FOLDER.rglob("*")):
        if file.suffix in _KINDS:
            name = file.relative_to(FOLDER).as_posix()
            path = "/" if name == "index.html" else BELOW + name
            found.append(Route(path, _sent(file), methods=["GET"]))
    return found


def _sent(file: Path) -> Callable[[Request], Awaitable[Response]]:
    """Answers with a file, or says that the browser's copy is still right."""
    content, kind = file.read_bytes(), f"{_KINDS[file.suffix]}; charset=utf-8"
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {**_HEADERS, "etag": tag, "content-type": kind}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    return answer
