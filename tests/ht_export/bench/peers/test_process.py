"""The process of a peer: what it answers, and that whatever else it does is one line, in time, with nothing left."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ht_export.bench.peers.process import MissingError, PeerError, Worker, environment_of
from tests.ht_export.bench.peers import scripted

ENVIRONMENT = environment_of(1, own=True)
OPEN: dict[str, Any] = {"max_new_tokens": 3, "setting": {}}


def worker(script: str, seconds: float = 30.0) -> Worker:
    return Worker(scripted.command(script), ENVIRONMENT, seconds)


def test_a_worker_answers_what_it_is_asked() -> None:
    with worker("never") as one:
        assert one.ask("open", 30, **OPEN)["version"] == "scripted 1"
        found = one.ask("answer", 30, prompts=[[4], [9]])
        assert [answer["tokens"] for answer in found["answers"]] == [[7, 8, 9], [12, 13, 14]]


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("open:dies", "ended with status 3: Segmentation fault, as it were"),
        ("open:hangs", "did not answer within 0.5 s and was ended"),
        ("open:closes", "closed its stdout"),
        ("open:floods", "more than 16 MiB without an end"),
        ("open:rubbish", "what is no answer: "),
        ("open:list", "what is no answer: '[]'"),
        ("open:nothing", "something else than an answer"),
        ("open:error", "ValueError: it does not like this"),
        ("start:dies", "ended with status 3"),
        ("start:rubbish", "what is no answer: "),
        ("start:nothing", "something else than what a worker says first"),
    ],
)
def test_whatever_a_worker_does_is_one_line(script: str, told: str) -> None:
    limit = 0.5 if script.endswith("hangs") else 30.0
    begun = time.monotonic()
    with pytest.raises(PeerError) as caught, worker(script) as one:
        one.ask("open", limit, **OPEN)
    assert told in caught.value.cause
    assert caught.value.cause.isprintable()
    assert time.monotonic() - begun < 60


def test_a_worker_that_lacks_its_library_says_so() -> None:
    with pytest.raises(MissingError, match="the_library"), worker("start:missing"):
        pass


def test_a_program_that_is_none_is_told_of() -> None:
    with pytest.raises(PeerError, match="cannot start /nowhere/python"):
        Worker(["/nowhere/python"], ENVIRONMENT)


def test_nothing_is_left_of_a_worker_that_hangs() -> None:
    one = worker("open:hangs")
    process = one._process.pid
    with pytest.raises(PeerError), one:
        one.ask("open", 0.2, **OPEN)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_worker_runs_in_a_python_that_has_none_of_ours() -> None:
    command = [sys.executable, "-S", str(Path(__file__).parents[4] / "ht_export/bench/peers/start.py")]
    with pytest.raises(MissingError, match="llama_cpp"):
        Worker([*command, "llama_cpp_python"], environment_of(1, own=False))
