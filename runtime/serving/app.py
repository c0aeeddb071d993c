"""`create_app`: an ASGI application that serves a generator, to be run by itself or mounted in another."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import NoReturn

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.routing import Route

from runtime.generator import Generator
from runtime.serving import playground
from runtime.serving.chat import Chat
from runtime.serving.completions import TextCompletion
from runtime.serving.endpoints import Generating, Health, Models, Telling
from runtime.serving.errors import ApiError
from runtime.serving.exchange import Exchanges
from runtime.serving.openapi import document
from runtime.serving.requests import ChatRequest, CompletionRequest, ResponseRequest
from runtime.serving.responses import Responding
from runtime.serving.settings import Settings
from runtime.serving.state import Server


def create_app(generator: Generator, settings: Settings | None = None) -> Starlette:
    """Return an application that serves `generator`, which whoever made it closes.

    Its `state.server` can be asked to drain. Where it is mounted in another application, whose own lifespan it has not,
    it warms up when it is first asked for its readiness or for an answer.
    """
    server = Server(generator, settings or Settings())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        server.start()
        yield

    about = msgspec.json.encode(document(keys=bool(server.settings.api_keys)))
    models, health = Models(server), Health(server)

    def telling(path: str, tell: object) -> Route:
        return Route(path, Telling(tell, path), methods=["GET"])  # type: ignore[arg-type]

    routes = [
        telling("/v1/models", models.all),
        telling("/v1/models/{model:path}", models.one),
        Route("/v1/chat/completions", Generating(server, ChatRequest, Chat), methods=["POST"]),
        Route("/v1/completions", Generating(server, CompletionRequest, TextCompletion), methods=["POST"]),
        Route("/v1/responses", Generating(server, ResponseRequest, Responding), methods=["POST"]),
        telling("/health", health.ready),
        telling("/health/live", health.live),
        telling("/health/ready", health.ready),
        telling("/metrics", lambda scope: (200, *server.metrics.text())),
        telling("/openapi.json", lambda scope: (200, about, "application/json")),
    ]
    if server.settings.playground:
        routes += playground.routes()
    middleware = [Middleware(Exchanges, server=server)]
    if server.settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(server.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers={HTTPException: _no_such_place}
    )
    app.state.server = server
    return app


async def _no_such_place(request: HttpRequest, error: Exception) -> NoReturn:
    """Have what the router refuses answered as other errors are."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        raise ApiError(
            405, f"{request.url.path} does not take {request.method}", code="method_not_allowed", headers=error.headers
        )
    told = f"there is nothing at {request.url.path}"
    path = f"/v1{request.scope['path'].removeprefix(request.scope.get('root_path', ''))}"
    if path in {route.path for route in request.app.routes if isinstance(route, Route)}:
        told += f"; there is {path}: let the client's base URL end with /v1"
    raise ApiError(error.status_code, told, code="not_found")
