"""Measuring peers: the float32 model's own texts, the best setting of each peer, then rounds of all of them in turn."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ht_export.bench.peers.kinds import ADDRESS, FLOAT32, TRANSFORMERS, PeerKind
from ht_export.bench.peers.models import Forms, bytes_of
from ht_export.bench.peers.process import MissingError, PeerError, Worker, command_of, environment_of
from ht_export.bench.peers.results import Answered, Entry, Measured, Results, Tried
from ht_export.bench.ways import first_difference

# New tokens of what is answered before anything is timed, and of each answer while settings are tried.
WARM_TOKENS = 8
SEARCH_TOKENS = 48


class OutOfTimeError(Exception):
    """The time that was given is over: what was measured is kept."""


@dataclass(frozen=True)
class Contestant:
    """A peer in a precision: `name` tells them apart, `python` is where it runs, None for this one; `address` is a
    server's, and `given` an engine that there is.
    """

    name: str
    kind: PeerKind
    precision: str
    python: str | None = None
    address: str | None = None
    given: Path | None = None


@dataclass(frozen=True)
class Work:
    """What all peers are asked: token ids of the prompts, and of those that settings are tried on.

    `limit` is how many seconds a peer has for each answer of its process; `seconds` how long all may go on, None for as
    long as it takes.
    """

    prompts: Sequence[Sequence[int]]
    trial: Sequence[Sequence[int]]
    forms: Forms
    threads: int
    max_new_tokens: int
    clients: Sequence[int]
    rounds: int
    limit: float
    seconds: float | None
    pad_token: int
    decode: Callable[[Sequence[int]], str]


def reference(work: Work, results: Results, python: str | None) -> None:
    """Have the float32 model's texts, by `transformers.generate`, one prompt after another. Raises `PeerError`."""
    if results.reference:
        return
    say("the float32 model's own texts, by transformers")
    contestant = Contestant("the reference", TRANSFORMERS, FLOAT32, python)
    with _opened(work, contestant, work.forms.checkpoint, 1, {}, work.max_new_tokens) as (worker, _, _):
        found = worker.ask("answer", work.limit * len(work.prompts), prompts=work.prompts)
        results.reference = [answer["tokens"] for answer in _answers(found, len(work.prompts))]
    results.write()


def measure(work: Work, results: Results, contestants: Sequence[Contestant]) -> None:
    """Measure what is left to be measured; `results` are written after each step. Raises `OutOfTimeError`.

    A peer that fails is told of, and left out from then on: the others go on.
    """
    end = None if work.seconds is None else time.monotonic() + work.seconds
    out: set[tuple[str, int]] = set()
    places: dict[str, Path] = {}

    def on_time() -> None:
        if end is not None and time.monotonic() >= end:
            raise OutOfTimeError

    @contextmanager
    def failing(contestant: Contestant, levels: Sequence[int]) -> Iterator[None]:
        try:
            yield
        except PeerError as error:
            out.update((contestant.name, clients) for clients in levels)
            told = f"{contestant.name}: {error.cause}"
            if isinstance(error, MissingError):
                told += f"; install it with: {contestant.kind.install}, or name a Python that has it with --python"
                results.left_out.append(told)
            else:
                results.failed.append(told)
            say(told)
            results.write()

    for contestant in contestants:
        on_time()
        with failing(contestant, work.clients):
            places[contestant.name] = _place(work, contestant)
        for clients in work.clients:
            if (contestant.name, clients) not in out:
                with failing(contestant, [clients]):
                    _search(work, results, contestant, places[contestant.name], clients, on_time)
    for turn in range(work.rounds):
        first = turn % max(1, len(contestants))
        for clients in work.clients:
            for contestant in [*contestants[first:], *contestants[:first]]:
                if (contestant.name, clients) in out or results.has(contestant.name, clients, turn):
                    continue
                on_time()
                with failing(contestant, [clients]):
                    results.rows.append(_measured(work, results, contestant, places[contestant.name], clients, turn))
                    results.write()


def best(tried: Sequence[Tried]) -> Tried | None:
    """Return the fastest of what was tried, None where nothing worked."""
    working = [one for one in tried if one.tokens_per_second > 0]
    return max(working, key=lambda one: one.tokens_per_second, default=None)


def say(text: str) -> None:
    """Tell of what goes on, on stderr."""
    print(f"ht-bench: {text}", file=sys.stderr, flush=True)


def _place(work: Work, contestant: Contestant) -> Path:
    if contestant.given is not None:
        return contestant.given
    if contestant.address is not None:
        return Path(contestant.address)
    command = command_of(contestant.kind.worker, contestant.python or sys.executable)
    # Before a form of the model is made that nothing could run.
    with Worker(command, environment_of(work.threads, own=contestant.python is None)):
        pass
    return work.forms.find(contestant.kind, contestant.precision, work.threads, contestant.python)


def _search(
    work: Work,
    results: Results,
    contestant: Contestant,
    place: Path,
    clients: int,
    on_time: Callable[[], None],
) -> None:
    """Try the settings of a peer that were not tried yet."""
    before = results.settings_of(contestant.name, clients)
    command = command_of(contestant.kind.worker, contestant.python or sys.executable)
    with Worker(command, environment_of(work.threads, own=contestant.python is None)) as worker:
        asked = {"precision": contestant.precision, "clients": clients}
        choices = worker.ask("choices", work.limit, **asked).get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise PeerError("it told no settings to choose from")
    known = [one.setting for one in before]
    for setting in choices:
        if setting in known:
            continue
        on_time()
        trial = work.trial if clients == 1 else (list(work.trial) * clients)[: max(clients, len(work.trial))]
        most = min(SEARCH_TOKENS, work.max_new_tokens)
        try:
            with _opened(work, contestant, place, clients, setting, most) as (worker, opened, _):
                found = worker.ask("answer", work.limit, prompts=trial)
                answers = _answers(found, len(trial))
                speed = sum(answer["count"] for answer in answers) / max(found["seconds"], 1e-9)
                tried = Tried(contestant.name, clients, setting, speed)
                _keep_entry(work, results, contestant, place, opened)
        except MissingError:
            raise
        except PeerError as error:
            tried = Tried(contestant.name, clients, setting, 0.0, error.cause)
        say(f"{_told(contestant, clients)}: {shown(setting)}: {_speed(tried)}")
        if contestant.name in results.entries:
            results.tried.append(tried)
            results.write()
    if not best(results.settings_of(contestant.name, clients)):
        raise PeerError(tried.cause or "none of its settings worked")


