"""Text that stays text: messages in which a model's control tokens are spelled out, encoded without those tokens.

A tokenizer finds control tokens wherever their text is: in what a template writes, where they are meant, and in what
users write, where they would end a turn or begin another one. Here each one in a message is *marked* before the
template is rendered, with characters on either side that are in neither. In the prompt, those that are not marked are
the template's own. They are replaced by *aliases*, and the prompt is encoded by a copy of the tokenizer that knows the
same tokens by their aliases alone: to it, `<|im_end|>` is ten characters like any others.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from runtime.chat import Message
from runtime.chat.conversation import read_conversation
from runtime.chat.tools import Tool, read_tools
from runtime.errors import InputError, shown
from runtime.foreign import failures

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Characters that nobody uses: those of a private plane.
PRIVATE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True)
class Marked:
    """Messages and tools in whose texts control tokens stand between two marks, characters that are nowhere else.

    Each token that is there has marks of its own in `marks`; `stop` follows a text that ends as a token begins.
    """

    messages: list[dict[str, Any]]
    marks: dict[str, tuple[str, str]]
    stop: str
    tools: list[dict[str, Any]] | None = None


class ControlTokens:
    """The control tokens of a model: the special ones, and the other added ones that its chat template writes."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        added = tokenizer.get_added_tokens_decoder()
        # Not line breaks and spaces that are tokens: templates have those as ordinary text.
        self.ids = {
            token.content: number
            for number, token in added.items()
            if token.content and (token.special or (token.content in template and not token.content.isspace()))
        }
        self._tokenizer = tokenizer
        self._template = template
        # A token that is looked for in normalised text is found in other spellings, too.
        self._inexact = tokenizer.normalizer is not None and any(
            token.normalized for token in added.values() if token.content in self.ids
        )
        # The longest first, as one token may begin with another.
        self._any = "|".join(re.escape(text) for text in sorted(self.ids, key=len, reverse=True)) or "(?!)"
        self._find = re.compile(self._any)
        self._beginnings = {text[:length] for text in self.ids for length in range(1, len(text))}
        self._longest = max(map(len, self._beginnings), default=0)

    def in_text(self, text: str) -> bool:
        """Return whether `text` may hold one, or the beginning of one at its end."""
        return self._inexact or bool(self._find.search(text)) or self._ends_within(text)

    def _ends_within(self, text: str) -> bool:
        return any(text[-length:] in self._beginnings for length in range(1, min(self._longest, len(text)) + 1))

    def mark(
        self, messages: Sequence[Message], most_characters: int, tools: Sequence[Tool] | None = None
    ) -> Marked | None:
        """Return `messages` and `tools` with the tokens in their texts marked; None when there are none to mark.

        Raises `InputError` as `read_conversation` and `read_tools` do.
        """
        texts: list[str] = []

        def keep(text: str) -> str:
            texts.append(text)
            return text

        plain = read_conversation(messages, most_characters, keep)
        functions = None if tools is None else read_tools(tools, most_characters, keep)
        if not any(map(self.in_text, texts)):
            return None
        free = _unused([self._template, *texts])
        found = {token for text in texts for token in self._find.findall(text)}
        stop, marks = next(free), {token: (next(free), next(free)) for token in found}

        def mark(text: str) -> str:
            marked = self._find.sub(lambda token: f"{marks[token[0]][0]}{token[0]}{marks[token[0]][1]}", text)
            return marked + stop if self._ends_within(text) else marked

        described = None if functions is None else read_tools(functions, change=mark)
        return Marked(read_conversation(plain, change=mark), marks, stop, described)

    def resolve(self, prompt: str, marked: Marked) -> str:
        """Return what `tokenizer` takes for the prompt that the template made of `marked`: without the marks, and with
        aliases in the place of tokens that are not marked.
        """
        marks = [marked.stop, *(mark for pair in marked.marks.values() for mark in pair)]
        for mark in marks:
            for spelled in _spellings(mark):
                prompt = prompt.replace(spelled, mark)
        # Where a template has cut a text in two, one of a token's marks may be gone.
        of_users = [
            f"{start}({re.escape(token)}){end}?|({re.escape(token)}){end}"
            for token, (start, end) in marked.marks.items()
        ]
        pattern = "|".join([*of_users, f"[{''.join(marks)}]", f"(?P<own>{self._any})"])

        def choose(found: re.Match[str]) -> str:
            if found["own"]:
                return self._aliases[found["own"]]
            return next(filter(None, found.groups()), "")

        return re.sub(pattern, choose, prompt)

    @cached_property
    def _aliases(self) -> dict[str, str]:
        # With a number that nobody can guess: a text with an alias in it would be the token.
        number = secrets.token_hex(16)
        return {text: f"\U00100000{number}.{index}\U00100001" for index, text in enumerate(self.ids)}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """A copy of the tokenizer, with the same ids, that knows the control tokens by their aliases alone.

        Raises `InputError` when there can be none.
        """
        from tokenizers import Tokenizer

        with failures(self._unfit):
            copy = Tokenizer.from_str(json.dumps(_renamed(json.loads(self._tokenizer.to_str()), self._aliases)))
        for text, number in self.ids.items():
            if copy.token_to_id(self._aliases[text]) != number or copy.token_to_id(text) is not None:
                raise self._unfit(f"it cannot do without {shown(text)}")
        return copy

    def _unfit(self, cause: str) -> InputError:
        return InputError(
            f"escape_special_tokens cannot be used with this model's tokenizer ({cause}); leave it out, and keep "
            "control tokens out of messages"
        )


def _renamed(about: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return the JSON of a tokenizer with some of its tokens renamed; ids depend on the order alone, which stays."""
    model, added = about["model"], about["added_tokens"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        vocab = {names.get(piece, piece): number for piece, number in vocab.items()}
    else:
        vocab = [[names.get(piece, piece), score] for piece, score in vocab]
    model = {**model, "vocab": vocab}
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in added]
    return {**about, "model": model, "added_tokens": added}


def _unused(texts: Sequence[str]) -> Iterator[str]:
    """Yield characters that are in none of `texts`, nor spelled there. Raises `InputError` when there are no more."""
    used = set().union(*texts)
    for mark in map(chr, PRIVATE):
        if mark not in used and not any(spelled in text for spelled in _spellings(mark) for text in texts):
            yield mark
    raise InputError("the conversation has every private character there is; leave some of them out")


def _spellings(mark: str) -> tuple[str, ...]:
    """Return how a template writes `mark` that quotes values, in JSON or as Python does."""
    return json.dumps(mark)[1:-1], repr(mark)[1:-1]
