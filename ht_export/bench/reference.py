"""`transformers.generate`, plain, with prompt lookup and with early exit, as ways of answering prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from ht_export.bench.settings import EARLY_EXIT, PROMPT_LOOKUP, TRANSFORMERS, BenchSettings, Job
from ht_export.bench.ways import Answer, Way
from ht_export.model.checkpoint import BaseModel, load_base_model
from runtime.checks import whole
from runtime.errors import InputError
from runtime.generator import Generator

# The value that the documentation of transformers uses.
PROMPT_LOOKUP_TOKENS = 10


def reference_ways(generator: Generator, settings: BenchSettings, on_gpu: bool) -> list[Way]:
    """Load the base model and return its ways, the greedy ones to be compared with plain decoding.

    Only `transformers.generate` on a float32 engine is required to give the same text. Raises `InputError` when the
    engine was made from other weights.
    """
    assert settings.model is not None
    base = load_base_model(settings.model, adapters=settings.adapters)
    made_from = generator.about.base_model
    if made_from["weights_sha256"] != base.weights_sha256:
        raise InputError(
            f"{settings.engine} was made from {made_from['name']} ({made_from['weights_sha256'][:12]}), and "
            f"{settings.model} has other weights ({base.weights_sha256[:12]}); give the engine's model with --model "
            "(and --adapter), or leave it out with --no-transformers"
        )
    if on_gpu and not torch.cuda.is_available():
        raise InputError("torch finds no CUDA GPU for transformers; install torch for CUDA, or use --no-transformers")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    reference = Reference(base, generator, settings.max_new_tokens, "cuda" if on_gpu else "cpu")
    greedy = not settings.sampling.temperature
    gap = reference.gap if greedy else None
    exact = greedy and generator.about.precision == "float32"
    ways = [Way(TRANSFORMERS, reference.answer, gap, exact)]
    if settings.prompt_lookup:
        ways.append(Way(PROMPT_LOOKUP, reference.answer_by_prompt_lookup, gap))
    if settings.early_exit is not None:
        layers = base.model.config.num_hidden_layers
        whole("--early-exit", settings.early_exit, 1, layers - 1)
        ways.append(Way(EARLY_EXIT, partial(reference.answer_by_early_exit, settings.early_exit), gap))
    return ways


class Reference:
    """The base model in transformers, in float32, with the engine's encoding of prompts and its limits."""

    def __init__(self, base: BaseModel, generator: Generator, max_new_tokens: int, device: str) -> None:
        self._model = base.model.to(device)
        self._generator = generator
        self._max_new_tokens = max_new_tokens

    def answer(self, job: Job) -> Answer:
        """Answer by `generate`, token by token."""
        return self._answer(job)

    def answer_by_prompt_lookup(self, job: Job) -> Answer:
        """Answer by `generate` with drafts looked up in the text so far."""
        return self._answer(job, prompt_lookup_num_tokens=PROMPT_LOOKUP_TOKENS)

    def answer_by_early_exit(self, layers: int, job: Job) -> Answer:
        """Answer by `generate` with drafts of the model's first `layers` layers."""
        return self._answer(job, assistant_early_exit=layers)

    @torch.inference_mode()
    def gap(self, job: Job, plain: Sequence[int], own: Sequence[int], position: int) -> float:
        """Return the largest logit of the base model at `position` less that of plain decoding's token there."""
        if position >= min(len(plain), len(own)):
            return math.inf
        ids = torch.tensor([[*self._generator.encode(job.text), *own[:position]]], device=self._model.device)
        logits = self._model(ids).logits[:, -1]
        if job.sampling.repetition_penalty != 1.0:
            logits = RepetitionPenaltyLogitsProcessor(job.sampling.repetition_penalty)(ids, logits)
        return float(logits[0].max() - logits[0, plain[position]])

    @torch.inference_mode()
    def _answer(self, job: Job, **options: Any) -> Answer:
        about = self._generator.about
        if job.sampling.seed is not None:
            torch.manual_seed(job.sampling.seed)
        clock = _Clock()
        # From text to text, as the engine's ways are timed.
        start = time.perf_counter()
        ids = self._generator.encode(job.text)
        input_ids = torch.tensor([ids], device=self._model.device)
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=min(self._max_new_tokens, about.max_context - len(ids)),
            streamer=clock,
            **_sampling_options(job),
            **options,
        )
        tokens = _clipped(output[0, len(ids) :].tolist(), about.stop_tokens)
        self._generator.decode(tokens)
        end = time.perf_counter()
        # The first call brings the prompt, each other one what a pass made certain.
        _, (first, certain), *_ = clock.calls
        after = len(tokens) - certain
        return Answer(
            tokens,
            seconds=end - start,
            decode_tokens_per_second=after / (end - first) if after > 0 else 0.0,
            time_to_first_token_s=first - start,
            steps=len(clock.calls) - 1,
        )


class _Clock:
    """A streamer for `generate`: when tokens came, and how many."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, int]] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.calls.append((time.perf_counter(), tokens.numel()))

    def end(self) -> None:
        pass


def _sampling_options(job: Job) -> dict[str, Any]:
    sampling = job.sampling
    options: dict[str, Any] = {"repetition_penalty": sampling.repetition_penalty, "do_sample": False}
    if sampling.temperature:
        # Left out, they would be the checkpoint's, or 50 for top_k.
        options |= {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "min_p": sampling.min_p,
        }
    return options


def _clipped(tokens: list[int], stop_tokens: Collection[int]) -> list[int]:
    """Return `tokens` up to the first that ends the text, which is kept."""
    end = next((index for index, token in enumerate(tokens) if token in stop_tokens), len(tokens))
    return tokens[: end + 1]