def _measured(work: Work, results: Results, contestant: Contestant, place: Path, clients: int, turn: int) -> Measured:
    chosen = best(results.settings_of(contestant.name, clients))
    assert chosen is not None
    with _opened(work, contestant, place, clients, chosen.setting, work.max_new_tokens) as (worker, opened, load_s):
        _keep_entry(work, results, contestant, place, opened)
        found = worker.ask("answer", work.limit * len(work.prompts), prompts=work.prompts)
    answers = _answers(found, len(work.prompts))
    row = Measured(
        contestant.name,
        clients,
        turn,
        chosen.setting,
        opened["about"],
        load_s,
        int(found["peak_bytes"]),
        float(found["seconds"]),
        [
            Answered(
                answer["count"],
                answer["at_first"],
                answer["first_s"],
                answer["seconds"],
                _difference(work, answer, own),
            )
            for answer, own in zip(answers, results.reference, strict=True)
        ],
    )
    speed = sum(answer.tokens for answer in row.answers) / row.seconds
    say(f"{_told(contestant, clients)}, round {turn + 1} of {work.rounds}: {speed:.1f} tokens/s")
    return row


def _difference(work: Work, answer: Mapping[str, Any], own: Sequence[int]) -> int | None:
    if answer["text"] is None:
        return first_difference(own, answer["tokens"])
    # A server's text: the tokens of the reference whose text it still begins with.
    if answer["text"] == work.decode(own):
        return None
    return next(
        (count for count in range(len(own)) if not answer["text"].startswith(work.decode(own[: count + 1]))), len(own)
    )


def _keep_entry(work: Work, results: Results, contestant: Contestant, place: Path, opened: Mapping[str, Any]) -> None:
    """Keep what is told once of a contestant. Raises `PeerError` where it was measured in another version before."""
    known = results.entries.get(contestant.name)
    if known is not None:
        if known.version != opened["version"]:
            raise PeerError(
                f"it is {opened['version']}, and was measured as {known.version} before; install that, or choose "
                "another --json"
            )
        return
    server = contestant.address is not None
    form = ADDRESS if server else f"{place.parent.name}/{place.name}" if place.suffix == ".onnx" else place.name
    results.entries[contestant.name] = Entry(
        contestant.kind.name,
        contestant.kind.title,
        contestant.precision,
        str(opened["version"]),
        form,
        0 if server else bytes_of(place),
    )


@contextmanager
def _opened(
    work: Work, contestant: Contestant, place: Path, clients: int, setting: Mapping[str, Any], most: int
) -> Iterator[tuple[Worker, dict[str, Any], float]]:
    """Yield a worker that has loaded its model, and is warm; what it told, and the seconds from its start to there."""
    command = command_of(contestant.kind.worker, contestant.python or sys.executable)
    with Worker(command, environment_of(work.threads, own=contestant.python is None)) as worker:
        longest = max(map(len, [*work.prompts, *work.trial]))
        opened = worker.ask(
            "open",
            work.limit,
            model=contestant.address or str(place),
            precision=contestant.precision,
            threads=work.threads,
            clients=clients,
            context=longest + work.max_new_tokens + 1,
            max_new_tokens=most,
            stop_tokens=work.forms.about.stop_tokens,
            pad_token=work.pad_token,
            setting=setting,
        )
        load_s = time.perf_counter() - worker.begun
        if not isinstance(opened.get("about"), dict) or not isinstance(opened.get("version"), str):
            raise PeerError("it wrote something else than what it has opened")
        worker.ask("answer", work.limit, prompts=[work.trial[0]] * clients, most=min(WARM_TOKENS, most))
        yield worker, opened, load_s


def _answers(found: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return the answers of a worker. Raises `PeerError` unless they are what was asked for."""
    answers = found.get("answers")
    numbers = ("count", "at_first", "first_s", "seconds")
    if (
        not isinstance(answers, list)
        or len(answers) != count
        or not all(
            isinstance(answer, dict)
            and all(isinstance(answer.get(name), int | float) and answer[name] >= 0 for name in numbers)
            and isinstance(answer.get("tokens"), list)
            and isinstance(answer.get("text", 0), str | None)
            for answer in answers
        )
        or not all(isinstance(found.get(name), int | float) and found[name] > 0 for name in ("seconds", "peak_bytes"))
    ):
        raise PeerError("it wrote something else than the answers to the prompts")
    if empty := sum(not answer["count"] for answer in answers):
        raise PeerError(f"it answered {empty} of {count} prompts with nothing")
    return answers


def _told(contestant: Contestant, clients: int) -> str:
    return f"{contestant.name}, {clients} client{'s' if clients > 1 else ''}"


def shown(setting: Mapping[str, Any]) -> str:
    """Return a setting in words."""
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "as it is"


def _speed(tried: Tried) -> str:
    return f"{tried.tokens_per_second:.1f} tokens/s" if tried.cause is None else f"failed: {tried.cause}"
