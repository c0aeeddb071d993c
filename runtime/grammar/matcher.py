"""`Matcher`: how far an answer is in its grammar, and which tokens may follow."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, one_line
from runtime.foreign import failures

if TYPE_CHECKING:
    from llguidance import LLMatcher

Allowed = NDArray[np.bool_]
# What llguidance says where no token fits.
NO_TOKEN = "NoExtension"
# Returns tokens whose bytes are these, as a tokenizer makes them of a text.
Tokenize = Callable[[bytes], tuple[int, ...]]
# Bytes of a forced text of which tokens are made, more than trees have room for: each pass asks for them anew.
MOST_FORCED = 1024
# How a special token is told of among bytes.
SPECIAL = re.compile(rb"\xff\[(\d+)\]")


class Matcher:
    """The state of one answer in its grammar. `accept` takes each token that is chosen; between two of these, `push`
    and `pop` try what may follow.

    `barred` [V] are tokens that cannot be the first, None where there are none such.
    """

    def __init__(self, found: LLMatcher, vocab_size: int, tokenize: Tokenize, barred: Allowed | None = None) -> None:
        self._matcher = found
        self._vocab_size = vocab_size
        self._tokenize = tokenize
        self._barred = barred
        self._allowed: Allowed | None = None
        self._taken = 0
        self._tried = 0
        self._complete = False

    def copy(self) -> Matcher:
        """Return another matcher in the same state, for another answer."""
        assert not self._taken and not self._tried, "what is copied is at the beginning"
        copy = Matcher(self._matcher.deep_copy(), self._vocab_size, self._tokenize, self._barred)
        copy._allowed = self._allowed
        return copy

    @property
    def complete(self) -> bool:
        """Return whether the answer is in the language, and nothing can follow but its end."""
        return self._complete

    def allowed(self) -> Allowed:
        """Return [V], read-only: the tokens that may follow what was accepted; stop tokens where the answer may end.

        Raises `InputError` where finding out takes more time or memory than a grammar may.
        """
        assert not self._tried, "what is tried is taken back first"
        if self._allowed is None:
            with failures(self._failed):
                bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            self._check()
            found = np.unpackbits(bits, count=max(self._vocab_size, 8 * len(bits)), bitorder="little")
            allowed = found[: self._vocab_size].view(np.bool_)
            if self._barred is not None and not self._taken:
                allowed &= ~self._barred
            allowed.setflags(write=False)
            self._allowed = allowed
        return self._allowed

    def accept(self, token: int) -> None:
        """Take the next token of the answer, one of those `allowed`."""
        assert not self._tried, "what is tried is taken back first"
        taken = self._matcher.consume_token(token)
        self._check()
        assert taken, "a token that was chosen is allowed"
        self._taken += 1
        self._allowed = None
        self._complete = self._matcher.is_stopped()

    def allows(self, token: int) -> bool:
        """Return whether `token` may follow what was accepted and what was pushed after it."""
        if not self._tried:
            return bool(self.allowed()[token])
        return self._matcher.validate_tokens([token]) == 1

    def push(self, token: int) -> None:
        """Try a token that `allows`."""
        taken = self._matcher.consume_token(token)
        self._check()
        assert taken, "a token that is tried is allowed"
        self._tried += 1

    def pop(self, count: int) -> None:
        """Take back the last `count` tokens that were pushed."""
        if count:
            assert count <= self._tried, "no more is taken back than was pushed"
            self._matcher.rollback(count)
            self._tried -= count
            self._check()

    def forced(self) -> tuple[int, ...]:
        """Return tokens of the text that must follow what was accepted and pushed, as the tokenizer makes them; none
        where the grammar leaves a choice. Other tokens may spell the same text. Of a long text they are the first ones.
        """
        parts = SPECIAL.split(self._matcher.compute_ff_bytes())
        found: list[int] = []
        for text, number in zip(parts[::2], [*map(int, parts[1::2]), None], strict=True):
            if len(text) > MOST_FORCED:
                # The last token may be one of a text that goes on otherwise.
                found += self._tokenize(_beginning(text))[:-1]
                break
            found += self._tokenize(text) if text else ()
            if number is not None:
                found.append(number)
        if len(parts) > 1 and not parts[0]:
            # Having told of a special token it can say no more what may follow, until it has been given it.
            self._matcher.consume_token(found[0])
            self._matcher.rollback(1)
            self._check()
        return tuple(found)

    def _check(self) -> None:
        if self._matcher.is_error():
            if self._matcher.get_error().startswith(NO_TOKEN):
                raise InputError(
                    f"no token of this model goes on in the grammar after {self._taken} tokens of the answer; give "
                    "another one"
                )
            raise self._failed(one_line(self._matcher.get_error()))

    def _failed(self, cause: str) -> InputError:
        return InputError(
            f"the grammar became too complex after {self._taken} tokens of the answer ({cause}); give a simpler one"
        )


def _beginning(text: bytes) -> bytes:
    """Return the first `MOST_FORCED` bytes of `text`, or up to three fewer, so that no character is cut."""
    end = MOST_FORCED
    while end > MOST_FORCED - 3 and text[end] & 0xC0 == 0x80:
        end -= 1
    return text[:end]
