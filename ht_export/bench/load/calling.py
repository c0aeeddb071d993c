"""One request to a server that speaks OpenAI's API, and what was heard of its answer, as it came."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from runtime.errors import InputError, one_line

if TYPE_CHECKING:
    import httpx

# Seconds without a byte after which a server is taken for dead.
SILENCE = 300.0
REFUSED = 429

Ending = Literal["whole", "left", "refused", "error"]


@dataclass
class Heard:
    """What was heard of the answer to job number `job`: `events` are the seconds at which pieces of text came, from the
    request on; `tokens` is what the server counted. Of an `error` there is a `cause`.
    """

    job: int
    ending: Ending = "error"
    text: str = ""
    tokens: int = 0
    cached: int = 0
    seconds: float = 0.0
    retry_after: float = 0.0
    cause: str = ""
    events: list[float] = field(default_factory=list)


class Caller:
    """Asks the server at `url`, the address of its `/v1`, for chats with its `model`; `extra` goes into every request.

    For any number of threads. Raises `InputError` where httpx is not installed.
    """

    def __init__(self, url: str, model: str | None, key: str | None, extra: dict[str, Any]) -> None:
        try:
            import httpx
        except ImportError as error:
            raise InputError("--url needs httpx; install hidden-transfer[bench]") from error
        self._failures = (httpx.HTTPError, httpx.StreamError)
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        try:
            self._client = httpx.Client(
                base_url=url.rstrip("/"), headers=headers, limits=unlimited, timeout=httpx.Timeout(SILENCE)
            )
            self.model = model or self._own_model(url)
        except (*self._failures, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"{url} does not answer as OpenAI's API does ({one_line(error)}); give an address such as "
                "http://127.0.0.1:8000/v1"
            ) from error
        self._extra = extra

    def _own_model(self, url: str) -> str:
        found = self._client.get("/models")
        found.raise_for_status()
        return str(found.json()["data"][0]["id"])

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def ask(self, number: int, text: str, leave_after: int | None = None) -> Heard:
        """Have job `number` answered, whose prompt is `text`; leave after so many pieces of the answer."""
        body = {"messages": [{"role": "user", "content": text}]}
        return self._asked(number, "/chat/completions", body, leave_after, lambda: None)

    def complete(self, number: int, prompt: Sequence[int], tick: Callable[[], None] = lambda: None) -> Heard:
        """Have job number `number` continued, whose prompt is token ids; `tick` is called when some text has come."""
        return self._asked(number, "/completions", {"prompt": list(prompt)}, None, tick)

    def _asked(
        self, number: int, path: str, asked: dict[str, Any], leave_after: int | None, tick: Callable[[], None]
    ) -> Heard:
        heard, begun = Heard(number), time.perf_counter()
        body = {
            "model": self.model,
            **asked,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }
        try:
            with self._client.stream("POST", path, json=body) as answer:
                if answer.status_code != 200:
                    self._refused(answer, heard)
                else:
                    self._listen(answer.iter_lines(), heard, begun, leave_after, tick)
        except self._failures as error:
            heard.ending, heard.cause = "error", f"{type(error).__name__}: {one_line(error)}"
        heard.seconds = time.perf_counter() - begun
        return heard

    def _refused(self, answer: httpx.Response, heard: Heard) -> None:
        answer.read()
        heard.ending = "refused" if answer.status_code == REFUSED else "error"
        heard.cause = f"{answer.status_code}: {one_line(answer.text)}"
        wait = answer.headers.get("retry-after", "")
        heard.retry_after = float(wait) if wait.isdigit() else 1.0

    def _listen(
        self, lines: Iterator[str], heard: Heard, begun: float, leave_after: int | None, tick: Callable[[], None]
    ) -> None:
        told = None
        for line in lines:
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                heard.ending, heard.cause = ("whole", "") if told is None else ("error", told)
                return
            event = json.loads(data)
            if "error" in event:
                told = f"the server told: {one_line(event['error'])}"
                continue
            if usage := event.get("usage"):
                heard.tokens = usage["completion_tokens"]
                heard.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            for choice in event["choices"]:
                if piece := choice["delta"].get("content") if "delta" in choice else choice.get("text"):
                    heard.text += piece
                    heard.events.append(time.perf_counter() - begun)
                    tick()
            if leave_after is not None and len(heard.events) >= leave_after:
                heard.ending = "left"
                return
        heard.cause = told or "the stream ended without [DONE]"
