"""The ASGI application: which path does what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mlx_redrafter.server import pages, problems
from mlx_redrafter.server.endpoints import Endpoints, Say
from mlx_redrafter.server.errors import response
from mlx_redrafter.server.problems import INVALID, Problem, Wrong
from mlx_redrafter.server.security import Guard
from mlx_redrafter.server.settings import Settings
from mlx_redrafter.server.worker import Worker, place_of

Handler = Callable[[Request], Awaitable[Response]]
LEFT = 499  # nginx's number for a client that is gone; nobody sees it
_NOT_HERE = (
    "/embeddings", "/rerank", "/moderations", "/images/generations", "/audio/speech",
    "/audio/transcriptions",
)  # fmt: skip


def make_app(worker: Worker, settings: Settings, say: Say = lambda line: None) -> ASGIApp:
    """The application of one model. ``say`` takes a line of the log."""
    does = Endpoints(worker, settings, say)
    posts: dict[str, Handler] = {
        "/chat/completions": does.chat,
        "/completions": does.completions,
        "/messages": does.messages,
        "/messages/count_tokens": does.count_tokens,
        "/responses": does.responses,
        **dict.fromkeys(_NOT_HERE, does.not_here),
    }
    gets: dict[str, Handler] = {"/models": does.list_models, "/models/{name:path}": does.model}
    routes = [
        Route(prefix + path, _safe(handler, say), methods=[method])
        for method, paths in (("POST", posts), ("GET", gets))
        for path, handler in paths.items()
        for prefix in ("/v1", "")
    ]
    routes += [
        Route("/tokenize", _safe(does.tokenize, say), methods=["POST"]),
        Route("/detokenize", _safe(does.detokenize, say), methods=["POST"]),
        Route("/apply-template", _safe(does.apply_template, say), methods=["POST"]),
        Route("/health", _safe(does.health, say), methods=["GET"]),
        Route("/ready", _safe(does.ready, say), methods=["GET"]),
        Route("/metrics", _safe(does.metrics, say), methods=["GET"]),
        Route("/slots", _safe(does.slots, say), methods=["GET"]),
    ]
    routes += pages.routes() if settings.page else []
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, settings=settings, count=worker.metrics.answered)],
        exception_handlers={HTTPException: _of_starlette},
    )
    app.router.redirect_slashes = False
    return app


def _safe(handler: Handler, say: Say) -> Handler:
    """The same; whatever goes wrong is an answer, and our own faults are a line of the log too."""

    async def run(request: Request) -> Response:
        try:
            return await handler(request)
        except Problem as problem:
            return response(request.scope, problem.wrong)
        except ClientDisconnect:
            return Response(status_code=LEFT)
        except Exception as error:
            request_id = request.state.request_id
            say(f"{request_id}: {place_of(error)}")
            return response(request.scope, problems.internal(request_id).wrong)

    return run


async def _of_starlette(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path[:100], request.method
    if error.status_code == 404:
        wrong = Wrong(f"there is no {path} here", 404, "not_found_error")
    else:
        wrong = Wrong(f"{method} is not possible for {path}", error.status_code, INVALID)
    found = response(request.scope, wrong)
    found.headers.update(error.headers or {})
    return found
