"""Long texts to tokens: cut where that changes nothing, and encoded by several threads at once."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from runtime.cuts import Cuts, cuts_of
from runtime.foreign import failures
from runtime.tokenizer import encode, encode_parts, unencodable, within

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Characters from which cutting is worth it, and of one part: `docs/measuring/tokenising.py` has the times.
LONG = 1 << 16
PART = 1 << 13


class TextEncoder:
    """Encodes texts with `tokenizer`, whose model has `vocab_size` tokens: `long` characters and more in parts of
    `part` characters, with the ids of the whole. It reads the tokenizer when it has the first such text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, long: int = LONG, part: int = PART) -> None:
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._long = long
        self._part = part

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, all of them below the vocabulary's size. Raises `InputError` where there are
        none such.
        """
        if len(text) >= self._long and self.cuts is not None and self._ends is not None:
            parts = self.cuts.parts(text, self._part)
            if len(parts) > 1:
                ids = encode_parts(self.tokenizer, parts, self._vocab_size)
                if not add_special_tokens:
                    return ids
                before, after = self._ends
                return within([*before, *ids, *after], self._vocab_size)
        return encode(self.tokenizer, text, self._vocab_size, add_special_tokens=add_special_tokens)

    @cached_property
    def cuts(self) -> Cuts | None:
        """Where texts may be cut, None where nowhere."""
        return cuts_of(self.tokenizer)

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]] | None:
        """The tokens that are put before and after a text, as around a letter; None where that has no token."""
        with failures(unencodable):
            around = self.tokenizer.encode("a")
        mask = around.special_tokens_mask
        if 0 not in mask:
            return None
        return around.ids[: mask.index(0)], around.ids[len(mask) - mask[::-1].index(0) :]
