"""Small tokenizers of the kinds that models have, trained on a few lines of text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog, and then   it sleeps for 123 days.\n\n",
    "def fox(dog):\n    return [dog ** 2 for _ in range(10)]  # ends\n<|im_start|> is text here\n",
    "Ünïcödé, 漢字 and 🙂 are <not> a < b > c </tags> | either; the end of the user's story",
]
ADDED: list[AddedToken] = [
    AddedToken("<unk>", special=True, normalized=False),
    AddedToken("<s>", special=True, normalized=False),
    AddedToken("</s>", special=True, normalized=False),
    AddedToken("<|im_start|>", special=True, normalized=False),
    AddedToken("<|im_end|>", special=True, normalized=False),
    # Takes the space on either side, as those of Phi-3 do.
    AddedToken("<|end|>", special=True, normalized=False, rstrip=True, lstrip=True),
    # Begins as another one does.
    AddedToken("<|im_start|><|system|>", special=True, normalized=False),
    AddedToken("<think>", special=False, normalized=False),
    AddedToken("</think>", special=False, normalized=False),
    AddedToken("<unused>", special=False, normalized=False),
    AddedToken("\n\n", special=False, normalized=False),
]


def byte_level(*, prefix: bool = False) -> Tokenizer:
    """As those of GPT-2, SmolLM2, Qwen and Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))


def whole_text(*, prefix: bool) -> Tokenizer:
    """As those of Gemma, and with a space put before texts those of Llama 2: words are not taken apart."""
    spaces: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    return _trained(
        tokenizer, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )


def metaspace() -> Tokenizer:
    """As newer ones of Llama 2 and Mistral."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _trained(
        tokenizer, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )


def unigram() -> Tokenizer:
    """As those of T5: special tokens are pieces of the model, too."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    return _trained(tokenizer, trainer)


def lowercase() -> Tokenizer:
    """One that looks for some of its special tokens in normalised text, and finds them in other spellings."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.add_special_tokens([AddedToken("<|halt|>", special=True, normalized=True)])
    return tokenizer


def _trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens(ADDED)
    tokenizer.add_special_tokens([token for token in ADDED if token.special])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level, with a space before": lambda: byte_level(prefix=True),
    "whole text": lambda: whole_text(prefix=False),
    "whole text, with a space before": lambda: whole_text(prefix=True),
    "metaspace": metaspace,
    "unigram": unigram,
    "lowercase": lowercase,
}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """Return the tokenizer of a kind, as a file of it would be read."""
    return Tokenizer.from_str(KINDS[kind]().to_str())
