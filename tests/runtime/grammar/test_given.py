"""Grammars as users give them: what is taken, what is refused, in a line, and how long that may take."""

from __future__ import annotations

import builtins
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="llguidance is not installed")

from runtime import Generator, Grammar, InputError, Sampling
from runtime.grammar.compiler import KEPT_GRAMMARS
from runtime.grammar.given import MOST_TEXT


@pytest.fixture(scope="module")
def generator(tiny_engine: Path) -> Iterator[Generator]:
    with Generator(tiny_engine, threads=1, adapt=False) as generator:
        yield generator


def refusal(generator: Generator, grammar: Grammar) -> str:
    with pytest.raises(InputError) as found:
        generator.check("Go", sampling=Sampling(grammar=grammar))
    told = str(found.value)
    assert "\n" not in told
    assert len(told) < 500
    return told


def test_equal_grammars_are_compiled_once(generator: Generator) -> None:
    before = generator.metrics()
    for _ in range(3):
        generator.check("Go", sampling=Sampling(grammar=Grammar.json_schema({"const": "compiled once"})))
    after = generator.metrics()
    assert after["grammars_compiled"] - before["grammars_compiled"] == 1
    assert after["grammar_hits"] - before["grammar_hits"] == 2
    assert after["grammar_seconds"] > before["grammar_seconds"]
    assert hash(Grammar.json_object()) == hash(Grammar.json_schema({"type": "object"}))


def test_the_latest_grammars_are_kept(generator: Generator) -> None:
    for number in range(KEPT_GRAMMARS + 1):
        generator.check("Go", sampling=Sampling(grammar=Grammar.regex(f"kept {number}")))
    before = generator.metrics()["grammars_compiled"]
    generator.check("Go", sampling=Sampling(grammar=Grammar.regex("kept 1")))
    generator.check("Go", sampling=Sampling(grammar=Grammar.regex("kept 0")))
    assert generator.metrics()["grammars_compiled"] == before + 1


