"""Self-speculative decoding by an engine's own passes: its drafts, and the text, which is that of plain decoding."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ht_export.bench.self_speculative.draft_model import DraftModel
from ht_export.bench.self_speculative.source import SelfDrafts
from ht_export.bench.self_speculative.way import self_speculating, self_speculative_way
from ht_export.bench.settings import BenchSettings, Job
from ht_export.model.blocks import Blocks, SkippedBlocks, read_skipped_blocks, write_skipped_blocks
from ht_export.model.checkpoint import load_base_model
from ht_export.model.skipping import without
from runtime import Generator, InputError, Sampling
from runtime.drafting.source import Context
from runtime.tree import TreeSizes


class Counting:
    """A model that says 10, 11, 12, ..., by what it is given, each with the probability of `sure`."""

    def __init__(self, sure: Sequence[float]) -> None:
        self.sure = sure
        self.asked: list[tuple[int, int]] = []
        self.room = (0, 0)

    def begin(self, length: int, rows: int) -> None:
        self.room = (length, rows)

    def logits(self, token: int, length: int) -> NDArray[np.float32]:
        sure = self.sure[len(self.asked)]
        self.asked.append((token, length))
        found = np.full(30, np.log((1 - sure) / 29), dtype=np.float32)
        found[token + 1] = np.log(sure)
        return found


def test_a_draft_is_a_chain_each_token_from_the_one_before() -> None:
    model = Counting([0.9, 0.8, 0.7])
    tree = SelfDrafts(model, 3, 0.0).propose(Context(9, 20, 8))
    assert tree.tokens.tolist() == [9, 10, 11, 12]
    assert tree.parents.tolist() == [-1, 0, 1, 2]
    np.testing.assert_allclose(tree.probabilities, [1, 0.9, 0.72, 0.504], rtol=1e-5)
    assert model.asked == [(9, 20), (10, 21), (11, 22)]
    assert model.room == (20, 3)


def test_a_draft_ends_with_the_first_token_below_the_confidence_or_where_there_is_no_room() -> None:
    assert SelfDrafts(Counting([0.9, 0.4, 0.9]), 3, 0.5).propose(Context(9, 0, 8)).tokens.tolist() == [9, 10, 11]
    assert SelfDrafts(Counting([0.9] * 3), 3, 0.5).propose(Context(9, 0, 2)).tokens.tolist() == [9, 10]


def test_logits_that_overflow_end_a_draft() -> None:
    class Broken(Counting):
        def logits(self, token: int, length: int) -> NDArray[np.float32]:
            return np.full(30, np.nan, dtype=np.float32)

    assert SelfDrafts(Broken([]), 3, 0.5).propose(Context(9, 0, 8)).tokens.tolist() == [9]


def skipped_of(engine: Path, blocks: Blocks, draft_tokens: int = 4, confidence: float = 0.0) -> SkippedBlocks:
    identity = Generator(engine, threads=1, adapt=False).about.base_model
    return SkippedBlocks.of(blocks, identity, draft_tokens, confidence, {})


@pytest.mark.parametrize(
    "blocks", [Blocks(mlp=(1,)), Blocks(attention=(0, 2)), Blocks((0, 1, 2), (0, 1, 2, 3)), Blocks((3,), (3,))]
)
def test_its_text_is_that_of_plain_decoding(tiny_engine: Path, settings: BenchSettings, blocks: Blocks) -> None:
    drafting = self_speculating(settings, skipped_of(tiny_engine, blocks))
    tree = TreeSizes(5, (0, 0, 0))
    drafted = 0
    with Generator(tiny_engine, threads=1, adapt=False) as plain:
        for text in ("Hello", "a a a a", "y" * 150):
            for sampling in (Sampling(), Sampling(temperature=0.8, seed=2)):
                expected = plain.generate(text, max_new_tokens=60, sampling=sampling, speculate=False)
                found = drafting.generate(text, max_new_tokens=60, sampling=sampling, tree=tree, ngrams=False)
                assert found.tokens == expected.tokens
                drafted += sum(n * count for n, count in enumerate(found.accepted))
    drafting.close()
    assert drafted > 0


def test_a_whole_model_drafts_what_it_says_itself(tiny_engine: Path, settings: BenchSettings) -> None:
    drafting = self_speculating(settings, skipped_of(tiny_engine, Blocks()))
    found = drafting.generate("Hello", max_new_tokens=41, tree=TreeSizes(5, (0, 0, 0)), ngrams=False)
    # The prompt's pass makes one token certain, and each other one five.
    assert len(found.tokens) == 41 or found.finish_reason == "stop"
    assert found.steps == 1 + -(-(len(found.tokens) - 1) // 5)
    drafting.close()


def test_the_draft_sees_what_the_whole_model_left_of_the_prompt(
    tiny_engine: Path, tiny_checkpoint: Path, settings: BenchSettings
) -> None:
    # Without a block of the last layer alone the keys and values of all tokens are those of the whole model.
    blocks = Blocks(mlp=(3,))
    base = load_base_model(str(tiny_checkpoint)).model
    seen: list[tuple[int, NDArray[np.float32]]] = []

    class Watched(SelfDrafts):
        def propose(self, context: Context):  # type: ignore[no-untyped-def]
            seen.append((context.length, self._model.logits(context.token, context.length).copy()))
            return super().propose(context)

    with Generator(tiny_engine, threads=1, adapt=False) as generator:
        model = DraftModel(tiny_engine, generator.engine, blocks, 1)
        generator.add_draft_source(lambda: Watched(model, 2, 0.0))
        prompt = generator.encode("Hello")
        answer = generator.generate("Hello", max_new_tokens=10, tree=TreeSizes(3, (0, 0, 0)), ngrams=False)
    text = torch.tensor([[*prompt, *answer.tokens]])
    with torch.no_grad(), without(base, blocks):
        expected = base(text, use_cache=False).logits[0].numpy()
    assert len(seen) > 1
    for length, logits in seen:
        np.testing.assert_allclose(logits, expected[length], rtol=1e-3, atol=1e-4)


def test_the_way_is_required_to_be_exact_in_float32(tiny_engine: Path, settings: BenchSettings, tmp_path: Path) -> None:
    path = tmp_path / "blocks.json"
    write_skipped_blocks(path, skipped_of(tiny_engine, Blocks((1,), (2,))))
    with Generator(tiny_engine, threads=1, adapt=False) as generator:
        way = self_speculative_way(replace(settings, self_speculative=path), generator)
        assert (way.name, way.required) == ("self_speculative", True)
        plain = generator.generate("Hello", max_new_tokens=20, speculate=False)
        answer = way.answer(Job("0", "a", "Hello", Sampling()))
        assert answer.tokens == plain.tokens
        assert answer.steps <= len(answer.tokens)


def test_an_engine_without_a_graph_for_the_cpu_is_refused(half_engine: Path, settings: BenchSettings) -> None:
    with pytest.raises(InputError, match=r"--self-speculative: .*does not run from a graph for the CPU"):
        self_speculating(replace(settings, engine=half_engine), skipped_of(half_engine, Blocks(mlp=(1,))))


def test_a_file_of_another_model_or_of_none_is_refused(tiny_engine: Path, tmp_path: Path) -> None:
    found = skipped_of(tiny_engine, Blocks(mlp=(1,)))
    identity = {"name": "tiny", "num_layers": 4, "weights_sha256": found.weights_sha256}
    path = tmp_path / "blocks.json"
    with pytest.raises(InputError, match=r"no file of skipped blocks at .*; search them with ht-train skip-blocks"):
        read_skipped_blocks(path, identity)
    write_skipped_blocks(path, found)
    assert read_skipped_blocks(path, identity) == found
    with pytest.raises(InputError, match="search them for this model with ht-train skip-blocks"):
        read_skipped_blocks(path, {**identity, "weights_sha256": "0" * 64})
    write_skipped_blocks(path, replace(found, attention=[7]))
    with pytest.raises(InputError, match=r"attention is left out of layers \[7\]"):
        read_skipped_blocks(path, identity)
    write_skipped_blocks(path, replace(found, confidence=1.5))
    with pytest.raises(InputError, match="confidence"):
        read_skipped_blocks(path, identity)
    write_skipped_blocks(path, replace(found, version=2))
    with pytest.raises(InputError, match="of version 2; this release reads version 1"):
        read_skipped_blocks(path, identity)
