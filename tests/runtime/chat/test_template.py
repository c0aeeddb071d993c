import datetime as dt
import enum
import json
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.chat import ChatTemplate
from runtime.chat.conversation import read_conversation
from runtime.chat.worker import make_environment, render
from runtime.errors import EngineFileError, InputError, PromptTooLongError
from tests.conftest import CHAT_TEMPLATE, byte_tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be <b>brief</b> & kind"}, {"role": "user", "content": "é\n\n 'x' \"y\" 漢字 🙂"}],
    [
        {"role": "user", "content": "2 + 2?", "name": None},
        {"role": "assistant", "content": "4", "reasoning": "Two and two.", "tool_calls": None},
        {"role": "tool", "content": "", "extra": {"list": [1, 2.5, None, True, {"a": []}], "e": 1e300, "b": 2**70}},
    ],
]
WITH_HELPERS = """
{%- for message in messages %}
    {%- if loop.index > 5 %}{% break %}{% endif %}
    {{ message | tojson }}
    {{- message | tojson(indent=2, sort_keys=true, separators=(',', ': '), ensure_ascii=true) }}
{% endfor %}{{ eos_token }}"""
# Tools and documents are none, and defined.
WITH_OPTIONS = """
{%- if tools is defined and tools is none and documents is none %}none{% endif %}
{%- set ns = namespace(last=dict(a=1).a, all=dict.fromkeys('ab', 2)) %}
{%- for message in messages %}{% set ns.last = message %}{% endfor %}
{%- for key in ns.last %}{{ key }}={{ ns.last[key] }};{% endfor %}{{ ns.all }}
{%- for message in messages if message.reasoning_content is defined %}
{{ message.thinking }} {{ message.reasoning_content }} {{ message.reasoning }}
{%- endfor %}"""
WITH_GENERATION = """
{%- for message in messages %}
{% if message.role == 'assistant' %}{% generation %}
    {{ message.content }}{{ eos_token }}
{% endgeneration %}{% else %}{{ message.content }}{% endif %}
{%- endfor %}"""


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, WITH_HELPERS, WITH_OPTIONS, WITH_GENERATION])
def test_templates_render_as_in_transformers(template: str, messages: list) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    assert ChatTemplate(template, special).render(messages) == expected


