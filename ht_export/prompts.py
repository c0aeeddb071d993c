"""Prompts: conversations of user turns, read from JSON lines, without duplicates, and encoded for a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from ht_export.foreign import foreign_code
from ht_export.formats import LinesFormat
from runtime.chat import ChatTemplate, InvalidTemplateError
from runtime.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


@dataclass(frozen=True)
class Conversation:
    """The user's turns of one conversation, in order; the base model's answers go between them."""

    id: str
    task: str
    turns: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The words of each turn, whatever their case and the space between them: duplicates have the same ones."""
        return tuple(" ".join(turn.split()).casefold() for turn in self.turns)


@dataclass(frozen=True)
class _Line:
    """A line of a file of prompts; `prompt`, where it says anything, goes before `turns`."""

    prompt: str | None = None
    turns: list[str] | None = None
    messages: Any = None
    id: str | int | float | bool | None = None
    task: str | int | float | bool = ""

    def __post_init__(self) -> None:
        if not self.said or not all(turn.strip() for turn in self.said):
            told = "" if self.messages is None else ", and 'messages' are not read: give the user's as 'turns'"
            raise ValueError(f"it needs 'prompt' (a string) or 'turns' (a list of strings), not empty{told}")

    @property
    def said(self) -> tuple[str, ...]:
        return (self.prompt,) if self.prompt else tuple(self.turns or ())


PROMPTS = LinesFormat(
    "prompt",
    most_bytes=1 << 24,
    remedy="give a JSON-lines file with a 'prompt', or 'turns', on each line",
    kind=_Line,
)


def read_conversations(path: Path) -> list[Conversation]:
    """Read a JSON-lines file of prompts: each line has `prompt` (a string) or `turns` (a list of strings).

    Optional fields: `id`, `task`. Raises `InputError` with the line number of the first line that does not fit.
    """
    if not path.is_file():
        raise InputError(f"no prompts file at {path}; give a JSON-lines file with a 'prompt' on each line")
    conversations = [
        Conversation(str(number if line.id is None else line.id), str(line.task), line.said)
        for number, line in PROMPTS.lines(path)
    ]
    if not conversations:
        raise InputError(f"{path} holds no prompts")
    return conversations


def without_duplicates(
    conversations: Iterable[Conversation], excluded: Iterable[Conversation] = (), max_turns: int | None = None
) -> list[Conversation]:
    """Return the first of each group of duplicates, leaving out those that begin as one of `excluded` does.

    Only the first `max_turns` turns count.
    """
    first_turns = {conversation.words[0] for conversation in excluded}
    seen: set[tuple[str, ...]] = set()
    kept = []
    for conversation in conversations:
        words = conversation.words[:max_turns]
        if words not in seen and words[0] not in first_turns:
            seen.add(words)
            kept.append(conversation)
    return kept


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` of `items`, or all if there are fewer, spread evenly over them."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def encode_chat(tokenizer: PreTrainedTokenizerBase, turns: Iterable[str], answers: Iterable[str] = ()) -> list[int]:
    """Return the ids of a conversation up to where the model speaks: `turns` with an answer after each but the last.

    In the model's chat template, which is rendered as the runtime does; without one, the bare texts follow each other.
    Raises `InputError` when the template cannot be compiled, or does not take the conversation, and when there is no
    token in it.
    """
    turns, answers = list(turns), list(answers)
    template = chat_template(tokenizer)
    if template is None:
        parts = [part for pair in zip(turns, answers, strict=False) for part in pair] + turns[len(answers) :]
        text = "".join(parts)
    else:
        text = _rendered(template, turns, answers)
    with foreign_code("the model's tokenizer cannot encode a text", "give a checkpoint with another tokenizer"):
        ids = list(tokenizer(text, add_special_tokens=template is None).input_ids)
    if not ids:
        raise InputError(
            f"a conversation of {len(turns)} turns has no token for this model; give other prompts, or a checkpoint "
            "with another chat template"
        )
    return ids


def _rendered(template: ChatTemplate, turns: Sequence[str], answers: Sequence[str]) -> str:
    messages = []
    for index, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn})
        if index < len(answers):
            messages.append({"role": "assistant", "content": answers[index]})
    try:
        return template.render(messages)
    except InputError as error:
        raise InputError(f"a conversation of {len(turns)} turns: {error}") from error


# By tokenizer: a template has a process, which ends with its tokenizer.
_templates: WeakKeyDictionary[PreTrainedTokenizerBase, ChatTemplate] = WeakKeyDictionary()


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Return the chat template of `tokenizer`, None without one. Raises `InputError` when it cannot be compiled."""
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        return None
    template = _templates.get(tokenizer)
    if template is None or template.source != source:
        special = {
            name: [str(token) for token in tokens] if isinstance(tokens, list) else str(tokens)
            for name, tokens in tokenizer.special_tokens_map.items()
        }
        try:
            template = _templates[tokenizer] = ChatTemplate(source, special)
        except InvalidTemplateError as error:
            raise InputError(f"the model's chat template is not valid: {error.cause}") from error
    return template
