"""POST /v1/responses, without state: what a response follows is in its input."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Literal

import msgspec

from runtime.answer import GenerationResult
from runtime.serving import admission
from runtime.serving.asking import asked_for, chunks_of, finish_of, note, results_of, submit, usage_of
from runtime.serving.calling import CallStream, calling_of
from runtime.serving.errors import api_error
from runtime.serving.exchange import Exchange
from runtime.serving.replies import (
    FunctionCallItem,
    Incomplete,
    InputDetails,
    OutputDetails,
    OutputMessage,
    OutputText,
    Response,
    ResponseFailure,
    ResponseUsage,
    TokenLogprob,
    Usage,
)
from runtime.serving.requests import ResponseRequest
from runtime.serving.response_calls import Items
from runtime.serving.response_events import DeltaEvent, ItemEvent, PartEvent, ResponseEvent, TextEvent
from runtime.serving.state import Server
from runtime.serving.streaming import event
from runtime.serving.structured import TextFormat
from runtime.serving.tool_types import FlatChoice


class Responding:
    """Answers one request for a response, which is checked when this is made. Raises `ApiError`."""

    answers = 1

    def __init__(self, server: Server, request: ResponseRequest, exchange: Exchange) -> None:
        admission.check_streaming(request, request.stream_options)
        admission.check_response(request)
        self._server = server
        self._exchange = exchange
        self._request = request
        self._logprobs = admission.logprobs_of_response(request)
        options = admission.options_of(request, request.max_output_tokens, server.settings)
        sampling = admission.sampling_of(
            request, self._logprobs, request.text.format if request.text else None, "text.format"
        )
        choice = request.tool_choice
        self._calling = calling_of(
            server.generator,
            request.tools or (),
            choice if isinstance(choice, str) else None,
            choice.name if isinstance(choice, FlatChoice) else None,
            parallel=request.parallel_tool_calls is not False,
            shaped=sampling.grammar is not None,
            enabled=server.settings.tools,
        )
        admission.check_logprobs_of_calls(request, self._calling is not None)
        options["sampling"] = sampling if self._calling is None else self._calling.sampling(sampling)
        options["tools"] = [] if self._calling is None else self._calling.tools
        options["escape_special_tokens"] = server.settings.escape != "none"
        self._asked = asked_for([admission.messages_of_response(request)], 1, options)
        self._id, self._item = (f"{kind}_{uuid.uuid4().hex}" for kind in ("resp", "msg"))
        self._created = server.now

    async def whole(self) -> bytes:
        """Return the answer, once it is there."""
        (result,) = await results_of(await submit(self._server.generator, self._asked))
        return msgspec.json.encode(self._ended(result))

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield the answer as events."""
        requests = await submit(self._server.generator, self._asked)
        numbers = itertools.count()
        stream = CallStream(self._calling) if self._calling else None
        items = Items(self._calling, numbers) if self._calling else None
        begun = False
        try:
            async for _, chunk in chunks_of(requests):
                told = b""
                if not begun:
                    begun = True
                    told = b"".join(self._opening(numbers))
                if stream is not None and items is not None:
                    events = stream.events(chunk.text, last=chunk.result is not None)
                    told += b"".join(map(_told, items.tell(events)))
                    if chunk.result is not None:
                        told += b"".join(map(_told, items.end(_status_of(chunk.result))))
                        response = self._ended(chunk.result, items.done)
                        told += _told(ResponseEvent(f"response.{response.status}", next(numbers), response))
                    if told:
                        yield told
                    continue
                scores = self._scored(chunk.log_probabilities)
                if chunk.text or scores:
                    told += _told(DeltaEvent(next(numbers), self._item, chunk.text, scores))
                if chunk.result is not None:
                    told += b"".join(self._closing(chunk.result, numbers))
                if told:
                    yield told
        except Exception as error:
            if not begun:
                raise
            failure = api_error(error, self._server.generator.metrics()).answer.error
            self._exchange.fields["error"] = failure.code
            failed = self._response("failed", [])
            failed.error = ResponseFailure("server_error", failure.message)
            yield _told(ResponseEvent("response.failed", next(numbers), failed))

    def _opening(self, numbers: Iterator[int]) -> Iterator[bytes]:
        begun = self._response("in_progress", [])
        for kind in ("response.created", "response.in_progress"):
            yield _told(ResponseEvent(kind, next(numbers), begun))
        if self._calling is not None:
            return
        item = OutputMessage(self._item, [], "in_progress")
        yield _told(ItemEvent("response.output_item.added", next(numbers), item))
        yield _told(PartEvent("response.content_part.added", next(numbers), self._item, OutputText("")))

    def _closing(self, result: GenerationResult, numbers: Iterator[int]) -> Iterator[bytes]:
        response = self._ended(result)
        (item,) = response.output
        assert isinstance(item, OutputMessage)
        (part,) = item.content
        yield _told(TextEvent(next(numbers), self._item, part.text, part.logprobs))
        yield _told(PartEvent("response.content_part.done", next(numbers), self._item, part))
        yield _told(ItemEvent("response.output_item.done", next(numbers), item))
        yield _told(ResponseEvent(f"response.{response.status}", next(numbers), response))

    def _ended(self, result: GenerationResult, items: list[OutputMessage | FunctionCallItem] | None = None) -> Response:
        usage = usage_of([result], 1)
        note(self._server, self._exchange, [result], usage)
        status, reason = _status_of(result), finish_of(result)[1]
        response = self._response(status, self._items(result) if items is None else items)
        response.usage = _usage(usage)
        if status == "incomplete":
            response.incomplete_details = Incomplete(reason or "max_output_tokens")
        return response

    def _items(self, result: GenerationResult) -> list[OutputMessage | FunctionCallItem]:
        status = _status_of(result)
        if self._calling is None:
            text = OutputText(result.text, logprobs=self._scored(result.log_probabilities))
            return [OutputMessage(self._item, [text], status)]
        items = Items(self._calling, itertools.count())
        told = CallStream(self._calling).events(result.text, last=True)
        for _ in itertools.chain(items.tell(told), items.end(status)):
            pass
        return items.done

    def _response(self, status: Any, output: list[OutputMessage | FunctionCallItem]) -> Response:
        request = self._request
        return Response(
            self._id,
            self._created,
            request.model,
            status,
            output,
            1.0 if request.temperature is None else request.temperature,
            1.0 if request.top_p is None else request.top_p,
            request.instructions,
            request.max_output_tokens,
            request.metadata or {},
            request.user,
            top_logprobs=request.top_logprobs or 0,
            tools=request.tools or [],
            tool_choice=request.tool_choice or "auto",
            parallel_tool_calls=request.parallel_tool_calls is not False and bool(request.tools),
            text={"format": (request.text and request.text.format) or TextFormat()},
        )

    def _scored(self, scores: Any) -> list[TokenLogprob]:
        if self._logprobs is None or not scores:
            return []
        return self._server.pieces.entries(scores, self._logprobs)


def _status_of(result: GenerationResult) -> Literal["completed", "incomplete"]:
    return "completed" if finish_of(result)[0] == "stop" else "incomplete"


def _told(value: Any) -> bytes:
    return event(value, value.type)


def _usage(usage: Usage) -> ResponseUsage:
    details = usage.completion_tokens_details
    return ResponseUsage(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.total_tokens,
        InputDetails(usage.prompt_tokens_details.cached_tokens),
        OutputDetails(0, details.accepted_prediction_tokens, details.rejected_prediction_tokens),
    )
