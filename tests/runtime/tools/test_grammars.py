"""Grammars of calls let through what they should, with markers that are special tokens and with those that are text."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("llguidance", reason="llguidance is not installed")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from runtime.errors import InputError
from runtime.grammar import Grammar
from runtime.grammar import calls as calls_module
from runtime.grammar.calls import NONE, Function, grammar_of_calls
from runtime.grammar.compiler import Compiler, Vocabulary
from runtime.grammar.schema import prepared
from runtime.token_bytes import TokenBytes
from runtime.tools import FORMATS
from runtime.tools.formats import special_markers

FUNCTIONS = [
    Function(
        "get_weather",
        {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    ),
    Function("add", None),
    Function("now", NONE),
]
FITS = ("get_weather", '{"city": "Paris", "unit": "c"}')
ANY = ("add", '{"a": [1, {}]}')
EMPTY = ("now", "{}")
UNFIT = ("get_weather", '{"city": 5}')
UNKNOWN = ("other", "{}")
SPECIAL: dict[str, list[list[str]]] = {
    "hermes": [[], ["<tool_call>", "</tool_call>"]],
    "llama3": [[], ["<|python_tag|>"]],
    "mistral": [[], ["[TOOL_CALLS]"], ["[TOOL_CALLS]", "[ARGS]"]],
}
CASES = [(form, special) for form, several in SPECIAL.items() for special in several]


class Model:
    """A tokenizer of bytes and these special tokens, and what its grammars let through."""

    def __init__(self, form: str, special: list[str]) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: index for index, token in enumerate(["</s>", *alphabet])}
        self._tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        self._tokenizer.add_special_tokens(["</s>", *special])
        self._form = FORMATS[form]
        self._markers = special_markers(self._form, self._tokenizer)
        found, size = TokenBytes(self._tokenizer), self._tokenizer.get_vocab_size()
        hidden = [0, *self._markers.values()]
        self._compiler = Compiler(
            lambda: Vocabulary([found[token] for token in range(size)], hidden, [0], self._encode)
        )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def written(self, *calls: tuple[str, str]) -> str:
        if "[ARGS]" in self._markers:
            return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)
        return self._form.write([(name, json.loads(arguments)) for name, arguments in calls])

    def takes(self, text: str, *, required: bool = True, parallel: bool = True) -> bool:
        """Return whether an answer may be `text`, token by token; what is forced is what follows."""
        lark = grammar_of_calls(self._form, FUNCTIONS, self._markers, required=required, parallel=parallel)
        matcher = self._compiler.matcher(Grammar.lark(lark))
        ids = [*self._encode(text), 0]
        for token in ids:
            forced = matcher.forced()
            if not matcher.allows(token):
                return False
            assert not forced or forced[0] == token
            matcher.accept(token)
        return True


@pytest.mark.parametrize(("form", "special"), CASES)
def test_required_calls_are_of_functions_that_there_are_with_arguments_that_fit(form: str, special: list[str]) -> None:
    model = Model(form, special)
    for calls in ([FITS], [ANY], [EMPTY], [FITS, ANY, EMPTY]):
        assert model.takes(model.written(*calls))
        assert model.takes(model.written(*calls), parallel=False) == (len(calls) == 1)
    for calls in ([UNFIT], [UNKNOWN], [FITS, UNFIT]):
        assert not model.takes(model.written(*calls))
    for text in ("", "Hello", f"Hello {model.written(FITS)}", f"{model.written(FITS)} Hello"):
        assert not model.takes(text)


@pytest.mark.parametrize(("form", "special"), CASES)
def test_text_is_free_until_a_call_begins(form: str, special: list[str]) -> None:
    model = Model(form, special)
    for text in ("", "Hello", "a <tool b", "[TOOL", "é {", "\n\nHi", model.written(FITS), model.written(FITS, ANY)):
        assert model.takes(text, required=False)
    for calls in ([UNFIT], [UNKNOWN], [FITS, UNFIT]):
        assert not model.takes(model.written(*calls), required=False)
    assert model.takes(model.written(FITS), required=False, parallel=False)
    assert not model.takes(model.written(FITS, ANY), required=False, parallel=False)
    if form != "llama3":
        assert model.takes(f"Hello. {model.written(FITS)}", required=False)
        assert not model.takes(f"Hello. {model.written(UNFIT)}", required=False)
    elif special:
        assert model.takes(f"Hello. <|python_tag|>{model.written(FITS)}", required=False)
        assert not model.takes(f"<|python_tag|>{model.written(UNFIT)}", required=False)


def test_a_special_token_that_is_forced_is_told_of_and_may_follow() -> None:
    model = Model("hermes", ["<tool_call>", "</tool_call>"])
    lark = grammar_of_calls(FORMATS["hermes"], FUNCTIONS[2:], model._markers, required=True, parallel=False)
    matcher = model._compiler.matcher(Grammar.lark(lark))
    told = matcher.forced()
    assert told == tuple(model._encode(model.written(EMPTY)))
    for token in told:
        assert matcher.forced()[0] == token
        assert matcher.allowed().nonzero()[0].tolist() == [token]
        matcher.accept(token)
    assert matcher.complete


def test_large_schemas_are_refused_before_all_of_them_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"type": "object", "properties": {f"p{n}": {"const": "x" * 1000} for n in range(100)}}
    functions = [Function(f"f{n}", large) for n in range(128)]
    read: list[str] = []

    def noted(text: str) -> str:
        read.append(text)
        return prepared(text)

    monkeypatch.setattr(calls_module, "prepared", noted)
    with pytest.raises(InputError, match=r"the parameters of the first 3 tools have .* give fewer tools"):
        grammar_of_calls(FORMATS["hermes"], functions, {}, required=True, parallel=False)
    assert len(read) == 3
