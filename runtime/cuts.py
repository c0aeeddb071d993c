"""Where a text may be cut so that its parts, encoded alone, have the tokens of the whole.

LoPT ("Lossless Parallel Tokenization for Long Prompts") encodes chunks that overlap, and joins them where they agree.
Agreement around one place is no proof for every tokenizer. Here a text is cut only before a space or a line break after
a letter or a digit, and only where the parts of a tokenizer, each of a kind that is known, leave no way for what is on
one side to change the tokens of the other. Nothing overlaps, and nothing has to agree. `cuts_of` has the reasons.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "▁"
# Characters a cut may follow. Every version of Unicode has them as letters and digits, and no normal form or lower case
# makes anything else of them when a space comes next. Those of the second line have no case and do not compose.
ASCII = string.ascii_letters + string.digits
MORE = "".join(map(chr, [*range(0x4E00, 0x9FA6), *range(0x3042, 0x308F)]))

# Alternatives of the regular expressions by which GPT-2, Llama 3, Qwen, Mistral and GPT-4o take texts apart. None looks
# behind, and no match of one has a space or a line break after a letter or a digit.
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ANY_CASE = f"(?i:{'|'.join(_CONTRACTIONS)})"
SPACES = r"\s+"
ALTERNATIVES = {
    *_CONTRACTIONS,
    _ANY_CASE,
    r" ?\p{L}+",
    r" ?\p{N}+",
    r"\p{N}",
    r"\p{N}{1,3}",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    *(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{many}{end}"
        for many in (f"*{_LOWER}+", f"+{_LOWER}*")
        for end in ("", _ANY_CASE + "?")
    ),
    r" ?[^\s\p{L}\p{N}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s*[\r\n]",
    r"\s+(?!\S)",
    SPACES,
}
# Normal forms and lower case: a space and a line break end what they look at, and stay what they are.
CHARACTERWISE = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}
BPE = {
    "type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
    "ignore_merges", "vocab", "merges",
}  # fmt: skip
UNIGRAM = {"type", "unk_id", "vocab", "byte_fallback"}


@dataclass(frozen=True)
class Cuts:
    """Where texts may be cut: at the beginning of a match of `place`. The part after a cut begins `skipped` characters
    later, as the tokenizer itself puts a space before each part.
    """

    place: re.Pattern[str]
    skipped: int = 0

    def parts(self, text: str, size: int) -> list[str]:
        """Return `text` in parts of `size` characters or a little more, much more where it cannot be cut."""
        parts, start = [], 0
        while (found := self.place.search(text, start + size)) is not None:
            parts.append(text[start : found.start()])
            start = found.start() + self.skipped
        return [*parts, text[start:]]


def cuts_of(tokenizer: Tokenizer) -> Cuts | None:
    """Return where `tokenizer` allows cuts, None where it has a part of a kind that is not known to.

    - *Added tokens* are found before all else, from left to right, the longest first. A cut is none where one of them
      has both characters beside it, or ends before it and takes spaces after it.
    - *A tokenizer that takes texts apart* by regular expressions without looking behind, or at each space, does so at
      the cut: on its left the same match ends there, whatever follows; from it on only what follows matters.
    - *BPE of whole texts* joins two tokens only to one of its vocabulary. Where no token has the two characters beside
      the cut next to each other, none is ever made across it, and the merges on either side are in the same order.
      Unigram has no such proof without taking texts apart: sums of scores may round differently.
    """
    about: dict[str, Any] = json.loads(tokenizer.to_str())
    added = about["added_tokens"]
    steps = _steps(about["normalizer"], "normalizers")
    splits = _steps(about["pre_tokenizer"], "pretokenizers")
    model = about["model"]
    if any(token["single_word"] for token in added) or not _plain_ends(about["post_processor"]):
        return None
    # Normalised ones are found in other spellings: none may have anything to do with spaces.
    if any(token["normalized"] and (token["rstrip"] or _spaced(token["content"])) for token in added):
        return None
    if model.get("type") == "BPE":
        if not model.keys() <= BPE or model.get("dropout"):
            return None
    elif model.get("type") != "Unigram" or not model.keys() <= UNIGRAM:
        return None
    before = _before(added)
    if all(step["type"] in CHARACTERWISE for step in steps):
        followers = _taken_apart(splits)
        if followers:
            return _cuts(ASCII + MORE, followers, before)
    if model["type"] == "BPE":
        return _whole_texts(model, steps, splits, added, before)
    return None


def _steps(part: dict[str, Any] | None, of: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or a pre-tokenizer, of sequences within it too."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[of] for step in _steps(inner, of)]


def _plain_ends(part: dict[str, Any] | None) -> bool:
    """Return whether a post-processor does no more than put tokens before and after a text."""
    for step in _steps(part, "processors"):
        if step["type"] == "TemplateProcessing":
            if sum("Sequence" in piece for piece in step["single"]) != 1:
                return False
        elif step["type"] not in {"ByteLevel", "RobertaProcessing", "BertProcessing"}:
            return False
    return True


def _spaced(content: str) -> bool:
    """Return whether a token has a space anywhere but at its beginning."""
    # Some characters become a space and a mark.
    texts = content[1:], unicodedata.normalize("NFKC", content)[1:]
    return any(character.isspace() or character == SPACE for text in texts for character in text)


def _before(added: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Return the characters that a cut before a space, and before a line break, may not follow for added tokens."""
    ends = {token["content"][-1:] for token in added if token["rstrip"]}
    return {
        follower: ends.union(*(re.findall(f"(?s)(?=(.){follower})", token["content"]) for token in added))
        for follower in " \n"
    }


