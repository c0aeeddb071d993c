"""The loop of a worker: one request a line of JSON on stdin, one answer a line on what was stdout.

A worker is a module with `NAME`, `PACKAGES` (what must be importable), and

- `choices(precision, clients)`: the settings, each a JSON-ready dictionary, of which the best is looked for;
- `open_peer(job)`: the peer, ready to answer, with `answer(prompts, hear)`, which tells `hear(number, tokens)` of each
  token as it comes: first without tokens, when the prompt is handed over. Also `version`, and `about`, the options in
  force;
- `convert(job)`, where the peer makes its own form of a checkpoint: into the folder `job["out"]`.

A job has `model` (a path), `precision`, `threads`, `clients`, `context` (the most tokens of prompt and answer),
`max_new_tokens`, `stop_tokens`, `pad_token` (in no prompt) and `setting`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

# Tells of tokens of the prompt of this number; `tokens` is empty when the prompt is handed over.
Hear = Callable[[int, Sequence[int]], None]
# Characters of a cause that are told.
LONGEST = 400


class Peer(Protocol):
    """A peer that is loaded."""

    version: str
    about: dict[str, Any]

    def answer(self, prompts: Sequence[Sequence[int]], hear: Hear) -> Sequence[tuple[str, int]] | None:
        """Answer all prompts greedily, as many at once as there are clients; ends when all are answered.

        Servers return texts, each with its number of tokens: they tell of no tokens but that some came.
        """


class Heard:
    """What came of one prompt, and when: seconds from the moment that it was handed over."""

    def __init__(self, stop_tokens: Sequence[int], most: int) -> None:
        self._stop, self._most = frozenset(stop_tokens), most
        self.tokens: list[int] = []
        self.begun = self.first = self.last = 0.0
        # How many came at once at first, which decoding alone does not count.
        self.at_first = 0
        # Of servers, which tell no tokens.
        self.text: str | None = None
        self.count = 0

    def take(self, tokens: Sequence[int]) -> None:
        """Keep `tokens`, up to one that ends the text, which is kept too."""
        now = time.perf_counter()
        if not self.begun:
            self.begun = now
        for token in tokens:
            if len(self.tokens) >= self._most or (self.tokens and self.tokens[-1] in self._stop):
                return
            self.tokens.append(int(token))
            self.last = now
            if not self.at_first:
                self.first = now
        if tokens and not self.at_first:
            self.at_first = len(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {
            "tokens": self.tokens if self.text is None else [],
            "text": self.text,
            "count": len(self.tokens) if self.text is None else self.count,
            "first_s": self.first - self.begun,
            "seconds": self.last - self.begun,
            "at_first": self.at_first,
        }


def serve(worker: Any) -> None:
    """Answer requests until stdin ends, and end then, whatever is under way: nobody hears its answer. What libraries
    print goes to stderr.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    missing = [name for name in worker.PACKAGES if importlib.util.find_spec(name) is None]
    _tell(out, {"ready": not missing, "missing": missing, "python": sys.version.split()[0]})
    state: dict[str, Any] = {}
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    while True:
        try:
            found = _done(worker, json.loads(lines.get()), state)
        except Exception as error:
            _tell(out, {"error": _line(error)})
        else:
            _tell(out, {"ok": found})


def _listen(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _done(worker: Any, asked: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    do = asked["do"]
    if do == "choices":
        return {"choices": worker.choices(asked["precision"], asked["clients"])}
    if do == "convert":
        worker.convert(asked)
        return {}
    if do == "open":
        state["job"] = asked
        state["peer"] = peer = worker.open_peer(asked)
        return {"version": peer.version, "about": peer.about, "peak_bytes": peak_bytes()}
    assert do == "answer", do
    job = state["job"]
    most = job["max_new_tokens"]
    # Peers look there.
    job["max_new_tokens"] = asked.get("most", most)
    try:
        return _answered(state["peer"], job, asked["prompts"])
    finally:
        job["max_new_tokens"] = most


def _answered(peer: Peer, job: dict[str, Any], prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    heard = [Heard(job["stop_tokens"], job["max_new_tokens"]) for _ in prompts]

    def hear(number: int, tokens: Sequence[int]) -> None:
        heard[number].take(tokens)

    begun = time.perf_counter()
    texts = peer.answer(prompts, hear)
    seconds = time.perf_counter() - begun
    for one, (text, count) in zip(heard, texts or (), strict=False):
        one.text, one.count = text, count
    return {"answers": [one.to_dict() for one in heard], "seconds": seconds, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """Return the most memory that this process has had at once, mapped files that it has read included."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) << 10
    except (OSError, IndexError, ValueError):
        # In KiB, but on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def version_of(package: str) -> str:
    """Return the version of an installed package with its name."""
    return f"{package} {importlib.metadata.version(package)}"


def _tell(out: TextIO, found: dict[str, Any]) -> None:
    out.write(json.dumps(found) + "\n")
    out.flush()


def _line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
