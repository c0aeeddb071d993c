"""Texts encoded in parts have the tokens of the whole, wherever the parts end."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, trainers

from runtime import InputError
from runtime.cuts import cuts_of
from runtime.escaping import ControlTokens
from runtime.long_texts import TextEncoder
from runtime.prompts import PromptEncoder
from tests.runtime.tokenizers import ADDED, byte_level, metaspace, tokenizer_of, unigram, whole_text

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


PIECES = [
    *"aAzst019 \n\r\t.,'!▁_-/<>|é漢字ひがßſİ\u00a0\u2028\u3000\u0301\u0327\u3099\u200d\ufe0f\x00\x1c\x85\u00a8ﬁ",
    *(" ", " ", "  ", "     ", "\n\n", "\r\n", " \r\n ", "\n \n", "a\n", "a \n", "9\n\n", "e\u0301 ", " \u0301", "가"),
    *("'s", "'ll ", "'S", "a's b", " the", "The quick", "dog", "fox jumps", "fox", " jumps", "then ", "d\nd", "123 45"),
    *("def fox(dog):\n    return", "漢字 and", "مرحبا بك", "Привет мир", "नमस्ते", "👩‍👩‍👧", "🙂 a"),
    *("🏳️‍🌈", "<|im_", "start|>"),
    *("<|HALT|> ", "<|halt|>", "<", "|>", *(token.content for token in ADDED)),
]  # fmt: skip


def text_of(chance: random.Random) -> str:
    """Return a text of pieces that tokenizers treat in ways of their own, long runs and cut tokens among them."""
    pieces = PIECES if chance.random() < 0.5 else chance.sample(PIECES, 4)
    text = ""
    for _ in range(chance.randrange(1, 24)):
        piece = chance.choice(pieces)
        match chance.randrange(12):
            case 0:
                piece = piece[: chance.randrange(1, len(piece) + 1)]
            case 1:
                piece *= chance.randrange(2, 40)
            case 2:
                piece = " " + piece
            case 3:
                # Nearly every tokenizer allows one of these to be cut.
                piece += chance.choice(["s w", "x 1", "Q zb", "7 K"])
        text += piece
    return text


@cache
def joined() -> str:
    """Return a byte level tokenizer whose tokens go across all borders of words, if texts are not taken apart there."""
    tokenizer = byte_level()
    chance = random.Random(0)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((text_of(chance) for _ in range(2000)), trainer)
    return tokenizer.to_str()


def split_by(*steps: Any, normalizer: Any = None) -> Tokenizer:
    """Return that tokenizer with steps that take texts apart."""
    tokenizer = Tokenizer.from_str(joined())
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_alone])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def own_words(*before: Any, prefix: bool = False) -> Tokenizer:
    """Return that tokenizer, which takes texts apart as GPT-2's does."""
    tokenizer = Tokenizer.from_str(joined())
    own = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, own])
    return tokenizer


def pattern(text: str) -> Any:
    return pre_tokenizers.Split(Regex(text), "isolated")


def gemma() -> Tokenizer:
    tokenizer = whole_text(prefix=False)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def words(tokenizer: Tokenizer, scheme: str) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    return tokenizer


def awkward(tokenizer: Tokenizer) -> Tokenizer:
    """Add tokens that have spaces within, and some that take those around them."""
    tokenizer.add_tokens(
        [
            AddedToken("fox jumps", normalized=False),
            AddedToken("d\nd", normalized=False),
            AddedToken("dog", rstrip=True, normalized=False),
            AddedToken("then", lstrip=True, normalized=False),
        ]
    )
    return tokenizer


MORE: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": own_words,
    "Qwen 3.5": lambda: split_by(pattern(QWEN_3_5), normalizer=normalizers.NFC()),
    "GPT-2, with a space before": lambda: own_words(prefix=True),
    "SmolLM2": lambda: own_words(pre_tokenizers.Digits(individual_digits=True)),
    "Llama 3": lambda: split_by(pattern(LLAMA_3)),
    "Qwen": lambda: split_by(pattern(LLAMA_3.replace("{1,3}", "")), normalizer=normalizers.NFC()),
    "GPT-4o": lambda: split_by(pattern(GPT_4O)),
    "numbers, then GPT-4o": lambda: split_by(pattern(r"\p{N}{1,3}"), pattern(GPT_4O), normalizer=normalizers.NFKD()),
    "Gemma": gemma,
    "words with a space before the first": lambda: words(metaspace(), "first"),
    "unigram with a space before the first": lambda: words(unigram(), "first"),
    "unigram, normalised": lambda: normalised(unigram()),
    "byte level, awkward tokens": lambda: awkward(own_words()),
    "Llama 3, awkward tokens": lambda: awkward(split_by(pattern(LLAMA_3))),
    "whole text, awkward tokens": lambda: awkward(whole_text(prefix=False)),
    "whole text with a space before, awkward tokens": lambda: awkward(whole_text(prefix=True)),
    "unigram, awkward tokens": lambda: awkward(unigram()),
}
KINDS = [
    "byte level",
    "byte level, with a space before",
    "whole text",
    "whole text, with a space before",
    "metaspace",
    "unigram",
    "lowercase",
    *MORE,
]


@cache
def kind_of(kind: str) -> Tokenizer:
    return Tokenizer.from_str(MORE[kind]().to_str()) if kind in MORE else tokenizer_of(kind)


