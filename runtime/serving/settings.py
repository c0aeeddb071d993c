"""`Settings`: what whoever runs a server may choose, with the limits that it keeps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.checks import number, whole
from runtime.errors import InputError, shown

# Seconds of any wait, and bytes of a body: more is a mistyped number.
LONGEST = 86400.0
LARGEST_BODY = 1 << 30
MOST = 1 << 20

Escape = Literal["messages", "all", "none"]
ESCAPES: tuple[Escape, ...] = ("messages", "all", "none")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of a server.

    - `models`: the names that the engine is served under, the first of them in answers; none for the model's own.
    - `api_keys`: keys of which a request must have one; none asks for no key.
    - `max_body`: bytes of a request's body.
    - `max_tokens`: new tokens that a request may ask for; None for as many as the context limit allows.
    - `max_answers`: answers that one request may ask for, `n` for each of its prompts.
    - `max_streams`: answers that are streamed at once, in all.
    - `body_s`, `reader_s`: seconds that a body may take to come, and that a client may take to read what was sent.
    - `drain_s`: seconds that requests under way have to end when the server is asked to stop.
    - `escape`: where text never becomes special tokens: in "messages" of chats, which are often others' text; in "all"
      texts, the prompts of completions too; or in "none".
    - `cors_origins`: web pages that may call this server from a browser; "*" for all.
    - `metrics_prefix`: what names of metrics begin with; "vllm:" makes them those of vLLM.
    - `log_texts`: write what was asked and answered into the log.
    - `tools`: take calls of tools out of answers; without, requests with tools are refused.
    - `playground`: have a page at `/` that chats and shows the trees of each pass.
    - `warm_up`: run some passes before the server says that it is ready.

    Raises `InputError` for what is out of range.
    """

    models: Sequence[str] = ()
    api_keys: Sequence[str] = field(default=(), repr=False)
    max_body: int = 4 << 20
    max_tokens: int | None = None
    max_answers: int = 128
    max_streams: int = 512
    body_s: float = 30.0
    reader_s: float = 30.0
    drain_s: float = 30.0
    escape: Escape = "messages"
    cors_origins: Sequence[str] = ()
    metrics_prefix: str = "ht_"
    log_texts: bool = False
    tools: bool = True
    playground: bool = True
    warm_up: bool = True

    def __post_init__(self) -> None:
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)

    def _checked(self) -> dict[str, Any]:
        if self.escape not in ESCAPES:
            raise InputError(f"escape must be one of {', '.join(ESCAPES)}, not {shown(self.escape)}")
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_:]*", self.metrics_prefix):
            raise InputError(
                f"metrics_prefix must be letters, digits, _ and :, such as ht_ or vllm:, not "
                f"{shown(self.metrics_prefix)}"
            )
        names = tuple(self.models)
        for name in names:
            if not name or len(name) > 256 or not name.isprintable():
                raise InputError(f"a model's name must be 1 to 256 characters that can be printed, not {shown(name)}")
        return {
            "models": names,
            "api_keys": tuple(self.api_keys),
            "cors_origins": tuple(self.cors_origins),
            "max_body": whole("max_body", self.max_body, 1024, LARGEST_BODY),
            "max_tokens": None if self.max_tokens is None else whole("max_tokens", self.max_tokens, 1, MOST),
            "max_answers": whole("max_answers", self.max_answers, 1, MOST),
            "max_streams": whole("max_streams", self.max_streams, 1, MOST),
            "body_s": number("body_s", self.body_s, 0.01, LONGEST),
            "reader_s": number("reader_s", self.reader_s, 0.01, LONGEST),
            "drain_s": number("drain_s", self.drain_s, 0.0, LONGEST),
        }