# An expression for each filter and each test of Jinja; some import what they need when they run.
FILTERS = {
    "abs": "-1|abs",
    "attr": "(text|attr('upper'))()",
    "batch": "list|batch(2, 0)|list",
    "capitalize": "text|capitalize",
    "center": "text|center(40)",
    "count": "list|count",
    "d": "none_such|d('x')",
    "default": "none_such|default('x')",
    "dictsort": "dict(b=1, a=2)|dictsort",
    "e": "html|e",
    "escape": "html|escape",
    "filesizeformat": "123456|filesizeformat",
    "first": "list|first",
    "float": "'1.5'|float",
    "forceescape": "html|forceescape",
    "format": "'%s-%05d'|format('a', 3)",
    "groupby": "messages|groupby('role')",
    "indent": "text|indent(2, true)",
    "int": "'0x1f'|int(base=16)",
    "items": "dict(a=1)|items|list",
    "join": "list|join(', ')",
    "last": "list|last",
    "length": "text|length",
    "list": "'abc'|list",
    "lower": "text|lower",
    "map": "messages|map(attribute='role')|list",
    "max": "list|max",
    "min": "list|min",
    "pprint": "messages|pprint",
    "random": "[1]|random",
    "reject": "list|reject('odd')|list",
    "rejectattr": "messages|rejectattr('role', 'equalto', 'user')|list",
    "replace": "text|replace('e', 'E')",
    "reverse": "text|reverse",
    "round": "1.55|round(1, 'floor')",
    "safe": "html|safe",
    "select": "list|select('odd')|list",
    "selectattr": "messages|selectattr('role', 'equalto', 'user')|list",
    "slice": "list|slice(2)|list",
    "sort": "list|sort(reverse=true)",
    "string": "1|string",
    "striptags": "html|striptags",
    "sum": "list|sum",
    "title": "text|title",
    "tojson": "messages|tojson",
    "trim": "text|trim",
    "truncate": "text|truncate(9)",
    "unique": "list|unique|list",
    "upper": "text|upper",
    "urlencode": "'a b/é'|urlencode",
    "urlize": "'see https://example.com/x.'|urlize",
    "wordcount": "text|wordcount",
    "wordwrap": "text|wordwrap(10)",
    "xmlattr": "dict(a='<')|xmlattr",
}
OPERANDS = {
    **dict.fromkeys(("==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "le"), ", 2"),
    **dict.fromkeys(("lessthan", "lt", "ne", "divisibleby", "sameas"), ", 2"),
    "in": ", [1]",
}


def test_every_filter_and_test_of_jinja_is_there_within_the_limits() -> None:
    environment = make_environment()
    assert set(environment.filters) == set(FILTERS)
    lines = [
        "{% set text = ' Once upon a time,\n there was an e ' %}{% set list = [3, 1, 2, 3] %}",
        "{% set html = '<a href=\"x\">&eacute;&#39;</a>' %}",
        *(f"{name}: {{{{ {expression} }}}}" for name, expression in FILTERS.items()),
        *(f"{name}: {{{{ [1]|select('{name}'{OPERANDS.get(name, '')})|list }}}}" for name in environment.tests),
        "{{ strftime_now('%Y %j') }}{{ lipsum(n=1)|length > 0 }}{{ cycler('a', 'b').next() }}{{ joiner(',')() }}",
        r"{{ 'Ünïcödé é \x41 A\u00e9'.encode('utf-8') }}{{ '%.3f'|format(2/3) }}{{ '{:>9,}'.format(12345) }}",
    ]
    source = "\n".join(lines)
    variables = {"messages": CONVERSATIONS[1], "tools": None, "documents": None, "add_generation_prompt": True}
    expected = render(environment.from_string(source), variables, 1 << 20)
    assert ChatTemplate(source, {}).render(CONVERSATIONS[1]) == expected


# What a template does wrong, and what the error says of it.
WRONG = {
    "refuses": ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
    "refuses with a number": ("{{ raise_exception(5) }}", "refuses this conversation: 5"),
    "refuses at length": ("{{ raise_exception('ab\nc' * 100000) }}", "refuses this conversation: ab cab cab"),
    "reaches into Python": ("{{ messages.__class__.__mro__ }}", "refuses .*access to attribute '__class__'"),
    "reaches into Python by a format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "refuses .*'__class__'"),
    "reaches into Python by a function": ("{{ cycler.__init__.__globals__ }}", "refuses .*'__init__'"),
    "reaches into a namespace": ("{% set ns = namespace(__class__=1) %}", "refuses .*'__class__'"),
    "changes messages": ("{{ messages.append(1) }}", "refuses .*'append' of 'list' object is unsafe"),
    "has another type": ("{{ 'a' + 1 }}", "cannot render .*TypeError: can only concatenate"),
    "has nothing": ("{{ nothing.at.all }}", "refuses .*'nothing' is undefined"),
    "divides by zero": ("{{ 1 / 0 }}", "cannot render .*ZeroDivisionError: division by zero"),
    "includes a file": ("{% include '/etc/passwd' %}", "cannot render .*no loader"),
    "calls itself": ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(0) }}", "calls itself, too deeply"),
    "calls itself twice": ("{% macro g(n) %}{{ g(n) }}{{ g(n) }}{% endmacro %}{{ g(0) }}", "calls itself, too deeply"),
    "calls its loop": ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "calls itself, too deeply"),
    "makes a wide number": ("{{ '%1000000000d' % messages|length }}", "needs more than 512 MiB of memory"),
    "makes a wide text": ("{{ 'a'.center(10**10) }}", "needs more than 512 MiB of memory"),
    "indents": ("{{ 'a\nb'|indent(10**9) }}", "needs more than 512 MiB of memory"),
    "joins": ("{{ (['aaaaaaaa'] * 90000000)|join('bbbbbbbb') }}", "needs more than 512 MiB of memory"),
    "replaces": ("{{ (messages[0].role * 4000000).replace('u', 'b' * 1000) }}", "needs more than 512 MiB of memory"),
    "doubles": (
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "needs more than 512 MiB of memory",
    ),
    "writes on": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}",
        "writes more than 16,777,216 characters",
    ),
    "writes much at once": ("{{ messages[0].role * 100000000 }}", "writes more than 16,777,216 characters"),
    "counts far": ("{{ range(10**9)|list }}", "Range too big"),
    "writes a long number": ("{{ 10 ** (messages|length * 5000) }}", "cannot render .*ValueError"),
}


