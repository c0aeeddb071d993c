import copy
import json
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from ht_export.model.checkpoint import load_base_model
from runtime import Generator, InputError, InputWarning, PromptTooLongError, Sampling, TreeSizes
from tests.runtime.conftest import change

# Random transfer layers draft badly: only many candidates have the right one among them now and then.
WIDE = TreeSizes(150, (150, 150, 150))


@pytest.fixture(scope="module")
def generator(tiny_engine: Path) -> Generator:
    return Generator(tiny_engine, threads=1)


@pytest.mark.parametrize("prompt", ["a", "Hello there", "x" * 40, "Ünïcödé 漢字 🙂"])
def test_greedy_tokens_are_those_of_transformers(generator: Generator, tiny_checkpoint: Path, prompt: str) -> None:
    base = load_base_model(str(tiny_checkpoint))
    ids = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    output = base.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60)
    expected = output[0, ids.shape[1] :].tolist()
    speculative = generator.generate(prompt, max_new_tokens=60)
    plain = generator.generate(prompt, max_new_tokens=60, speculate=False)
    assert speculative.tokens == plain.tokens == expected
    assert plain.tokens_per_step == 1.0
    assert plain.prompt_tokens == ids.shape[1]


@pytest.mark.parametrize("tree", [TreeSizes(1, (1, 1, 1)), TreeSizes(3, (1, 0, 0)), TreeSizes(20, (20, 20, 20))])
def test_the_tree_does_not_change_the_text(generator: Generator, tree: TreeSizes) -> None:
    plain = generator.generate("Hello", max_new_tokens=50, speculate=False)
    assert generator.generate("Hello", max_new_tokens=50, tree=tree).tokens == plain.tokens


@pytest.mark.parametrize(
    "chosen",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2},
        {"temperature": 1.2, "top_k": 30, "min_p": 0.02, "presence_penalty": 0.5, "frequency_penalty": 0.25},
        {"repetition_penalty": 1.3, "logit_bias": {40: 2.0}, "banned_tokens": [50], "min_new_tokens": 20},
        {"temperature": 0.9, "forced_tokens": {0: 70, 9: 71}, "logprobs": 3},
    ],
)
def test_sampled_text_is_the_same_with_and_without_speculation(generator: Generator, chosen: dict[str, Any]) -> None:
    for seed in range(2):
        sampling = Sampling(**chosen, seed=seed)
        speculative = generator.generate("Hello", max_new_tokens=40, sampling=sampling, tree=WIDE)
        plain = generator.generate("Hello", max_new_tokens=40, sampling=sampling, speculate=False)
        assert speculative.tokens == plain.tokens
        assert speculative.text == plain.text
        assert speculative.seed == plain.seed == (seed if "temperature" in chosen else None)


def test_penalised_greedy_tokens_are_those_of_transformers(generator: Generator, tiny_checkpoint: Path) -> None:
    base = load_base_model(str(tiny_checkpoint))
    ids = torch.tensor([generator.encode("Hello")])
    output = base.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=60,
        min_new_tokens=60,
        repetition_penalty=1.3,
        sequence_bias={(40,): 2.0},
        suppress_tokens=[50, 51],
    )
    sampling = Sampling(repetition_penalty=1.3, logit_bias={40: 2.0}, banned_tokens=[50, 51], min_new_tokens=60)
    result = generator.generate("Hello", max_new_tokens=60, sampling=sampling)
    assert result.tokens == output[0, ids.shape[1] :].tolist()


def test_a_sampled_answer_can_be_had_again_by_the_seed_of_its_result(generator: Generator) -> None:
    one, other = (generator.generate("Hi", max_new_tokens=30, sampling=Sampling(temperature=1.0)) for _ in range(2))
    assert one.tokens != other.tokens
    assert one.seed is not None
    again = generator.generate("Hi", max_new_tokens=30, sampling=Sampling(temperature=1.0, seed=one.seed))
    assert again.tokens == one.tokens


