"""Problems as answers of HTTP, in the dialect of the path."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import Scope

from mlx_redrafter.server.problems import Wrong

FULL, OVERLOADED = 429, 529  # as Anthropic has it


def anthropic(path: str) -> bool:
    """Does the path belong to Anthropic's dialect?"""
    return path.removeprefix("/v1").startswith("/messages")


def response(scope: Scope, wrong: Wrong) -> JSONResponse:
    """The answer to a request that is not answered."""
    headers = {}
    if wrong.retry_after is not None:
        headers["retry-after"] = str(wrong.retry_after)
    if wrong.status == 408:
        # Of others the rest is read and dropped: closed at once, a client that still sends would
        # lose the answer.
        headers["connection"] = "close"
    if anthropic(scope["path"]):
        status = OVERLOADED if wrong.status == FULL else wrong.status
        content = wrong.anthropic(scope.get("state", {}).get("request_id", ""))
        return JSONResponse(content, status, headers)
    return JSONResponse(wrong.openai(), wrong.status, headers)
