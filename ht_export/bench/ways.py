"""Ways of answering a prompt that a benchmark compares, and how two answers that differ are judged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ht_export.bench.settings import PLAIN, SPECULATIVE, TEXT_DRAFTS, WITHOUT_NGRAMS, BenchSettings, Job
from runtime.bundle.engine_file import read_engine_file
from runtime.engines.opening import runs_on_cpu
from runtime.errors import InputError, PromptTooLongError
from runtime.generator import Generator
from runtime.sampling import Sampling
from runtime.sampling.candidates import candidates
from runtime.sampling.noise import Noise
from runtime.tree import TreeSizes

# A token whose logit, with its noise when sampling, is this near to the largest one may be chosen instead of it where
# arithmetic is done in another order.
TIE = 1e-4


@dataclass(frozen=True)
class Answer:
    """One run of one prompt: the new `tokens`, an end-of-text token included, and the `seconds` that all took.

    `steps` counts the passes that made tokens certain, the prompt's included; `accepted[n]` those between the prompt's
    and the last that accepted n drafted tokens, where drafts are counted.
    """

    tokens: list[int]
    seconds: float
    decode_tokens_per_second: float
    time_to_first_token_s: float
    steps: int
    accepted: tuple[int, ...] = ()


# Rows of trees of drafts from the text alone: as many tokens as transformers looks up, and the certain one.
TEXT_ROWS = 11

# Properties that engines must share to have the same answer to a prompt.
ALIKE = ("base model", "tokenizer", "chat template", "stop tokens", "context limit")

# Tells how near plain decoding was to the other answer where they part: gap(job, plain tokens, own tokens, position).
Gap = Callable[[Job, Sequence[int], Sequence[int], int], float]


@dataclass(frozen=True)
class Way:
    """A way of answering prompts. `gap` is None where its text need not be that of plain decoding, as of sampling with
    other random numbers; `required` says that a text that differs, other than at a tie, is wrong.
    """

    name: str
    answer: Callable[[Job], Answer]
    gap: Gap | None = None
    required: bool = False


def load_engines(settings: BenchSettings) -> tuple[Generator, dict[str, Generator]]:
    """Load the engine, and those to compare with, by name.

    Raises `InputError`, also for engines that do not run on one device, or would not answer a prompt alike.
    """

    def load(path: Path) -> Generator:
        # What one answer leaves behind would make the next one of the same prompt faster.
        return Generator(path, device=settings.device, threads=settings.threads, prefix_cache_bytes=0)

    paths = [settings.engine, *(path for _, path in settings.compare)]
    places = [(path, runs_on_cpu(read_engine_file(path), settings.device)) for path in paths]
    if len({cpu for _, cpu in places}) > 1:
        found = ", ".join(f"{path} on the {'CPU' if cpu else 'GPU'}" for path, cpu in places)
        raise InputError(f"--compare: engines must run on one device, not {found}; see --device")
    generator = load(settings.engine)
    others = {name: load(path) for name, path in settings.compare}
    for name, other in others.items():
        for what, one, another in zip(ALIKE, _alike(generator), _alike(other), strict=True):
            if one != another:
                raise InputError(
                    f"--compare {name}: that engine has another {what} ({another}) than {settings.engine} ({one}); "
                    "compare engines of one model, exported alike"
                )
    return generator, others


def _alike(generator: Generator) -> tuple[Any, ...]:
    """Return what ALIKE names."""
    about = generator.about
    return (
        f"{about.base_model['name']}, {about.base_model['weights_sha256'][:12]}",
        about.tokenizer.sha256[:12],
        about.chat_template and about.chat_template.sha256[:12],
        about.stop_tokens,
        about.max_context,
    )


def check_jobs(
    jobs: Sequence[Job], generator: Generator, others: dict[str, Generator], settings: BenchSettings
) -> None:
    """Raise `InputError` where a job does not fit one of the engines."""
    for engine, tree in ((generator, settings.tree), *((other, None) for other in others.values())):
        for job in jobs:
            try:
                engine.check(job.text, max_new_tokens=settings.max_new_tokens, sampling=job.sampling, tree=tree)
            except PromptTooLongError as error:
                raise InputError(f"prompt {job.id}: {error}") from error


def engine_ways(generator: Generator, others: dict[str, Generator], settings: BenchSettings) -> list[Way]:
    """Return plain and speculative decoding in `generator`, and the speculative one in `others`, by name.

    A text is required to be that of plain decoding where both are computed in float32.
    """
    exact = is_exact(generator)

    gap = gap_of(generator)
    tree = {"tree": settings.tree} if settings.tree else {}
    own: list[tuple[str, dict[str, Any]]] = [(PLAIN, {"speculate": False}), (SPECULATIVE, tree)]
    if settings.without_ngrams:
        own.append((WITHOUT_NGRAMS, {**tree, "ngrams": False}))
    if settings.text_drafts:
        own.append((TEXT_DRAFTS, {"tree": TreeSizes(TEXT_ROWS, (0,) * generator.about.dims.num_steps)}))
    ways = [Way(name, decoder(generator, settings, **options), gap, exact) for name, options in own]
    for name, other in others.items():
        ways.append(Way(name, decoder(other, settings), gap, exact and is_exact(other)))
    return ways


def is_exact(generator: Generator) -> bool:
    """Return whether the texts of an engine are required to be those of plain decoding, whatever drafts."""
    return generator.about.precision == "float32"


def gap_of(generator: Generator) -> Gap:
    """Return the gaps of plain decoding in an engine."""
    return lambda job, plain, own, position: plain_gap(generator, job, own, position)


def decoder(generator: Generator, settings: BenchSettings, **options: Any) -> Callable[[Job], Answer]:
    """Return what answers a job by an engine with these `options` of a request."""

    def answer(job: Job) -> Answer:
        start = time.perf_counter()
        result = generator.generate(job.text, max_new_tokens=settings.max_new_tokens, sampling=job.sampling, **options)
        return Answer(
            result.tokens,
            time.perf_counter() - start,
            result.decode_tokens_per_second,
            result.time_to_first_token_s,
            result.steps,
            result.accepted,
        )

    return answer


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the first position at which two answers differ, be it that one has ended; None if they are the same."""
    if list(one) == list(other):
        return None
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def plain_gap(generator: Generator, job: Job, other: Sequence[int], position: int) -> float:
    """Return how near plain decoding was, at new token `position`, to the token that `other` has there.

    Greedy: the largest logit less that token's. Sampling: the same of logits over temperature plus noise, of which the
    largest is drawn. Infinite where `other` has ended before, or the options rule the token out.
    """
    if position >= len(other):
        return math.inf
    # The logits of each token chosen, after the options that act before sampling.
    seen: list[NDArray[np.float32]] = []

    def remember(tokens: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(logits)
        return logits

    watched = replace(job.sampling, processors=[*job.sampling.processors, remember])
    generator.generate(job.text, max_new_tokens=position + 1, sampling=watched, speculate=False)
    if position >= len(seen):
        return math.inf
    logits, token = seen[position], other[position]
    if not job.sampling.temperature:
        return float(logits.max() - logits[token])
    return _drawn_gap(logits, token, job, len(generator.encode(job.text)) + position)


def _drawn_gap(logits: NDArray[np.float32], token: int, job: Job, place: int) -> float:
    """Return the gap of a draw; the least one where rounding may leave out the last token that is kept, or keep one
    more: all boundaries between tokens move then.
    """
    sampling = job.sampling
    scaled = logits / np.float32(sampling.temperature)
    gaps = [_gap_within(scaled, token, sampling, place)]
    if sampling.top_k is not None and 1 < sampling.top_k < len(scaled):
        falling = np.sort(scaled)[::-1]
        for other in (sampling.top_k - 1, sampling.top_k + 1):
            if abs(falling[other - 1] - falling[sampling.top_k - 1]) < TIE or (
                other < sampling.top_k and falling[other] - falling[sampling.top_k] < TIE
            ):
                gaps.append(_gap_within(scaled, token, replace(sampling, top_k=other), place))
    for shift in (-TIE, TIE):
        if sampling.top_p is not None and 0.0 < sampling.top_p + shift <= 1.0:
            gaps.append(_gap_within(scaled, token, replace(sampling, top_p=sampling.top_p + shift), place))
        if sampling.min_p and sampling.min_p * (1 + shift) <= 1.0:
            gaps.append(_gap_within(scaled, token, replace(sampling, min_p=sampling.min_p * (1 + shift)), place))
    return min(gaps)


def _gap_within(scaled: NDArray[np.float32], token: int, sampling: Sampling, place: int) -> float:
    assert sampling.seed is not None
    tokens, weights = candidates(
        scaled, float(scaled.max()), top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
    )
    found = np.arange(len(scaled)) if tokens is None else tokens
    if token not in found:
        return math.inf
    with np.errstate(divide="ignore"):
        finish = np.log(Noise(sampling.seed, place).waits(place, found)) - np.log(weights.astype(np.float64))
    return float(finish[found == token][0] - finish.min())
