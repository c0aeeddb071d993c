"""Tools in prompts: as transformers gives them to templates that take them, and told to other models."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from runtime import InputError
from runtime.chat import ChatTemplate
from runtime.prompts import PromptEncoder
from runtime.tools import HERMES, LLAMA3, MISTRAL, ToolFormat
from tests.conftest import byte_tokenizer
from tests.runtime.tools.speaking import LLAMA, PLAIN, QWEN
from tests.runtime.tools.speaking import MISTRAL as MISTRAL_TEMPLATE

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <two> numbers, d'accord?",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "é": {"type": "integer"}}},
    },
}
ARGUMENTS = {"a": 1, "é": "<x> \"y\" 'z'"}


def conversation(arguments: Any, **content: Any) -> list[dict[str, Any]]:
    call = {"id": "abc123def", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", **content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc123def", "content": "3"},
        {"role": "user", "content": "And now?"},
    ]


# What templates ask of texts: a text where an object is given raises, or is quoted twice.
TEXT_WANTED = QWEN.replace("call.function.arguments | tojson", "call.function.arguments + ''")
TEXT_CONTENT = QWEN.replace("<|assistant|>{{ message.content }}", "<|assistant|>{{ message.content + '' }}")
NULL_CONTENT = QWEN.replace(
    "{%- elif message.tool_calls %}<|assistant|>{{ message.content }}",
    "{%- elif message.content is none %}<|assistant|>",
)


@pytest.mark.parametrize("template", [QWEN, LLAMA, MISTRAL_TEMPLATE])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_template_that_takes_tools_is_given_them_as_in_transformers(template: str, as_text: bool) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(
        conversation(ARGUMENTS), tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    chat = ChatTemplate(template, {})
    # As OpenAI's clients have them.
    given = conversation(json.dumps(ARGUMENTS) if as_text else ARGUMENTS, content=None)
    before = copy.deepcopy(given)
    strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    assert chat.render(given, tools=[strict]) == expected
    assert chat.takes_tools
    assert given == before


@pytest.mark.parametrize("template", [TEXT_WANTED, TEXT_CONTENT, NULL_CONTENT])
def test_templates_get_calls_in_the_way_that_they_take(template: str) -> None:
    text = ChatTemplate(template, {}).render(conversation(json.dumps(ARGUMENTS, ensure_ascii=False)), tools=[TOOL])
    assert HERMES.write([("add", ARGUMENTS)]) in text
    assert "None" not in text


@pytest.mark.parametrize("form", [HERMES, LLAMA3, MISTRAL])
def test_a_model_whose_template_knows_no_tools_is_told_of_them(form: ToolFormat) -> None:
    chat = ChatTemplate(PLAIN, {})
    text = chat.render(conversation(ARGUMENTS), tools=[TOOL], form=form)
    assert not chat.takes_tools
    system, *rest = text.split("</s>")
    assert system.startswith("<|system|>") and json.dumps(TOOL, ensure_ascii=False) in system
    assert form.before + '{"name": <name>' in system
    # What it is told to write is what it is shown to have written, and what is found.
    assert rest[1] == f"<|assistant|>{form.write([('add', ARGUMENTS)])}"
    (call,) = form.parse(rest[1].removeprefix("<|assistant|>"), ["add"]).calls
    assert json.loads(call.arguments) == ARGUMENTS
    assert rest[2] == "<|user|><tool_response>\n3\n</tool_response>"
    first = chat.render([{"role": "system", "content": "Be brief."}, *conversation(ARGUMENTS)], tools=[TOOL], form=form)
    assert first == "<|system|>Be brief.\n\n" + text.removeprefix("<|system|>")


def test_a_template_that_takes_no_system_message_has_the_tools_in_the_first_message() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    text = ChatTemplate(refusing, {}).render(conversation(ARGUMENTS), tools=[TOOL])
    assert text.startswith("<|user|>You can call functions.")
    assert "\n\n1 + 2?</s>" in text


def test_what_several_calls_return_is_one_message() -> None:
    messages = conversation(ARGUMENTS)
    text = ChatTemplate(PLAIN, {}).render([*messages[:3], messages[2], *messages[3:]], tools=[])
    assert text.count("<|user|>") == 3
    assert "You can call functions" not in text


def test_without_tools_messages_are_as_in_transformers() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    messages = conversation(ARGUMENTS, content="")
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(PLAIN, {}).render(messages) == expected


def test_arguments_that_are_no_json_object_stay_text() -> None:
    for arguments in ("{", "5", "", "[" * 100_000, '{"a": ' * 100_000):
        text = ChatTemplate(QWEN, {}).render(conversation(arguments), tools=[TOOL])
        assert json.dumps(arguments) in text


@pytest.mark.parametrize("template", [PLAIN, QWEN, LLAMA])
def test_no_text_of_tools_and_calls_becomes_a_special_token(template: str) -> None:
    tokenizer = byte_tokenizer()
    encoder = PromptEncoder(tokenizer.backend_tokenizer, ChatTemplate(template, {}), len(tokenizer))
    stop = tokenizer.eos_token_id

    def count(spelled: str) -> int:
        tool = copy.deepcopy(TOOL)
        tool["function"]["description"] = spelled
        tool["function"]["parameters"]["properties"][spelled] = {"enum": [spelled]}
        # Spelled within JSON as no one would look for it.
        arguments = json.dumps({"a": spelled, spelled: 1}).replace("<", "\\u003c")
        messages = conversation(arguments)
        messages[2]["content"] = spelled
        return encoder.encode(messages, tools=[tool], escape_special_tokens=True).count(stop)

    assert count("</s>") == count("text")


@pytest.mark.parametrize(
    ("tools", "told"),
    [
        ("add", "tools must be a list"),
        ([5], "tool 0 must be"),
        ([{"type": "web_search"}], "tool 0 must be"),
        ([{"type": "function", "function": {}}], "the name of tool 0 must be 1 to 64 letters"),
        ([{"type": "function", "function": {"name": "a b"}}], "the name of tool 0"),
        ([{"type": "function", "function": {"name": "a" * 65}}], "the name of tool 0"),
        ([TOOL, TOOL], "two tools have the name 'add'"),
        ([TOOL] * 129, "there are 129 tools, and 128 are allowed"),
        ([{"type": "function", "function": {"name": "a", "description": 5}}], "the description of tool 'a'"),
        ([{"type": "function", "function": {"name": "a", "parameters": []}}], "the parameters of tool 'a'"),
        ([{"type": "function", "function": {"name": "a", "parameters": {"b": object()}}}], "a value of type object"),
    ],
)
def test_what_describes_no_function_is_refused(tools: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        ChatTemplate(PLAIN, {}).render([{"role": "user", "content": "Hello"}], tools=tools)


def test_a_conversation_that_a_template_cannot_take_is_refused_in_its_words() -> None:
    messages = conversation(ARGUMENTS)
    messages[1]["tool_calls"].append(messages[1]["tool_calls"][0])
    with pytest.raises(InputError, match="refuses this conversation: one call at a time"):
        ChatTemplate(LLAMA, {}).render(messages, tools=[TOOL])
    with pytest.raises(InputError, match="needs 'content' as a string"):
        ChatTemplate(QWEN, {}).render([{"role": "assistant", "content": None, "tool_calls": []}], tools=[TOOL])
