"""Prompts to token ids: through the chat template or as they are, and refused early when they cannot fit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from runtime.chat import ChatTemplate, Message
from runtime.chat.conversation import MOST_CHARACTERS, check_characters
from runtime.chat.tools import Tool
from runtime.checks import whole
from runtime.errors import InputError, PromptTooLongError, shown
from runtime.escaping import ControlTokens
from runtime.long_texts import TextEncoder
from runtime.tools import HERMES, ToolFormat

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Tokens(tuple[int, ...]):
    """A prompt as token ids, which are taken as they are."""


# One prompt, and several; and what an answer is expected to be like.
Prompt = str | Sequence[Message] | Tokens
Prediction = str | Tokens
Prompts = Sequence[str] | Sequence[Sequence[Message]] | Sequence[Tokens] | Sequence[Prompt]

# Characters for each token of the context limit, and at least: longer prompts are refused unread. The longest token of
# SmolLM2 has 81.
CHARACTERS_PER_TOKEN = 1024
LEAST_CHARACTERS = 1 << 20
# Characters, likewise, up to which a prompt is encoded whole at once, whatever it holds.
WHOLE_PER_TOKEN = 16
LEAST_WHOLE = 1 << 16
# Characters for each token of the first beginning of a longer one that is looked at.
FIRST_PER_TOKEN = 4
# Tokens at the end of a beginning that the text after it may change, besides a quarter of the limit.
UNSETTLED = 256


class PromptEncoder:
    """Encodes prompts with a tokenizer and a chat template, None for a model without one."""

    def __init__(
        self, tokenizer: Tokenizer, chat: ChatTemplate | None, vocab_size: int, form: ToolFormat = HERMES
    ) -> None:
        self._form = form
        self._tokenizer = tokenizer
        self._texts = TextEncoder(tokenizer, vocab_size)
        self._chat = chat
        self._vocab_size = vocab_size

    def encode(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        escape_special_tokens: bool = False,
        limit: int | None = None,
        tools: Sequence[Tool] | None = None,
    ) -> list[int]:
        """Return the token ids of a prompt: of chat messages, of a string as one user message, or (`raw`, or without a
        chat template) of the string as it is; with `escape_special_tokens` no text in it is a control token. Messages
        may come with `tools`, which the model is told of.

        With a `limit` of tokens, `PromptTooLongError` is raised for a prompt that clearly has more, in a time that
        depends on the limit. Raises `InputError` for what is no prompt, or no text.
        """
        chat = self._chat
        if tools and (isinstance(prompt, Tokens) or raw or chat is None):
            reason = "this model has no chat template" if chat is None else "a prompt that is taken as it is has none"
            raise InputError(f"tools cannot be given ({reason}); leave them out, or give chat messages")
        if isinstance(prompt, Tokens):
            return self._checked(prompt, limit)
        most = MOST_CHARACTERS
        if limit is not None:
            most = min(most, max(LEAST_CHARACTERS, CHARACTERS_PER_TOKEN * limit))
        if isinstance(prompt, str) and (raw or chat is None):
            if limit is not None and len(prompt) > most:
                raise PromptTooLongError(
                    f"the prompt has {len(prompt):,} characters, and the engine's context limit of {limit} tokens "
                    f"allows {most:,}; shorten it"
                )
            texts = self._texts
            if escape_special_tokens and self._control.in_text(prompt):
                texts = self._escaped_texts
            return self._ids(texts, prompt, limit, add_special_tokens=True)
        if raw or chat is None:
            reason = "raw=True takes a string" if raw else "this model has no chat template"
            raise InputError(f"cannot encode chat messages: {reason}; give the prompt as one string")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        marked = self._control.mark(messages, most, tools) if escape_special_tokens else None
        if marked is None:
            text = chat.render(messages, most, tools=tools, form=self._form)
            return self._ids(self._texts, text, limit, add_special_tokens=False)
        text = self._control.resolve(chat.render(marked.messages, tools=marked.tools, form=self._form), marked)
        return self._ids(self._escaped_texts, text, limit, add_special_tokens=False)

    def encode_prediction(self, prediction: Prediction, limit: int) -> list[int]:
        """Return the token ids of what an answer is expected to be like, at most `limit`. Raises `InputError` for more,
        of which no answer would have any, and for what is no text.
        """
        try:
            if isinstance(prediction, Tokens):
                if len(prediction) <= limit:
                    return [whole("each token of a prediction", token, 0, self._vocab_size - 1) for token in prediction]
            elif not isinstance(prediction, str):
                raise InputError(f"prediction must be a string or runtime.Tokens, not {shown(prediction)}")
            elif len(prediction) <= max(LEAST_CHARACTERS, CHARACTERS_PER_TOKEN * limit):
                check_characters(prediction, "prediction")
                ids = self._ids(self._texts, prediction, limit, add_special_tokens=False)
                if len(ids) <= limit:
                    return ids
        except PromptTooLongError:
            pass
        raise InputError(
            f"the prediction has more than {limit} tokens, the engine's context limit, and no answer is as long; "
            "shorten it"
        )

    def _checked(self, tokens: Tokens, limit: int | None) -> list[int]:
        if limit is not None and len(tokens) > limit:
            raise PromptTooLongError(
                f"the prompt has {len(tokens)} tokens, and the engine's context limit is {limit} for prompt and answer "
                "together; shorten the prompt"
            )
        return [whole("each token of a prompt", token, 0, self._vocab_size - 1) for token in tokens]

    def _ids(self, texts: TextEncoder, text: str, limit: int | None, *, add_special_tokens: bool) -> list[int]:
        check_characters(text)
        if limit is not None:
            _check_length(texts, text, limit)
        return texts.encode(text, add_special_tokens=add_special_tokens)

    @cached_property
    def _escaped_texts(self) -> TextEncoder:
        return TextEncoder(self._control.tokenizer, self._vocab_size)

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(self._tokenizer, self._chat.source if self._chat else "")


def _check_length(texts: TextEncoder, text: str, limit: int) -> None:
    """Raise `PromptTooLongError` when the beginning of a long `text` shows that it has more than `limit` tokens.

    What follows a beginning may change its last tokens, those of an unfinished word or added token, and hardly ever
    others. So a few tokens more than the limit prove nothing; a quarter more does.
    """
    if len(text) <= max(LEAST_WHOLE, WHOLE_PER_TOKEN * limit):
        return
    longest = max((len(token.content) for token in texts.tokenizer.get_added_tokens_decoder().values()), default=0)
    enough = limit + limit // 4 + UNSETTLED + longest
    size = FIRST_PER_TOKEN * enough
    while size < len(text):
        count = len(texts.encode(text[:size], add_special_tokens=False))
        if count > enough:
            raise PromptTooLongError(
                f"the prompt has more than {limit} tokens, and the engine's context limit is {limit} for prompt and "
                "answer together; shorten the prompt"
            )
        # As far as the same density needs, and a quarter more.
        size += size // 4 + int(size * min(15.0, 1.25 * (enough - count) / max(count, 1)))