@pytest.mark.parametrize(
    ("keyword", "schema"),
    [
        ("uniqueItems", {"type": "array", "uniqueItems": True}),
        ("not", {"not": {"type": "string"}}),
        ("if", {"if": {"type": "string"}, "then": {"const": "a"}}),
        ("contains", {"contains": {"const": 1}}),
        ("dependentRequired", {"dependentRequired": {"a": ["b"]}}),
        ("propertyNames", {"propertyNames": {"maxLength": 3}}),
        ("unevaluatedProperties", {"unevaluatedProperties": False}),
        ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "number"}]}),
        ("format", {"type": "string", "format": "postcode"}),
        ("minProperties", {"type": "object", "minProperties": 2}),
        ("items", {"items": [{"type": "integer"}]}),
        ("exclusiveMinimum", {"type": "integer", "minimum": 1, "exclusiveMinimum": True}),
        ("x-guidance", {"x-guidance": {"lenient": True}, "uniqueItems": True}),
        ("https://example.org/a", {"$ref": "https://example.org/a"}),
        ("file:///etc/passwd", {"$ref": "file:///etc/passwd"}),
        ("$dynamicRef", {"$dynamicRef": "#a"}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(generator: Generator, keyword: str, schema: Any) -> None:
    within = {"type": "object", "properties": {"a": schema}}
    assert keyword in refusal(generator, Grammar.json_schema(schema))
    if keyword != "x-guidance":
        assert keyword in refusal(generator, Grammar.json_schema(within))


def test_names_of_properties_and_constants_are_no_keywords(generator: Generator) -> None:
    schema = {
        "type": "object",
        "properties": {
            "minProperties": {"const": {"minProperties": 5, "items": []}},
            "items": {"enum": [{"items": []}]},
        },
        "default": {"minProperties": 3},
    }
    generator.check("Go", sampling=Sampling(grammar=Grammar.json_schema(schema)))


def test_a_property_cannot_come_twice_in_another_spelling(generator: Generator) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    matcher = generator._preparation.grammars.matcher(Grammar.json_schema(schema, compact=True))
    for token in generator.encode('{"', raw=True)[-2:]:
        matcher.accept(token)
    assert not matcher.allows(generator.encode("\\u0061", raw=True)[-6]) or _dies(generator, matcher, "\\u0061")


def _dies(generator: Generator, matcher: Any, text: str) -> bool:
    for token in generator.encode(text, raw=True)[-len(text) :]:
        if not matcher.allows(token):
            return True
        matcher.accept(token)
    return False


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Grammar.json_schema([]), "must be a dictionary, True or False"),  # type: ignore[arg-type]
        (lambda: Grammar.json_schema("{"), "not JSON"),
        (lambda: Grammar.json_schema({"a": float("nan")}), "cannot be written as JSON"),
        (lambda: Grammar.json_schema({"a": object()}), "cannot be written as JSON"),
        (lambda: Grammar.regex("\ud800"), "the grammar is no text"),
        (lambda: Grammar.regex(""), "cannot be empty"),
        (lambda: Grammar.lark(5), "must be a string"),  # type: ignore[arg-type]
        (lambda: Grammar.regex("a" * (MOST_TEXT + 1)), f"{MOST_TEXT} are allowed"),
        (lambda: Grammar.json_schema({"enum": ["x" * (1 << 22)]}), f"{MOST_TEXT} are allowed"),
        (lambda: Grammar.json_schema('"' + "x" * (1 << 22) + '"'), f"{MOST_TEXT} are allowed"),
        (lambda: Sampling(grammar="a"), "grammar must be a runtime.Grammar"),  # type: ignore[arg-type]
        (lambda: Sampling(grammar=Grammar.regex("a"), min_new_tokens=1), "min_new_tokens cannot be had with a grammar"),
        (lambda: Sampling(grammar=Grammar.regex("a"), forced_tokens={0: 1}), "forced_tokens cannot be had"),
    ],
)
def test_what_is_no_grammar_is_refused_when_it_is_made(make: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        make()


def test_ignoring_stop_tokens_is_refused_beside_a_grammar(generator: Generator) -> None:
    with pytest.raises(InputError, match="ignore_stop_tokens cannot be had with a grammar"):
        generator.check("Go", ignore_stop_tokens=True, sampling=Sampling(grammar=Grammar.json_object()))


def nested(depth: int) -> str:
    return '{"properties":{"a":' * depth + "{}" + "}}" * depth


HOSTILE = {
    "deeply nested": Grammar("json_schema", nested(5000)),
    "nested": Grammar("json_schema", nested(500)),
    "exponential": Grammar.json_schema(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"{side}{n}": {"type": "integer"}}} for side in "ab"]} for n in range(24)
            ]
        }
    ),
    "a circle": Grammar.json_schema(
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    ),
    "itself": Grammar.json_schema({"$ref": "#"}),
    "all of itself": Grammar.json_schema({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {}]}}, "$ref": "#/$defs/a"}),
    "a large multiple": Grammar.json_schema({"type": "integer", "multipleOf": 10**9 + 7}),
    "no value": Grammar.json_schema(False),
    "parentheses": Grammar.regex("(" * 3000 + "a" + ")" * 3000),
    "half a character": Grammar("json_schema", '{"const":"\\ud800"}'),
    "a number of many digits": Grammar("json_schema", '{"maximum":' + "9" * 5000 + "}"),
    "lookaround": Grammar.regex("(?=a)a"),
    "groups of Lark": Grammar.lark("start: " + "(" * 5000 + '"a"' + ")" * 5000),
    "options of Lark": Grammar.lark('%llguidance {"no_forcing": false}\nstart: "a"'),
    "no start": Grammar.lark('a: "a"'),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_grammars_are_refused_in_a_line(generator: Generator, kind: str) -> None:
    begun = time.process_time()
    refusal(generator, HOSTILE[kind])
    # Some milliseconds: this is no measurement, and a machine may be slow.
    assert time.process_time() - begun < 5.0


BOUNDED = {
    "repeats": Grammar.regex("a{0,100000}"),
    "repeats of repeats": Grammar.regex("(a{0,1000}){0,1000}"),
    "catastrophic elsewhere": Grammar.regex("(a|aa|a*)+b"),
    "states": Grammar.regex("(.*a.{12}|.*b.{12})*"),
    "ambiguous": Grammar.lark('start: a\na: a a | "x" | ""'),
    "nested stars": Grammar.lark('start: a*\na: b*\nb: "x"*'),
    "many words": Grammar.regex("|".join(f"word{number}" for number in range(5000))),
    "many properties": Grammar.json_schema({"type": "object", "properties": {f"p{n}": {} for n in range(1000)}}),
    "doubling": Grammar.lark("start: a0\n" + "\n".join(f"a{n}: a{n + 1} a{n + 1}" for n in range(60)) + '\na60: "x"'),
}


@pytest.mark.parametrize("kind", BOUNDED)
def test_hostile_grammars_end_by_an_answer_or_an_error_and_others_go_on(generator: Generator, kind: str) -> None:
    other = generator.submit("Hello", max_new_tokens=20)
    begun = time.process_time()
    try:
        generator.generate("Go", max_new_tokens=24, sampling=Sampling(grammar=BOUNDED[kind], temperature=1.0, seed=1))
    except InputError as error:
        assert "grammar" in str(error)
    assert time.process_time() - begun < 20.0
    assert len(other.result().tokens) == 20


def test_without_llguidance_a_grammar_names_what_to_install(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "llguidance":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "llguidance", raising=False)
    assert "pip install 'hidden-transfer[grammar]'" in refusal(generator, Grammar.regex("not compiled before"))
