"""The file of the tokens that draft logits are of."""

from pathlib import Path

import numpy as np
import pytest

from runtime.drafting.draft_tokens import DRAFT_TOKENS, read_draft_tokens, write_draft_tokens
from runtime.errors import EngineFileError


def content_of(tokens: object, folder: Path) -> bytes:
    write_draft_tokens(np.array(tokens, dtype=np.int64), folder / "t.npy")
    return DRAFT_TOKENS.content(folder / "t.npy")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = read_draft_tokens(content_of([0, 3, 9], tmp_path), "t.npy", 3, 10)
    assert found.dtype == np.int64
    assert found.tolist() == [0, 3, 9]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0, 3], "it has 2 tokens where 3 are expected"),
        ([0, 3, 10], "it has token 10, and the vocabulary has 10 tokens"),
        ([-1, 3, 4], "it has token -1, below 0"),
        ([3, 0, 4], "it has token 0 after 3: they must be in ascending order"),
        ([0, 4, 4], "it has token 4 after 4: they must be in ascending order"),
    ],
)
def test_tokens_that_cannot_be(tmp_path: Path, tokens: list[int], message: str) -> None:
    with pytest.raises(EngineFileError, match=f"not a valid draft_tokens.npy .*{message}"):
        read_draft_tokens(content_of(tokens, tmp_path), "t.npy", 3, 10)


def test_files_that_are_cut_short_or_of_another_type(tmp_path: Path) -> None:
    content = content_of([0, 3, 9], tmp_path)
    with pytest.raises(EngineFileError, match="not those of 3 tokens"):
        read_draft_tokens(content[:-1], "t.npy", 3, 10)
    with pytest.raises(EngineFileError, match="does not begin as a row of whole numbers"):
        read_draft_tokens(content.replace(b"<i4", b"<f4"), "t.npy", 3, 10)
    with pytest.raises(EngineFileError, match="does not begin as a row of whole numbers"):
        read_draft_tokens(content.replace(b"(3,)", b"(3, 1)"), "t.npy", 3, 10)
