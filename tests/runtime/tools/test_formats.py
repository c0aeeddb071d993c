"""Calls are found in answers of each format, as they come; what is no call is content, and no text is lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.tools import FORMATS, Call, ParsedAnswer, ToolFormat

NAMES = ("get_weather", "add")
PARIS = '{"city": "Paris", "unit": "celsius"}'
SUM = '{"a": 1, "b": [2, {"c": "}"}]}'


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def hermes(name: str, arguments: str) -> str:
    return f"<tool_call>\n{call(name, arguments)}\n</tool_call>"


TWO = [("get_weather", PARIS), ("add", SUM)]
ONE = TWO[:1]
# The format, an answer, its content, and its calls.
ANSWERS: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", "Hello there. ", "Hello there. ", []),
    ("hermes", hermes(*TWO[0]), "", ONE),
    ("hermes", f"Let me see.\n{hermes(*TWO[0])}\n", "Let me see.", ONE),
    ("hermes", f"{hermes(*TWO[0])}\n{hermes(*TWO[1])}", "", TWO),
    ("hermes", f"A {hermes(*TWO[0])} B {hermes(*TWO[1])} C ", "A B C ", TWO),
    ("hermes", f"<tool_call>{call('get_weather', PARIS)}</tool_call>", "", ONE),
    ("hermes", f"<tool_call>{call('get_weather', PARIS)}", "", ONE),
    ("hermes", f"<tool_call>{call('get_weather', PARIS)}\n</tool_", "", ONE),
    ("hermes", f"<tool_call>{call('get_weather', PARIS, 'parameters')}</tool_call>", "", ONE),
    ("hermes", f'<tool_call>{{"arguments": {PARIS}, "id": 7, "name": "get_weather"}}</tool_call>', "", ONE),
    ("hermes", f'<tool_call>{{"id": [1], "name": "get_weather", "arguments": {PARIS}, "x": "y"}}</tool_call>', "", ONE),
    ("hermes", f"<tool_call>{call('get_weather', json.dumps(PARIS))}</tool_call>", "", ONE),
    ("hermes", f'<tool_call>{{"arguments": {json.dumps(PARIS)}, "name": "get_weather"}}', "", ONE),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "x', "", [("add", '{"a": "x')]),
    ("hermes", f"<tool_call>{call('another', '{}')}</tool_call>", "", [("another", "{}")]),
    ("hermes", f"<tool_call>{call('get_weather', PARIS)} and more</tool_call>", " and more</tool_call>", ONE),
    ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {PARIS} oh', " oh", ONE),
    ("hermes", "a <tool_call> b", "a <tool_call> b", []),
    ("hermes", "a <tool_ca", "a <tool_ca", []),
    ("hermes", f"<tool_call>{{<tool_call>{call('add', SUM)}</tool_call>", "<tool_call>{", [("add", SUM)]),
    (
        "hermes",
        '<tool_call>{"name": "no name", "arguments": {}}',
        '<tool_call>{"name": "no name", "arguments": {}}',
        [],
    ),
    ("hermes", '<tool_call>{"name": "add", "arguments": 5}', '<tool_call>{"name": "add", "arguments": 5}', []),
    ("hermes", '<tool_call>{"name": "add", "arguments": "5"}', '<tool_call>{"name": "add", "arguments": "5"}', []),
    ("hermes", '{"name": "add", "arguments": {}}', '{"name": "add", "arguments": {}}', []),
    ("llama3", "Hello; there.", "Hello; there.", []),
    ("llama3", call("get_weather", PARIS, "parameters"), "", ONE),
    ("llama3", f"\n\n{call('get_weather', PARIS)}", "", ONE),
    ("llama3", f"<|python_tag|>{call('get_weather', PARIS, 'parameters')}", "", ONE),
    ("llama3", f"Well. <|python_tag|>{call('get_weather', PARIS, 'parameters')}", "Well.", ONE),
    ("llama3", f"{call('get_weather', PARIS)}; {call('add', SUM)}", "", TWO),
    ("llama3", f"<|python_tag|>{call('get_weather', PARIS)};{call('add', SUM)};", "", TWO),
    ("llama3", f"{call('get_weather', PARIS)}; thanks", "; thanks", ONE),
    ("llama3", f"{call('get_weather', PARIS)}; {{1}}", "; {1}", ONE),
    ("llama3", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    ("llama3", '<|python_tag|>{"name": "Bob", "parameters": {}}', "", [("Bob", "{}")]),
    ("llama3", '{"age": 5}', '{"age": 5}', []),
    ("llama3", f"It is {call('add', SUM)}", f"It is {call('add', SUM)}", []),
    ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("mistral", "Hello [there].", "Hello [there].", []),
    ("mistral", f"[TOOL_CALLS][{call('get_weather', PARIS)}]", "", ONE),
    ("mistral", f"[TOOL_CALLS] [{call('get_weather', PARIS)}, {call('add', SUM)}]", "", TWO),
    ("mistral", f"Well. [TOOL_CALLS] [{call('get_weather', PARIS)}] Done.", "Well. Done.", ONE),
    ("mistral", f"[TOOL_CALLS] [{call('get_weather', PARIS)}, oh]", " oh]", ONE),
    ("mistral", f"[TOOL_CALLS]{call('get_weather', PARIS)}", "", ONE),
    ("mistral", f"[TOOL_CALLS]get_weather{PARIS}", "", ONE),
    ("mistral", f"[TOOL_CALLS]get_weather{PARIS}[TOOL_CALLS]add{SUM}", "", TWO),
    ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{PARIS}", "", ONE),
    ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]abc123def[ARGS]{PARIS}", "", ONE),
    ("mistral", "[TOOL_CALLS] none today", "[TOOL_CALLS] none today", []),
    ("mistral", "[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
]


def streamed(form: ToolFormat, pieces: Sequence[str]) -> ParsedAnswer:
    parser, found = form.parser(NAMES), ParsedAnswer()
    for piece in pieces:
        found.add(parser.push(piece))
    found.add(parser.finish())
    return found


def split(text: str, places: Sequence[int]) -> list[str]:
    cuts = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(cuts)]


@pytest.mark.parametrize(("form", "text", "content", "calls"), ANSWERS)
def test_calls_and_content_are_told_apart(form: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    found = FORMATS[form].parse(text, NAMES)
    assert found.content == content
    assert [(one.name, one.arguments) for one in found.calls] == calls
    assert streamed(FORMATS[form], list(text)) == found


@pytest.mark.parametrize(("form", "text"), [(form, text) for form, text, _, calls in ANSWERS if calls])
def test_arguments_come_before_the_call_is_over(form: str, text: str) -> None:
    parser = FORMATS[form].parser(NAMES)
    before = ParsedAnswer()
    for character in text[:-1]:
        before.add(parser.push(character))
    assert before.calls and before.calls[-1].arguments


def test_an_escape_is_never_cut_in_two() -> None:
    for arguments in (r'{"a": "\u00e9\ud83d\ude00\\\"\n\\ud83d"}', r'{"a\\": "\ud83d"}'):
        for text in (call("add", arguments), call("add", json.dumps(arguments))):
            parser, pieces, found = FORMATS["hermes"].parser(), [], ParsedAnswer()
            for character in f"<tool_call>{text}":
                told = parser.push(character)
                pieces += [event.text for event in told if hasattr(event, "text")]
                found.add(told)
            assert "".join(pieces) == found.calls[0].arguments == arguments
            if arguments in text:
                assert not [piece for piece in pieces[:-1] if (len(piece) - len(piece.rstrip("\\"))) % 2]


def test_half_a_character_within_a_string_is_text_that_can_be_sent() -> None:
    found = FORMATS["hermes"].parse('<tool_call>{"name": "add", "arguments": "{\\"a\\": \\"\\ud83d\\"}"}')
    assert found.calls[0].arguments == '{"a": "\ufffd"}'
    found.calls[0].arguments.encode()


# Text of which much may be a call, or nearly.
WORDS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[", "]", ",", ";"),
        *("{", "}", '"', ":", "\\", '"name"', '"arguments"', '"parameters"', '"add"', "get_weather", "null", "1"),
        *(" ", "\n", "a", "\u00e9", "\U0001f642", "\\u00e9", "\\ud83d", '{"name": "add", "arguments": {', "<", "\\u"),
        *(call("add", SUM), hermes("add", SUM), call("add", json.dumps(SUM)), json.dumps(SUM)),
    ]
)
HOSTILE = st.one_of(st.lists(WORDS, max_size=24).map("".join), st.text(max_size=60))


@settings(max_examples=400)
@given(st.sampled_from(sorted(FORMATS)), HOSTILE, st.lists(st.integers(0, 10**6), max_size=12))
def test_no_text_raises_or_is_lost_however_it_is_cut(form: str, text: str, places: list[int]) -> None:
    whole = FORMATS[form].parse(text, NAMES)
    assert streamed(FORMATS[form], split(text, places)) == whole
    assert streamed(FORMATS[form], list(text)) == whole
    told = "".join(part.source if isinstance(part, Call) else part for part in whole.parts)
    assert text.startswith(told)
    # What separates calls and follows the last one.
    assert not text[len(told) :].strip(" \t\r\n;")
    assert text[len(told) :] == "" or whole.calls
    for one in whole.calls:
        one.arguments.encode()
        assert one.source


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=6), VALUES, max_size=3)), min_size=1, max_size=3
)


def written(form: str, calls: list[tuple[str, Any]], ascii_only: bool, quoted: bool, indent: int | None) -> str:
    def dumped(arguments: Any) -> str:
        text = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
        return json.dumps(text, ensure_ascii=ascii_only) if quoted else text

    if form == "hermes":
        return "\n".join(hermes(name, dumped(arguments)) for name, arguments in calls)
    if form == "llama3":
        return "; ".join(call(name, dumped(arguments), "parameters") for name, arguments in calls)
    return f"[TOOL_CALLS] [{', '.join(call(name, dumped(arguments)) for name, arguments in calls)}]"


@settings(max_examples=200)
@given(
    st.sampled_from(sorted(FORMATS)),
    CALLS,
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.lists(st.integers(0, 10**6), max_size=12),
)
def test_calls_that_are_well_formed_are_all_found(
    form: str, calls: list[tuple[str, Any]], ascii_only: bool, quoted: bool, indent: int | None, places: list[int]
) -> None:
    text = written(form, calls, ascii_only, quoted, indent)
    found = streamed(FORMATS[form], split(text, places))
    assert [(one.name, json.loads(one.arguments)) for one in found.calls] == calls
    assert found.content == ""


@pytest.mark.parametrize("form", sorted(FORMATS))
@pytest.mark.parametrize(
    "part",
    ["<tool_call>{", '<tool_call>{"a":"', "[TOOL_CALLS][{", "<|python_tag|>{", " ", '{"name": "add",', '"\\'],
)
def test_what_is_nearly_a_call_ten_thousand_times_is_read_to_its_end(form: str, part: str) -> None:
    assert streamed(FORMATS[form], [part] * 10_000).content == part * 10_000
