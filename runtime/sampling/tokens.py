"""`TokensSoFar`: the tokens of a prompt and its answer, for code that may read them and no more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray


class TokensSoFar(Sequence[int]):
    """A view of `tokens` [N] that cannot change them, and grows as they do: handing it out costs nothing.

    A slice is a list of its own. It equals any sequence of the same tokens.
    """

    __slots__ = ("_tokens",)

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._tokens[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens)

    def __reversed__(self) -> Iterator[int]:
        return reversed(self._tokens)

    def __contains__(self, token: object) -> bool:
        return token in self._tokens

    def index(self, value: int, *bounds: Any) -> int:
        """See `list.index`."""
        return self._tokens.index(value, *bounds)

    def count(self, value: int) -> int:
        """See `list.count`."""
        return self._tokens.count(value)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Sequence) and not isinstance(other, str | bytes):
            return self._tokens == list(other)
        return NotImplemented

    # As a list has none: it changes.
    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Sequence[int]) -> list[int]:
        return [*self._tokens, *other]

    def __radd__(self, other: Sequence[int]) -> list[int]:
        return [*other, *self._tokens]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        # Without this method NumPy asks for one token after another.
        if copy is False:
            raise ValueError("the tokens so far are a list: an array of them is a copy")
        return np.array(self._tokens, dtype=dtype)

    def __repr__(self) -> str:
        return repr(self._tokens)