@pytest.mark.parametrize("way", [{"tree": WIDE}, {"speculate": False}])
def test_log_probabilities_are_those_of_the_base_model(
    generator: Generator, tiny_checkpoint: Path, way: dict[str, Any]
) -> None:
    sampling = Sampling(temperature=1.5, seed=3, repetition_penalty=1.5, logprobs=4)
    chunks = list(generator.stream("Hello", max_new_tokens=30, sampling=sampling, **way))
    result = chunks[-1].result
    assert result is not None
    assert result.log_probabilities is not None
    assert [score for chunk in chunks for score in chunk.log_probabilities or []] == result.log_probabilities
    assert [len(chunk.log_probabilities or []) for chunk in chunks] == [len(chunk.tokens) for chunk in chunks]
    ids = generator.encode("Hello")
    logits = load_base_model(str(tiny_checkpoint)).model(torch.tensor([ids + result.tokens])).logits[0]
    expected = logits[len(ids) - 1 : -1].log_softmax(dim=-1)
    for token, found, row in zip(result.tokens, result.log_probabilities, expected, strict=True):
        assert found.token == token
        assert found.log_probability == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(4)
        assert [place for place, _ in found.best] == best.indices.tolist()
        assert [value for _, value in found.best] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_without_being_asked_for_there_are_no_log_probabilities(generator: Generator) -> None:
    chunks = list(generator.stream("Hello", max_new_tokens=10))
    assert chunks[-1].result is not None
    assert chunks[-1].result.log_probabilities is None
    assert {chunk.log_probabilities for chunk in chunks} == {None}


def test_steps_are_counted_by_the_drafted_tokens_that_they_accepted(generator: Generator) -> None:
    chunks = list(generator.stream("Stop here", max_new_tokens=33, tree=WIDE))
    result = chunks[-1].result
    assert result is not None
    assert len(result.accepted) > 1
    assert result.accepted[-1] > 0
    # Neither the prompt's step nor the one that the end cut short.
    between = [len(chunk.tokens) - 1 for chunk in chunks[1:-1]]
    assert result.accepted == tuple(between.count(count) for count in range(max(between) + 1))
    assert result.steps == len(chunks)
    plain = generator.generate("Stop here", max_new_tokens=33, speculate=False)
    assert plain.accepted == (31,)
    for few in (1, 2):
        assert generator.generate("Stop here", max_new_tokens=few, speculate=False).accepted == ()


@pytest.mark.parametrize("way", [{"tree": WIDE}, {"speculate": False}])
def test_processors_are_called_once_for_each_token_of_an_answer_up_to_its_end(
    engine_copy: Path, generator: Generator, way: dict[str, Any]
) -> None:
    tokens = generator.generate("Stop here", max_new_tokens=30).tokens
    end = next(i for i in range(5, 30) if tokens[i] not in tokens[:i])
    change(engine_copy, stop_tokens=[tokens[end]])
    stopping = Generator(engine_copy, threads=1)
    prompt = stopping.encode("Stop here")
    for generator_, count in ((stopping, 30), (generator, end + 1)):
        seen: list[list[int]] = []

        def remember(so_far: Sequence[int], logits: np.ndarray, seen: list[list[int]] = seen) -> np.ndarray:
            seen.append(list(so_far))
            return logits

        result = generator_.generate("Stop here", max_new_tokens=count, sampling=Sampling(processors=[remember]), **way)
        assert result.tokens == tokens[: end + 1]
        assert seen == [prompt + tokens[:index] for index in range(end + 1)]


def test_a_stop_string_leaves_no_log_probabilities_of_tokens_after_it(generator: Generator) -> None:
    sampling = Sampling(temperature=1.0, seed=4, logprobs=1)
    whole = generator.generate("Stop at a word", max_new_tokens=40, sampling=sampling)
    assert whole.log_probabilities is not None
    for start in range(3, len(whole.text) - 2, 5):
        result = generator.generate(
            "Stop at a word", max_new_tokens=40, stop=[whole.text[start : start + 2]], sampling=sampling, tree=WIDE
        )
        count = len(result.tokens)
        assert result.tokens == whole.tokens[:count]
        assert [score.token for score in result.log_probabilities or []] == result.tokens


