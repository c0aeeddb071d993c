"""Answers are in their grammar, or cut short by a limit; and the same with speculation and without, alone and beside
others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for needed in ("llguidance", "jsonschema_rs"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

from jsonschema_rs import Draft202012Validator

from runtime import GenerationResult, Generator, Grammar, InputError, Sampling, Tokens
from tests.runtime.grammar.grammars import GRAMMARS
from tests.runtime.grammar.schemas import SCHEMAS, Schema, record

MOST = 90
FEW_SCHEMAS = [
    "a person with optional parts",
    "an enum with a common beginning",
    "told apart by a kind",
    "names with quotes and letters",
    "a linked list",
    "format date-time",
]
FEW_GRAMMARS = ["a call", "letters beyond English", "sums"]


@pytest.fixture(scope="module")
def generator(tiny_engine: Path) -> Iterator[Generator]:
    with Generator(tiny_engine, threads=1, adapt=False) as generator:
        yield generator


def fits(schema: Schema) -> Callable[[str], bool]:
    validator = Draft202012Validator(schema, validate_formats=True)

    def check(text: str) -> bool:
        json.loads(text)
        # A number may be beyond what a float holds, and the validator takes no infinity.
        finite = json.loads(text, parse_float=lambda digits: max(-1e300, min(float(digits), 1e300)))
        return bool(validator.is_valid(finite))

    return check


def asked(name: str, *, compact: bool = False) -> tuple[Grammar, Callable[[str], bool]]:
    if name in GRAMMARS:
        return GRAMMARS[name]
    return Grammar.json_schema(SCHEMAS[name], compact=compact), fits(SCHEMAS[name])


def told(result: GenerationResult) -> tuple[str, list[int], str]:
    return result.text, result.tokens, result.finish_reason


def check_answers(generator: Generator, names: list[str], samplings: list[dict[str, Any]]) -> None:
    wanted: list[tuple[str, Callable[[str], bool], Any]] = [
        (name, check, {"max_new_tokens": MOST, "sampling": Sampling(grammar=grammar, **sampling)})
        for name in names
        for sampling in samplings
        for grammar, check in [asked(name)]
    ]
    together = [generator.submit("Go", **options) for _, _, options in wanted]
    for (name, check, options), beside in zip(wanted, together, strict=True):
        plain = generator.generate("Go", speculate=False, **options)
        assert told(generator.generate("Go", **options)) == told(plain), name
        assert told(beside.result()) == told(plain), name
        assert plain.finish_reason == "length" or check(plain.text), (name, plain.text)
        assert plain.finish_reason in ("stop", "length")


def test_answers_are_in_their_grammar_and_the_same_in_every_way(generator: Generator) -> None:
    check_answers(generator, FEW_SCHEMAS + FEW_GRAMMARS, [{}, {"temperature": 1.0, "seed": 5}])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["schemas", "grammars"])
def test_the_whole_corpus(generator: Generator, kind: str) -> None:
    names = list(SCHEMAS if kind == "schemas" else GRAMMARS)
    assert len(names) == (100 if kind == "schemas" else 20)
    samplings = [{}, *({"temperature": 0.8, "top_p": 0.9, "seed": seed} for seed in (1, 2))]
    for start in range(0, len(names), 8):
        check_answers(generator, names[start : start + 8], samplings)


def test_every_schema_and_grammar_of_the_corpus_compiles(generator: Generator) -> None:
    for name in (*SCHEMAS, *GRAMMARS):
        generator.check("Go", max_new_tokens=4, sampling=Sampling(grammar=asked(name)[0]))


def test_an_answer_ends_where_nothing_else_may_follow_without_another_pass(generator: Generator) -> None:
    found = generator.generate("Go", speculate=False, sampling=Sampling(grammar=Grammar.regex("abc")))
    assert told(found) == ("abc", generator.encode("abc", raw=True)[-3:], "stop")
    assert found.steps == 3


def test_what_a_grammar_forces_is_drafted(generator: Generator) -> None:
    grammar = Grammar.json_schema(record({"a_long_property_name": {"type": "boolean"}}), compact=True)
    ways: list[Any] = [{"speculate": False}, {"forced_drafts": False}, {}]
    found = [generator.generate("Go", ngrams=False, sampling=Sampling(grammar=grammar), **way) for way in ways]
    assert len({one.text for one in found}) == 1
    assert found[2].steps < min(found[0].steps, found[1].steps) / 2


def test_a_trace_names_the_grammar_for_what_it_forces_beside_others_that_proposed_it(generator: Generator) -> None:
    grammar = Grammar.json_schema(record({"a_long_property_name": {"type": "boolean"}}), compact=True)
    sampling = Sampling(grammar=grammar)
    found = generator.generate("Go", sampling=sampling, prediction='{"a_long_property_name":true}', trace=True)
    names = {node.sources for one in found.passes or () for node in one.nodes[1:]}
    assert all(names)
    assert {"grammar", "text"} in map(set, names)


def test_each_of_several_answers_has_its_own_place_in_the_grammar(generator: Generator) -> None:
    sampling = Sampling(grammar=Grammar.regex("[a-z]{3}(-[0-9]{2}){0,3}"), temperature=1.5, seed=1)
    together = generator.generate("Go", n=4, sampling=sampling)
    assert len({one.text for one in together}) > 1
    for index, one in enumerate(together):
        alone = Sampling(grammar=sampling.grammar, temperature=1.5, seed=1 + index)
        assert told(generator.generate("Go", sampling=alone)) == told(one)


def test_an_answer_that_had_to_leave_its_slot_goes_on_in_its_grammar(tiny_engine: Path, generator: Generator) -> None:
    grammar, check = asked("a list of records")
    sampling = Sampling(grammar=grammar, temperature=1.0, seed=3)
    expected = generator.generate("Go", max_new_tokens=60, sampling=sampling)
    row = generator.engine.row_bytes
    with Generator(tiny_engine, threads=1, adapt=False, cache_bytes=row * 200, prefix_cache_bytes=0) as small:
        requests = [small.submit(prompt, max_new_tokens=60, sampling=sampling) for prompt in ("Go",) * 5]
        for request in requests:
            assert told(request.result()) == told(expected)
        assert small.metrics()["preemptions"]
    assert expected.finish_reason == "length" or check(expected.text)


def test_a_short_limit_cuts_an_answer_short(generator: Generator) -> None:
    found = generator.generate("Go", max_new_tokens=5, sampling=Sampling(grammar=Grammar.regex("[ab]{9}")))
    assert found.finish_reason == "length"
    assert set(found.text) <= {"a", "b"}


def test_what_leaves_no_token_ends_that_request_alone(generator: Generator) -> None:
    tokens = tuple(generator.encode("ab", raw=True)[-2:])
    other = generator.submit("Hello", max_new_tokens=20)
    sampling = Sampling(grammar=Grammar.regex("x?[ab]"), banned_tokens=(*tokens, *generator.encode("x", raw=True)))
    with pytest.raises(InputError, match=r"no token is left for new token 0: .* grammar rule out"):
        generator.generate("Go", sampling=sampling)
    assert len(other.result().tokens) == 20


def test_penalties_and_processors_act_before_the_grammar(generator: Generator) -> None:
    grammar = Grammar.regex("[ab]{6}")
    (best,) = generator.encode("b", raw=True)[-1:]

    def prefer(tokens: Any, logits: Any) -> Any:
        logits[best] += 50.0
        return logits

    for way in (True, False):
        found = generator.generate("Go", speculate=way, sampling=Sampling(grammar=grammar, processors=[prefer]))
        assert found.text == "bbbbbb"


def test_log_probabilities_are_the_base_models_own(generator: Generator) -> None:
    found = generator.generate("Go", sampling=Sampling(grammar=Grammar.regex("[0-9]{3}"), logprobs=2))
    free = generator.generate("Go", max_new_tokens=1, sampling=Sampling(logprobs=2))
    assert found.log_probabilities is not None
    assert free.log_probabilities is not None
    assert found.log_probabilities[0].best == free.log_probabilities[0].best
    assert [one.token for one in found.log_probabilities] == found.tokens


def test_a_prompt_of_tokens_and_stop_strings_go_with_a_grammar(generator: Generator) -> None:
    found = generator.generate(Tokens([5, 6]), stop=["-"], sampling=Sampling(grammar=Grammar.regex("[a-c]{2}-x")))
    assert (len(found.text), found.finish_reason) == (2, "stop")
