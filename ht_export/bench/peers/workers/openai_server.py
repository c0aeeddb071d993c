"""Any server that speaks OpenAI's API, such as vLLM and SGLang, by its address; prompts go as token ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ht_export.bench.peers.workers.loop import Hear

NAME = "a server"
PACKAGES = ("httpx",)
KEY_VARIABLE = "OPENAI_API_KEY"


def choices(precision: str, clients: int) -> list[dict[str, Any]]:
    """Return one setting: a server has its own."""
    return [{}]


def open_peer(job: dict[str, Any]) -> Server:
    """Ask the server for its model."""
    return Server(job)


class Server:
    """A server, which is asked by `/completions`."""

    def __init__(self, job: dict[str, Any]) -> None:
        from ht_export.bench.load.calling import Caller

        extra = {"max_tokens": job["max_new_tokens"], "temperature": 0.0}
        self._caller = Caller(job["model"], None, os.environ.get(KEY_VARIABLE), extra)
        self._clients = job["clients"]
        self.version = self._caller.model
        self.about = {"model": self._caller.model}

    def answer(self, prompts: Sequence[Sequence[int]], hear: Hear) -> list[tuple[str, int]]:
        """Answer: each client asks for the next prompt when it has its answer. Raises `RuntimeError` for a failure."""

        def ask(number: int) -> tuple[str, int]:
            hear(number, ())
            # What a piece has of tokens is not told.
            heard = self._caller.complete(number, list(prompts[number]), lambda: hear(number, [-1]))
            if heard.ending != "whole":
                raise RuntimeError(f"prompt {number}: {heard.cause}")
            return heard.text, heard.tokens

        with ThreadPoolExecutor(self._clients) as pool:
            return list(pool.map(ask, range(len(prompts))))
