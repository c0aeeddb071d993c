"""The tokenizer of an engine, with every failure of the library told as one error.

`tokenizer.json` says what the library runs, regular expressions among it. Some fail for some texts only, and where the
library gives up it raises a `PanicException`, which is no `Exception`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtime.errors import EngineFileError, InputError
from runtime.foreign import failures
from runtime.formats import Format

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = Format("tokenizer.json", 1 << 28, "export the engine again", EngineFileError)


def parse_tokenizer(content: bytes, where: object, vocab_size: int) -> Tokenizer:
    """Return the tokenizer in `content`, which was read at `where`, for a model whose vocabulary has `vocab_size`
    tokens; the tokenizer may know fewer.

    Raises `EngineFileError` for what is no tokenizer, and for one that has tokens which the model does not.
    """
    from tokenizers import Tokenizer

    with failures(lambda cause: TOKENIZER.unfit(where, cause)):
        tokenizer = Tokenizer.from_buffer(content)
        # A prompt is neither cut nor filled up, whatever was done to texts for training.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        beyond = tokens_beyond(tokenizer, vocab_size)
    if beyond:
        raise TOKENIZER.unfit(where, told_beyond(beyond, vocab_size))
    return tokenizer


def tokens_beyond(tokenizer: Tokenizer, vocab_size: int) -> dict[int, str]:
    """Return the tokens of `tokenizer`, by id, that a vocabulary of `vocab_size` tokens does not have."""
    found = tokenizer.get_vocab(with_added_tokens=True).items()
    return {number: token for token, number in found if number >= vocab_size}


def told_beyond(beyond: dict[int, str], vocab_size: int) -> str:
    """Return what is wrong with a tokenizer that has tokens `beyond` the vocabulary."""
    largest = max(beyond)
    return f"it has token {largest}, {beyond[largest][:20]!r}, and the model's vocabulary has {vocab_size} tokens"


def encode(tokenizer: Tokenizer, text: str, vocab_size: int, *, add_special_tokens: bool = True) -> list[int]:
    """Return the token ids of `text`, all of them below `vocab_size`. Raises `InputError` where there are none such."""
    with failures(unencodable):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    return within(ids, vocab_size)


def encode_parts(tokenizer: Tokenizer, parts: list[str], vocab_size: int) -> list[int]:
    """Return the token ids of several texts, one behind the other, as `encode` does without special tokens. The
    library's threads encode them, and Python's others go on meanwhile.
    """
    with failures(unencodable):
        ids = [
            token for encoding in tokenizer.encode_batch_fast(parts, add_special_tokens=False) for token in encoding.ids
        ]
    return within(ids, vocab_size)


def within(ids: list[int], vocab_size: int) -> list[int]:
    """Return `ids`. Raises `InputError` where one is not below `vocab_size`."""
    # What the tokenizer puts around a text need not be in its own vocabulary.
    if ids and max(ids) >= vocab_size:
        raise InputError(
            f"the tokenizer makes token {max(ids)} of this text, and the model's vocabulary has {vocab_size} tokens; "
            "export the engine again"
        )
    return ids


def decode(tokenizer: Tokenizer, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Return the text of `tokens`, without special ones. Raises `InputError` where there is none."""
    with failures(undecodable):
        return tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)


def special_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that text leaves out."""
    return frozenset(number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special)


class DecodedStream:
    """The text of tokens that come one by one, without special ones unless those are to be kept."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def step(self, token: int) -> str | None:
        """Take one more token; return the text that it completes, None where that ends within a character.

        Raises `InputError` where there is none.
        """
        with failures(undecodable):
            return self._stream.step(self._tokenizer, token)


def unencodable(cause: str) -> InputError:
    """Return the error of a text that the tokenizer cannot encode, for this `cause`."""
    return InputError(f"the tokenizer cannot encode this text ({cause}); change the text")


def undecodable(cause: str) -> InputError:
    """Return the error of tokens that the tokenizer cannot decode, for this `cause`."""
    return InputError(
        f"the tokenizer cannot decode these tokens ({cause}); export the engine again if they are its own"
    )
