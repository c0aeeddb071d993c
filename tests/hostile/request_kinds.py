"""What a running service is given: templates, texts, conversations and options, and functions that change logits."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

import runtime.generator
from runtime import Generator, InputError, Sampling, TreeSizes
from runtime.bundle.engine_file import EngineFile
from runtime.chat import ChatTemplate
from runtime.engines.protocol import Engine
from tests.hostile.cases import SECRET, Case, FaultError, Kind
from tests.hostile.engine_kinds import ENGINE, NAME, texts_of
from tests.hostile.templates import templates
from tests.runtime.known_engine import KnownEngine, Text

VOCABULARY = 264
# A service's patience: shorter than what is usual, so that more templates are tried.
SECONDS = 0.25


def known_generator(folder: Path) -> Generator:
    """Return a generator whose logits are known functions of the text, so that speculation changes no token of it; with
    the tokenizer and the template of the engine of an earlier release.
    """
    shutil.copytree(ENGINE, folder, dirs_exist_ok=True)

    def opened(_files: object, about: EngineFile, *rest: Any) -> Engine:
        return KnownEngine(about.dims, _logits, lambda text, step: _logits((*text, step)))

    original = runtime.generator.open_engine
    runtime.generator.open_engine = opened
    try:
        return Generator(folder / NAME, threads=1, adapt=False)
    finally:
        runtime.generator.open_engine = original


def _logits(text: Text) -> NDArray[np.float32]:
    """Logits that depend on the last two tokens, some of them equal."""
    seed = (text[-1] * 31 + (text[-2] if len(text) > 1 else 7)) % 5
    return np.random.default_rng(seed).integers(-8, 8, VOCABULARY).astype(np.float32)


CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a Hello"}]


def _templates(name: str, folder: Path) -> Kind:
    folder.mkdir(parents=True)

    def use(case: Case) -> None:
        assert isinstance(case.asked, str)
        template = ChatTemplate(case.asked, {"bos_token": "<s>"}, seconds=SECONDS)
        text = template.render(CONVERSATION)
        if SECRET in text:
            raise FaultError("a template gets at the environment")
        text.encode()

    cases = st.builds(lambda source: Case(asked=source), templates())
    return Kind(name, ("chat_template.jinja",), folder, cases, use, Case(asked="{{ messages[0].content }}"))


PIECES = (
    *(
        "a",
        "Hello ",
        " ",
        "\n",
        "\r\n",
        "\t",
        "0",
        "1,000.00",
        "''",
        "don't",
        "é",
        "e\u0301",
        "漢字",
        "🫖",
        "👩‍👩‍👧",
        "\u202e",
        "\ufeff",
    ),
    *(
        "\x00",
        "\x07",
        "\x1b[2J",
        "\x7f",
        "\u2028",
        "\ufffd",
        "\uffff",
        "\U0010ffff",
        "\ud800",
        "\udfff",
        "\udc80a",
        "İ",
        "ſ",
        "ﬃ",
        "ﷺ",
    ),
    *(
        "<s>",
        "</s>",
        "<pad>",
        "<|user|>",
        "<|assistant|>",
        "<|im_end|>",
        "< s >",
        "<S>",
        "{{ 7 }}",
        "{% raw %}",
        "%s",
        "\\x",
        "\U000f0000",
    ),
)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """A text by somebody hostile."""
    parts = draw(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=6))
    # Few of which are long: those that are read whole take long.
    times = draw(st.sampled_from((1,) * 20 + (3, 50, 1000, 70_000, 1_000_000)))
    place = draw(st.integers(0, max(0, len(parts) - 1)))
    return "".join([*parts[:place], *(part * times for part in parts[place : place + 1]), *parts[place + 1 :]])


WAYS = st.fixed_dictionaries({"raw": st.booleans()}, optional={"escape_special_tokens": st.booleans()})
STOPS = st.lists(st.sampled_from(("a", "\ufffd", "</s>", "\ud800", " ", "é", "x" * 10_000)), max_size=2)


def _texts(name: str, folder: Path) -> Kind:
    generator = known_generator(folder)

    def use(case: Case) -> None:
        text, ways, stop = case.asked  # type: ignore[misc]
        texts_of(generator, text, stop=stop, **ways)

    cases = st.builds(lambda *asked: Case(asked=asked), texts(), WAYS, STOPS)
    return Kind(name, (), folder, cases, use, Case(asked=("Hello", {}, [])))


# Python does not write such numbers, and so no strategy of them.
HUGE = st.sampled_from((400, 5000)).flatmap(lambda digits: st.sampled_from((1, -1)).map(lambda sign: sign * 10**digits))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), HUGE, st.floats(), texts(), st.binary(max_size=3), st.just({1})
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
)


@st.composite
def _deep(draw: st.DrawFn) -> Any:
    value: Any = draw(SCALARS)
    for _ in range(draw(st.sampled_from((5, 100, 127, 128, 129, 500)))):
        value = (draw(st.sampled_from((0, 0, 0, 1))) and [value]) or {"a": value}
    return value


@st.composite
def _messages(draw: st.DrawFn) -> Any:
    roles = st.sampled_from(("user", "assistant", "system", "tool"))
    message = st.fixed_dictionaries({"role": roles, "content": texts()})
    odd = st.fixed_dictionaries(
        {"role": st.one_of(roles, texts(), SCALARS), "content": st.one_of(texts(), VALUES)},
        optional={"tool_calls": VALUES, "thinking": VALUES, "reasoning": _deep(), "\ud800": VALUES},
    )
    found: Any = draw(st.lists(st.one_of(message, message, message, odd, VALUES), max_size=4))
    what = draw(st.sampled_from(("list",) * 8 + ("tuple", "circle", "value", "many")))
    if what == "circle":
        circle: dict[str, Any] = {"role": "user", "content": "a"}
        circle["self"] = circle
        return [circle]
    if what == "many":
        return [{"role": "user", "content": ""}] * draw(st.sampled_from((1000, 2_000_000)))
    return {"list": found, "tuple": tuple(found), "value": draw(VALUES)}[what]


def _conversations(name: str, folder: Path) -> Kind:
    generator = known_generator(folder)

    def use(case: Case) -> None:
        messages, ways = case.asked  # type: ignore[misc]
        texts_of(generator, messages, **ways)

    ways = st.fixed_dictionaries({}, optional={"escape_special_tokens": st.booleans()})
    cases = st.builds(lambda *asked: Case(asked=asked), _messages(), ways)
    return Kind(name, (), folder, cases, use, Case(asked=(CONVERSATION, {})))


NUMBERS = st.one_of(
    HUGE,
    st.sampled_from((0, 1, -1, 0.5, 1.0, 0.01, 100.0, 1e-9, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))),
    st.sampled_from(
        (True, None, "1", b"1", [1], {}, 10**400, 2**63, 2**64, 1 + 2j, np.float32(0.5), np.int64(3), np.nan)
    ),
    st.floats(0, 2),
    st.integers(0, 300),
)
TOKENS = st.integers(0, VOCABULARY - 1)
VALID = {
    "temperature": st.one_of(st.just(0), st.floats(0.01, 3)),
    "top_k": st.one_of(st.none(), st.integers(1, 300)),
    "top_p": st.one_of(st.none(), st.floats(0.01, 1)),
    "min_p": st.one_of(st.none(), st.floats(0, 1)),
    "repetition_penalty": st.floats(0.01, 100),
    "presence_penalty": st.floats(-100, 100),
    "frequency_penalty": st.floats(-100, 100),
    "logit_bias": st.dictionaries(TOKENS, st.floats(-100, 100), max_size=4),
    "banned_tokens": st.one_of(st.lists(TOKENS, max_size=4), st.just(range(1, VOCABULARY))),
    "forced_tokens": st.dictionaries(st.integers(0, 5), TOKENS, max_size=3),
    "min_new_tokens": st.integers(0, 5),
    "seed": st.integers(0, 5),
    "logprobs": st.integers(0, 300),
}
ODD = st.one_of(
    NUMBERS,
    NUMBERS,
    st.lists(st.one_of(TOKENS, NUMBERS), max_size=4),
    st.dictionaries(st.one_of(st.integers(0, VOCABULARY + 2), HUGE), st.one_of(TOKENS, NUMBERS), max_size=4),
    st.sampled_from((None, "12", (), range(VOCABULARY), [[]], object, {"1": 2}, {None: 1}, {1.5: 2})),
)


@st.composite
def _samplings(draw: st.DrawFn) -> dict[str, Any]:
    """Options that go together, mostly, one of which may be odd."""
    found = draw(st.fixed_dictionaries({}, optional=VALID))
    if not found.get("temperature"):
        # They have no meaning without.
        found = {name: value for name, value in found.items() if name not in ("top_k", "top_p", "min_p")}
    if draw(st.integers(0, 2)) == 0:
        found[draw(st.sampled_from(sorted(VALID)))] = draw(ODD)
    return found


TREES = st.one_of(
    st.just(TreeSizes(4, (4, 2, 2))),
    st.builds(TreeSizes, st.integers(0, 70), st.lists(st.integers(-1, 9), min_size=1, max_size=4).map(tuple)),
    st.builds(TreeSizes, NUMBERS, st.sampled_from((None, "111", (), (1, 1, 1), (None, 0, 0), [2, 0, 1]))),
    st.sampled_from((5, "x", (4, (4, 2, 2)))),
)


@st.composite
def _requests(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a request, one of which may be odd."""
    valid = {"max_new_tokens": st.integers(1, 9), "stop": STOPS, "ngrams": st.booleans()}
    found = draw(st.fixed_dictionaries({}, optional=valid))
    if draw(st.integers(0, 3)) == 0:
        odd = {
            "max_new_tokens": NUMBERS,
            "stop": st.sampled_from((None, "a", [""], [1], ("a",), ["x"] * 100_000)),
            "tree": TREES,
            "sampling": st.sampled_from((None, 5, {}, Sampling)),
        }
        name = draw(st.sampled_from(sorted(odd)))
        found[name] = draw(odd[name])
    return found


