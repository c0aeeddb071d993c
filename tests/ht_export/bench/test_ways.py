import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ht_export.bench.reference import reference_ways
from ht_export.bench.settings import BenchSettings, Job
from ht_export.bench.ways import engine_ways, plain_gap
from ht_export.model.checkpoint import load_base_model
from runtime import Generator, InputError, Sampling

from .conftest import job


def test_a_greedy_gap_is_that_of_the_two_logits(generator: Generator) -> None:
    greedy = job()
    result = generator.generate("Hello", max_new_tokens=8, sampling=Sampling(logprobs=2), speculate=False)
    assert result.log_probabilities is not None
    for position, score in enumerate(result.log_probabilities):
        (best, first), (other, second) = score.best
        assert plain_gap(generator, greedy, [*result.tokens[:position], best], position) == 0.0
        gap = plain_gap(generator, greedy, [*result.tokens[:position], other], position)
        assert gap == pytest.approx(first - second, abs=1e-5)


def test_an_answer_that_has_ended_is_no_tie(generator: Generator) -> None:
    assert plain_gap(generator, job(), [1, 2], 2) == math.inf


@pytest.mark.parametrize(
    "options", [{"temperature": 1.5}, {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.2}]
)
def test_a_sampled_gap_is_how_far_the_random_number_was_from_the_token(
    generator: Generator, options: dict[str, Any]
) -> None:
    sampled = job(**options, seed=5)
    tokens = generator.generate("Hello", max_new_tokens=12, sampling=sampled.sampling, speculate=False).tokens
    for position, token in enumerate(tokens):
        assert plain_gap(generator, sampled, tokens, position) == 0.0
        gaps = [
            plain_gap(generator, sampled, [*tokens[:position], other], position) for other in (token - 1, token + 1)
        ]
        assert all(gap > 0 for gap in gaps)


def test_a_token_that_the_options_rule_out_is_no_tie(generator: Generator) -> None:
    sampled = job(temperature=1.0, top_k=1, seed=0)
    token = generator.generate("Hello", max_new_tokens=1, sampling=sampled.sampling).tokens[0]
    assert plain_gap(generator, sampled, [token + 1], 0) == math.inf


def test_where_plain_decoding_had_ended_there_is_no_tie(generator: Generator) -> None:
    tokens = generator.generate("y" * 240, max_new_tokens=300, speculate=False).tokens
    assert plain_gap(generator, job("y" * 240), [*tokens, 1, 2], len(tokens)) == math.inf


def test_what_is_kept_of_a_distribution_may_differ_by_rounding(generator: Generator) -> None:
    # A top_p that ends just before or just after the second token: which of the two is a matter of rounding.
    scores = generator.generate("Hello", max_new_tokens=1, sampling=Sampling(logprobs=2)).log_probabilities
    assert scores is not None
    (_, first), (second, _) = scores[0].best
    edge = math.exp(first)
    for seed in range(3):
        sampled = job(temperature=1.0, top_p=edge * (1 - 1e-6), seed=seed)
        assert plain_gap(generator, sampled, [second], 0) < math.inf
    far = job(temperature=1.0, top_p=edge * 0.9, seed=0)
    assert plain_gap(generator, far, [second], 0) == math.inf


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_what_is_computed_in_float32_must_have_the_text_of_plain_decoding(
    generator: Generator, tiny_engine: Path, settings: BenchSettings, precision: str
) -> None:
    other = Generator(tiny_engine, threads=1)
    other.about = replace(other.about, precision=precision)
    settings = replace(settings, without_ngrams=True, text_drafts=True)
    ways = engine_ways(generator, {"other": other}, settings)
    exact = precision == "float32"
    assert {way.name: way.required for way in ways} == {
        "plain": True,
        "speculative": True,
        "without_ngrams": True,
        "text_drafts": True,
        "other": exact,
    }
    assert not any(way.required for way in engine_ways(other, {"other": generator}, settings)) or exact


def test_the_ways_of_transformers_give_the_text_of_plain_decoding(
    generator: Generator, settings: BenchSettings
) -> None:
    plain, *_ = engine_ways(generator, {}, settings)
    ways = reference_ways(generator, replace(settings, prompt_lookup=True, early_exit=2), on_gpu=False)
    required = {"transformers": True, "prompt_lookup": False, "early_exit": False}
    assert {way.name: way.required for way in ways} == required
    for text in ("Hello", "a a a a a a a a a"):
        expected = plain.answer(job(text))
        reference, lookup, early = (way.answer(job(text)) for way in ways)
        assert reference.tokens == lookup.tokens == early.tokens == expected.tokens
        assert reference.steps == len(reference.tokens)
        assert lookup.steps <= len(lookup.tokens)
        assert early.steps <= len(early.tokens)
        for answer in (reference, lookup, early):
            assert 0 < answer.time_to_first_token_s < answer.seconds
            assert answer.decode_tokens_per_second > 0


def test_an_answer_of_transformers_ends_with_the_text_or_the_context(
    generator: Generator, settings: BenchSettings
) -> None:
    plain, *_ = engine_ways(generator, {}, replace(settings, max_new_tokens=300))
    (reference,) = reference_ways(generator, replace(settings, max_new_tokens=300), on_gpu=False)
    long = job("y" * 240)
    assert reference.answer(long).tokens == plain.answer(long).tokens


def test_the_gap_to_transformers_is_that_of_the_base_models_logits(
    generator: Generator, settings: BenchSettings, tiny_checkpoint: Path
) -> None:
    (reference,) = reference_ways(generator, settings, on_gpu=False)
    assert reference.gap is not None
    tokens = reference.answer(job()).tokens
    model = load_base_model(str(tiny_checkpoint)).model
    logits = model(torch.tensor([generator.encode("Hello") + tokens[:6]])).logits[0, -1]
    other = int(logits.topk(2).indices[1])
    assert reference.gap(job(), [*tokens[:6], other], tokens, 6) == pytest.approx(
        float(logits[tokens[6]] - logits[other]), abs=1e-5
    )
    assert reference.gap(job(), tokens[:6], tokens, 6) == math.inf
    penalised = job(repetition_penalty=1.5)
    tokens = reference.answer(penalised).tokens
    assert reference.gap(penalised, tokens, tokens, 6) == 0.0


def test_sampled_text_of_transformers_is_another_and_comes_again_with_its_seed(
    generator: Generator, settings: BenchSettings
) -> None:
    def answer(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, top_p=0.9, seed=seed)
        (reference,) = reference_ways(generator, replace(settings, sampling=sampling), on_gpu=False)
        assert reference.gap is None
        return reference.answer(Job("0", "a", "Hello", sampling)).tokens

    assert answer(1) == answer(1) != answer(2)


def test_a_model_that_is_not_the_engines_is_refused(
    generator: Generator, settings: BenchSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = replace(generator.about, base_model={**generator.about.base_model, "weights_sha256": "0" * 64})
    monkeypatch.setattr(generator, "about", about)
    with pytest.raises(InputError, match=r"was made from .* and .* has other weights"):
        reference_ways(generator, settings, on_gpu=False)
