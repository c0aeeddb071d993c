"""Several requests in one driver: each has the tokens that it has alone, whatever runs beside it."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import Generator, driver
from runtime.bundle.engine_file import read_engine_file
from runtime.decode import DecodingState
from runtime.drafting.drafter import Drafter
from runtime.drafting.ngrams import Ngrams
from runtime.drafting.sizing import FixedSizes
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.rows import Phase
from runtime.sampling import Sampling
from runtime.sampling.sampler import Sampler
from runtime.tree import TreeSizes
from tests.runtime.known_engine import KnownEngine
from tests.runtime.test_decode import DIMS, VOCAB, known_engine, plain, request_for

trees_ = st.builds(TreeSizes, st.integers(1, 9), st.tuples(*[st.integers(0, 9)] * 3))
prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)
right_ = st.lists(st.booleans(), min_size=1, max_size=7)


def drafter_of(sizes: TreeSizes, ngrams: bool = False) -> Drafter:
    return Drafter(FixedSizes(sizes), [TransferDrafts(), *([Ngrams()] if ngrams else [])])


def test_three_requests_interleaved_each_have_the_tokens_of_plain_decoding() -> None:
    engine = known_engine([True, False], max_batch=3)
    texts = [[1, 2, 3], [4] * 11, [5, 6]]
    sizes = [TreeSizes(4, (4, 2, 1)), TreeSizes(1, (0, 0, 0)), TreeSizes(6, (6, 6, 6))]
    counts = [9, 5, 14]
    requests = [
        request_for(drafter_of(one), text, max_new_tokens=count)
        for one, text, count in zip(sizes, texts, counts, strict=True)
    ]
    before = 0
    for _ in driver.run(engine, requests):
        # A step is one pass for each phase that requests are in, with all of them that are in it.
        phases = [batch.phase for batch in engine.batches[before:]]
        assert len(set(phases)) == len(phases)
        before = len(engine.batches)
    for request, text, count in zip(requests, texts, counts, strict=True):
        assert request.tokens == plain(text, count)
        assert request.ended
    # While the second one is at its prompt, 8 tokens a pass, the others decode.
    assert [(batch.phase, len(batch)) for batch in engine.batches[:3]] == [
        (Phase.PROMPT, 3),
        (Phase.PROMPT, 1),
        (Phase.DECODE, 2),
    ]
    # Once the shorter answers have ended, the longest goes on by itself.
    assert len(engine.batches[-1]) == 1


@given(
    st.lists(st.tuples(prompts, trees_, st.integers(1, 12), st.booleans()), min_size=1, max_size=5),
    right_,
    st.integers(1, 4),
    st.integers(1, 6),
    st.permutations(range(3)),
)
def test_any_requests_together_have_the_tokens_and_steps_that_each_has_alone(
    asked: list[tuple[list[int], TreeSizes, int, bool]],
    right: list[bool],
    max_batch: int,
    max_slots: int,
    layers: list[int],
) -> None:
    # Transfer layers in any order, so that padding is laid out in another order than the steps'.
    dims = replace(DIMS, num_layers=3, transfer_layers=tuple(layers))

    def requests() -> list[DecodingState]:
        return [
            DecodingState(prompt, drafter_of(sizes, ngrams), 8, dims.join_order, max_new_tokens=count)
            for prompt, sizes, count, ngrams in asked
        ]

    def steps(engine: KnownEngine, requests: list[DecodingState]) -> list[list[int]]:
        """Run the requests; return how many tokens each had after each of its steps."""
        lengths: list[list[int]] = [[] for _ in requests]
        for _ in driver.run(engine, requests):
            for found, request in zip(lengths, requests, strict=True):
                if len(request.tokens) > (found[-1] if found else 0):
                    found.append(len(request.tokens))
        return lengths

    together = requests()
    engine = known_engine(right, max_batch, dims)
    engine.max_slots = max_slots
    lengths = steps(engine, together)
    for request in together:
        assert request.tokens == plain(list(request.prompt), request.max_new_tokens)
    for found, request, alone in zip(lengths, together, requests(), strict=True):
        assert steps(known_engine(right, dims=dims), [alone]) == [found]
        assert (request.tokens, request.committed) == (alone.tokens, alone.committed)


def test_a_request_that_ended_frees_its_slot() -> None:
    engine = known_engine([True], max_batch=2)
    short, long = (request_for(drafter_of(TreeSizes(1, (0, 0, 0))), [1, 2], max_new_tokens=count) for count in (2, 9))
    steps = driver.run(engine, [short, long])
    next(steps)
    slot = weakref.ref(engine.batches[0].slots[0])
    for _ in steps:
        if short.ended and len(long.tokens) > 3:
            break
    engine.batches.clear()
    gc.collect()
    assert slot() is None
    assert not long.ended


def test_no_requests_are_no_steps() -> None:
    assert list(driver.run(known_engine([True]), [])) == []


@pytest.fixture(scope="module")
def portable(tiny_engine: Path) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(tiny_engine, read_engine_file(tiny_engine).dims, threads=1)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_real_graph_with_a_batch_dimension_gives_each_request_the_tokens_it_has_alone(
    tiny_engine: Path, portable: OnnxRuntimeEngine, sampled: bool
) -> None:
    generator = Generator(tiny_engine, threads=1, adapt=False)
    about, dims = generator.about, generator.about.dims
    texts = ["Hello", "x" * 40, "The sky is blue, the sky is", "a"]
    sizes = [TreeSizes(6, (6, 4, 2)), TreeSizes(1, (0, 0, 0)), TreeSizes(3, (1, 0, 0)), TreeSizes(9, (9, 9, 9))]
    options = [Sampling(temperature=0.9, top_p=0.9, seed=seed) if sampled else Sampling() for seed in range(4)]
    requests = []
    for text, one, sampling in zip(texts, sizes, options, strict=True):
        ids = generator.encode(text)
        sampler = Sampler(sampling, ids, dims.vocab_size, about.stop_tokens)
        drafter = generator.new_drafter(FixedSizes(one), sampling.temperature, sampler.noise)
        requests.append(
            DecodingState(
                ids, drafter, about.prompt_chunk, dims.join_order, sampler, 30, about.stop_tokens.__contains__
            )
        )
    batches = 0
    for _ in driver.run(portable, requests):
        batches += 1
    assert batches < sum(len(request.tokens) for request in requests)
    for text, request, sampling in zip(texts, requests, options, strict=True):
        alone = generator.generate(text, max_new_tokens=30, speculate=False, sampling=sampling)
        assert request.tokens == alone.tokens
