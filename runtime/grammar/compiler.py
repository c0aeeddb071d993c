"""`Compiler`: grammars made ready for one tokenizer by llguidance, in the thread of whoever asks, and kept.

llguidance (https://github.com/guidance-ai/llguidance) knows a tokenizer by the bytes of its tokens: those that texts
are made of here too, so that a token means the same to both.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.errors import InputError, one_line
from runtime.foreign import failures
from runtime.grammar.given import Grammar
from runtime.grammar.matcher import Allowed, Matcher
from runtime.grammar.schema import prepared

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

# Grammars kept, the latest ones; and texts whose tokens are.
KEPT_GRAMMARS = 32
KEPT_TEXTS = 4096
# Grammars that are compiled at once, so that others have a core left.
AT_ONCE = 2
# What a token's mask may take: items of the parser, some 20 ms of them; and states of the lexer, a kilobyte or two
# each, which stay.
MOST_ITEMS = 20_000
MOST_STATES = 32_768
# All tokens that go on with the text may be chosen, not only those that the tokenizer would make of it.
HEADER = '%llguidance {"no_forcing": true}\n'
# What users call those of these kinds; others are grammars.
NAMES = {"json_schema": "the JSON schema", "regex": "the regular expression"}
MISSING = "llguidance is not installed, and a grammar needs it; install it with: pip install 'hidden-transfer[grammar]'"


@dataclass(frozen=True)
class Vocabulary:
    """What a grammar has to know of a tokenizer: the bytes of each token [V], none for tokens that are no text;
    `special` tokens, whose names are no text either; `stop_tokens`, with which answers end; and `encode`, which makes
    tokens of a text. `changed_first` are tokens whose spaces are lost at a text's beginning.
    """

    tokens: Sequence[bytes]
    special: Collection[int]
    stop_tokens: Sequence[int]
    encode: Callable[[str], list[int]]
    changed_first: Sequence[int] = ()


class Compiler:
    """Compiles grammars for the tokens of one tokenizer, whose `vocabulary` is made when the first one comes.

    Any thread may use it. `seconds` were spent on compiling `compiled` grammars, `refused` among them; `hits` were
    there already.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._make = vocabulary
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(AT_ONCE)
        self._made = threading.Lock()
        self._kept: OrderedDict[Grammar, Matcher] = OrderedDict()
        self._texts: dict[bytes, tuple[int, ...]] = {}
        self.compiled = 0
        self.refused = 0
        self.hits = 0
        self.seconds = 0.0

    def matcher(self, grammar: Grammar) -> Matcher:
        """Return a matcher at the beginning of an answer in `grammar`. Raises `InputError` for a grammar that cannot be
        compiled, or that takes more time or memory than one may.
        """
        with self._lock:
            found = self._kept.get(grammar)
            if found is not None:
                self._kept.move_to_end(grammar)
                self.hits += 1
                return found.copy()
        with self._turns:
            begun = time.perf_counter()
            refused = True
            try:
                found = self._compile(grammar)
                refused = False
            finally:
                with self._lock:
                    self.compiled += 1
                    self.refused += refused
                    self.seconds += time.perf_counter() - begun
        with self._lock:
            self._kept[grammar] = found
            while len(self._kept) > KEPT_GRAMMARS:
                self._kept.popitem(last=False)
            return found.copy()

    def counts(self) -> dict[str, Any]:
        """Return what was counted, as plain data."""
        return {
            "grammars_compiled": self.compiled,
            "grammars_refused": self.refused,
            "grammar_hits": self.hits,
            "grammar_seconds": self.seconds,
        }

    def _compile(self, grammar: Grammar) -> Matcher:
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise InputError(MISSING) from error
        source = HEADER + _lark(grammar)
        with self._made:
            tokenizer = self._tokenizer
        with failures(lambda cause: _unusable(grammar, cause)):
            found = LLMatcher(tokenizer, source, log_level=0, limits=_limits())
        if found.is_error():
            raise _unusable(grammar, _cause(grammar, found.get_error()))
        matcher = Matcher(found, len(self._vocabulary.tokens), self._tokens_of, self._barred)
        # It is needed for the first token in any case, and takes the longest of all.
        if not matcher.allowed().any() or (found.is_stopped() and not found.is_accepting()):
            raise InputError("no text of this model's tokens is in the grammar; give another one")
        return matcher

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return self._make()

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        wrapper: Any = _Wrapper(self._vocabulary)
        return LLTokenizer(wrapper, eos_token=_ends(self._vocabulary))

    @cached_property
    def _barred(self) -> Allowed | None:
        if not self._vocabulary.changed_first:
            return None
        barred = np.zeros(len(self._vocabulary.tokens), dtype=bool)
        barred[list(self._vocabulary.changed_first)] = True
        return barred

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        hidden = {*self._vocabulary.special, *self._vocabulary.stop_tokens}
        found = enumerate(self._vocabulary.tokens)
        return {token: number for number, token in reversed(list(found)) if token and number not in hidden}

    def _tokens_of(self, text: bytes) -> tuple[int, ...]:
        """See `runtime.grammar.matcher.Tokenize`."""
        found = self._texts.get(text)
        if found is None:
            if len(self._texts) >= KEPT_TEXTS:
                self._texts.clear()
            found = self._texts[text] = self._tokenized(text)
        return found

    def _tokenized(self, text: bytes) -> tuple[int, ...]:
        tokens = self._vocabulary.tokens
        whole = text.decode(errors="ignore")
        # Some tokenizers put a space before a text, and none before what follows a line's end.
        for before in ("", "\n"):
            try:
                ids = self._vocabulary.encode(before + whole)
            except InputError:
                break
            spelled = b"".join(tokens[number] for number in ids)
            if before and spelled == before.encode() + text and tokens[ids[0]] == before.encode():
                return tuple(ids[1:])
            if not before and spelled == text:
                return tuple(ids)
        return self._longest(text)

    def _longest(self, text: bytes) -> tuple[int, ...]:
        """Return tokens of `text`, the longest ones first; they end where no token goes on."""
        found: list[int] = []
        start = 0
        while start < len(text):
            ends = range(min(len(text), start + 64), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is None:
                break
            found.append(self._ids[text[start:end]])
            start = end
        return tuple(found)


def _lark(grammar: Grammar) -> str:
    if grammar.kind == "json_schema":
        return f"start: %json {prepared(grammar.text)}"
    if grammar.kind == "regex":
        from llguidance import regex_to_lark

        return f"start: /{regex_to_lark(grammar.text)}/"
    if "%llguidance" in grammar.text:
        raise InputError("a grammar cannot set options with %llguidance; leave them out")
    return grammar.text


def _unusable(grammar: Grammar, cause: str) -> InputError:
    return InputError(f"{NAMES.get(grammar.kind, 'the grammar')} cannot be used: {cause}")


def _cause(grammar: Grammar, error: str) -> str:
    """Return what llguidance says of a grammar, in a line."""
    told = one_line(error)
    if grammar.kind in NAMES:
        # The place is one in a grammar that the user has not written.
        told = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", told)
    # What is wrong with a regular expression is said some lines further down.
    wrong = next((line for line in error.splitlines() if line.startswith("error: ")), "")
    return f"{told} {one_line(wrong.removeprefix('error: '))}" if wrong else told


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(step_max_items=MOST_ITEMS, max_lexer_states=MOST_STATES, verbose_errors=False)


def _ends(vocabulary: Vocabulary) -> list[int]:
    """Return the tokens that end an answer: a number beyond all of them where there are none."""
    return list(vocabulary.stop_tokens) or [len(vocabulary.tokens)]


class _Wrapper:
    """A vocabulary as llguidance takes one."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        ends = _ends(vocabulary)
        hidden = {*vocabulary.special, *ends}
        beyond = [b"</s>"] * (max(ends) + 1 - len(vocabulary.tokens))
        # Without a name a special token is none.
        self.tokens = [
            (text or b"<%d>" % number) if number in hidden else text
            for number, text in enumerate([*vocabulary.tokens, *beyond])
        ]
        self.special_token_ids = sorted(hidden)
        self.eos_token_id = ends[0]

    def __call__(self, text: str) -> list[int]:
        """Return no tokens: with `HEADER` nothing is asked for."""
        return []
