"""A server that runs, in a thread of the tests, and what asks it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from runtime import Generator, Sampling
from runtime.request import Request
from runtime.serving import Settings, create_app
from runtime.serving.protocol import protocol
from tests.runtime.waiting import Gate, until

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


class Live:
    """A server of `generator` with these settings: `client` asks it, `state` is its own."""

    def __init__(self, generator: Generator, settings: Settings | None = None, app: Any = None) -> None:
        self.generator = generator
        self.settings = settings or Settings()
        self.app = app or create_app(generator, self.settings)
        self.state = getattr(self.app.state, "server", None)
        http: Any = protocol(self.settings.body_s, self.settings.reader_s)
        config = uvicorn.Config(
            self.app, host="127.0.0.1", port=0, http=http, log_config=None, access_log=False, lifespan="on"
        )
        config.timeout_graceful_shutdown = 5
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until(lambda: self._server.started)
        self.address: tuple[str, int] = self._server.servers[0].sockets[0].getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def close(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def ask(self, path: str, **body: Any) -> Any:
        """Return the answer to a request that is answered."""
        found = self.client.post(path, json={"model": self.name, **body})
        assert found.status_code == 200, found.text
        return found.json()

    def chat(self, content: str = "Hello", **body: Any) -> Any:
        return self.ask(CHAT, messages=[{"role": "user", "content": content}], **body)

    def events(self, path: str, **body: Any) -> list[Any]:
        """Return the events of a stream that ends as it should."""
        asked = {"model": self.name, "stream": True, **body}
        with self.client.stream("POST", path, json=asked) as found:
            assert found.status_code == 200, found.read()
            assert found.headers["content-type"].startswith("text/event-stream")
            lines = [line.removeprefix("data: ") for line in found.iter_lines() if line.startswith("data: ")]
        if path != RESPONSES:
            assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    @property
    def name(self) -> str:
        return str(self.client.get("/v1/models", headers=self.key).json()["data"][0]["id"])

    @property
    def key(self) -> dict[str, str]:
        keys = self.settings.api_keys
        return {"authorization": f"Bearer {keys[0]}"} if keys else {}

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address)

    def connect_with_small_buffers(self) -> socket.socket:
        """Return a connection between whose ends little fits: what is accepted has the listener's buffer."""
        self._server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(self.address)
        return connection


@contextmanager
def held_up(generator: Generator) -> Iterator[Request]:
    """Hold up the engine in the block, by a request that runs."""
    gate = Gate()
    request = generator.submit("hold", max_new_tokens=1, sampling=Sampling(processors=[gate]))
    try:
        assert gate.reached.wait(30)
        yield request
    finally:
        gate.open.set()
        request.result(30)


def raw_request(path: str, body: dict[str, Any], **headers: str) -> bytes:
    """Return the bytes of a request over HTTP."""
    content = json.dumps(body).encode()
    told = {"host": "x", "content-type": "application/json", "content-length": str(len(content)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content