@pytest.mark.parametrize("way", [{"tree": WIDE}, {"speculate": False}])
def test_nothing_is_chosen_after_a_stop_string(generator: Generator, way: dict[str, Any]) -> None:
    whole = generator.generate("Stop here", max_new_tokens=30)
    for start in range(3, len(whole.text) - 2, 4):
        stop = [whole.text[start : start + 2]]
        expected = generator.generate("Stop here", max_new_tokens=30, stop=stop, speculate=False)
        end = expected.prompt_tokens + len(expected.tokens)

        def refuse(so_far: Sequence[int], logits: np.ndarray, end: int = end) -> np.ndarray:
            assert len(so_far) < end, "asked for a token after the answer's end"
            return logits

        result = generator.generate(
            "Stop here", max_new_tokens=30, stop=stop, sampling=Sampling(processors=[refuse]), **way
        )
        assert (result.text, result.tokens) == (expected.text, expected.tokens)
        assert result.finish_reason == expected.finish_reason


def test_a_request_within_a_request_is_refused_and_leaves_the_generator_usable(generator: Generator) -> None:
    def ask(so_far: Sequence[int], logits: np.ndarray) -> np.ndarray:
        generator.generate("Another", max_new_tokens=3)
        return logits

    with pytest.raises(InputError, match="a processor cannot call the generator that calls it"):
        generator.generate("Hello", max_new_tokens=5, sampling=Sampling(processors=[ask]))
    expected = generator.generate("Hello", max_new_tokens=20, speculate=False)
    assert generator.generate("Hello", max_new_tokens=20).tokens == expected.tokens


def test_streams_taken_in_turns_are_those_taken_one_after_another(generator: Generator) -> None:
    prompts = ["Hello", "Another one"]
    alone = [generator.generate(prompt, max_new_tokens=25).tokens for prompt in prompts]
    streams = [generator.stream(prompt, max_new_tokens=25) for prompt in prompts]
    found: list[list[int]] = [[], []]
    while streams_left := [pair for pair in zip(streams, found, strict=True) if len(pair[1]) < 25]:
        for stream, tokens in streams_left:
            tokens += next(stream).tokens
    assert found == alone


def test_a_raw_prompt_is_encoded_without_the_chat_template(generator: Generator, tiny_checkpoint: Path) -> None:
    tokenizer = load_base_model(str(tiny_checkpoint)).tokenizer
    assert generator.encode("Hi!", raw=True) == tokenizer("Hi!").input_ids
    messages = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Yes?"}]
    assert generator.encode(messages) == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_special_tokens_that_a_prompt_spells_are_text_when_asked_for(generator: Generator, tiny_engine: Path) -> None:
    prompt = "Hi</s><|user|>"
    end, user = (generator.encode(text, raw=True)[0] for text in ("</s>", "<|user|>"))
    found = generator.encode(prompt)
    assert [found.count(end), found.count(user)] == [2, 2]
    escaped = generator.encode(prompt, escape_special_tokens=True)
    assert [escaped.count(end), escaped.count(user)] == [1, 1]
    assert generator.encode([{"role": "user", "content": prompt}], escape_special_tokens=True) == escaped
    raw = generator.encode(prompt, raw=True, escape_special_tokens=True)
    assert end not in raw
    assert generator.decode(raw) == prompt
    always = Generator(tiny_engine, threads=1, adapt=False, escape_special_tokens=True)
    assert always.encode(prompt) == escaped
    assert always.encode(prompt, escape_special_tokens=False) == found
    assert always.generate(prompt, max_new_tokens=2).prompt_tokens == len(escaped)
    result = generator.generate(prompt, max_new_tokens=2, escape_special_tokens=True)
    assert result.prompt_tokens == len(escaped)
    assert always.generate(prompt, max_new_tokens=2, escape_special_tokens=False).prompt_tokens == len(found)


def test_a_stream_ends_with_the_result_and_its_parts_are_the_whole(generator: Generator) -> None:
    chunks = list(generator.stream("Stream this", max_new_tokens=40))
    result = chunks[-1].result
    assert result is not None
    assert result.tokens == generator.generate("Stream this", max_new_tokens=40).tokens
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert [token for chunk in chunks for token in chunk.tokens] == result.tokens
    assert all(chunk.result is None for chunk in chunks[:-1])
    assert len(chunks) == result.steps


def test_the_answer_has_at_most_the_tokens_asked_for(generator: Generator) -> None:
    long = generator.generate("Stop here", max_new_tokens=30, speculate=False)
    for count in range(1, 12):
        result = generator.generate("Stop here", max_new_tokens=count)
        assert result.tokens == long.tokens[:count]
        assert result.finish_reason == "length"


