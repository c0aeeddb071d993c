"""Answer from routes of your own: whole, and streamed, with a request that ends when its client leaves.

pip install '.[serve,cpu]'
python examples/service.py engine.onnx
curl -N http://127.0.0.1:8000/stream -d '{"prompt": "Why is the sky blue?"}'

With FastAPI the same functions are routes, and `fastapi.responses.StreamingResponse` is the same class.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from runtime import BusyError, Generator, InputError, Request, ServiceError

MAX_NEW_TOKENS = 128


def make_app(engine: str) -> Starlette:
    """Return an application that loads the engine when it starts, and closes it at its end."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # Of what users write nothing becomes a special token, such as the end of their turn.
        with Generator(engine, escape_special_tokens=True) as generator:
            await asyncio.to_thread(generator.warm_up)
            app.state.generator = generator
            yield

    routes = [Route("/answer", answer, methods=["POST"]), Route("/stream", stream, methods=["POST"])]
    return Starlette(routes=routes, lifespan=lifespan)


async def answer(http: HttpRequest) -> JSONResponse:
    """Answer with the whole text."""
    generator: Generator = http.app.state.generator
    messages = await asked(http)
    with refused():
        result = await generator.agenerate(messages, max_new_tokens=MAX_NEW_TOKENS)
    return JSONResponse({"text": result.text, "finish_reason": result.finish_reason})


async def stream(http: HttpRequest) -> StreamingResponse:
    """Answer with the text as it comes."""
    submit: Callable[..., Request] = http.app.state.generator.submit
    messages = await asked(http)
    # Before the response has begun: what does not fit has a status of its own, and no response that breaks off.
    with refused():
        request = await asyncio.to_thread(submit, messages, max_new_tokens=MAX_NEW_TOKENS)
    return Texts(request)


class Texts(StreamingResponse):
    """The texts of a request. It ends with the response: when all is said, and when the client has left."""

    def __init__(self, request: Request) -> None:
        super().__init__((chunk.text async for chunk in request), media_type="text/plain")
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        with contextlib.closing(self._request):
            await super().__call__(scope, receive, send)


async def asked(http: HttpRequest) -> list[dict[str, str]]:
    """Return the conversation that a body asks for."""
    try:
        return [{"role": "user", "content": (await http.json())["prompt"]}]
    except (ValueError, TypeError, LookupError):
        raise HTTPException(400, 'the body must be JSON: {"prompt": "..."}') from None


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Give errors of the generator their status."""
    try:
        yield
    except InputError as error:
        raise HTTPException(400, str(error)) from error
    except BusyError as error:
        raise HTTPException(429, str(error)) from error
    except ServiceError as error:
        raise HTTPException(503, str(error)) from error


def main(arguments: Sequence[str]) -> None:
    """Serve the engine named, by one process: each has an engine of its own."""
    (engine,) = arguments
    uvicorn.run(make_app(engine), timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main(sys.argv[1:])