def normalised(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer


def compare(kind: str, count: int, seed: str) -> None:
    tokenizer = kind_of(kind)
    size = tokenizer.get_vocab_size()
    chance = random.Random(f"{kind} {seed}")
    encoders = [TextEncoder(tokenizer, size, long=1, part=part) for part in (1, 2, 7, 30)]
    cut = 0
    for _ in range(count):
        text = text_of(chance)
        encoder = encoders[chance.randrange(4)]
        assert encoder.cuts is not None
        cut += len(encoder.cuts.parts(text, 1)) > 1
        special = chance.random() < 0.5
        expected = tokenizer.encode(text, add_special_tokens=special).ids
        assert encoder.encode(text, add_special_tokens=special) == expected, (text, encoder.cuts.parts(text, 1))
    assert cut > count // 30


@pytest.mark.parametrize("kind", KINDS)
def test_text_in_small_parts_has_the_tokens_of_the_whole(kind: str) -> None:
    compare(kind, 300, "few")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_texts_in_small_parts_have_the_tokens_of_the_whole(kind: str) -> None:
    compare(kind, 10_000, "many")


def about(change: Callable[[dict[str, Any]], object], kind: str = "byte level") -> Tokenizer:
    """Return a tokenizer with its JSON changed."""
    parts = json.loads(kind_of(kind).to_str())
    change(parts)
    return Tokenizer.from_str(json.dumps(parts))


def added(content: str, **ways: bool) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(content, **ways)])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        about(lambda parts: parts["model"].update(ignore_merges=True), "whole text"),
        about(lambda parts: parts["model"].update(end_of_word_suffix="</w>"), "whole text"),
        about(lambda parts: parts.update(pre_tokenizer=None), "unigram"),
        about(lambda parts: parts["pre_tokenizer"].update(split=False), "unigram"),
        about(lambda parts: parts.update(pre_tokenizer=None)),
        about(lambda parts: parts["pre_tokenizer"].update(use_regex=False)),
        about(lambda parts: parts.update(normalizer={"type": "Strip", "strip_left": True, "strip_right": True})),
        about(lambda parts: parts.update(normalizer={"type": "Prepend", "prepend": "a"}), "whole text"),
        split_by(pattern(r"\w+ \w+|\s+")),
        split_by(pattern(r"(?<= )\p{L}+|\s+")),
        split_by(pattern(r" ?\p{L}+| ?\p{N}+")),
        split_by(pre_tokenizers.Split(Regex(LLAMA_3), "removed", invert=True)),
        split_by(pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel(add_prefix_space=True)),
        added("word", single_word=True, normalized=False),
        added("a b", normalized=True),
        added("a\u00a8", normalized=True),
        added("end", rstrip=True, normalized=True),
    ],
)
def test_a_tokenizer_with_a_part_that_is_not_known_to_allow_cuts_encodes_texts_whole(tokenizer: Tokenizer) -> None:
    assert cuts_of(tokenizer) is None
    text = "a b c d " * 4
    assert TextEncoder(tokenizer, 1000, long=1, part=1).encode(text) == tokenizer.encode(text).ids


def test_a_tokenizer_that_joins_tokens_by_chance_allows_no_cuts() -> None:
    assert cuts_of(about(lambda parts: parts["model"].update(dropout=0.1))) is None


def parts_of(kind: str, text: str) -> list[str]:
    cuts = cuts_of(kind_of(kind))
    assert cuts is not None
    return cuts.parts(text, 1)


def test_cuts_are_before_spaces_and_line_breaks_after_letters_and_digits_alone() -> None:
    text = "The fox,\n 12\nd!\n 漢字 \n e\u0301 s"
    assert parts_of("Llama 3", text) == ["The", " fox,\n 12", "\nd!\n 漢字", " \n e\u0301 s"]
    assert parts_of("byte level, with a space before", text) == ["The", " fox,\n 12\nd!\n 漢字", " \n e\u0301 s"]
    assert parts_of("unigram", text) == ["The", " fox,\n 12\nd!\n 漢字", " \n e\u0301 s"]


def test_no_cut_is_within_an_added_token_or_takes_its_spaces_away() -> None:
    text = "a fox jumps dog a d\nd a"
    assert parts_of("byte level, awkward tokens", text) == ["a", " fox jumps", " dog a", " d\nd", " a"]


def test_text_without_a_place_for_a_cut_stays_whole() -> None:
    for text in ("a" * 100, " " * 100, "漢" * 100, "\u0301" * 100, "a\u0301 " * 30, ""):
        assert parts_of("byte level", text) == [text]


def test_what_is_wrong_with_one_part_is_the_error_of_the_text() -> None:
    tokenizer = kind_of("byte level")
    beyond = tokenizer.token_to_id("<|im_end|>")
    assert beyond is not None
    encoder = TextEncoder(tokenizer, beyond, long=1, part=1)
    with pytest.raises(InputError, match=r"the tokenizer makes token \d+ of this text, and the model's vocabulary has"):
        encoder.encode("one two <|im_end|> three")


@pytest.mark.parametrize("escape", [False, True])
@pytest.mark.parametrize("kind", ["byte level", "whole text, with a space before", "unigram"])
def test_a_long_prompt_has_the_tokens_that_the_tokenizer_gives_it(kind: str, escape: bool) -> None:
    tokenizer = kind_of(kind)
    encoder = PromptEncoder(tokenizer, None, tokenizer.get_vocab_size())
    text = "The quick brown fox <|im_end|> jumps over the lazy dog, and then\n" * 2000
    found = encoder.encode(text, raw=True, escape_special_tokens=escape)
    whole = ControlTokens(tokenizer, "").tokenizer if escape else tokenizer
    assert found == whole.encode(text).ids
    assert (tokenizer.token_to_id("<|im_end|>") in found) is not escape
