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
from runtime.serving.errors import api_error
from runtime.serving.exchange import Exchange
from runtime.serving.replies import (
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
from runtime.serving.state import Server
from runtime.serving.streaming import event
from runtime.serving.structured import TextFormat

Status = Literal["in_progress", "completed", "incomplete"]


class ResponseEvent(msgspec.Struct):
    """An event about the whole response."""

    type: str
    sequence_number: int
    response: Response


class ItemEvent(msgspec.Struct):
    """An event about its message."""

    type: str
    sequence_number: int
    item: OutputMessage
    output_index: int = 0


class PartEvent(msgspec.Struct):
    """An event about the text of its message, as a part."""

    type: str
    sequence_number: int
    item_id: str
    part: OutputText
    output_index: int = 0
    content_index: int = 0


class DeltaEvent(msgspec.Struct):
    """A piece of the text."""

    sequence_number: int
    item_id: str
    delta: str
    logprobs: list[TokenLogprob]
    output_index: int = 0
    content_index: int = 0
    type: Literal["response.output_text.delta"] = "response.output_text.delta"


class TextEvent(msgspec.Struct):
    """The whole text."""

    sequence_number: int
    item_id: str
    text: str
    logprobs: list[TokenLogprob]
    output_index: int = 0
    content_index: int = 0
    type: Literal["response.output_text.done"] = "response.output_text.done"


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
        options["sampling"] = admission.sampling_of(
            request, self._logprobs, request.text.format if request.text else None, "text.format"
        )
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
        begun = False
        try:
            async for _, chunk in chunks_of(requests):
                told = b""
                if not begun:
                    begun = True
                    told = b"".join(self._opening(numbers))
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
        item = OutputMessage(self._item, [], "in_progress")
        yield _told(ItemEvent("response.output_item.added", next(numbers), item))
        yield _told(PartEvent("response.content_part.added", next(numbers), self._item, OutputText("")))

    def _closing(self, result: GenerationResult, numbers: Iterator[int]) -> Iterator[bytes]:
        response = self._ended(result)
        (item,) = response.output
        (part,) = item.content
        yield _told(TextEvent(next(numbers), self._item, part.text, part.logprobs))
        yield _told(PartEvent("response.content_part.done", next(numbers), self._item, part))
        yield _told(ItemEvent("response.output_item.done", next(numbers), item))
        yield _told(ResponseEvent(f"response.{response.status}", next(numbers), response))

    def _ended(self, result: GenerationResult) -> Response:
        usage = usage_of([result], 1)
        note(self._server, self._exchange, [result], usage)
        finish, reason = finish_of(result)
        status: Status = "completed" if finish == "stop" else "incomplete"
        text = OutputText(result.text, logprobs=self._scored(result.log_probabilities))
        response = self._response(status, [OutputMessage(self._item, [text], status)])
        response.usage = _usage(usage)
        if status == "incomplete":
            response.incomplete_details = Incomplete(reason or "max_output_tokens")
        return response

    def _response(self, status: Any, output: list[OutputMessage]) -> Response:
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
            tool_choice=request.tool_choice or "auto",
            text={"format": (request.text and request.text.format) or TextFormat()},
        )

    def _scored(self, scores: Any) -> list[TokenLogprob]:
        if self._logprobs is None or not scores:
            return []
        return self._server.pieces.entries(scores, self._logprobs)


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
