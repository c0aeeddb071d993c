"""Our own engine, by `runtime.Generator`; with nothing kept of a prompt that others would not keep."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ht_export.bench.peers.workers.loop import Hear, version_of

NAME = "hidden-transfer"
PACKAGES = ("onnxruntime",)


def choices(precision: str, clients: int) -> list[dict[str, Any]]:
    """Return speculative and plain decoding."""
    return [{"speculate": True}, {"speculate": False}]


def open_peer(job: dict[str, Any]) -> Ours:
    """Load the engine."""
    return Ours(job)


class Ours:
    """An engine, loaded, and warm for as many clients as there are."""

    def __init__(self, job: dict[str, Any]) -> None:
        from runtime import Generator

        self._job = job
        self._generator = Generator(
            job["model"], threads=job["threads"], max_batch=max(2, job["clients"]), prefix_cache_bytes=0
        )
        library = version_of("onnxruntime")
        self.version = f"{version_of('hidden-transfer')}, {library}"
        tuning = self._generator.tuning
        self.about = {"precision": self._generator.about.precision, "tuning": tuning and tuning.kind}

    def answer(self, prompts: Sequence[Sequence[int]], hear: Hear) -> None:
        """Answer: each client asks for the next prompt when it has its answer."""
        from runtime import Tokens

        numbers = itertools.count()

        def client() -> None:
            while (number := next(numbers)) < len(prompts):
                hear(number, ())
                request = self._generator.submit(
                    Tokens(list(prompts[number])), max_new_tokens=self._job["max_new_tokens"], **self._job["setting"]
                )
                for chunk in request:
                    hear(number, chunk.tokens)

        with ThreadPoolExecutor(self._job["clients"]) as pool:
            for done in [pool.submit(client) for _ in range(self._job["clients"])]:
                done.result()
