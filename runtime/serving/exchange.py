"""One request over HTTP and its answer: its id, what is logged and counted of it, and its errors as OpenAI's are."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from runtime.serving.asgi import App, Message, Receive, Scope, Send, header
from runtime.serving.connection import ClientGoneError
from runtime.serving.errors import api_error
from runtime.serving.logs import NAME
from runtime.serving.state import Server

LOG = logging.getLogger(NAME)
KEY = "ht.exchange"
REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
# What is asked of with the key that a server may want.
GUARDED = "/v1"
# Answers of these paths are no news.
QUIET = ("/health", "/metrics")


@dataclass
class Exchange:
    """A request on its way: `fields` are for the log."""

    id: str
    method: str
    path: str
    # The route's own path, without what a client may write into it.
    route: str = "other"
    status: int = 0
    # The field of the request that has its prompt.
    prompt: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """The time since it began."""
        return time.monotonic() - self.begun


def exchange_of(scope: Scope) -> Exchange:
    """Return the exchange that a scope is of."""
    found: Exchange = scope[KEY]
    return found


class Exchanges:
    """Gives each request of `app` its exchange, checks its key, answers its errors, and logs and counts it."""

    def __init__(self, app: App, server: Server) -> None:
        self._app = app
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = header(scope, b"x-request-id")
        number = given.decode() if given and REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        exchange = scope[KEY] = Exchange(number, scope["method"], _path(scope))

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", exchange.id.encode())]
            await send(message)

        metrics = self._server.metrics
        metrics.open.inc()
        try:
            if exchange.path.startswith(GUARDED):
                self._server.keys.check(header(scope, b"authorization"))
            await self._app(scope, receive, tell)
        except ClientGoneError as gone:
            exchange.fields["gone"] = str(gone)
            metrics.left()
        except Exception as error:
            await self._failed(error, exchange, tell)
        finally:
            metrics.open.dec()
            self._end(exchange)

    async def _failed(self, error: Exception, exchange: Exchange, send: Send) -> None:
        told = api_error(error, self._server.generator.metrics(), exchange.prompt)
        if told.status == 500:
            LOG.error("a request failed", exc_info=error, extra={"fields": {"request_id": exchange.id}})
        exchange.fields["error"] = told.answer.error.code
        if exchange.status:
            # It has begun: the connection ends, as nothing that is sent would be told from the answer.
            raise error
        await send(told.start)
        await send({"type": "http.response.body", "body": told.body})

    def _end(self, exchange: Exchange) -> None:
        self._server.metrics.answered(exchange.route, exchange.status)
        level = logging.DEBUG if exchange.path.startswith(QUIET) else logging.INFO
        if LOG.isEnabledFor(level):
            fields = {
                "request_id": exchange.id,
                "method": exchange.method,
                "path": exchange.path if exchange.route != "other" else "other",
                "status": exchange.status,
                "seconds": round(exchange.seconds, 4),
                **exchange.fields,
            }
            LOG.log(level, "request", extra={"fields": fields})


def _path(scope: Scope) -> str:
    """Return the path within the application, wherever that is mounted: as it is routed, so that keys guard that."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(f"{root}/") else path