def _ask(
    generator: Generator, options: dict[str, Any], request: dict[str, Any], processors: Sequence[Any] = ()
) -> None:
    """Have an answer with these options, with speculation and without, to the same end: the same text, or an error."""
    ends: list[Any] = []
    for speculate in (True, False):
        asked = {"max_new_tokens": 6, **request, "speculate": speculate}
        if not speculate:
            asked.pop("tree", None)
        try:
            # Without a seed every request has one of its own.
            again = [processor.again() for processor in processors]
            sampling = Sampling(**{"seed": 1, **options, **({"processors": again} if again else {})})
            if sampling.seed is None and sampling.temperature:
                return
            found = generator.generate("ab ab ab", raw=True, **{"sampling": sampling, **asked})
            ends.append((found.tokens, found.text, found.finish_reason, found.log_probabilities))
        except InputError as error:
            ends.append(error)
    if request.get("tree") is not None and isinstance(ends[0], InputError):
        raise ends[0]
    if all(isinstance(end, InputError) for end in ends):
        raise ends[0]
    if ends[0] != ends[1]:
        raise FaultError(f"speculative and plain decoding differ: {ends!r}")


def _options(name: str, folder: Path) -> Kind:
    generator = known_generator(folder)

    def use(case: Case) -> None:
        options, request = case.asked  # type: ignore[misc]
        _ask(generator, options, request)

    cases = st.builds(lambda *asked: Case(asked=asked), _samplings(), _requests())
    return Kind(name, (), folder, cases, use, Case(asked=({}, {})))


