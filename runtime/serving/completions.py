"""POST /v1/completions."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence

import msgspec

from runtime.answer import GenerationResult
from runtime.prompts import Prompt, Tokens
from runtime.request import Request
from runtime.serving import admission
from runtime.serving.asking import (
    asked_for,
    beside,
    chunks_of,
    finish_of,
    note,
    results_of,
    submit,
    usage_of,
    usage_so_far,
)
from runtime.serving.errors import ApiError
from runtime.serving.exchange import Exchange
from runtime.serving.passes import passes_of
from runtime.serving.pieces import TextPieces, joined
from runtime.serving.replies import Completion, TextChoice, TextLogprobs, Usage
from runtime.serving.requests import CompletionRequest, StreamOptions
from runtime.serving.state import Server
from runtime.serving.streaming import DONE, event

# New tokens where a request does not say how many, as OpenAI's API has it.
USUAL_TOKENS = 16


class TextCompletion:
    """Answers one request for a completion, which is checked when this is made. Raises `ApiError`."""

    def __init__(self, server: Server, request: CompletionRequest, exchange: Exchange) -> None:
        admission.check_streaming(request, request.stream_options)
        admission.check_completion(request)
        self._server = server
        self._exchange = exchange
        self._prompts = admission.prompts_of(request)
        self._each = request.n or 1
        self.answers = self._each * len(self._prompts)
        admission.check_answers(self.answers, server.settings)
        self._logprobs = request.logprobs
        self._echo = bool(request.echo)
        if self._echo and request.stream and request.logprobs is not None:
            raise ApiError(
                400,
                "echo with logprobs cannot be streamed; leave stream out",
                param="stream",
                code="invalid_value",
            )
        most = USUAL_TOKENS if request.max_tokens is None else request.max_tokens
        options = admission.options_of(request, most, server.settings)
        options["sampling"] = admission.sampling_of(request, self._logprobs)
        options["raw"] = True
        options["escape_special_tokens"] = server.settings.escape == "all"
        if self._echo and self._logprobs is not None:
            options["prompt_logprobs"] = max(1, self._logprobs)
        prompts: list[Prompt] = [one if isinstance(one, str) else Tokens(one) for one in self._prompts]
        self._options = request.stream_options or StreamOptions()
        options["trace"] = bool(self._options.include_passes)
        # Passes show what was drafted, which of a pool is what others were answered.
        options["text_pool"] = options["text_pool"] and not options["trace"]
        self._asked = asked_for(prompts, self._each, options)
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._model = request.model

    async def whole(self) -> bytes:
        """Return the answer, once it is there."""
        results = await results_of(await submit(self._server.generator, self._asked))
        usage = usage_of(results, self._each)
        note(self._server, self._exchange, results, usage)

        def work() -> bytes:
            choices = [self._choice(index, result) for index, result in enumerate(results)]
            return msgspec.json.encode(self._answer(self._server.now, choices, usage))

        return work() if self._logprobs is None else await beside(work)

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield the answer as events."""
        requests = await submit(self._server.generator, self._asked)
        created = self._server.now
        results: dict[int, GenerationResult] = {}
        counts = [0] * self.answers
        prompts = [self._prompt_text(index) for index in range(self.answers)]
        pieces = [TextPieces(self._server.pieces, self._logprobs or 0) for _ in requests]
        async for index, chunk in chunks_of(requests):
            text = chunk.text if counts[index] else prompts[index] + chunk.text
            counts[index] += len(chunk.tokens)
            scores = chunk.log_probabilities if self._logprobs is not None else None
            choice = TextChoice(index, text, logprobs=pieces[index].of(scores) if scores else None)
            if chunk.passes:
                choice.passes = passes_of(chunk.passes, self._server.pieces)
            if chunk.result is not None:
                results[index] = chunk.result
                choice.finish_reason, choice.stop_reason = finish_of(chunk.result)
            if text or scores or chunk.passes or chunk.result is not None:
                yield event(self._answer(created, [choice], self._so_far(requests, counts)))
        ended = [results[index] for index in range(self.answers)]
        usage = usage_of(ended, self._each)
        note(self._server, self._exchange, ended, usage)
        last = event(self._answer(created, [], usage)) if self._options.include_usage else b""
        yield last + DONE

    def _so_far(self, requests: Sequence[Request], counts: Sequence[int]) -> Usage | None:
        if not self._options.continuous_usage_stats:
            return None
        return usage_so_far(sum(one.prompt_tokens for one in requests[:: self._each]), sum(counts))

    def _answer(self, created: int, choices: list[TextChoice], usage: Usage | None) -> Completion:
        return Completion(
            self._id, created, self._model, choices, system_fingerprint=self._server.fingerprint, usage=usage
        )

    def _prompt_text(self, index: int) -> str:
        """Return what an answer repeats of its prompt."""
        if not self._echo:
            return ""
        prompt = self._prompts[index // self._each]
        return prompt if isinstance(prompt, str) else self._server.generator.decode(prompt)

    def _choice(self, index: int, result: GenerationResult) -> TextChoice:
        finish, reason = finish_of(result)
        logprobs = self._scored(index, result) if self._logprobs is not None else None
        return TextChoice(index, self._prompt_text(index) + result.text, finish, logprobs, stop_reason=reason)

    def _scored(self, index: int, result: GenerationResult) -> TextLogprobs:
        pieces = TextPieces(self._server.pieces, self._logprobs or 0)
        parts = []
        if result.prompt_log_probabilities is not None:
            prompt = self._asked[index].prompt
            scored = [score for score in result.prompt_log_probabilities if score is not None]
            first = prompt[0] if isinstance(prompt, Tokens) else self._first_token(prompt)
            parts = [pieces.first(first), pieces.of(scored)]
        return joined(*parts, pieces.of(result.log_probabilities or ()))

    def _first_token(self, prompt: Prompt) -> int:
        escape = self._asked[0].options["escape_special_tokens"]
        return self._server.generator.encode(prompt, raw=True, escape_special_tokens=escape)[0]
