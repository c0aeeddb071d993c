"""Connections: what uvicorn's do, and an end for clients that are too slow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol(head_s: float, reader_s: float) -> Callable[..., asyncio.Protocol]:
    """Return the protocol of connections on which the head of a request comes within `head_s` seconds, and so does what
    is left of a body whose request was answered without it, and what is sent is read within `reader_s`; others are cut
    off, which uvicorn does not do.
    """

    class Bounded(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _reading: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            # Idle is a client whose next head has not come, or not to its end.
            if self.conn.their_state is h11.IDLE or self._owes_a_body():
                self._wait_for_head()
            else:
                self._head = _stop(self._head)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._owes_a_body():
                self._wait_for_head()

        def _owes_a_body(self) -> bool:
            """Return whether the client has its answer and still sends the body, for which nobody waits."""
            answered = self.cycle is not None and self.cycle.response_complete
            return bool(answered and self.conn.their_state is h11.SEND_BODY)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reading = self._reading or self.loop.call_later(reader_s, self._cut_off)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._reading = _stop(self._reading)

        def connection_lost(self, exc: Any) -> None:
            self._head, self._reading = _stop(self._head), _stop(self._reading)
            super().connection_lost(exc)

        def _wait_for_head(self) -> None:
            self._head = self._head or self.loop.call_later(head_s, self._cut_off)

        def _cut_off(self) -> None:
            self.transport.abort()

    return Bounded


def _stop(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Stop a timer; return what stands in its place."""
    if timer is not None:
        timer.cancel()
    return None