@dataclass
class Processor:
    """A processor that does so `what` at its call number `at`, and then returns its logits as they are."""

    what: str
    at: int
    calls: int = 0

    def again(self) -> Processor:
        """Return one that was not called."""
        return Processor(self.what, self.at)

    def __call__(self, tokens: Any, logits: Any) -> Any:
        self.calls += 1
        if self.calls <= self.at:
            return logits
        with contextlib.suppress(Exception):
            # What it may not do is refused in its own code; what it may, has no effect on others.
            self._change(tokens)
        return self._returned(logits)

    def _change(self, tokens: Any) -> None:
        if self.what == "appends a token":
            tokens.append(3)
        elif self.what == "changes a token":
            tokens[-1] = 3
        elif self.what == "clears the tokens":
            tokens.clear()
        elif self.what == "makes them writeable":
            tokens.setflags(write=True)
            tokens[:] = 3

    def _returned(self, logits: Any) -> Any:
        found = np.array(logits)
        results: dict[str, Any] = {
            "returns nothing": None,
            "returns a list": found.tolist(),
            "returns a text": "logits",
            "returns one fewer": found[:-1],
            "returns one more": np.append(found, 0),
            "returns two dimensions": found[None],
            "returns none": found[:0],
            "returns a number": 0.0,
            "returns NaN": np.full_like(found, np.nan),
            "returns some NaN": np.where(np.arange(len(found)) == 9, np.nan, found),
            "returns infinity": np.where(np.arange(len(found)) == 9, np.inf, found),
            "rules out all": np.full_like(found, -np.inf),
            "rules out all but one": np.where(np.arange(len(found)) == 9, found, -np.inf),
            "returns the largest": np.full_like(found, np.finfo(np.float32).max),
            "returns float64": found.astype(np.float64) * 1e300,
            "returns float16": found.astype(np.float16),
            "returns whole numbers": found.astype(np.int64),
            "returns booleans": found > 0,
            "returns texts": found.astype(str),
            "returns objects": found.astype(object),
            "returns complex numbers": found.astype(np.complex64),
            "returns a view": found[::-1][::-1],
            "returns fortran": np.asfortranarray(found),
            "doubles them in place": logits,
        }
        if self.what == "doubles them in place":
            logits *= 2
        return results.get(self.what, logits)


