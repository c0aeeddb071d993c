"""An engine's tokenizer: what its library does, whatever it is, is text, tokens, or one error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers

from runtime import EngineFileError, Generator, InputError
from runtime.bundle.engine_file import FileRecord
from runtime.foreign import failures
from runtime.text import TextStream
from runtime.tokenizer import DecodedStream, decode, encode, parse_tokenizer
from tests.conftest import byte_tokenizer
from tests.runtime.conftest import change

VOCAB = 264
# Matching it against many letters and something else takes so many tries that the library gives up.
ENDLESS = Regex("(a+)+$")
HOPELESS = "a" * 28 + "!"


def whole() -> Tokenizer:
    return byte_tokenizer().backend_tokenizer


def changed(**parts: Any) -> bytes:
    """Return the byte tokenizer with other parts."""
    return json.dumps({**json.loads(whole().to_str()), **parts}).encode()


def parsed(content: bytes) -> Tokenizer:
    return parse_tokenizer(content, "tokenizer.json", VOCAB)


def giving_up() -> Tokenizer:
    """Return the byte tokenizer with regular expressions that no text with many letters a comes through."""
    tokenizer = whole()
    words = pre_tokenizers.Split(ENDLESS, "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(ENDLESS, "a")])
    return parsed(tokenizer.to_str().encode())


def test_text_becomes_tokens_and_text_again() -> None:
    tokenizer = parsed(whole().to_str().encode())
    ids = encode(tokenizer, "漢字 <s> é", VOCAB)
    assert ids == whole().encode("漢字 <s> é").ids
    assert decode(tokenizer, ids) == "漢字  é"
    stream = DecodedStream(tokenizer)
    assert "".join(stream.step(token) or "" for token in ids) == "漢字  é"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"null",
        b"{}",
        b"[" * 100_000,
        changed(model={"type": "other"}),
        changed(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
        changed(model={"type": "BPE", "vocab": {"a": 10**30}, "merges": []}),
        changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}),
        changed(model={"type": "Unigram", "unk_id": 0, "vocab": []}),
        changed(normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
        # The library panics.
        changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ],
    ids=lambda content: repr(content[-60:]),
)
def test_what_is_no_tokenizer_is_one_clear_error(content: bytes) -> None:
    with pytest.raises(EngineFileError, match=r"tokenizer\.json is not a valid tokenizer\.json \(.*; export") as raised:
        parsed(content)
    assert "\n" not in str(raised.value)


def added(special: bool) -> list[dict[str, Any]]:
    tokenizer = whole()
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([f"<extra {number}>" for number in range(4)])
    return json.loads(tokenizer.to_str())["added_tokens"]


@pytest.mark.parametrize(
    ("content", "token"),
    [
        (changed(model={"type": "BPE", "vocab": {"a": 0, "b": VOCAB}, "merges": []}, added_tokens=[]), VOCAB),
        (changed(model={"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}, added_tokens=[]), 2**32 - 1),
        (changed(added_tokens=added(special=False)), VOCAB),
        (changed(added_tokens=added(special=True)), VOCAB),
    ],
    ids=["in the model", "far beyond", "added", "special"],
)
def test_tokens_beyond_the_vocabulary_are_refused(content: bytes, token: int) -> None:
    with pytest.raises(
        EngineFileError, match=rf"it has token {token}, '.*', and the model's vocabulary has {VOCAB} tok"
    ):
        parsed(content)
    parse_tokenizer(content, "tokenizer.json", token + 1)


def test_a_vocabulary_may_be_larger_than_the_tokenizer() -> None:
    assert encode(parse_tokenizer(whole().to_str().encode(), "here", 10**6), "a", 10**6) == whole().encode("a").ids


def test_a_token_put_around_a_text_must_be_of_the_vocabulary() -> None:
    around = {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", VOCAB]}
    tokenizer = parsed(changed(post_processor=around))
    with pytest.raises(InputError, match=rf"token {VOCAB} of this text, and the model's vocabulary has {VOCAB} tokens"):
        encode(tokenizer, "a", VOCAB)
    assert encode(tokenizer, "a", VOCAB, add_special_tokens=False) == whole().encode("a").ids


def test_prompts_are_neither_cut_nor_filled_up() -> None:
    cut = {"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    filled = {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    assert len(encode(parsed(changed(truncation=cut, padding=filled)), "five!", VOCAB)) == 5


def test_a_text_that_the_library_gives_up_on_is_one_clear_error_and_the_next_is_encoded() -> None:
    tokenizer = giving_up()
    with pytest.raises(InputError, match=r"cannot encode this text \(.*retry-limit-in-match over\); change the text"):
        encode(tokenizer, HOPELESS, VOCAB)
    assert encode(tokenizer, "hello", VOCAB) == whole().encode("hello").ids


def test_tokens_that_the_library_gives_up_on_are_one_clear_error() -> None:
    tokenizer = giving_up()
    ids = whole().encode(HOPELESS).ids
    with pytest.raises(InputError, match=r"cannot decode these tokens \(.*retry-limit-in-match over\)"):
        decode(tokenizer, ids)
    text = TextStream(tokenizer)
    with pytest.raises(InputError, match="cannot decode these tokens"):
        for token in ids:
            text.push(token)
    assert decode(tokenizer, whole().encode("hello").ids) == "hello"


def test_a_text_with_what_the_tokenizer_does_not_know_is_one_clear_error() -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    tokenizer = parsed(changed(model=model, added_tokens=[], pre_tokenizer=None))
    with pytest.raises(InputError, match="cannot encode this text"):
        encode(tokenizer, "b", VOCAB)


@pytest.mark.parametrize("tokens", [[-1], [2**32], [2**70], ["a"], [None], [1.5], 3])
def test_what_is_no_token_is_one_clear_error(tokens: Any) -> None:
    with pytest.raises(InputError, match="cannot decode these tokens"):
        decode(whole(), tokens)


def raises(error: type[BaseException]) -> Callable[[], None]:
    def run() -> None:
        with failures(InputError):
            raise error("cause")

    return run


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interruption_stays_one(error: type[BaseException]) -> None:
    with pytest.raises(error):
        raises(error)()


def test_a_generator_with_a_tokenizer_that_gives_up_refuses_the_text_alone(engine_copy: Path) -> None:
    path = engine_copy.with_name("engine.tokenizer.json")
    path.write_text(giving_up().to_str())
    record = FileRecord.of(path)
    change(engine_copy, tokenizer=vars(record))
    generator = Generator(engine_copy, threads=1, adapt=False)
    for raw in (True, False):
        with pytest.raises(InputError, match="cannot encode this text"):
            generator.generate(HOPELESS, raw=raw)
    assert generator.generate("hello", max_new_tokens=2).tokens
    with pytest.raises(InputError, match="cannot decode these tokens"):
        generator.decode(whole().encode(HOPELESS).ids)


def test_a_generator_with_a_tokenizer_of_another_vocabulary_is_refused(engine_copy: Path) -> None:
    path = engine_copy.with_name("engine.tokenizer.json")
    path.write_bytes(changed(added_tokens=added(special=True)))
    change(engine_copy, tokenizer=vars(FileRecord.of(path)))
    with pytest.raises(
        EngineFileError, match=rf"engine\.tokenizer\.json .* token {VOCAB}, .*; export the engine again"
    ):
        Generator(engine_copy)
