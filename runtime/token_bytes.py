"""The bytes of each token, for programs that show tokens one by one: a part of a character is no text."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING

from runtime.foreign import failures
from runtime.tokenizer import undecodable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What a decoder shows for bytes that are no character.
REPLACEMENT = "\ufffd"
# How tokenizers with byte fallback name the token of a byte.
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes of the tokens of `tokenizer`, looked up by id and kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        """Return the bytes of `token`; none for one that the tokenizer does not know."""
        found = self._known.get(token)
        if found is None:
            with failures(undecodable):
                found = self._known[token] = self._bytes(token)
        return found

    def _bytes(self, token: int) -> bytes:
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return b""
        if token in self._added:
            return self._added[token].encode()
        if byte := BYTE_TOKEN.fullmatch(name):
            return bytes([int(byte[1], 16)])
        # A decoder may drop a space at a text's beginning, so that the token must follow another.
        before = self._tokenizer.decode([self._anchor], skip_special_tokens=False)
        after: str = self._tokenizer.decode([self._anchor, token], skip_special_tokens=False)
        text = after[len(before) :] if after.startswith(before) else self._tokenizer.decode([token])
        if REPLACEMENT in text and all(character in BYTES_OF for character in name):
            return bytes(BYTES_OF[character] for character in name)
        return text.encode()

    @cached_property
    def drops_space(self) -> bool:
        """Return whether a space is lost with which the first token of a text begins."""
        spaced = next((token for token in range(self._tokenizer.get_vocab_size()) if self[token][:1] == b" "), None)
        if spaced is None or spaced in self._added:
            return False
        with failures(undecodable):
            return not self._tokenizer.decode([spaced], skip_special_tokens=False).startswith(" ")

    def special(self) -> list[int]:
        """Return the tokens that are left out of texts."""
        return [number for number, added in self._tokenizer.get_added_tokens_decoder().items() if added.special]

    @cached_property
    def _added(self) -> dict[int, str]:
        return {number: added.content for number, added in self._tokenizer.get_added_tokens_decoder().items()}

    @cached_property
    def _anchor(self) -> int:
        """A token that is one plain character."""
        for name in ("a", "e", "0"):
            number = self._tokenizer.token_to_id(name)
            if number is not None:
                return int(number)
        return 0


def _bytes_of() -> dict[str, int]:
    """Return the byte of each character that byte-level tokenizers write for one, as in GPT-2's `bytes_to_unicode`."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES_OF = _bytes_of()