def test_an_end_of_text_token_ends_the_answer_and_is_not_in_its_text(engine_copy: Path, generator: Generator) -> None:
    tokens = generator.generate("Stop here", max_new_tokens=30).tokens
    end = next(i for i in range(5, 30) if tokens[i] not in tokens[:i])
    about = json.loads(engine_copy.with_suffix(".json").read_text())
    about["stop_tokens"] = [tokens[end]]
    engine_copy.with_suffix(".json").write_text(json.dumps(about))
    for speculate in (True, False):
        result = Generator(engine_copy, threads=1).generate("Stop here", max_new_tokens=30, speculate=speculate)
        assert result.tokens == tokens[: end + 1]
        assert result.finish_reason == "stop"


def test_a_stop_string_ends_the_text_before_it_in_either_way_of_decoding(generator: Generator) -> None:
    text = generator.generate("Stop at a word", max_new_tokens=40).text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    for speculate in (True, False):
        result = generator.generate("Stop at a word", max_new_tokens=40, stop=[stop], speculate=speculate)
        assert result.text == text[: text.index(stop)]
        assert result.finish_reason == "stop"
        assert len(result.tokens) < 40


def test_generation_ends_at_the_context_limit(generator: Generator) -> None:
    prompt = "y" * 240
    size = len(generator.encode(prompt, raw=True))
    result = generator.generate(prompt, raw=True, max_new_tokens=100)
    plain = generator.generate(prompt, raw=True, max_new_tokens=100, speculate=False)
    assert size + len(result.tokens) == 256
    assert result.finish_reason == "length"
    assert result.tokens == plain.tokens


def test_a_prompt_past_the_context_limit(generator: Generator) -> None:
    with pytest.raises(PromptTooLongError, match="has 256 tokens, and the engine's context limit is 256"):
        generator.stream("y" * 256, raw=True)


@pytest.mark.parametrize("size", [100_000, 1_000_000, 100_000_000])
@pytest.mark.parametrize("raw", [True, False])
def test_a_prompt_far_past_the_context_limit(generator: Generator, size: int, raw: bool) -> None:
    with pytest.raises(PromptTooLongError, match=r"more than 256 tokens|characters.*; shorten it$"):
        generator.stream("y" * size, raw=raw)


