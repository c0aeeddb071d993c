"""The endpoints: each takes a request over HTTP and has it answered."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from runtime.serving import admission
from runtime.serving.asgi import Receive, Scope, Send
from runtime.serving.connection import Sender, read_body, unless_gone
from runtime.serving.errors import ApiError
from runtime.serving.exchange import Exchange, exchange_of
from runtime.serving.replies import Model, ModelList
from runtime.serving.requests import Request
from runtime.serving.state import Server
from runtime.serving.streaming import send_events

R = TypeVar("R", bound=Request)


class Answering(Protocol):
    """What answers one request, with so many `answers` of the model."""

    @property
    def answers(self) -> int:
        """How many answers of the model there are."""
        ...

    async def whole(self) -> bytes:
        """Return the answer, once it is there."""
        ...

    def events(self) -> AsyncGenerator[bytes]:
        """Return the answer as events."""
        ...


class Generating(Generic[R]):
    """An endpoint that has the model answer: requests are of a `kind`, and `begin` checks one and answers it."""

    def __init__(self, server: Server, kind: type[R], begin: Callable[[Server, R, Exchange], Answering]) -> None:
        self._server = server
        self._kind = kind
        self._begin = begin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        server, settings = self._server, self._server.settings
        exchange = exchange_of(scope)
        exchange.route = exchange.path
        exchange.prompt = self._kind.PROMPT
        server.start()
        server.check_open()
        body = await read_body(scope, receive, settings.max_body, settings.body_s)
        request = admission.decode(body, self._kind)
        if settings.log_texts:
            exchange.fields["asked"] = msgspec.to_builtins(request)
        admission.check_model(request, server.names)
        answering = self._begin(server, request, exchange)
        sender = Sender(send, settings.reader_s)
        exchange.fields["stream"] = bool(request.stream)
        if request.stream:
            with server.streaming(answering.answers):
                await unless_gone(receive, send_events(server, exchange, answering.events(), sender))
        else:
            found = await unless_gone(receive, answering.whole())
            await sender.whole(found)


class Telling:
    """An endpoint that tells something: `tell` returns a status, a body and its media type."""

    def __init__(self, tell: Callable[[Scope], tuple[int, bytes, str]], route: str) -> None:
        self._tell = tell
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        exchange_of(scope).route = self._route
        status, body, media = self._tell(scope)
        headers = [(b"content-type", media.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def json(value: Any, status: int = 200) -> tuple[int, bytes, str]:
    """Return `value` as what an endpoint tells."""
    return status, msgspec.json.encode(value), "application/json"


class Models:
    """What is served here: the one engine, under its names."""

    def __init__(self, server: Server) -> None:
        limit = server.generator.about.max_context
        self._models = {name: Model(name, server.began, limit) for name in server.names}

    def all(self, scope: Scope) -> tuple[int, bytes, str]:
        """Tell of all."""
        return json(ModelList(list(self._models.values())))

    def one(self, scope: Scope) -> tuple[int, bytes, str]:
        """Tell of one. Raises `ApiError`."""
        name = scope["path_params"]["model"]
        if name not in self._models:
            raise ApiError(404, f"there is no model {name!r} here", param="model", code="model_not_found")
        return json(self._models[name])


class Health:
    """Whether the server lives, and whether it should be sent requests."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def live(self, scope: Scope) -> tuple[int, bytes, str]:
        """Tell whether it lives: with a failed engine it does not, and only a new process helps."""
        failure = self._server.generator.failure
        return json({"status": "ok"}) if failure is None else json({"status": str(failure)}, 503)

    def ready(self, scope: Scope) -> tuple[int, bytes, str]:
        """Tell whether it is ready."""
        self._server.start()
        reason = self._server.not_ready
        return json({"status": "ok"}) if reason is None else json({"status": reason}, 503)
