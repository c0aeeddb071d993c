"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence

import msgspec
from msgspec import UNSET

from runtime.answer import GenerationChunk, GenerationResult
from runtime.generator import Generator
from runtime.request import Request
from runtime.sampling import TokenLogProbability
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
from runtime.serving.calling import Calling, CallStream, calling_of
from runtime.serving.exchange import Exchange
from runtime.serving.passes import passes_of
from runtime.serving.replies import (
    AssistantText,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    Finish,
    Usage,
)
from runtime.serving.requests import ChatRequest, StreamOptions
from runtime.serving.state import Server
from runtime.serving.streaming import DONE, event
from runtime.serving.tool_types import CalledFunction, FunctionDelta, NamedChoice, ToolCall, ToolCallDelta
from runtime.tools import ArgumentsPart, Call, CallBegun, Content


class Chat:
    """Answers one request for a chat completion, which is checked when this is made. Raises `ApiError`."""

    def __init__(self, server: Server, request: ChatRequest, exchange: Exchange) -> None:
        admission.check_streaming(request, request.stream_options)
        self._server = server
        self._exchange = exchange
        self.answers = request.n or 1
        admission.check_answers(self.answers, server.settings)
        self._logprobs = admission.logprobs_of_chat(request)
        options = admission.options_of(request, admission.most_of_chat(request), server.settings)
        sampling = admission.sampling_of(request, self._logprobs, request.response_format, "response_format")
        shaped = sampling.grammar is not None
        self._calling = calling_of_chat(server.generator, request, shaped=shaped, enabled=server.settings.tools)
        options["sampling"] = sampling if self._calling is None else self._calling.sampling(sampling)
        options["tools"] = [] if self._calling is None else self._calling.tools
        options["escape_special_tokens"] = server.settings.escape != "none"
        self._options = request.stream_options or StreamOptions()
        options["trace"] = bool(self._options.include_passes)
        # Passes show what was drafted, which of a pool is what others were answered.
        options["text_pool"] = options["text_pool"] and not options["trace"]
        self._asked = asked_for([admission.messages_of_chat(request)], self.answers, options)
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._model = request.model

    async def whole(self) -> bytes:
        """Return the answer, once it is there."""
        results = await results_of(await submit(self._server.generator, self._asked))
        usage = usage_of(results, self.answers)
        note(self._server, self._exchange, results, usage)

        def work() -> bytes:
            choices = [self._choice(index, result) for index, result in enumerate(results)]
            answer = ChatCompletion(
                self._id, self._server.now, self._model, choices, usage, system_fingerprint=self._server.fingerprint
            )
            return msgspec.json.encode(answer)

        return work() if self._logprobs is None else await beside(work)

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield the answer as events."""
        requests = await submit(self._server.generator, self._asked)
        created = self._server.now
        results: dict[int, GenerationResult] = {}
        counts = [0] * self.answers
        streams = [CallStream(self._calling) if self._calling else None for _ in range(self.answers)]
        async for index, chunk in chunks_of(requests):
            first = not counts[index]
            counts[index] += len(chunk.tokens)
            if chunk.result is not None:
                results[index] = chunk.result
            choices = self._parts(index, chunk, streams[index], first=first)
            if choices:
                usage = self._so_far(requests, counts)
                yield b"".join(event(self._chunk(created, [choice], usage)) for choice in choices)
        ended = [results[index] for index in range(self.answers)]
        usage = usage_of(ended, self.answers)
        note(self._server, self._exchange, ended, usage)
        last = event(self._chunk(created, [], usage)) if self._options.include_usage else b""
        yield last + DONE

    def _so_far(self, requests: Sequence[Request], counts: Sequence[int]) -> Usage | None:
        if not self._options.continuous_usage_stats:
            return None
        return usage_so_far(requests[0].prompt_tokens, sum(counts))

    def _parts(
        self, index: int, chunk: GenerationChunk, stream: CallStream | None, *, first: bool
    ) -> list[ChunkChoice]:
        """Return what there is to tell of a chunk."""
        found = []
        if first:
            found.append(ChunkChoice(index, Delta("assistant", "")))
        logprobs, passes = self._scored(chunk.log_probabilities), passes_of(chunk.passes, self._server.pieces)
        nothing = [Delta(content="")] if logprobs or chunk.passes else []
        for delta in self._deltas(chunk, stream) or nothing:
            found.append(ChunkChoice(index, delta, logprobs=logprobs, passes=passes))
            logprobs, passes = None, UNSET
        if chunk.result is not None:
            finish, reason = self._finish(chunk.result, stream.calls if stream else 0)
            found.append(ChunkChoice(index, Delta(), finish, stop_reason=reason))
        return found

    def _deltas(self, chunk: GenerationChunk, stream: CallStream | None) -> list[Delta]:
        if stream is None or self._calling is None:
            return [Delta(content=chunk.text)] if chunk.text else []
        found = []
        for told in stream.events(chunk.text, last=chunk.result is not None):
            if isinstance(told, Content):
                found.append(Delta(content=told.text))
            elif isinstance(told, CallBegun):
                begun = ToolCallDelta(told.index, FunctionDelta(told.name, ""), self._calling.new_id(), "function")
                found.append(Delta(tool_calls=[begun]))
            elif isinstance(told, ArgumentsPart):
                found.append(Delta(tool_calls=[ToolCallDelta(told.index, FunctionDelta(arguments=told.text))]))
        return found

    def _finish(self, result: GenerationResult, calls: int) -> tuple[Finish, str | None]:
        finish, reason = finish_of(result)
        return (finish if self._calling is None else self._calling.finish(finish, calls)), reason

    def _chunk(self, created: int, choices: list[ChunkChoice], usage: Usage | None) -> ChatChunk:
        return ChatChunk(
            self._id, created, self._model, choices, system_fingerprint=self._server.fingerprint, usage=usage
        )

    def _choice(self, index: int, result: GenerationResult) -> ChatChoice:
        message = AssistantText(result.text)
        if self._calling is not None:
            parsed = self._calling.parsed(result.text)
            if parsed.calls:
                message = AssistantText(parsed.content or None, tool_calls=self._calls(self._calling, parsed.calls))
        finish, reason = self._finish(result, len(message.tool_calls or ()))
        return ChatChoice(index, message, finish, self._scored(result.log_probabilities), stop_reason=reason)

    def _calls(self, calling: Calling, calls: Sequence[Call]) -> list[ToolCall]:
        return [
            ToolCall(id=calling.new_id(), function=CalledFunction(name=call.name, arguments=call.arguments))
            for call in calls
        ]

    def _scored(self, scores: Sequence[TokenLogProbability] | None) -> ChatLogprobs | None:
        if self._logprobs is None or not scores:
            return None
        return ChatLogprobs(self._server.pieces.entries(scores, self._logprobs))


def calling_of_chat(generator: Generator, request: ChatRequest, *, shaped: bool, enabled: bool) -> Calling | None:
    """Return how the answers of a chat call its tools, None where they call none. Raises `ApiError`."""
    choice = request.tool_choice
    return calling_of(
        generator,
        [tool.function for tool in request.tools or ()],
        choice if isinstance(choice, str) else None,
        choice.function.name if isinstance(choice, NamedChoice) else None,
        parallel=request.parallel_tool_calls is not False,
        shaped=shaped,
        enabled=enabled,
    )