def _cuts(characters: str, followers: str, before: dict[str, set[str]]) -> Cuts:
    places = []
    for follower in followers:
        allowed = "".join(character for character in characters if character not in before[follower])
        places.append(f"(?<=[{re.escape(allowed)}]){follower}" if allowed else "(?!)")
    return Cuts(re.compile("|".join(places)))


def _taken_apart(splits: list[dict[str, Any]]) -> str:
    """Return which of a space and a line break begin a new part of a text after each letter and digit."""
    followers = ""
    for place, split in enumerate(splits):
        match split:
            case {"type": "Digits"}:
                # Digits are taken out of what has spaces, which the next one takes apart.
                pass
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                alternatives = _alternatives(pattern)
                if not alternatives <= ALTERNATIVES:
                    return ""
                if SPACES in alternatives:
                    followers = " \n"
            case {"type": "ByteLevel", "use_regex": bool(own), "add_prefix_space": bool(prefix)}:
                # With a space put before each part, whatever is before it in the text.
                if prefix and place:
                    return ""
                if own:
                    followers = " \n"
                if prefix:
                    followers = followers.replace("\n", "")
            case {"type": "Metaspace", "replacement": "▁", "split": True} if len(splits) == 1:
                # Puts a space only before what begins with none.
                return " "
            case _:
                return ""
    return followers


def _alternatives(pattern: str) -> set[str]:
    """Return the alternatives of a regular expression."""
    found, depth, start, inside, place = [], 0, 0, False, 0
    while place < len(pattern):
        character = pattern[place]
        if character == "\\":
            place += 1
        elif inside:
            inside = character != "]"
        elif character == "[":
            inside = True
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character == "|" and not depth:
            found.append(pattern[start:place])
            start = place + 1
        place += 1
    return {*found, pattern[start:]}


def _whole_texts(
    model: dict[str, Any],
    steps: list[dict[str, Any]],
    splits: list[dict[str, Any]],
    added: list[dict[str, Any]],
    before: dict[str, set[str]],
) -> Cuts | None:
    """Return the cuts of BPE that joins tokens across words, with a sign for the space."""
    if model["ignore_merges"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return None
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepended = {"type": "Prepend", "prepend": SPACE}
    # Gemma takes texts apart at spaces, of which none are left.
    nothing = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    match splits:
        case [{"type": "Metaspace", "replacement": "▁", "split": False}] if not steps:
            prefix = False
        case [] | [_] if splits in ([], [nothing]) and steps in ([replaced], [prepended, replaced]):
            prefix = steps[0] == prepended
        case _:
            return None
    vocab = model["vocab"]
    if SPACE not in vocab:
        return None
    inside = {pair for token in vocab for pair in re.findall(f"(?s)(?=(.){SPACE})", token)}
    allowed = "".join(one for one in ASCII if one in vocab and one not in inside and one not in before[" "])
    if not allowed:
        return None
    if not prefix:
        return Cuts(re.compile(f"(?<=[{allowed}]) "))
    # The space that is put before the next part stands for the one that is left out, if that is no token's and no
    # token is found first.
    firsts = {token["content"][:1] for token in added}
    after = "".join(one for one in ASCII if one not in firsts)
    if not after or firsts & {" ", SPACE}:
        return None
    return Cuts(re.compile(f"(?<=[{allowed}]) (?=[{after}])"), skipped=1)
