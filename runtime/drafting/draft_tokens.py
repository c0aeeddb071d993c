"""Draft tokens: the part of the vocabulary that pseudo rows have logits of, where these have a head of their own.

Draft logit i is of token `draft_tokens[i]`. Everything that drafts are handed on to knows tokens alone: the map is used
once, where drafts are read (`runtime.decode.drafts_of`).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from runtime.arrays import IntArray
from runtime.bindings import MOST_VOCABULARY
from runtime.errors import EngineFileError
from runtime.formats import Format

# What a file of NumPy's format 1.0 begins with is no longer than this.
MOST_HEADER = 1 << 16
DRAFT_TOKENS = Format("draft_tokens.npy", MOST_HEADER + 4 * MOST_VOCABULARY, "export the engine again", EngineFileError)
# A file of NumPy's format 1.0 begins so where it holds a row of whole numbers of 32 bits.
NPY = re.compile(
    rb"\x93NUMPY\x01\x00(?P<length>..)"
    rb"\{'descr': '<i4', 'fortran_order': False, 'shape': \((?P<count>[1-9]\d{0,9}),\), \} *\n",
    re.DOTALL,
)


def write_draft_tokens(tokens: IntArray, path: Path) -> None:
    """Write tokens [V_d], ascending, as `read_draft_tokens` reads them."""
    with path.open("wb") as file:
        np.save(file, tokens.astype("<i4"))


def read_draft_tokens(content: bytes, where: object, count: int, vocab_size: int) -> IntArray:
    """Return the tokens [V_d] in `content`, which was read at `where`: `count` of a vocabulary of `vocab_size`.

    Raises `EngineFileError` unless they are so many, within the vocabulary, and in ascending order.
    """
    header = NPY.match(content)
    if header is None or int.from_bytes(header["length"], "little") != header.end() - header.start("length") - 2:
        raise DRAFT_TOKENS.unfit(where, "it does not begin as a row of whole numbers of 32 bits does")
    found = int(header["count"])
    if found != count:
        raise DRAFT_TOKENS.unfit(where, f"it has {found} tokens where {count} are expected")
    if len(content) - header.end() != 4 * found:
        raise DRAFT_TOKENS.unfit(where, f"it has {len(content)} bytes, not those of {found} tokens")
    tokens = np.frombuffer(content, "<i4", offset=header.end()).astype(np.int64)
    if fault := fault_of(tokens, vocab_size):
        raise DRAFT_TOKENS.unfit(where, fault)
    return tokens


def fault_of(tokens: IntArray, vocab_size: int) -> str | None:
    """Return what is wrong with draft tokens of a vocabulary of `vocab_size` tokens, None where nothing is."""
    for bad, told in ((tokens < 0, "below 0"), (tokens >= vocab_size, f"and the vocabulary has {vocab_size} tokens")):
        if bad.any():
            return f"it has token {tokens[bad.argmax()]}, {told}"
    falls = tokens[1:] <= tokens[:-1]
    if falls.any():
        place = int(falls.argmax())
        return f"it has token {tokens[place + 1]} after {tokens[place]}: they must be in ascending order"
    return None
