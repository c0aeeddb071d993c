"""Parts of tokenizers that a hostile one may have anywhere."""

from __future__ import annotations

from typing import Any

PARTS: tuple[Any, ...] = (
    *(
        {"Regex": pattern}
        for pattern in ("(a+)+$", "(a|a)*b", "(?<=a*)b", "(", "a{1000}{1000}", "", "\\p{X}", "(?i)\\1", "a*?")
    ),
    *(
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in ("", "a", "(a*)*b")
    ),
    *(
        {"type": "Replace", "pattern": {"String": old}, "content": new}
        for old, new in (("", "x"), ("a", "a" * 9999), ("o", ""))
    ),
    {
        "type": "Sequence",
        "normalizers": [{"type": "NFD"}, {"type": "Prepend", "prepend": "x" * 99}, {"type": "Lowercase"}],
    },
    {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "Whitespace"}]},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Metaspace", "replacement": "x", "prepend_scheme": "always", "split": True},
    {"type": "ByteFallback"},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    {"type": "Strip", "content": "H", "start": 2**63, "stop": 2**63},
    {"type": "Fuse"},
    {"type": "BPEDecoder", "suffix": ""},
    {"type": "WordPiece", "prefix": "", "cleanup": True},
    {"type": "BPE", "vocab": {"H": 0, "e": 1, "He": 300}, "merges": [["H", "e"]]},
    {"type": "BPE", "vocab": {"H": 0}, "merges": [["H", "e"]], "dropout": 0.5, "unk_token": "?", "byte_fallback": True},
    {"type": "WordLevel", "vocab": {"Hello": 2**32 - 1}, "unk_token": "x"},
    {"type": "WordPiece", "vocab": {}, "unk_token": "", "continuing_subword_prefix": "", "max_input_chars_per_word": 0},
    {"type": "Unigram", "unk_id": 7, "vocab": [["H", float("-inf")], ["e", float("nan")]], "byte_fallback": False},
    {"type": "Unigram", "unk_id": 0, "vocab": [["", 0.0], ["<s>", -1e308], ["H", 1e308]]},
    {"max_length": 0, "stride": 5, "strategy": "LongestFirst", "direction": "Right"},
    {
        "strategy": {"Fixed": 2**40},
        "direction": "Left",
        "pad_to_multiple_of": 0,
        "pad_id": 9999,
        "pad_type_id": 0,
        "pad_token": "",
    },
    {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "z", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
    {
        "id": 263,
        "content": "",
        "single_word": True,
        "lstrip": True,
        "rstrip": True,
        "normalized": True,
        "special": True,
    },
    {
        "id": 5,
        "content": "a",
        "single_word": True,
        "lstrip": True,
        "rstrip": True,
        "normalized": True,
        "special": False,
    },
)
