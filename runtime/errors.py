"""Errors that a user can act on. Command lines print them as one line; services can catch them by class."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from reprlib import Repr


class InputError(ValueError):
    """Something given by the user does not fit: the message says what, what is allowed and what to do."""


class EngineFileError(InputError):
    """An engine file, or a file beside it, is missing, damaged, or of a version that this runtime cannot read."""


class PromptTooLongError(InputError):
    """The prompt leaves no room for a single new token within the engine's context limit."""


class ServiceError(RuntimeError):
    """A request that fits was not answered: the message says why. Another time, or elsewhere, it may be."""


class BusyError(ServiceError):
    """The queue is full: `waiting` requests of at most `max_queue` wait for `running` ones."""

    def __init__(self, waiting: int, running: int, max_queue: int) -> None:
        super().__init__(
            f"the queue is full: {waiting} requests wait for {running} that run, and max_queue is {max_queue}; try "
            "again later"
        )
        self.waiting = waiting
        self.running = running
        self.max_queue = max_queue


class DeadlineError(ServiceError):
    """The deadline of a request passed before it ran."""


class CancelledError(ServiceError):
    """The request was cancelled."""


class ClosedError(ServiceError):
    """The generator was closed, or takes no more requests."""


class EngineError(ServiceError):
    """The engine failed while it ran: nothing that was under way can go on, and no more is taken."""


class InputWarning(UserWarning):
    """Something given by the user works, and likely not as it was meant. Command lines show it as one line."""


# How alike a name must be to be suggested, from 0 to 1.
ALIKE = 0.6
# Characters of a cause that an error repeats.
LONGEST_CAUSE = 300


def one_line(cause: object, most: int = LONGEST_CAUSE) -> str:
    """Return the first line of what `cause` says, up to `most` characters of it that can be printed, or its class where
    it says nothing: it may quote a file, or come from another library.
    """
    lines = str(cause).strip().splitlines()
    first = lines[0].strip() if lines else type(cause).__name__
    return "".join(one if one.isprintable() else "\ufffd" for one in first[:most])


_SHORT = Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 100


def shown(value: object) -> str:
    """Return `value` as Python writes it, for an error: cut short, in one line, and whatever its own class does."""
    try:
        return one_line(_SHORT.repr(value))
    except Exception:
        # Python writes no whole number of more than some thousand digits.
        return f"a value of type {type(value).__name__}"


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a question for the one of `known` that `word` is most like, to end an error with; empty for none."""
    found = difflib.get_close_matches(word, known, 1, ALIKE)
    return f"; did you mean {found[0]}?" if found else ""
