"""The choice of tokens: each option against transformers, and speculation against plain decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime import InputError, LogitsProcessor, Sampling
from runtime.bindings import GraphDims
from runtime.drafting.drafter import Drafter
from runtime.drafting.sizing import FixedSizes
from runtime.drafting.text_drafts import TextDrafts
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.sampling.noise import Noise
from runtime.sampling.sampler import Sampler
from runtime.tree import TreeSizes
from tests.runtime.known_engine import KnownEngine, Text
from tests.runtime.known_engine import steps as steps_of
from tests.runtime.sampling.test_candidates import on_a_border
from tests.statistics import largest_chi_square

VOCAB = 12
STOPS = (2, 5)
PLAIN = TreeSizes.plain(2)
NO_FILTERS: dict[str, Any] = {"top_k": None, "top_p": None, "min_p": None}


class PenalisesAnswer:
    """Presence and frequency penalties by their definition in the OpenAI API, as a processor of transformers."""

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self.prompt_length, self.presence, self.frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for token, count in Counter(input_ids[0, self.prompt_length :].tolist()).items():
            scores[0, token] -= count * self.frequency + self.presence
        return scores


def by_transformers(sampling: Sampling, prompt_length: int, warp: bool = True) -> LogitsProcessorList:
    """Return the processors of `generate`, in its order; `warp=False` without temperature and what comes after it."""
    processors: list[Any] = []
    if sampling.logit_bias:
        bias = {(token,): value for token, value in sampling.logit_bias.items()}
        processors.append(SequenceBiasLogitsProcessor(bias))
    processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(PenalisesAnswer(prompt_length, sampling.presence_penalty, sampling.frequency_penalty))
    processors.append(MinNewTokensLengthLogitsProcessor(prompt_length, sampling.min_new_tokens, list(STOPS)))
    processors.append(SuppressTokensLogitsProcessor(sampling.banned_tokens))
    if warp:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k is not None:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p is not None:
            processors.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p is not None:
            processors.append(MinPLogitsWarper(sampling.min_p))
    return LogitsProcessorList(processors)


def processed(list_: LogitsProcessorList, tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
    ids = torch.tensor([list(tokens)], dtype=torch.int64)
    return list_(ids, torch.from_numpy(logits.copy())[None])[0].numpy()


class Spy:
    """A processor that changes nothing and remembers what it was given."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.logits: list[np.ndarray] = []

    def __call__(self, tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        self.tokens.append(list(tokens))
        self.logits.append(logits)
        return logits


numbers = st.floats(-20, 20, width=32) | st.integers(-3, 3).map(float)
rows = st.lists(numbers, min_size=VOCAB, max_size=VOCAB).map(lambda row: np.array(row, dtype=np.float32))
tokens_ = st.integers(0, VOCAB - 1)
prompts = st.lists(tokens_, min_size=1, max_size=8)
# Exact in float32, with any count.
shifts = st.sampled_from([0.0, 0.5, -1.25, 3.75])
# Two tokens are always left.
history_options: dict[str, st.SearchStrategy] = {
    "logit_bias": st.dictionaries(tokens_, st.floats(-5, 5, width=32)),
    "repetition_penalty": st.sampled_from([1.0, 0.5, 1.1, 2.0]),
    "presence_penalty": shifts,
    "frequency_penalty": shifts,
    "banned_tokens": st.lists(st.integers(0, VOCAB - 3), max_size=4),
    "min_new_tokens": st.integers(0, 4),
}
draw_options: dict[str, st.SearchStrategy] = {
    "temperature": st.sampled_from([0.1, 0.8, 1.0, 1.7]),
    "top_k": st.none() | st.integers(1, VOCAB + 1),
    "top_p": st.none() | st.floats(0.05, 0.999),
    "min_p": st.none() | st.floats(0.0, 1.0),
}


def options(strategies: dict[str, st.SearchStrategy]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=strategies)


@given(prompts, options(history_options), st.lists(rows, min_size=1, max_size=6))
def test_processors_see_logits_as_transformers_makes_them_of_the_same_options(
    prompt: list[int], chosen: dict[str, Any], logits: list[np.ndarray]
) -> None:
    spy = Spy()
    sampling = Sampling(**chosen, processors=[spy])
    sampler = Sampler(sampling, prompt, VOCAB, STOPS)
    reference = by_transformers(sampling, len(prompt), warp=False)
    tokens = list(prompt)
    for step, row in enumerate(logits):
        token = sampler(row)
        expected = processed(reference, tokens, row)
        np.testing.assert_allclose(spy.logits[step], expected, rtol=1e-6, atol=1e-6)
        assert spy.tokens[step] == tokens
        assert token == spy.logits[step].argmax()
        tokens.append(token)


@given(prompts, options(history_options), options(draw_options), st.integers(0, 2**64 - 1), st.lists(rows, max_size=6))
def test_a_token_is_the_first_by_its_noise_in_the_distribution_of_transformers(
    prompt: list[int], history: dict[str, Any], drawing: dict[str, Any], seed: int, logits: list[np.ndarray]
) -> None:
    sampling = Sampling(**{"temperature": 1.3, **history, **drawing, "seed": seed})
    sampler = Sampler(sampling, prompt, VOCAB, STOPS)
    reference = by_transformers(sampling, len(prompt))
    tokens = list(prompt)
    for row in logits:
        token = sampler(row)
        scores = processed(by_transformers(replace(sampling, **NO_FILTERS), len(prompt)), tokens, row)
        probabilities = torch.from_numpy(processed(reference, tokens, row)).double().softmax(0).numpy()
        waits = Noise(seed, len(tokens)).waits(len(tokens), np.arange(VOCAB))
        if not on_a_border(scores, sampling.top_k, sampling.top_p, sampling.min_p):
            assert probabilities[token] > 0
            with np.errstate(divide="ignore"):
                finish = waits / probabilities
            assert finish[token] <= finish.min() * (1 + 1e-4)
        tokens.append(token)


def two_token_engine(seed: int = 0, spread: float = 1.5) -> KnownEngine:
    """Return a base model whose logits are a function of the last two tokens and the position.

    It drafts its own logits along the greedy continuation: often right for sampled text, and often not.
    """
    table = (np.random.default_rng(seed).standard_normal((41, VOCAB)) * spread).astype(np.float32)
    table.setflags(write=False)

    def logits(text: Text) -> np.ndarray:
        return table[(5 * sum(text[-2:]) + text[-1] + len(text)) % len(table)]

    def draft_logits(text: Text, step: int) -> np.ndarray:
        for _ in range(step):
            text = (*text, int(logits(text).argmax()))
        return logits(text)

    return KnownEngine(GraphDims(1, 1, 1, 1, 1, VOCAB, (0, 0)), logits, draft_logits)


def decode(
    prompt: list[int],
    sampling: Sampling,
    sizes: TreeSizes,
    count: int,
    stop_tokens: Sequence[int] = STOPS,
    ngrams: TextDrafts | None = None,
) -> tuple[list[list[int]], Sampler]:
    sampler = Sampler(sampling, prompt, VOCAB, stop_tokens)
    layers = TransferDrafts(temperature=sampling.temperature, noise=sampler.noise)
    drafter = Drafter(FixedSizes(sizes), [layers] if ngrams is None else [layers, ngrams])
    ends = frozenset(stop_tokens).__contains__
    found = steps_of(two_token_engine(), prompt, drafter, 4, choose=sampler, max_new_tokens=count, ends=ends)
    return list(found), sampler


def flat(steps: list[list[int]]) -> list[int]:
    return [token for step in steps for token in step]


class EveryThird:
    """A stateful processor: every third token is a multiple of three, and no token comes twice running."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        self.calls += 1
        if self.calls % 3 == 0:
            logits[np.arange(VOCAB) % 3 != 0] = -np.inf
        logits[tokens[-1]] = -np.inf
        return logits


trees_ = st.builds(TreeSizes, st.integers(1, 9), st.tuples(*[st.integers(0, 9)] * 2))


@given(
    prompts,
    options(history_options),
    options(draw_options),
    st.dictionaries(st.integers(4, 12), st.integers(VOCAB - 2, VOCAB - 1), max_size=3),
    st.booleans(),
    st.integers(0, 3),
    trees_,
    st.booleans(),
    st.integers(5, 20),
    st.integers(0, 1000),
)
def test_with_the_same_seed_speculation_gives_the_tokens_of_plain_decoding_with_any_options(
    prompt: list[int],
    history: dict[str, Any],
    drawing: dict[str, Any],
    forced: dict[int, int],
    hook: bool,
    logprobs: int,
    sizes: TreeSizes,
    ngrams: bool,
    count: int,
    seed: int,
) -> None:
    if drawing.keys() & {"top_k", "top_p", "min_p"}:
        drawing = {"temperature": 0.9, **drawing}
    # Whatever came last, the hook leaves a token.
    assume(not hook or len(set(range(0, VOCAB, 3)) - set(history.get("banned_tokens", ()))) > 1)
    found = []
    for tree in (sizes, PLAIN):
        spy = Spy()
        processors: list[LogitsProcessor] = [EveryThird(), spy] if hook else [spy]
        # A forced token after itself would be ruled out by the hook.
        chosen = {**history, **drawing, "forced_tokens": {} if hook else forced}
        sampling = Sampling(**chosen, processors=processors, seed=seed, logprobs=logprobs)
        steps, sampler = decode(prompt, sampling, tree, count, ngrams=TextDrafts() if ngrams else None)
        tokens = flat(steps)
        assert spy.tokens == [prompt + tokens[:index] for index in range(len(tokens))]
        assert not set(tokens[:-1]) & set(STOPS)
        assert len(tokens) == count or tokens[-1] in STOPS
        found.append((tokens, sampler.log_probabilities, [row.tolist() for row in spy.logits]))
    assert found[0] == found[1]


def test_speculation_accepts_drafts_of_sampled_text() -> None:
    sampling = Sampling(temperature=0.8, seed=1)
    steps, _ = decode([1], sampling, TreeSizes(9, (9, 9)), 200, stop_tokens=())
    assert len(flat(steps)) / len(steps) > 1.4
    assert {len(step) for step in steps} == {1, 2, 3}


@pytest.mark.parametrize("sizes", [PLAIN, TreeSizes(6, (6, 6))])
@pytest.mark.parametrize(
    "chosen",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 4},
        {"temperature": 1.2, "top_p": 0.8},
        {"temperature": 1.3, "min_p": 0.2},
        {"temperature": 1.1, "top_k": 6, "top_p": 0.9, "logit_bias": {3: 2.0}, "banned_tokens": [1]},
    ],
)
def test_tokens_come_as_often_as_the_distribution_of_transformers_says(
    chosen: dict[str, Any], sizes: TreeSizes
) -> None:
    engine = two_token_engine()
    prompt = [4, 7]
    reference = by_transformers(Sampling(**chosen), len(prompt))
    counts: dict[tuple[int, ...], np.ndarray] = {}
    for seed in range(700):
        steps, _ = decode(prompt, Sampling(**chosen, seed=seed), sizes, 3, stop_tokens=())
        text = flat(steps)
        # Counts of what follows the prompt, and of what follows each continuation that is frequent enough.
        for place in range(3):
            counts.setdefault(tuple(text[:place]), np.zeros(VOCAB))[text[place]] += 1
    statistic, degrees = 0.0, 0
    for continuation, seen in counts.items():
        if seen.sum() < 100:
            continue
        tokens = [*prompt, *continuation]
        scores = torch.from_numpy(processed(reference, tokens, engine.logits(tuple(tokens))))
        probabilities = scores.double().softmax(0).numpy()
        assert seen[probabilities == 0].sum() == 0
        expected = probabilities * seen.sum()
        # The statistic has its distribution where enough is expected; the rest counts as one.
        rare = expected < 5
        pairs = [*zip(seen[~rare], expected[~rare], strict=True)]
        if expected[rare].sum() > 5:
            pairs.append((seen[rare].sum(), expected[rare].sum()))
        statistic += sum((a - b) ** 2 / b for a, b in pairs)
        degrees += len(pairs) - 1
    assert degrees >= 3
    assert statistic < largest_chi_square(degrees)


@given(prompts, st.integers(0, 2**64 - 1), st.integers(1, 9))
def test_an_answer_goes_on_the_same_when_part_of_it_is_put_into_the_prompt(
    prompt: list[int], seed: int, cut: int
) -> None:
    sampling = Sampling(temperature=1.0, repetition_penalty=1.2, top_p=0.9, seed=seed)
    whole = flat(decode(prompt, sampling, PLAIN, 12, stop_tokens=())[0])
    rest = flat(decode(prompt + whole[:cut], sampling, PLAIN, 12 - cut, stop_tokens=())[0])
    assert whole == whole[:cut] + rest


def test_the_same_seed_gives_the_same_answer_and_other_seeds_others() -> None:
    answers = {}
    for seed in [*range(20), 2**32, 2**64 - 1]:
        sampling = Sampling(temperature=1.0, seed=seed)
        answers[seed], again = (tuple(flat(decode([3], sampling, PLAIN, 20, ())[0])) for _ in range(2))
        assert again == answers[seed]
    assert len(set(answers.values())) == len(answers)


def test_without_a_seed_each_answer_has_a_new_one_which_gives_it_again() -> None:
    sampling = Sampling(temperature=1.0)
    (one, sampler), (other, other_sampler) = (decode([3], sampling, PLAIN, 20, ()) for _ in range(2))
    assert one != other
    assert sampler.seed is not None
    assert sampler.seed != other_sampler.seed
    assert sampler.seed < 2**53
    again, _ = decode([3], Sampling(temperature=1.0, seed=sampler.seed), PLAIN, 20, ())
    assert again == one


def test_greedy_decoding_has_no_seed() -> None:
    assert Sampler(Sampling(seed=5), [1], VOCAB).seed is None


def test_forced_tokens_come_where_they_are_wanted_and_are_all_that_processors_may_choose_from() -> None:
    spy = Spy()
    sampling = Sampling(temperature=1.0, seed=0, forced_tokens={0: 3, 2: 9}, logit_bias={3: -100.0}, processors=[spy])
    tokens = flat(decode([1], sampling, TreeSizes(6, (6, 6)), 5, ())[0])
    assert (tokens[0], tokens[2]) == (3, 9)
    assert np.flatnonzero(spy.logits[2] > -np.inf).tolist() == [9]


def test_stop_tokens_may_come_from_min_new_tokens_on() -> None:
    row = np.zeros(VOCAB, dtype=np.float32)
    row[[2, 5]] = 9
    sampler = Sampler(Sampling(min_new_tokens=2), [1], VOCAB, STOPS)
    assert [sampler(row) for _ in range(4)] == [0, 0, 2, 2]


@given(st.lists(rows, min_size=1, max_size=3), st.integers(1, VOCAB), st.sampled_from([0.0, 1.0]))
def test_log_probabilities_are_the_base_models_own_whatever_the_options(
    logits: list[np.ndarray], count: int, temperature: float
) -> None:
    sampling = Sampling(
        temperature=temperature, seed=1, logprobs=count, repetition_penalty=2.0, logit_bias={4: 5.0}, banned_tokens=[1]
    )
    sampler = Sampler(sampling, [1], VOCAB)
    tokens = [sampler(row) for row in logits]
    assert sampler.log_probabilities is not None
    for token, row, found in zip(tokens, logits, sampler.log_probabilities, strict=True):
        expected = torch.from_numpy(row).double().log_softmax(0).numpy()
        assert found.token == token
        assert found.log_probability == pytest.approx(expected[token], abs=1e-5)
        assert [best for best, _ in found.best] == np.argsort(-row, kind="stable")[:count].tolist()
        assert [value for _, value in found.best] == pytest.approx([expected[best] for best, _ in found.best], abs=1e-5)


def test_without_log_probabilities_there_are_none() -> None:
    sampler = Sampler(Sampling(), [1], VOCAB)
    sampler(np.zeros(VOCAB, dtype=np.float32))
    assert sampler.log_probabilities is None


@given(prompts, options(history_options), options(draw_options), rows)
def test_the_logits_given_may_be_read_only_and_stay_as_they_are(
    prompt: list[int], history: dict[str, Any], drawing: dict[str, Any], row: np.ndarray
) -> None:
    before = row.copy()
    row.setflags(write=False)
    chosen = {"temperature": 1.0, **history, **drawing}
    for processors in ([], [EveryThird()]):
        sampler = Sampler(Sampling(**chosen, processors=processors, logprobs=2), prompt, VOCAB, STOPS)
        sampler(row)
        np.testing.assert_array_equal(row, before)


def test_a_prompt_may_have_tokens_that_cannot_be_chosen() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), [VOCAB + 5, 1], VOCAB, [VOCAB + 7])
    row = np.full(VOCAB, 1.0, dtype=np.float32)
    row[1] = 1.5
    assert sampler(row) == 0


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"logit_bias": {12: 1.0}}, "logit_bias has token 12; this model's tokens are 0 to 11"),
        ({"banned_tokens": [3, 400]}, "banned_tokens has token 400; this model's tokens are 0 to 11"),
        ({"forced_tokens": {0: 12}}, "forced_tokens has token 12; this model's tokens are 0 to 11"),
        ({"logprobs": 13}, "logprobs must be at most 12, the size of the vocabulary, not 13"),
        (
            {"forced_tokens": {1: 5}, "min_new_tokens": 2},
            "forced_tokens ends the answer with stop token 5 as new token 1, and min_new_tokens is 2; change one",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampler(Sampling(**chosen), [1], VOCAB, STOPS)


def forbid_all(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
    return np.full_like(logits, -np.inf)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
@pytest.mark.parametrize(
    "chosen",
    [
        {"banned_tokens": range(VOCAB)},
        {"banned_tokens": [token for token in range(VOCAB) if token not in STOPS], "min_new_tokens": 1},
        {"processors": [forbid_all]},
    ],
)
def test_settings_that_leave_no_token(chosen: dict[str, Any], temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, **chosen), [1], VOCAB, STOPS)
    with pytest.raises(InputError, match="no token is left for new token 0: banned_tokens, min_new_tokens, proc"):
        sampler(np.zeros(VOCAB, dtype=np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logits_that_are_no_numbers_are_not_drawn_from(value: float, temperature: float) -> None:
    row = np.zeros(VOCAB, dtype=np.float32)
    row[4] = value
    with pytest.raises(InputError, match=f"the engine's logits for new token 0 hold {value}: its numbers overflow"):
        Sampler(Sampling(temperature=temperature), [1], VOCAB)(row)
    with pytest.raises(InputError, match=f"the engine's logits for new token 0 hold {value}"):
        Sampler(Sampling(banned_tokens=[1]), [1], VOCAB)(row)
    with pytest.raises(InputError, match=f"the engine's logits for new token 0 hold {value}"):
        Sampler(Sampling(), [1], VOCAB)(row)


def returns(value: Any) -> Callable[[Sequence[int], NDArray[np.float32]], Any]:
    def processor(tokens: Sequence[int], logits: NDArray[np.float32]) -> Any:
        return value

    return processor


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"processor 1 \(processor\) returned NoneType; it must return an array of logits"),
        ([0.0] * VOCAB, "returned list; it must return an array of logits"),
        (np.zeros(VOCAB), r"returned float64 \[12\]; it must return logits of float32 \[12\]"),
        (np.zeros(VOCAB, dtype=np.int64), r"returned int64 \[12\]; it must return logits of float32 \[12\]"),
        (np.zeros(VOCAB - 1, dtype=np.float32), r"returned float32 \[11\]; it must return logits of float32 \[12\]"),
        (np.zeros((1, VOCAB), dtype=np.float32), r"returned float32 \[1, 12\]; it must return"),
        (np.full(VOCAB, np.nan, dtype=np.float32), "returned logits that hold nan; they must be numbers, or -inf"),
        (np.full(VOCAB, np.inf, dtype=np.float32), "returned logits that hold inf; they must be numbers, or -inf"),
        (np.float32(1), "returned float32; it must return an array of logits"),
        (np.array(1, dtype=np.float32), r"returned float32 \[\]; it must return logits of float32 \[12\]"),
        (np.zeros(VOCAB, dtype=">f4"), r"returned >f4 \[12\]; it must return logits of float32 \[12\]"),
        (np.ma.masked_array(np.zeros(VOCAB, dtype=np.float32), mask=True), "returned MaskedArray; it must return an"),
    ],
)
def test_a_processor_that_returns_something_else_than_logits(value: object, message: str) -> None:
    sampler = Sampler(Sampling(processors=[Spy(), returns(value)]), [1], VOCAB)
    with pytest.raises(InputError, match=message):
        sampler(np.zeros(VOCAB, dtype=np.float32))


def test_a_processor_may_keep_what_it_is_given_and_return_what_it_keeps() -> None:
    fixed = np.zeros(VOCAB, dtype=np.float32)
    fixed[3] = 1
    fixed.setflags(write=False)
    spy = Spy()
    sampler = Sampler(Sampling(temperature=0.01, seed=0, processors=[spy, returns(fixed), spy]), [1], VOCAB)
    rows_ = [np.full(VOCAB, step, dtype=np.float32) for step in range(3)]
    assert [sampler(row) for row in rows_] == [3, 3, 3]
    for step, (given_, after) in enumerate(zip(spy.logits[::2], spy.logits[1::2], strict=True)):
        assert (given_ == step).all()
        np.testing.assert_array_equal(after, fixed)


@pytest.mark.parametrize("view", [np.zeros(2 * VOCAB, np.float32)[::2], np.zeros(VOCAB, np.float32)[::-1]])
@pytest.mark.parametrize("chosen", [{}, {"temperature": 1.0, "seed": 0, "top_k": 3}])
def test_a_processor_may_return_a_view(view: np.ndarray, chosen: dict[str, Any]) -> None:
    view[5] = 50
    assert Sampler(Sampling(**chosen, processors=[returns(view)]), [1], VOCAB)(np.zeros(VOCAB, np.float32)) == 5


def test_what_a_processor_does_later_with_the_array_that_it_returned_does_not_matter() -> None:
    """It keeps what it returned for one token and changes it at the next."""
    kept: list[np.ndarray] = []

    def keeps(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        for array in kept:
            array.fill(np.nan)
        kept.append(logits)
        return logits

    chosen: dict[str, Any] = {"repetition_penalty": 2.0, "temperature": 1.0, "seed": 0, "logprobs": 2}
    rows_ = np.random.default_rng(0).normal(size=(9, VOCAB)).astype(np.float32)
    before = rows_.copy()
    first = Sampler(Sampling(**chosen, processors=[keeps]), [1], VOCAB)
    second = Sampler(Sampling(**chosen), [1], VOCAB)
    assert [first(row) for row in rows_] == [second(row) for row in rows_]
    assert first.log_probabilities == second.log_probabilities
    np.testing.assert_array_equal(rows_, before)


@pytest.mark.parametrize("chosen", [{}, {"repetition_penalty": 2.0, "temperature": 1.0, "seed": 0}])
def test_a_processor_cannot_change_the_tokens_so_far(chosen: dict[str, Any]) -> None:
    """One that tries to gets an error of its own, and the next token is what it would be without."""

    def tries(tokens: Any, logits: np.ndarray) -> np.ndarray:
        with pytest.raises(AttributeError):
            tokens.append(7)
        with pytest.raises(TypeError):
            tokens[0] = 7
        tokens[:].clear()
        return logits

    rows_ = np.random.default_rng(0).normal(size=(9, VOCAB)).astype(np.float32)
    spy = Spy()
    changed = Sampler(Sampling(**chosen, processors=[tries, spy]), [1, 2], VOCAB)
    plain = Sampler(Sampling(**chosen), [1, 2], VOCAB)
    tokens = [plain(row) for row in rows_]
    assert [changed(row) for row in rows_] == tokens
    assert spy.tokens == [[1, 2, *tokens[:count]] for count in range(len(rows_))]


def test_a_logit_that_overflows_by_the_temperature_is_not_the_engines() -> None:
    forced = np.zeros(VOCAB, dtype=np.float32)
    forced[3] = np.finfo(np.float32).max
    row = np.zeros(VOCAB, dtype=np.float32)
    assert Sampler(Sampling(processors=[returns(forced)]), [1], VOCAB)(row) == 3
    assert Sampler(Sampling(temperature=1.0, processors=[returns(forced)]), [1], VOCAB)(row) == 3
    sampler = Sampler(Sampling(temperature=0.5, processors=[returns(forced)]), [1], VOCAB)
    with pytest.raises(InputError, match=r"processor 0 .* hold 3.40282e\+38; divided by temperature 0.5 it overflows"):
        sampler(row)


@pytest.mark.parametrize("kind", [KeyError, SystemError, KeyboardInterrupt, GeneratorExit])
def test_an_error_of_a_processor_reaches_the_caller(kind: type[BaseException]) -> None:
    def breaks(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        raise kind("grammar")

    with pytest.raises(kind, match="grammar"):
        Sampler(Sampling(processors=[breaks]), [1], VOCAB)(np.zeros(VOCAB, dtype=np.float32))


def test_a_processor_that_has_run_out_is_named() -> None:
    """StopIteration cannot leave a generator, which decoding is."""
    plan = iter([3])

    def planned(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        logits[next(plan)] = 50
        return logits

    sampler = Sampler(Sampling(processors=[planned]), [1], VOCAB)
    row = np.zeros(VOCAB, dtype=np.float32)
    assert sampler(row) == 3
    with pytest.raises(InputError, match=r"processor 0 \(planned\) raised StopIteration; let it raise another error"):
        sampler(row)