def test_the_result_is_json_with_the_documented_names(generator: Generator) -> None:
    result = generator.generate("Names", max_new_tokens=5)
    assert list(json.loads(json.dumps(result.to_dict()))) == [
        "text",
        "tokens",
        "prompt_tokens",
        "cached_prompt_tokens",
        "finish_reason",
        "steps",
        "tokens_per_step",
        "decode_tokens_per_second",
        "time_to_first_token_s",
        "accepted",
        "seed",
        "log_probabilities",
        "prompt_log_probabilities",
        "candidates",
        "accepted_candidates",
        "prediction_tokens",
        "found_prediction_tokens",
    ]
    assert result.tokens_per_step == len(result.tokens) / result.steps
    assert result.decode_tokens_per_second > 0
    assert result.time_to_first_token_s > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens must be a whole number, not 2\.5"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens must be a whole number, not nan"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, not True"),
        ({"stop": None}, "stop must be a list of strings"),
        ({"stop": iter(["x"])}, "stop must be a list of strings"),
        ({"stop": "word"}, "stop must be a list of strings"),
        ({"stop": [""]}, "not empty"),
        ({"tree": TreeSizes(0, (1, 1, 1))}, "tree_rows must be at least 1"),
        ({"tree": TreeSizes(4, (1, 1))}, "pseudo_rows must be 3 numbers"),
        ({"tree": TreeSizes(4, (0, 4, 4))}, "with none after a 0"),
        ({"tree": TreeSizes(4, (9, 1, 1))}, "each of pseudo_rows must be at most 4, not 9"),
        ({"tree": TreeSizes(4, (-1, 1, 1))}, "each of pseudo_rows must be at least 0, not -1"),
        ({"tree": TreeSizes(4, cast(Any, (1.5, 1, 1)))}, r"each of pseudo_rows must be a whole number, not 1\.5"),
        ({"tree": TreeSizes(4, cast(Any, 4))}, r"tree must be a runtime\.TreeSizes"),
        ({"tree": (4, (4, 2, 2))}, r"tree must be a runtime\.TreeSizes"),
        ({"tree": TreeSizes(10**7, (4, 2, 2))}, "tree_rows must be at most 1024, not 10000000"),
        (
            {"sampling": Sampling(forced_tokens={5: 1}), "max_new_tokens": 5},
            "forced_tokens has new token 5, and max_new_tokens is 5; change one of them",
        ),
        ({"tree": TreeSizes(4, (1, 1, 1)), "speculate": False}, "leave one of them out"),
        ({"sampling": {"temperature": 1.0}}, r"sampling must be a runtime\.Sampling, not \{'temperature': 1\.0\}"),
        (
            {"sampling": Sampling(min_new_tokens=6), "max_new_tokens": 5},
            "min_new_tokens is 6, more than max_new_tokens, 5; change one of them",
        ),
        ({"sampling": Sampling(banned_tokens=[264])}, "banned_tokens has token 264; this model's tokens are 0 to 263"),
    ],
)
def test_arguments_that_do_not_fit(generator: Generator, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generator.generate("Hi", **arguments)


@pytest.mark.parametrize("prompt", [[{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": 3}]])
def test_messages_that_do_not_fit(generator: Generator, prompt: list) -> None:
    with pytest.raises(InputError, match=r"conversation is empty|needs '(role|content)' as a string"):
        generator.generate(prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (5, "a conversation must be a list of messages, not 5"),
        (None, "a conversation must be a list of messages, not None"),
        ({"role": "user", "content": "x"}, "a conversation must be a list of messages"),
        (iter([{"role": "user", "content": "x"}]), "a conversation must be a list of messages"),
    ],
)
def test_what_is_no_prompt(generator: Generator, prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generator.generate(prompt)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": "a\udcffb", "raw": True},
        {"prompt": "a\udcffb"},
        {"prompt": [{"role": "user", "content": "\ud800"}]},
    ],
)
def test_bytes_that_are_no_text(generator: Generator, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"the prompt has '\\ud(cff|800)', which is no character"):
        generator.generate(**arguments)


def test_an_empty_raw_prompt(generator: Generator) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        generator.generate("", raw=True)


def test_raw_takes_no_messages(generator: Generator) -> None:
    with pytest.raises(InputError, match="raw=True takes a string"):
        generator.generate([{"role": "user", "content": "x"}], raw=True)


@pytest.mark.parametrize("use", [pickle.dumps, copy.copy, copy.deepcopy, lambda generator: pickle.dumps([generator])])
def test_a_generator_cannot_be_pickled_or_copied(generator: Generator, use: Callable[[object], object]) -> None:
    with pytest.raises(
        TypeError, match=r"a Generator cannot be pickled or copied: it holds .* make one in each process"
    ):
        use(generator)


@pytest.mark.parametrize("use", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_answer_under_way_cannot_be_pickled_or_copied(generator: Generator, use: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="a Request cannot be pickled or copied"):
        use(generator.stream("Hello"))


def test_results_and_options_can_be_pickled_and_copied(generator: Generator) -> None:
    sampling = Sampling(temperature=1.0, seed=3, logprobs=2)
    chunks = list(generator.stream("Hello", max_new_tokens=3, sampling=sampling))
    for value in (sampling, chunks, chunks[-1].result):
        assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value


def test_more_threads_than_cores_are_warned_of_at_the_callers_line(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.checks.cores", lambda: 2)
    with pytest.warns(InputWarning, match="threads is 3, and this process has 2 cores: .* give at most 2") as warned:
        Generator(tiny_engine, threads=3, adapt=False)
    assert [warning.filename for warning in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Generator(tiny_engine, threads=2, adapt=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("engine\0.onnx", r"engine\\x00.onnx' has a character of code 0"),
        ("a\udcff/engine.onnx", r"a\\udcff/engine.onnx': the name is not in UTF-8; rename the file or folder"),
        ("", "no engine at"),
    ],
)
def test_the_name_of_an_engine_that_no_file_can_have(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Generator(name)
