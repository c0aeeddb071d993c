"""Text from tokens as they arrive: never half a character, never past a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer

from runtime.tokenizer import DecodedStream, decode, special_tokens


class TextStream:
    """Decodes the tokens of one answer.

    Text is released when later tokens can no longer change it: not while it ends within a character, and not while
    it ends with what may be the beginning of a stop string. `stopped` says that a stop string was found; `text` ends
    before it. Special tokens are left out, but for those that are `shown`, by their names.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), shown: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Where some are shown, the others are left out here, as the tokenizer leaves out all or none.
        self._hidden = special_tokens(tokenizer).difference(shown) if shown else frozenset()
        self._skips = not shown
        self._stream = DecodedStream(tokenizer, skip_special_tokens=self._skips)
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._released = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one more token and return the text that it releases."""
        if token in self._hidden:
            return ""
        self._tokens.append(token)
        piece = self._stream.step(token)
        if not piece:
            return ""
        self._append(piece)
        return self._release(len(self.text) if self.stopped else len(self.text) - self._held_back())

    def finish(self) -> str:
        """Return the text still held back, when no more tokens come."""
        if not self.stopped:
            # A last character that stayed incomplete shows as the decoder shows it.
            self._append(decode(self._tokenizer, self._tokens, skip_special_tokens=self._skips)[len(self.text) :])
        return self._release(len(self.text))

    def _append(self, piece: str) -> None:
        longest = max(map(len, self._stop), default=0)
        search_from = max(0, len(self.text) - longest)
        self.text += piece
        places = [place for stop in self._stop if (place := self.text.find(stop, search_from)) >= 0]
        if places:
            self.text = self.text[: min(places)]
            self.stopped = True

    def _held_back(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for count in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:count]):
                    longest = count
                    break
        return longest

    def _release(self, end: int) -> str:
        released = self.text[self._released : end]
        self._released = max(self._released, end)
        return released
