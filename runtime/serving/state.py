"""What a server is: its generator, its settings, and whether it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator

import anyio.to_thread

from runtime.errors import ClosedError, ServiceError, one_line
from runtime.generator import Generator
from runtime.serving.errors import ApiError, busy
from runtime.serving.keys import Keys
from runtime.serving.metrics import Metrics
from runtime.serving.pieces import Pieces
from runtime.serving.settings import Settings

LOG = logging.getLogger("runtime.serving")
# Seconds between two looks at whether a drain should be cut short.
LOOK = 0.1


class Server:
    """A `generator` that is served as `settings` say.

    It is warmed up once, when it is started or first asked: until then, while it drains and when its engine has failed
    it is not ready.
    """

    def __init__(self, generator: Generator, settings: Settings) -> None:
        self.generator = generator
        self.settings = settings
        own = str(generator.about.base_model.get("name") or "model")
        self.names = tuple(settings.models) or (own,)
        self.fingerprint = f"ht-{generator.about.graph.sha256[:12]}"
        self.began = int(time.time())
        self.keys = Keys(settings.api_keys)
        self.pieces = Pieces(generator)
        self.metrics = Metrics(generator, settings.metrics_prefix, self.names[0])
        self.draining = False
        self.warm = not settings.warm_up
        self._streams = 0
        self._warming: asyncio.Task[None] | None = None

    @property
    def now(self) -> int:
        """The time, in seconds since 1970."""
        return int(time.time())

    def start(self) -> None:
        """Begin to warm up, in the background, unless that was done before."""
        if not self.warm and self._warming is None:
            self._warming = asyncio.get_running_loop().create_task(self._warm_up())

    async def _warm_up(self) -> None:
        begun, tools = time.monotonic(), {}
        try:
            await anyio.to_thread.run_sync(self.generator.warm_up, abandon_on_cancel=True)
            tools = await anyio.to_thread.run_sync(self._about_tools, abandon_on_cancel=True)
        except ServiceError as error:
            # A queue that is full is warm already; of a failed engine the health tells.
            level = logging.DEBUG if isinstance(error, ClosedError) else logging.WARNING
            LOG.log(level, "warming up ended early", extra={"fields": {"error": one_line(error)}})
        except Exception:
            # Of a server that nobody should be sent to.
            LOG.exception("warming up failed")
            return
        self.warm = True
        seconds = round(time.monotonic() - begun, 3)
        LOG.info("ready", extra={"fields": {"seconds": seconds, "models": self.names, **tools}})

    def _about_tools(self) -> dict[str, str]:
        """Return how models are told of tools here, and how they call them, for the log."""
        if not self.settings.tools:
            return {"tool_format": "none"}
        told = "chat template" if self.generator.takes_tools else "system message"
        return {"tool_format": self.generator.tool_format.name, "tools_told_by": told}

    @property
    def not_ready(self) -> str | None:
        """Why no requests should be sent here, None where they should."""
        if self.generator.failure is not None:
            return "the engine has failed"
        if self.draining:
            return "the server is shutting down"
        return None if self.warm else "the server is warming up"

    def check_open(self) -> None:
        """Raise `ApiError` where no more requests are taken."""
        if self.draining:
            raise ApiError(
                503,
                "the server is shutting down; ask another one",
                type="service_unavailable_error",
                code="shutting_down",
                headers={"retry-after": "1", "connection": "close"},
            )

    @contextlib.contextmanager
    def streaming(self, count: int) -> Iterator[None]:
        """Take note of so many answers that are streamed in the block. Raises `ApiError` for too many."""
        most = self.settings.max_streams
        if self._streams + count > most:
            raise busy(
                f"{self._streams} answers are being streamed, and this server allows {most}; try again later",
                self.generator.metrics(),
            )
        self._streams += count
        try:
            yield
        finally:
            self._streams -= count

    async def drain(self) -> bool:
        """Take no more requests and wait for those under way, as long as the settings allow; return whether they have
        ended.
        """
        self.draining = True
        end = time.monotonic() + self.settings.drain_s
        with contextlib.suppress(ServiceError):
            while (left := end - time.monotonic()) > 0:
                if await anyio.to_thread.run_sync(self.generator.drain, min(LOOK, left)):
                    return True
        return self.generator.failure is not None