@pytest.fixture(scope="module")
def wrong() -> ChatTemplate:
    """A template that does one of the things above, on the line of its place there, as the first message asks."""
    lines = [
        f"{{% if messages[0].content == '{name}' %}}{source.replace(chr(10), ' ')}{{% endif %}}"
        for name, (source, _) in WRONG.items()
    ]
    return ChatTemplate("\n".join([*lines, "{{ messages[0].content }}"]), {})


@pytest.mark.parametrize("name", WRONG)
def test_what_a_template_does_wrong_is_one_error_with_its_line_and_the_next_prompt_is_rendered(
    wrong: ChatTemplate, name: str
) -> None:
    line = list(WRONG).index(name) + 1
    with pytest.raises(InputError, match=f"^the chat template, line {line}, .*{WRONG[name][1]}") as caught:
        wrong.render([{"role": "user", "content": name}])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert wrong.render(HELLO).strip() == "Hello"


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", ", line 2,"),
        ("{{ (9 * messages|length) ** (9 ** 9) }}", ", line 2,"),
        # One long operation, which nothing within the process interrupts: the process itself is ended.
        ("{{ ([[1] * 100 * messages|length] * 40000)|sum(start=[]) }}", ""),
    ],
)
def test_a_template_that_takes_long_is_ended(source: str, where: str) -> None:
    template = ChatTemplate("{% if messages|length == 1 %}\n" + source + "{% else %}fine{% endif %}", {}, seconds=0.5)
    with pytest.raises(InputError, match=rf"^the chat template{where} cannot render .*: it takes more than 0\.5 s$"):
        template.render(HELLO)
    assert template.render(2 * HELLO) == "fine"


def test_a_template_that_writes_what_is_no_text() -> None:
    with pytest.raises(InputError, match=r"^the chat template cannot render .*: it writes '\\ud800', which is no char"):
        ChatTemplate('{{ "\\ud800" }}', {}).render(HELLO)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("{% if %}", "line 1: Expected an expression"),
        ("a\n\nb {% endfor %}", "line 3: Encountered unknown tag 'endfor'"),
        ("a\n{{ messages|nothing }}", "line 2: No filter named 'nothing'"),
        ("{{ 'a' * 300000000 }}", "it needs more than 512 MiB of memory"),
        ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "it is nested, or calls itself, too deeply"),
        ("{{ " + "[" * 2_000 + " }}", "it is nested, or calls itself, too deeply"),
        ("{% if true %}" * 40_000 + "{% endif %}" * 40_000, "it is nested, or calls itself, too deeply"),
        ("{% if messages %}" * 120 + "{% endif %}" * 120, "SyntaxError|IndentationError"),
        ("{% for m in messages %}" * 30 + "{% endfor %}" * 30, "SyntaxError: too many statically nested blocks"),
        ("x" * (1 << 20) + "x", "it has 1,048,577 characters, and 1,048,576 are allowed"),
    ],
)
def test_a_damaged_template(source: str, cause: str) -> None:
    with pytest.raises(
        EngineFileError, match=f"^the engine's chat template is not valid: ({cause}).*; export it again$"
    ):
        ChatTemplate(source, {})


