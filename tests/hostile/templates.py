"""Chat templates by somebody hostile, or clumsy: all that Jinja has, with arguments that are too large, or astray."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.hostile.cases import SECRET_NAME
from tests.hostile.damage import damaged

ATOMS = (
    *("0", "1", "-1", "2", "9", "3.5", "1e308", "-0.0", "500000000", "10**9", "9**9**9", "2**64", "'9' * 5000"),
    *(
        "''",
        "'a'",
        "'abc ' * 50",
        "'%1000000000d'",
        "'{:1000000000}'",
        "'{0.__class__}'",
        "'\\ud800'",
        "'\\x00'",
        "'é'",
    ),
    *("none", "true", "[]", "[1, 'a']", "{}", "{'a': 1}", "(1, 2)", "undefined_name", "[[]] * 1000000"),
    *(
        "messages",
        "messages[0]",
        "messages[0].content",
        "messages[-1].role",
        "bos_token",
        "tools",
        "add_generation_prompt",
    ),
    *(
        "range",
        "range(9)",
        "range(999999999)",
        "dict",
        "dict(a=1)",
        "namespace()",
        "namespace(a=1)",
        "cycler('a', 'b')",
    ),
    *("joiner()", "lipsum", "lipsum(n=100000)", "loop", "loop.index", "self", "caller", "varargs", "kwargs", "super"),
    *("raise_exception", "raise_exception('no')", "strftime_now('%Y')", "strftime_now('%' * 99999)", "m", "ns.a"),
)
ATTRIBUTES = (
    *(
        "__class__",
        "__mro__",
        "__subclasses__()",
        "__globals__",
        "__init__",
        "__builtins__",
        "__dict__",
        "__reduce__()",
    ),
    *("format", "format_map", "encode()", "mro()", "gi_frame", "f_globals", "f_back", "func_globals", "__code__"),
    *("__traceback__", "tb_frame", "environment", "_environment", "parent", "name", "items()", "keys()", "a", "x.y.z"),
    *(
        "append(1)",
        "pop()",
        "update(a=1)",
        "clear()",
        "__setitem__('a', 1)",
        "__getattribute__('__class__')",
        "cr_frame",
    ),
    *(
        "join(range(9999999))",
        "ljust(500000000)",
        "zfill(500000000)",
        "replace('', 'aaaaaaaaaaaaaaaa')",
        "expandtabs(10**9)",
    ),
    *(
        "translate({97: 'b' * 999999})",
        "splitlines()",
        "__mul__(500000000)",
        "__add__('a')",
        "count('a')",
        "index('z')",
    ),
)
FILTERS = (
    *(
        "abs",
        "attr('__class__')",
        "attr('format')",
        "batch(2)",
        "batch(500000000, 'a')",
        "capitalize",
        "center(500000000)",
    ),
    *(
        "default('a')",
        "dictsort",
        "escape",
        "filesizeformat",
        "first",
        "float",
        "forceescape",
        "format('a', 1)",
        "groupby('a')",
    ),
    *(
        "groupby('role')",
        "indent(500000000)",
        "indent(width='x' * 99999999)",
        "int",
        "int(base=99)",
        "items",
        "join",
        "join('a' * 99)",
    ),
    *(
        "last",
        "length",
        "list",
        "list|list",
        "lower",
        "map('upper')",
        "map(attribute='__class__')",
        "map('center', 99999999)",
        "max",
    ),
    *(
        "min",
        "pprint",
        "random",
        "reject",
        "rejectattr('a')",
        "replace('a', 'a' * 9999)",
        "replace('', 'b' * 9999)",
        "reverse",
    ),
    *(
        "round",
        "round(999999999)",
        "safe",
        "select",
        "select('sameas', none)",
        "selectattr('role', 'equalto', 'user')",
        "slice(3)",
    ),
    *(
        "slice(500000000)",
        "sort",
        "sort(attribute='role')",
        "string",
        "striptags",
        "sum",
        "sum(attribute='a')",
        "sum(start=[])",
    ),
    *(
        "title",
        "tojson",
        "tojson(indent=99999999)",
        "tojson(indent='a' * 99999)",
        "trim",
        "truncate(3)",
        "truncate(-5)",
        "unique",
    ),
    *(
        "upper",
        "urlencode",
        "urlize",
        "wordcount",
        "wordwrap(1)",
        "wordwrap(0)",
        "xmlattr",
        "no_such_filter",
        "map('map', 'map')",
    ),
)
OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or", "is sameas")
TESTS = (
    "defined",
    "none",
    "string",
    "iterable",
    "mapping",
    "divisibleby(0)",
    "filter",
    "test",
    "callable",
    "no_such_test",
)


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    """An expression, valid mostly."""
    what = draw(
        st.sampled_from(("atom", "atom", "attribute", "filter", "filter", "operator", "call", "index", "test", "slice"))
    )
    if depth == 0 or what == "atom":
        return draw(st.sampled_from(ATOMS))
    inner = f"({draw(expressions(depth - 1))})"
    if what == "attribute":
        return f"{inner}.{draw(st.sampled_from(ATTRIBUTES))}"
    if what == "filter":
        return f"{inner}|{draw(st.sampled_from(FILTERS))}"
    if what == "call":
        return f"{inner}({draw(expressions(depth - 1))})"
    if what == "index":
        return f"{inner}[{draw(expressions(depth - 1))}]"
    if what == "slice":
        return f"{inner}[{draw(expressions(0))}:{draw(expressions(0))}:{draw(expressions(0))}]"
    if what == "test":
        return f"{inner} is {draw(st.sampled_from(TESTS))}"
    return f"{inner} {draw(st.sampled_from(OPERATORS))} ({draw(expressions(depth - 1))})"


BLOCKS = (
    "{{% for x in {0} %}}{1}{{% endfor %}}",
    "{{% for x in {0} recursive %}}{1}{{{{ loop({0}) }}}}{{% endfor %}}",
    "{{% for a, b in {0} if a %}}{1}{{% else %}}{1}{{% endfor %}}",
    "{{% for x in range(99999) %}}{{% for y in range(99999) %}}{1}{{% endfor %}}{{% endfor %}}",
    "{{% for x in range(999999999) %}}{{% endfor %}}{1}",
    "{{% if {0} %}}{1}{{% elif {0} %}}{{% break %}}{{% endif %}}",
    "{{% set x = {0} %}}{1}",
    "{{% set x %}}{1}{{% endset %}}{{{{ x * 99999 }}}}",
    "{{% set ns = namespace(a='a') %}}{{% for x in range(99) %}}{{% set ns.a = ns.a ~ ns.a %}}{{% endfor %}}{1}",
    "{{% set ns = namespace(a=[]) %}}{{% for x in range(9) %}}{{% set ns.a=[ns.a] * 2 %}}{{% endfor %}}{{{{ ns.a }}}}",
    "{{% set ns.a = {0} %}}{1}",
    "{{% macro m(a, b=1) %}}{1}{{{{ m(a) }}}}{{% endmacro %}}{{{{ m({0}) }}}}",
    "{{% macro m() %}}{1}{{{{ caller() }}}}{{% endmacro %}}{{% call m() %}}{1}{{% endcall %}}",
    "{{% filter center(99999999) %}}{1}{{% endfilter %}}",
    "{{% filter {2} %}}{1}{{% endfilter %}}",
    "{{% with x = {0} %}}{1}{{% endwith %}}",
    "{{% generation %}}{1}{{% endgeneration %}}",
    "{{% block b %}}{1}{{{{ self.b() }}}}{{% endblock %}}",
    "{{% include {0} %}}{{% import {0} as x %}}{{% from {0} import y %}}",
    "{{% extends {0} %}}{1}",
    "{{% autoescape true %}}{1}{{% endautoescape %}}",
    "{{% raw %}}{1}{{% endraw %}}",
    "{{% trans %}}{1}{{% endtrans %}}{{% debug %}}",
    "{{# {1} #}}{1}",
    "{{% for message in messages %}}{{{{ message.role ~ message.content }}}}{1}{{% endfor %}}",
    "{{{{ raise_exception({0}) }}}}",
)
DEEP = (
    "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{{ " + "[" * 99 + "]" * 99 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{{ 1" + " + 1" * 3000 + " }}",
    "{{ 1" + "|abs" * 3000 + " }}",
    "{{ a" + ".a" * 3000 + " }}",
    "{{ 'a'" + " 'a'" * 9999 + " }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ '" + "a" * 100_000 + "'|wordwrap(1)|urlize|center(99999) }}",
    f"{{{{ lipsum.__globals__['os'].environ['{SECRET_NAME}'] }}}}",
    f"{{{{ cycler.__init__.__globals__.os.environ.get('{SECRET_NAME}') }}}}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ('{0.__class__.__init__.__globals__}').format(cycler) }}",
    "{{ '{0.__init__.__globals__}'|format(cycler) }}",
    "{{ ['{0.__globals__}']|map('format', lipsum)|list }}",
    "{{ messages|map(attribute='__class__.__mro__')|list }}",
    "{%- set a = 'a' * 2**20 -%}{{ a.replace('a', a) }}",
    "{{ [[[[[0]*99]*99]*99]*99]*99 }}",
    "{{ 9**9**9 }}",
    "{{ (9**99999)|string }}",
    "{{ '%s' % messages }}{{ '%*d' % (999999999, 1) }}",
)


@st.composite
def templates(draw: st.DrawFn) -> str:
    """The source of a chat template."""
    source = draw(_bodies(2))
    return source if draw(st.integers(0, 4)) else draw(damaged(source.encode())).decode("utf-8", "replace")


@st.composite
def _bodies(draw: st.DrawFn, depth: int) -> str:
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        what = draw(st.sampled_from(("text", "expression", "expression", "block", "block", "deep")))
        if what == "text":
            parts.append(draw(st.sampled_from(("a", "\n", "<|user|>", "{{", "{%", "%}", "\x00", "\u2028", "-%}  {%-"))))
        elif what == "deep":
            parts.append(draw(st.sampled_from(DEEP)))
        elif what == "block" and depth:
            block = draw(st.sampled_from(BLOCKS))
            inner = draw(_bodies(depth - 1))
            parts.append(block.format(draw(expressions(1)), inner, draw(st.sampled_from(FILTERS))))
        else:
            parts.append(f"{{{{ {draw(expressions())} }}}}")
    return "".join(parts)
