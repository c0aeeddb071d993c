import pytest
from tokenizers import Tokenizer, decoders

from runtime.token_bytes import TokenBytes
from tests.runtime.tokenizers import TEXT, tokenizer_of

# As in the tokenizer.json of such models: Llama 2 and Gemma drop a space at a text's beginning.
PIECES = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


@pytest.mark.parametrize("kind", ["byte level", "whole text", "whole text, with a space before"])
def test_the_bytes_of_a_texts_tokens_are_those_of_the_text(kind: str) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_of(kind).to_str())
    if kind != "byte level":
        tokenizer.decoder = PIECES
    found = TokenBytes(tokenizer)
    unknown = tokenizer.token_to_id("<unk>")
    for text in ("The quick brown fox", "def fox(dog):\n    return", "Ünïcödé, 漢字 and 🙂", TEXT[0]):
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        if unknown in tokens:
            continue
        assert b"".join(found[token] for token in tokens).decode().strip() == text.strip()


def test_a_part_of_a_character_is_bytes_that_are_no_text() -> None:
    tokenizer = tokenizer_of("byte level")
    tokens = tokenizer.encode("\U0001f9a6", add_special_tokens=False).ids
    found = [TokenBytes(tokenizer)[token] for token in tokens]
    assert len(tokens) > 1
    assert b"".join(found) == "\U0001f9a6".encode()
    with pytest.raises(UnicodeDecodeError):
        found[0].decode()
