"""Who may ask: hosts, origins, keys. It stands before everything else.

A web page that somebody visits can send requests to this machine. It cannot set the Host header to
a name of this machine (that stops DNS rebinding), its own address is in Origin, and without JSON as
content type it would need no leave from us at all (`bodies.py`).
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_redrafter.server import pages
from mlx_redrafter.server.errors import response
from mlx_redrafter.server.problems import Problem
from mlx_redrafter.server.settings import Settings

Count = Callable[[int], None]
FREE = ("/health",)  # paths that need no key, beside the page
_HEADERS = (
    "authorization, content-type, x-api-key, anthropic-version, anthropic-beta, openai-beta, "
    "anthropic-dangerous-direct-browser-access"
)


def loopback(host: str) -> bool:
    """Is it this machine, seen from itself?"""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_of(header: str) -> str:
    """The host in ``host:port``, in small letters."""
    text = header.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0].rstrip(".") if text.count(":") == 1 else text.rstrip(".")


def known_host(host: str, allowed: tuple[str, ...]) -> bool:
    """May a request name this host? Names that public DNS cannot give to somebody else's page."""
    own = socket.gethostname().lower()
    if loopback(host) or host in allowed or host in (own, f"{own}.local"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.endswith((".local", ".internal"))
    return address.is_private or address.is_link_local


class Guard:
    """The middleware: checks, cross-origin headers, and the number of every request. ``count`` is
    told the status of every answer."""

    def __init__(self, app: ASGIApp, settings: Settings, count: Count) -> None:
        self.app, self.settings, self.count = app, settings, count
        self.local = loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        request_id = f"req_{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = request_id
        added = {"x-request-id": request_id, "request-id": request_id}
        try:
            self._check_host(headers)
            added |= self._check_origin(scope["method"], headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                given = self._adding(send, {})
                await Response(status_code=204, headers=added)(scope, receive, given)
                return
            if scope["path"] not in FREE and not pages.is_page(scope["path"]):
                self._check_key(headers)
        except Problem as problem:
            refused = response(scope, problem.wrong)
            await refused(scope, receive, self._adding(send, added))
            return
        await self.app(scope, receive, self._adding(send, added))

    def _adding(self, send: Send, added: dict[str, Any]) -> Send:
        """The same, counted, with headers on every answer."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in added.items():
                    headers[name] = value
            await send(message)

        return sending

    def _check_host(self, headers: Headers) -> None:
        given = headers.get("host")
        if given and self.local and not known_host(host_of(given), self.settings.allowed_hosts):
            raise _forbidden(
                f"requests for host {given[:100]!r} are refused: use an address of this machine, "
                "or start the server with --allowed-hosts"
            )

    def _check_origin(self, method: str, headers: Headers) -> dict[str, str]:
        """The headers for pages of that origin, none without one."""
        origin = headers.get("origin")
        if origin is None:
            return {}
        if not self._knows(origin, headers.get("host", "")):
            if method in ("GET", "HEAD"):
                return {"vary": "Origin"}  # without leave the page cannot read it
            raise _forbidden(
                f"requests of web pages of {origin[:100]!r} are refused: start the server with "
                "--allowed-origins to allow them"
            )
        every = "*" in self.settings.allowed_origins
        return {
            "access-control-allow-origin": "*" if every else origin,
            "access-control-allow-methods": "GET, POST, OPTIONS",
            "access-control-allow-headers": _asked(headers),
            "access-control-expose-headers": "x-request-id, request-id, retry-after",
            "vary": "Origin",
        }

    def _knows(self, origin: str, host: str) -> bool:
        for allowed in self.settings.allowed_origins:
            if origin == allowed or (allowed[-1:] == "*" and origin.startswith(allowed[:-1])):
                return True
        try:
            parts = urlsplit(origin)
            name = parts.hostname or ""
        except ValueError:
            return False
        if parts.scheme not in ("http", "https"):
            return False
        return loopback(name) or parts.netloc.lower() == host.lower()

    def _check_key(self, headers: Headers) -> None:
        wanted = self.settings.api_key
        if wanted is None:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", "")]
        given += [token.strip()] if scheme.lower() == "bearer" else []
        if not any(hmac.compare_digest(one.encode(), wanted.encode()) for one in given):
            raise Problem(
                "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                status=401, code="invalid_api_key",
            )  # fmt: skip


def _asked(headers: Headers) -> str:
    """The headers that a page may send: ours, and those that an OpenAI SDK adds of its own."""
    wanted = headers.get("access-control-request-headers", "").lower().split(",")
    more = sorted(name.strip() for name in wanted if name.strip().startswith("x-stainless-"))
    return ", ".join([_HEADERS, *more])


def _forbidden(message: str) -> Problem:
    return Problem(message, status=403, kind="permission_error")
