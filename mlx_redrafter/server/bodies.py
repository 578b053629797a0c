"""Reading a request: as long, as slow and as deep as may be, and no further."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request

from mlx_redrafter.server.problems import Problem, invalid
from mlx_redrafter.server.settings import MIB, Settings


async def json_body(request: Request, settings: Settings) -> dict[str, Any]:
    """The JSON object that a client sent.

    Raises Problem, and ClientDisconnect where the client is gone.
    """
    _check_headers(request, settings)
    try:
        async with asyncio.timeout(settings.body_seconds):
            data = await _read(request, settings)
    except TimeoutError:
        message = f"the request did not arrive within {settings.body_seconds:g} seconds"
        raise Problem(message, status=408) from None
    try:
        body = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        where = str(error).rpartition(" at line ")
        text = where[0] or str(error)
        place = f" (line {where[2].replace(' column', ', column')})" if where[1] else ""
        raise invalid(f"the body is not JSON: {text}{place}") from None
    if not isinstance(body, dict):
        raise invalid("the body is not a JSON object")
    return body


def _check_headers(request: Request, settings: Settings) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Problem(
            f"content type {kind[:60]!r} is refused: send JSON with 'Content-Type: "
            "application/json'",
            status=415,
        )
    length = request.headers.get("content-length")
    if length is None and "transfer-encoding" not in request.headers:
        raise Problem("the request has no Content-Length", status=411)
    if length is not None and int(length) > settings.body_limit:
        raise _too_large(settings)


async def _read(request: Request, settings: Settings) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > settings.body_limit:
            raise _too_large(settings)
        parts.append(part)
    return b"".join(parts)


def _too_large(settings: Settings) -> Problem:
    return Problem(f"the request is larger than {settings.body_limit / MIB:g} MiB", status=413)
