"""Chat templates: Jinja in a sandbox, with the helpers that Hugging Face templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from runtime.errors import EngineFileError, InputError

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled chat template. `special_tokens` (`bos_token`, `eos_token`, ...) are variables inside it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise EngineFileError(f"the engine's chat template is not valid: {error}; export it again") from error
        self._special_tokens = dict(special_tokens)
        self._error = TemplateError

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt for `messages`, ending where the assistant's answer begins.

        Raises `InputError` when a message lacks `role` or `content`, or the template refuses the conversation.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
            raise InputError(f"a conversation must be a list of messages, not {messages!r}")
        if not messages:
            raise InputError("the conversation is empty; give at least one message with 'role' and 'content'")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise InputError(f"message {index} must be a dictionary with 'role' and 'content', not {message!r}")
            missing = [key for key in ("role", "content") if not isinstance(message.get(key), str)]
            if missing:
                raise InputError(f"message {index} needs {missing[0]!r} as a string")
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except self._error as error:
            raise InputError(f"the chat template refuses this conversation: {error}") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Not jinja2's own filter: that one escapes HTML characters, which models have not seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
