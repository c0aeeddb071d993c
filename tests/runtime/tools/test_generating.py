"""Tools without a server: the prompt tells of them, and the text has calls that the model's format finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime import InputError, Sampling, Tokens
from tests.runtime.tools.speaking import LLAMA, MISTRAL, PLAIN, QWEN, Speaking

ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}, "b": {"enum": [1, 2]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("template", "special", "name"),
    [
        (PLAIN, (), "hermes"),
        (QWEN, ("<tool_call>", "</tool_call>"), "hermes"),
        (LLAMA, ("<|python_tag|>",), "llama3"),
        (MISTRAL, ("[TOOL_CALLS]",), "mistral"),
        # A template that takes tools and shows no marker has the one that is a token.
        (LLAMA.replace("<|python_tag|>", ""), ("[TOOL_CALLS]",), "mistral"),
        # One that takes none is told of a format that it need not know.
        (PLAIN, ("<|python_tag|>",), "hermes"),
    ],
)
def test_the_format_is_the_one_that_the_template_shows(
    tmp_path: Path, template: str, special: tuple[str, ...], name: str
) -> None:
    with Speaking(tmp_path, template, special).generator as generator:
        assert generator.tool_format.name == name
        assert generator.takes_tools == (template != PLAIN)


@pytest.mark.parametrize("name", ["hermes", "llama3", "mistral"])
def test_calls_are_forced_and_found(tmp_path: Path, name: str) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    with Speaking(tmp_path, PLAIN, tool_format=name).generator as generator:
        forced = Sampling(temperature=1.0, seed=2, grammar=generator.tool_grammar([ADD], name="add"))
        result = generator.generate(HELLO, tools=[ADD], sampling=forced)
        assert result.text == generator.generate(HELLO, tools=[ADD], sampling=forced, speculate=False).text
        assert result.finish_reason == "stop"
        (call,) = generator.tool_format.parse(result.text, ["add"]).calls
        assert call.name == "add"
        assert set(json.loads(call.arguments).values()) <= {1, 2}
        with pytest.raises(InputError, match="there is no tool 'other'"):
            generator.tool_grammar([ADD], name="other")


def test_markers_that_are_special_tokens_are_in_the_text_where_there_are_tools(tmp_path: Path) -> None:
    speaking = Speaking(tmp_path, QWEN, ("<tool_call>", "</tool_call>"))
    with speaking.generator as generator:
        text = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
        speaking.say(text)
        assert generator.generate(HELLO, tools=[ADD]).text == text
        streamed = "".join(chunk.text for chunk in generator.stream(HELLO, tools=[ADD]))
        assert streamed == text
        assert "<tool_call>" not in generator.generate(HELLO).text


def test_tools_are_for_chats(tmp_path: Path) -> None:
    with Speaking(tmp_path).generator as generator:
        assert len(generator.encode("Hello", tools=[ADD])) > len(generator.encode("Hello"))
        for prompt, raw in ((Tokens([1]), False), ("Hello", True)):
            with pytest.raises(InputError, match="tools cannot be given"):
                generator.generate(prompt, raw=raw, tools=[ADD])


def test_a_format_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be one of hermes, llama3, mistral, not 'xml'"):
        Speaking(tmp_path, tool_format="xml")
