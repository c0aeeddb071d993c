"""What a running service is given: templates, texts, conversations and options, and functions that change logits."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

import runtime.generator
from runtime import DeadlineError, Generator, InputError, RequestOptions, Sampling, Tokens
from runtime.bundle.engine_file import EngineFile
from runtime.chat import ChatTemplate
from runtime.engines.protocol import Engine
from runtime.prompts import PromptEncoder
from runtime.serving import admission
from runtime.serving.chat import calling_of_chat
from runtime.serving.errors import ApiError
from runtime.serving.keys import Keys, read_keys
from runtime.serving.requests import ChatRequest, CompletionRequest, ResponseRequest
from runtime.serving.settings import Settings
from tests.hostile.cases import SECRET, Case, FaultError, Kind, Kinds
from tests.hostile.damage import damaged, damaged_json
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


BODY: dict[str, Any] = {
    "model": "m",
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "min_p": 0.1,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.5},
    "seed": 7,
    "stop": ["a", "b"],
    "min_tokens": 1,
    "prediction": {"type": "content", "content": [{"type": "text", "text": "a Hello"}]},
    "priority": 1,
    "deadline": 5.0,
    "metadata": {"a": "b"},
    "stream": False,
}
PART = {"type": "text", "text": "Hello"}
FUNCTION = {"name": "f", "description": "a", "parameters": {"type": "object", "properties": {"a": {"enum": [1, "b"]}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
BODIES: dict[str, dict[str, Any]] = {
    "chat": {
        **BODY,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [PART]}],
        "max_tokens": 4,
        "logprobs": True,
        "top_logprobs": 2,
        "n": 2,
    },
    "tools": {
        **{name: value for name, value in BODY.items() if name != "min_tokens"},
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "3"},
        ],
        "tools": [{"type": "function", "function": {**FUNCTION, "strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "max_tokens": 4,
    },
    "text": {**BODY, "prompt": ["a", "b c"], "max_tokens": 4, "logprobs": 2, "echo": True},
    "response": {**BODY, "input": [{"role": "user", "content": "Hello"}], "max_output_tokens": 4},
}


def _asked_over_http(generator: Generator, kind: str, body: bytes) -> tuple[Any, Sampling, RequestOptions, list[Any]]:
    """Return what a body asks for, as a server takes it."""
    settings = Settings(max_tokens=8)
    if kind in ("chat", "tools"):
        chat = admission.decode(body, ChatRequest)
        admission.check_streaming(chat, chat.stream_options)
        sampling = admission.sampling_of(chat, admission.logprobs_of_chat(chat))
        options = admission.options_of(chat, admission.most_of_chat(chat), settings)
        found = calling_of_chat(generator, chat, shaped=sampling.grammar is not None, enabled=True)
        options["tools"] = [] if found is None else found.tools
        sampling = sampling if found is None else found.sampling(sampling)
        return chat, sampling, options, [admission.messages_of_chat(chat)]
    if kind == "text":
        text = admission.decode(body, CompletionRequest)
        admission.check_streaming(text, text.stream_options)
        admission.check_completion(text)
        sampling = admission.sampling_of(text, text.logprobs)
        prompts: list[Any] = [one if isinstance(one, str) else Tokens(one) for one in admission.prompts_of(text)]
        return text, sampling, admission.options_of(text, text.max_tokens, settings), prompts
    response = admission.decode(body, ResponseRequest)
    admission.check_streaming(response, response.stream_options)
    admission.check_response(response)
    sampling = admission.sampling_of(response, admission.logprobs_of_response(response))
    options = admission.options_of(response, response.max_output_tokens, settings)
    return response, sampling, options, [admission.messages_of_response(response)]


@KINDS.add("bodies of requests over HTTP")
def _bodies(folder: Path) -> Kind:
    generator = known_generator(folder)

    def use(case: Case) -> None:
        kind, body = case.asked
        try:
            _, sampling, options, prompts = _asked_over_http(generator, kind, body)
        except ApiError as error:
            if error.status != 400:
                raise FaultError(f"a body that does not fit has status {error.status}") from error
            raise InputError(str(error)) from error
        for prompt in prompts:
            options["raw"] = not isinstance(prompt, list)
            asked: Any = {**options, "sampling": sampling}
            # One that is over at once is no fault.
            with contextlib.suppress(DeadlineError):
                generator.submit(prompt, **asked).result()

    def damaged_body(kind: str) -> st.SearchStrategy[Case]:
        return st.builds(lambda body: Case(asked=(kind, body)), damaged_json(BODIES[kind], MORE))

    cases = st.sampled_from(sorted(BODIES)).flatmap(damaged_body)
    return Kind(folder, cases, use, Case(asked=("chat", json.dumps(BODIES["chat"]).encode())))


# What a field may have in the place of its own.
MORE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1 << 70,
    1.5,
    -0.0,
    "",
    "\ud800",
    "assistant",
    "</s>",
    [],
    [[1, 2]],
    {},
    {"type": "image_url"},
)


@KINDS.add("files of API keys", "file of API keys")
def _keys(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    path = folder / "keys.txt"
    valid = b"# of ours\nsk-one\n\nsk-two \n"
    path.write_bytes(valid)

    def use(case: Case) -> None:
        for key in read_keys(path):
            keys = Keys([key])
            keys.check(b"Bearer " + key.encode())
            with contextlib.suppress(ApiError):
                keys.check(b"Bearer " + key.encode() + b"x")
                raise FaultError("another key is taken for one of the file's")

    cases = st.builds(lambda content: Case({path.name: content}), damaged(valid))
    return Kind(folder, cases, use)
