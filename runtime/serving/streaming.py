"""Server-sent events: an answer's parts as they come, and its end, whichever that is."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import msgspec

from runtime.serving.connection import ClientGoneError, Sender
from runtime.serving.errors import api_error
from runtime.serving.exchange import Exchange
from runtime.serving.state import Server

MEDIA = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"
ENCODER = msgspec.json.Encoder()


def event(value: msgspec.Struct, name: str | None = None) -> bytes:
    """Return `value` as an event, with a `name` where events have some."""
    data = ENCODER.encode(value)
    return b"data: " + data + b"\n\n" if name is None else b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


async def send_events(server: Server, exchange: Exchange, events: AsyncGenerator[bytes], sender: Sender) -> None:
    """Send `events` as they come. What fails before the first of them is raised, and so has a status of its own; what
    fails later is an event.
    """
    async with contextlib.aclosing(events):
        try:
            async for part in events:
                if not sender.begun:
                    await sender.begin(MEDIA)
                await sender.part(part)
        except ClientGoneError:
            raise
        except Exception as error:
            if not sender.begun:
                raise
            told = api_error(error, server.generator.metrics())
            exchange.fields["error"] = told.answer.error.code
            await sender.part(event(told.answer) + DONE)
    await sender.part(b"", more=False)
