"""What a running service is given: templates, texts, conversations and options, and functions that change logits."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

import runtime.generator
from runtime import Generator, InputError, Sampling
from runtime.bundle.engine_file import EngineFile
from runtime.chat import ChatTemplate
from runtime.engines.protocol import Engine
from runtime.prompts import PromptEncoder
from tests.hostile.cases import SECRET, Case, FaultError, Kind, Kinds
from tests.hostile.engine_kinds import ENGINE, NAME, texts_of
from tests.hostile.messages import STOPS, WAYS, conversations, texts, written
from tests.hostile.options import VOCABULARY, WHATS, Processor, requests, samplings
from tests.hostile.templates import templates
from tests.runtime.known_engine import KnownEngine, Text
from tests.runtime.tokenizers import KINDS as TOKENIZERS
from tests.runtime.tokenizers import tokenizer_of

KINDS = Kinds()
# A service's patience: shorter than what is usual, so that more templates are tried.
SECONDS = 0.25


def known_generator(folder: Path) -> Generator:
    """Return a generator whose logits are known functions of the text, so that speculation changes no token of it; with
    the tokenizer and the template of the engine of an earlier release.
    """
    shutil.copytree(ENGINE, folder, dirs_exist_ok=True)

    def opened(_files: object, about: EngineFile, *rest: Any) -> Engine:
        return KnownEngine(about.dims, _logits, lambda text, step: _logits((*text, step)))

    original = runtime.generator.open_engine  # type: ignore[attr-defined]
    runtime.generator.open_engine = opened  # type: ignore[assignment, attr-defined]
    try:
        return Generator(folder / NAME, threads=1, adapt=False)
    finally:
        runtime.generator.open_engine = original  # type: ignore[attr-defined]


def _logits(text: Text) -> NDArray[np.float32]:
    """Logits that depend on the last two tokens, some of them equal."""
    seed = (text[-1] * 31 + (text[-2] if len(text) > 1 else 7)) % 5
    return np.random.default_rng(seed).integers(-8, 8, VOCABULARY).astype(np.float32)


CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a Hello"}]


@KINDS.add("chat templates", "chat_template.jinja")
def _templates(folder: Path) -> Kind:
    folder.mkdir(parents=True)

    def use(case: Case) -> None:
        assert isinstance(case.asked, str)
        template = ChatTemplate(case.asked, {"bos_token": "<s>"}, seconds=SECONDS)
        text = template.render(CONVERSATION)
        if SECRET in text:
            raise FaultError("a template gets at the environment")
        text.encode()

    cases = st.builds(lambda source: Case(asked=source), templates())
    return Kind(folder, cases, use, Case(asked="{{ messages[0].content }}"))


@KINDS.add("texts")
def _texts(folder: Path) -> Kind:
    generator = known_generator(folder)

    def use(case: Case) -> None:
        text, ways, stop = written(case.asked)
        texts_of(generator, text, stop=stop, **ways)

    cases = st.builds(lambda *asked: Case(asked=asked), texts(), WAYS, STOPS)
    return Kind(folder, cases, use, Case(asked=("Hello", {}, [])))


@KINDS.add("texts of other tokenizers")
def _other_tokenizers(folder: Path) -> Kind:
    folder.mkdir(parents=True)

    def use(case: Case) -> None:
        name, text, escape, limit = written(case.asked)
        tokenizer = tokenizer_of(name)
        encoder = PromptEncoder(tokenizer, None, tokenizer.get_vocab_size())
        # As many characters as have a token for each thousand may fit, and take memory some hundred times as long.
        text = text[: 500_000 if limit else 100_000]
        ids = encoder.encode(text, escape_special_tokens=escape, limit=limit)
        if not escape and ids != tokenizer.encode(text).ids:
            raise FaultError("a prompt is not encoded as its tokenizer does")

    asked = (st.sampled_from(sorted(TOKENIZERS)), texts(), st.booleans(), st.sampled_from((None, 1, 256, 10_000)))
    cases = st.builds(lambda *asked: Case(asked=asked), *asked)
    return Kind(folder, cases, use, Case(asked=("byte level", "Hello", True, None)))


@KINDS.add("conversations")
def _conversations(folder: Path) -> Kind:
    generator = known_generator(folder)

    def use(case: Case) -> None:
        messages, ways = written(case.asked)
        texts_of(generator, messages, **ways)

    ways = st.fixed_dictionaries({}, optional={"escape_special_tokens": st.booleans()})
    cases = st.builds(lambda *asked: Case(asked=asked), conversations(), ways)
    return Kind(folder, cases, use, Case(asked=(CONVERSATION, {})))


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


@KINDS.add("options")
def _options(folder: Path) -> Kind:
    generator = known_generator(folder)

    def use(case: Case) -> None:
        options, request = case.asked
        _ask(generator, options, request)

    cases = st.builds(lambda *asked: Case(asked=asked), samplings(), requests())
    return Kind(folder, cases, use, Case(asked=({}, {})))


@KINDS.add("processors")
def _processors(folder: Path) -> Kind:
    generator = known_generator(folder)

    def use(case: Case) -> None:
        options, processors = case.asked
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
    return Kind(folder, cases, use, Case(asked=({}, [Processor("returns a view", 0)])))
