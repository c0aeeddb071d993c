"""Chat templates as the rest of the runtime sees them: messages go in, a prompt or one clear error comes out."""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.chat.conversation import MOST_CHARACTERS, Message, read_conversation
from runtime.chat.process import ProcessEndedError, TemplateProcess
from runtime.chat.tools import CallFormat, Tool, ToolUse, as_taken, read_tools, tool_use, uses_tools, without_tools
from runtime.errors import EngineFileError, InputError
from runtime.tools.formats import HERMES

# Seconds that a template may take to be compiled, and for each prompt.
SECONDS = 5.0
# When the process is ended that should have ended the template, as a multiple of that.
PATIENCE = 1.2
# Characters of a template; the longest known have some 50,000.
LONGEST_SOURCE = 1 << 20


class InvalidTemplateError(EngineFileError):
    """A template cannot be compiled; `cause` tells why, and where."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"the engine's chat template is not valid: {cause}; export it again")
        self.cause = cause


class ChatTemplate:
    """A compiled chat template. `special_tokens` (`bos_token`, `eos_token`, ...) are variables inside it.

    Templates are foreign code: this one runs in a process of its own, `process` or a new one, for at most `seconds`
    each time. Threads take turns; a process that forks has one for itself. Raises `InvalidTemplateError` for a template
    that cannot be compiled.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str | list[str]],
        *,
        process: TemplateProcess | None = None,
        seconds: float = SECONDS,
    ) -> None:
        if len(source) > LONGEST_SOURCE:
            raise InvalidTemplateError(f"it has {len(source):,} characters, and {LONGEST_SOURCE:,} are allowed")
        self.source = source
        self._seconds = seconds
        # What `transformers` gives a template, too.
        variables = {**special_tokens, "tools": None, "documents": None, "add_generation_prompt": True}
        self._compile = {"source": source, "variables": variables}
        self._process = process
        self._compiled = False
        # What it does with tools, once that has been seen.
        self._tool_use: ToolUse | None = None
        self._lock = threading.Lock()
        _templates.add(self)
        with self._lock:
            self._ready()

    def render(
        self,
        messages: Sequence[Message],
        most_characters: int = MOST_CHARACTERS,
        *,
        tools: Sequence[Tool] | None = None,
        form: CallFormat = HERMES,
    ) -> str:
        """Return the prompt for `messages`, ending where the assistant's answer begins, with `tools` for a template
        that takes them. For one that does not they are described in a system message, and calls in `messages` are
        written in `form`; with None messages are as `transformers` would have them.

        Raises `InputError` when a message lacks `role` or `content` or has what JSON has not, when the template refuses
        the conversation or fails on it, and when it takes more time or memory than it may; `PromptTooLongError` when
        the messages have more than `most_characters`.
        """
        conversation = read_conversation(messages, most_characters)
        functions = read_tools(tools or (), most_characters)
        with self._lock:
            if tools is not None and (functions or uses_tools(conversation)):
                use = self._use()
                if use.takes:
                    conversation = as_taken(conversation, use)
                else:
                    conversation = without_tools(conversation, functions, form, system=use.system)
                    functions = []
            found = self._rendered(conversation, functions)
        if isinstance(found, str):
            return found
        line, cause, refused = found["line"], found["cause"], found["refused"]
        where = "the chat template" if line is None else f"the chat template, line {line},"
        raise InputError(f"{where} {'refuses' if refused else 'cannot render'} this conversation: {cause}")

    @property
    def takes_tools(self) -> bool:
        """Whether the template itself tells a model of tools; for one that does not they are described to it."""
        with self._lock:
            return self._use().takes

    def _use(self) -> ToolUse:
        if self._tool_use is None:

            def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
                found = self._rendered(messages, tools or [])
                return found if isinstance(found, str) else ""

            self._tool_use = tool_use(render)
        return self._tool_use

    def _rendered(self, conversation: Sequence[Any], tools: Sequence[Any]) -> str | dict[str, Any]:
        request = {"messages": conversation, **({"tools": tools} if tools else {})}
        return self._ask(self._ready(), request)

    def _ready(self) -> TemplateProcess:
        """Return a process that has compiled the template."""
        if self._process is None or not self._process.alive:
            self._process, self._compiled = TemplateProcess(), False
        if not self._compiled:
            found = self._ask(self._process, self._compile)
            if isinstance(found, dict):
                line = found["line"]
                raise InvalidTemplateError(found["cause"] if line is None else f"line {line}: {found['cause']}")
            self._compiled = True
        return self._process

    def _ask(self, process: TemplateProcess, request: dict[str, Any]) -> str | dict[str, Any]:
        """Return the text that `process` answers, or a failure: `line`, `cause` and `refused`."""
        about = {**request, "seconds": self._seconds, "most_characters": MOST_CHARACTERS}
        content = json.dumps(about, ensure_ascii=False).encode("utf-8", errors="surrogatepass")
        try:
            answer = process.ask(content, PATIENCE * self._seconds)
        except ProcessEndedError as error:
            cause = f"it takes more than {self._seconds:g} s" if error.expired else error.cause
            return {"line": None, "cause": cause, "refused": False}
        if answer[:1] == b"t":
            return answer[1:].decode()
        failure = json.loads(answer[1:])
        if failure["spent"]:
            process.end()
        return failure

    def _after_fork(self) -> None:
        """Let go of the process that is the parent's, in a child made by a fork."""
        self._process, self._lock = None, threading.Lock()


# Those that a fork copies.
_templates: weakref.WeakSet[ChatTemplate] = weakref.WeakSet()


def _after_fork() -> None:
    for template in list(_templates):
        template._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
