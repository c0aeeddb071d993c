"""A client's side of a request: its body within limits, whether it is still there, and what is sent to it in time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from runtime.serving.asgi import Receive, Scope, Send, header
from runtime.serving.errors import ApiError

T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def read_body(scope: Scope, receive: Receive, most: int, seconds: float) -> bytes:
    """Return the JSON body of a request, of up to `most` bytes, that comes within so many seconds. Raises `ApiError`,
    and `ClientGoneError`.
    """
    media = (header(scope, b"content-type") or b"").partition(b";")[0].strip().lower()
    if media != b"application/json":
        # Not any other: a web page may send those to a server on its reader's machine, unasked.
        raise ApiError(
            415, "the body must be JSON, with 'Content-Type: application/json'", code="unsupported_media_type"
        )
    told = header(scope, b"content-length")
    if told is not None and told.isdigit() and int(told) > most:
        raise _too_large(most)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError("before its request was whole")
                part = message.get("body", b"")
                size += len(part)
                if size > most:
                    raise _too_large(most)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not come within {seconds:g} s", code="request_timeout", headers={"connection": "close"}
        ) from None


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        # The connection stays: where it ended now, the client would be cut off while it sends, and would not hear this.
        f"the body has more than the {most} bytes that are allowed here; send less",
        code="request_too_large",
    )


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it, and raise `ClientGoneError`, when the client leaves before."""
    watching = asyncio.ensure_future(_gone(receive))
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait((watching, working), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError("before its answer's end")
        return working.result()
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Sender:
    """Sends an answer to a client that has so many `seconds` to take each part of it."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send = send
        self._seconds = seconds
        self.begun = False

    async def whole(self, body: bytes, media: str = "application/json") -> None:
        """Send an answer at once."""
        await self.begin(media, len(body))
        await self.part(body, more=False)

    async def begin(self, media: str, size: int | None = None) -> None:
        """Begin an answer of this media type."""
        headers = [(b"content-type", media.encode())]
        if size is None:
            headers += [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        else:
            headers.append((b"content-length", str(size).encode()))
        self.begun = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def part(self, body: bytes, *, more: bool = True) -> None:
        """Send a part of the answer. Raises `ClientGoneError` where the client does not take it."""
        try:
            async with asyncio.timeout(self._seconds):
                await self._send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            raise ClientGoneError("it reads too slowly") from None
        except OSError as error:
            raise ClientGoneError("before its answer's end") from error
