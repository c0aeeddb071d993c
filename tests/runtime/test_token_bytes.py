import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders

from runtime.text import TextStream
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


@pytest.mark.parametrize(
    ("kind", "decoder"),
    [
        ("byte level", decoders.ByteLevel()),
        ("byte level, with a space before", decoders.ByteLevel()),
        ("whole text", PIECES),
        ("whole text, with a space before", PIECES),
        ("whole text", decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])),
        ("metaspace", decoders.Metaspace(prepend_scheme="first", split=False)),
        ("unigram", decoders.Metaspace()),
    ],
)
def test_the_text_of_any_tokens_is_their_bytes_but_for_a_first_space_that_is_dropped(kind: str, decoder: Any) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_of(kind).to_str())
    tokenizer.decoder = decoder
    found = TokenBytes(tokenizer)
    special, changed = set(found.special()), set(found.changed_first())
    usual = [token for token in range(tokenizer.get_vocab_size()) if token not in special]
    draw = random.Random(1)
    checked = 0
    for _ in range(2000):
        tokens = [draw.choice(usual) for _ in range(draw.randint(1, 6))]
        if tokens[0] in changed:
            continue
        try:
            text = b"".join(found[token] for token in tokens).decode()
        except UnicodeDecodeError:
            continue
        stream = TextStream(tokenizer)
        assert "".join([*map(stream.push, tokens), stream.finish()]) == text, tokens
        checked += 1
    assert checked > 100
