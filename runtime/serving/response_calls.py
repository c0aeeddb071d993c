"""Items of a response that may call tools: messages and calls in the order of the answer, whole or as events."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from runtime.serving.calling import Calling
from runtime.serving.replies import FunctionCallItem, OutputMessage, OutputText
from runtime.serving.response_events import DeltaEvent, ItemEvent, PartEvent, TextEvent
from runtime.tools import ArgumentsPart, CallBegun, CallEnded, Content
from runtime.tools.parsing import Event

Status = Literal["completed", "incomplete"]


class ArgumentsDelta(msgspec.Struct):
    """A piece of a call's arguments."""

    sequence_number: int
    item_id: str
    output_index: int
    delta: str
    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"


class ArgumentsDone(msgspec.Struct):
    """The whole arguments of a call."""

    sequence_number: int
    item_id: str
    output_index: int
    name: str
    arguments: str
    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"


ItemsEvent = ItemEvent | PartEvent | DeltaEvent | TextEvent | ArgumentsDelta | ArgumentsDone


class Items:
    """The `done` items of one answer of a `calling`, as its text comes; events have the next of `numbers`."""

    def __init__(self, calling: Calling, numbers: Iterator[int]) -> None:
        self._calling = calling
        self._numbers = numbers
        self._open: OutputMessage | FunctionCallItem | None = None
        self.done: list[OutputMessage | FunctionCallItem] = []

    def tell(self, events: Sequence[Event]) -> Iterator[ItemsEvent]:
        """Take what is certain of the answer, and yield the events that tell of it."""
        for one in events:
            if isinstance(one, Content):
                if not isinstance(self._open, OutputMessage):
                    yield from self.close("completed")
                    yield from self._begin_message()
                assert isinstance(self._open, OutputMessage)
                self._open.content[0].text += one.text
                yield DeltaEvent(next(self._numbers), self._open.id, one.text, [], self._place)
            elif isinstance(one, CallBegun):
                yield from self.close("completed")
                item = FunctionCallItem(_new_id("fc"), self._calling.new_id(), one.name, "", "in_progress")
                self._open = item
                yield ItemEvent("response.output_item.added", next(self._numbers), _copy(item), self._place)
            elif isinstance(one, ArgumentsPart):
                assert isinstance(self._open, FunctionCallItem)
                self._open.arguments += one.text
                yield ArgumentsDelta(next(self._numbers), self._open.id, self._place, one.text)
            elif isinstance(one, CallEnded):
                # It is closed by what follows: one that the answer's end has cut off is not completed.
                continue

    def end(self, status: Status) -> Iterator[ItemsEvent]:
        """Yield the events of the end, at which the last item has this `status`."""
        if self._open is None and not self.done:
            yield from self._begin_message()
        yield from self.close(status)

    def close(self, status: Status) -> Iterator[ItemsEvent]:
        """Yield the events of the end of the item that is under way, if one is."""
        item, numbers = self._open, self._numbers
        if item is None:
            return
        item.status = status
        if isinstance(item, OutputMessage):
            (part,) = item.content
            yield TextEvent(next(numbers), item.id, part.text, [], self._place)
            yield PartEvent("response.content_part.done", next(numbers), item.id, part, self._place)
        else:
            yield ArgumentsDone(next(numbers), item.id, self._place, item.name, item.arguments)
        yield ItemEvent("response.output_item.done", next(numbers), item, self._place)
        self.done.append(item)
        self._open = None

    def _begin_message(self) -> Iterator[ItemsEvent]:
        self._open = OutputMessage(_new_id("msg"), [OutputText("")], "in_progress")
        empty = OutputMessage(self._open.id, [], "in_progress")
        yield ItemEvent("response.output_item.added", next(self._numbers), empty, self._place)
        part = OutputText("")
        yield PartEvent("response.content_part.added", next(self._numbers), self._open.id, part, self._place)

    @property
    def _place(self) -> int:
        return len(self.done)


def _copy(item: FunctionCallItem) -> FunctionCallItem:
    return msgspec.structs.replace(item)


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