def test_a_template_that_takes_long_to_be_compiled() -> None:
    with pytest.raises(EngineFileError, match=r"template is not valid: it takes more than 0\.3 s; export it again$"):
        ChatTemplate("{{ 9 ** (9 ** 9) }}", {}, seconds=0.3)


def test_a_long_template_is_rendered() -> None:
    source = "{% if messages %}" + "x" * (1 << 20)
    source = source[: (1 << 20) - 11] + "{% endif %}"
    assert len(ChatTemplate(source, {}).render(HELLO)) == (1 << 20) - 28


@pytest.fixture(scope="module")
def shown() -> Iterator[ChatTemplate]:
    """A template that writes a message as it sees it."""
    yield ChatTemplate("{{ messages[0] | tojson }}", {})


class Colour(enum.StrEnum):
    RED = "red"


class Count(enum.IntEnum):
    TWO = 2


def test_values_are_those_of_json(shown: ChatTemplate) -> None:
    message = {"role": Colour.RED, "content": "x", "a": (1, [2.5]), "b": Count.TWO, "c": float("inf"), "d": {"e": None}}
    seen = json.loads(shown.render([message]))
    assert seen == {"role": "red", "content": "x", "a": [1, [2.5]], "b": 2, "c": float("inf"), "d": {"e": None}}


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def cycle() -> list:
    value: list = []
    value.append(value)
    return value


def shared(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"x": b"bytes"}, "message 0 has a value of type bytes; messages are made of texts, numbers, lists"),
        ({"x": [{"y": {1, 2}}]}, "message 0 has a value of type set"),
        ({"x": dt.date(2020, 1, 1)}, "message 0 has a value of type date"),
        ({"x": 1j}, "message 0 has a value of type complex"),
        ({"x": {1: "a"}}, "message 0 has the key 1; keys must be strings"),
        ({None: "a"}, "message 0 has the key None; keys must be strings"),
        ({"x": 10**5000}, "message 0 has a whole number of 16610 bits; give it as a text"),
        ({"x": "a\udcff"}, r"the prompt has '\\udcff', which is no character"),
        ({"\ud800": "a"}, r"the prompt has '\\ud800', which is no character"),
        ({"x": nested(100_000)}, "message 0 is nested more than 128 levels deep"),
        ({"x": nested(128)}, "message 0 is nested more than 128 levels deep"),
        ({"x": cycle()}, "message 0 is nested more than 128 levels deep"),
        ({"x": shared(40)}, "the conversation has more than the 100,000 characters that a prompt may have here"),
        ({"x": "y" * 100_000}, "the conversation has more than the 100,000 characters"),
    ],
)
def test_what_json_has_not(shown: ChatTemplate, extra: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        shown.render([{**HELLO[0], **extra}], 100_000)
    assert json.loads(shown.render(HELLO)) == HELLO[0]


def test_a_conversation_may_be_nested_and_long(shown: ChatTemplate) -> None:
    message = {**HELLO[0], "x": nested(127), "y": "y" * 1_000_000}
    assert json.loads(shown.render([message])) == message


def test_a_conversation_beyond_what_goes_to_another_process(shown: ChatTemplate) -> None:
    with pytest.raises(PromptTooLongError, match="more than the 16,777,216 characters"):
        shown.render([{"role": "user", "content": "x" * (1 << 24)}])


def test_the_longest_conversation_of_the_widest_characters_is_rendered() -> None:
    content = "🙂" * ((1 << 24) - 100)
    assert ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": content}]) == content


@pytest.mark.parametrize(
    "messages",
    [[10**5000], 10**5000, ["a" * 10**6], "a" * 10**6, [{10**5000: 1, "role": "user", "content": ""}]],
    ids=map(str, range(5)),
)
def test_an_error_repeats_little_of_a_conversation(messages: Any) -> None:
    with pytest.raises(InputError) as raised:
        read_conversation(messages)
    assert len(str(raised.value)) < 500
