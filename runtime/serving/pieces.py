"""Tokens as answers show them one by one: with log-probabilities."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.generator import Generator
from runtime.sampling import TokenLogProbability
from runtime.serving.replies import TextLogprobs, TokenLogprob, TopLogprob

# JSON has no infinity: the least that is written, as other servers do.
LEAST = -9999.0


@dataclass(frozen=True, slots=True)
class Piece:
    """A token's text, as it is shown alone, and its bytes. A `special` one is left out of answers."""

    text: str
    content: list[int]
    special: bool


class Pieces:
    """The pieces of all tokens of a generator, looked up once each."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._known: dict[int, Piece] = {}

    def of(self, token: int) -> Piece:
        """Return the piece of `token`."""
        piece = self._known.get(token)
        if piece is None:
            content = self._generator.token_bytes(token)
            special = bool(content) and not self._generator.decode([token]) and bool(content.strip())
            piece = self._known[token] = Piece(content.decode(errors="replace"), list(content), special)
        return piece

    def entries(self, scores: Sequence[TokenLogProbability], count: int) -> list[TokenLogprob]:
        """Return what chats show of tokens, each with `count` of the best."""
        found = []
        for score in scores:
            best = [
                TopLogprob(piece.text, max(value, LEAST), piece.content)
                for token, value in score.best[:count]
                for piece in (self.of(token),)
            ]
            piece = self.of(score.token)
            found.append(TokenLogprob(piece.text, max(score.log_probability, LEAST), piece.content, best))
        return found


class TextPieces:
    """What completions show of the tokens of one text, which begins with as many characters as `offset` says."""

    def __init__(self, pieces: Pieces, count: int, offset: int = 0) -> None:
        self._pieces = pieces
        self._count = count
        self._offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def first(self, token: int) -> TextLogprobs:
        """Return what is shown of the first token of a prompt, which follows nothing."""
        return TextLogprobs([self._pieces.of(token).text], [None], [None], [self._place(token)])

    def of(self, scores: Sequence[TokenLogProbability]) -> TextLogprobs:
        """Return what is shown of the next tokens."""
        found = TextLogprobs([], [], [], [])
        for score in scores:
            best: dict[str, float] = {}
            for token, value in score.best[: self._count]:
                # Of parts of characters that look alike the first is the more probable.
                best.setdefault(self._pieces.of(token).text, max(value, LEAST))
            own = self._pieces.of(score.token).text
            value = max(score.log_probability, LEAST)
            if self._count:
                best.setdefault(own, value)
            found.tokens.append(own)
            found.token_logprobs.append(value)
            found.top_logprobs.append(best or None)
            found.text_offset.append(self._place(score.token))
        return found

    def _place(self, token: int) -> int:
        place, piece = self._offset, self._pieces.of(token)
        if not piece.special:
            self._offset += len(self._decoder.decode(bytes(piece.content)))
        return place


def joined(*parts: TextLogprobs) -> TextLogprobs:
    """Return the lists of `parts`, one behind the other."""
    found = TextLogprobs([], [], [], [])
    for part in parts:
        found.tokens += part.tokens
        found.token_logprobs += part.token_logprobs
        found.top_logprobs += part.top_logprobs
        found.text_offset += part.text_offset
    return found
