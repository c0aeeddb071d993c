"""The events of a streamed response."""

from __future__ import annotations

from typing import Literal

import msgspec

from runtime.serving.replies import FunctionCallItem, OutputMessage, OutputText, Response, TokenLogprob


class ResponseEvent(msgspec.Struct):
    """An event about the whole response."""

    type: str
    sequence_number: int
    response: Response


class ItemEvent(msgspec.Struct):
    """An event about one of its items."""

    type: str
    sequence_number: int
    item: OutputMessage | FunctionCallItem
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
