"""Running an application by uvicorn, to an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from runtime.serving.logs import NAME
from runtime.serving.protocol import protocol
from runtime.serving.state import Server

LOG = logging.getLogger(NAME)
# Seconds for what is left of connections when all requests have ended.
LAST_SECONDS = 5
# The same after a second signal, and for the end of requests whose connection was cut off.
FORCED_SECONDS, CUT_SECONDS = 0.1, 1
# Seconds between two looks at whether there was a signal.
LOOK = 0.05
# Seconds that a connection without a request is kept.
IDLE_SECONDS = 30
# Connections that wait to be taken.
BACKLOG = 2048


class DrainingServer(uvicorn.Server):
    """Answers until it is asked to stop; then it goes on answering what is under way, and refuses the rest, until the
    drain of `served` ends. A second signal ends it at once, as orderly as that goes.
    """

    def __init__(self, config: uvicorn.Config, served: Server) -> None:
        super().__init__(config)
        self._served = served

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM for itself, and leave nothing of them to whoever runs it."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop soon, or for the second time at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, end what is left, and close all connections."""
        LOG.info("draining", extra={"fields": {"seconds": self._served.settings.drain_s}})
        draining = asyncio.ensure_future(self._served.drain())
        while not draining.done() and not self.force_exit:
            await asyncio.wait((draining,), timeout=LOOK)
        drained = draining.done() and draining.result()
        draining.cancel()
        if self.force_exit:
            LOG.warning("stopping at once")
        # Its requests end with an error that clients are told.
        await asyncio.to_thread(self._served.generator.close)
        await self._let_go()
        await super().shutdown(sockets)
        if self.force_exit:
            # It has left the application in the middle of its life.
            await self.lifespan.shutdown()
        LOG.info("stopped", extra={"fields": {"drained": drained}})

    async def _let_go(self) -> None:
        """Let clients have what is left for them, and cut off those that go on sending or do not read: their requests
        end as those of clients that leave, where uvicorn would end them with a fault.
        """
        state = self.server_state
        for left in (LAST_SECONDS, CUT_SECONDS):
            end = time.monotonic() + left
            while state.tasks and time.monotonic() < end:
                if self.force_exit:
                    end = min(end, time.monotonic() + FORCED_SECONDS)
                await asyncio.sleep(LOOK)
            if state.tasks:
                for connection in list(state.connections):
                    connection.transport.abort()


def serve(app: Starlette, listening: socket.socket) -> None:
    """Serve `app` at the address of a `bound` socket until SIGINT or SIGTERM comes; then close its generator."""
    served: Server = app.state.server
    settings = served.settings
    # A function that makes them does as well as a class.
    http: Any = protocol(settings.body_s, settings.reader_s)
    config = uvicorn.Config(
        app,
        http=http,
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS,
        backlog=BACKLOG,
        lifespan="on",
    )
    told = listening.getsockname()
    LOG.info("listening", extra={"fields": {"host": told[0], "port": told[1], "models": served.names}})
    DrainingServer(config, served).run(sockets=[listening])


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that has this address, and does not listen yet. Raises `OSError` where it cannot be had."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OSError(error.errno, error.strerror, host) from error
    listening = socket.socket(family, kind, number)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from error
    return listening