WHATS = (
    *(
        "appends a token",
        "changes a token",
        "clears the tokens",
        "makes them writeable",
        "returns nothing",
        "returns a list",
    ),
    *(
        "returns a text",
        "returns one fewer",
        "returns one more",
        "returns two dimensions",
        "returns none",
        "returns a number",
    ),
    *(
        "returns NaN",
        "returns some NaN",
        "returns infinity",
        "rules out all",
        "rules out all but one",
        "returns the largest",
    ),
    *(
        "returns float64",
        "returns float16",
        "returns whole numbers",
        "returns booleans",
        "returns texts",
        "returns objects",
    ),
    *("returns complex numbers", "returns a view", "returns fortran", "doubles them in place"),
)


def _processors(name: str, folder: Path) -> Kind:
    generator = known_generator(folder)

    def use(case: Case) -> None:
        options, processors = case.asked  # type: ignore[misc]
        _ask(generator, options, {}, processors)

    one = st.builds(Processor, st.sampled_from(WHATS), st.integers(0, 4))
    options = st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0.01, 3),
            "logprobs": st.integers(0, 3),
            "repetition_penalty": st.floats(0.1, 10),
            "logit_bias": st.dictionaries(st.integers(0, 263), st.floats(-100, 100), max_size=2),
            "banned_tokens": st.lists(st.integers(0, 263), max_size=2),
            "min_new_tokens": st.integers(0, 5),
        },
    )
    cases = st.builds(lambda *asked: Case(asked=asked), options, st.lists(one, min_size=1, max_size=3))
    return Kind(name, (), folder, cases, use, Case(asked=({}, [Processor("returns a view", 0)])))


KINDS = {
    "chat templates": _templates,
    "texts": _texts,
    "conversations": _conversations,
    "options": _options,
    "processors": _processors,
}
