"""Engines whose drafts have a head of their own: the text stays the base model's, and drafts are of its tokens."""

import json
from pathlib import Path

import numpy as np
import pytest

from runtime import EngineFileError, Generator, Sampling, TreeSizes
from runtime.bindings import GraphDims
from runtime.bundle.placing import check_replaceable, own_names
from runtime.decode import drafts_of
from runtime.drafting.correction import TokenCorrection
from runtime.drafting.drafter import Drafter
from runtime.drafting.sizing import FixedSizes
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.engines.protocol import Batch
from runtime.rows import prompt_rows
from tests.conftest import DRAFT_TOKENS
from tests.runtime.conftest import change
from tests.runtime.known_engine import KnownEngine, Text, steps

PROMPTS = ["a", "Hello there", "x" * 40, "Tell me about tea."]
SAMPLINGS = [None, Sampling(temperature=0.9, seed=3), Sampling(temperature=1.2, top_k=20, seed=4)]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    "sampling", [None, Sampling(temperature=0.9, seed=3), Sampling(temperature=1.2, top_k=20, seed=4)]
)
def test_speculative_text_is_plain_text(draft_head_engine: Path, prompt: str, sampling: Sampling | None) -> None:
    generator = Generator(draft_head_engine, threads=1, adapt=False)
    plain = generator.generate(prompt, max_new_tokens=80, speculate=False, sampling=sampling)
    for tree in (None, TreeSizes(12, (12, 12, 12)), TreeSizes(3, (1, 0, 0))):
        found = generator.generate(prompt, max_new_tokens=80, sampling=sampling, tree=tree)
        assert found.tokens == plain.tokens


def test_the_text_is_that_of_an_engine_whose_drafts_have_all_tokens(draft_head_engine: Path, tiny_engine: Path) -> None:
    own, whole = (Generator(path, threads=1, adapt=False) for path in (draft_head_engine, tiny_engine))
    for prompt in PROMPTS:
        assert own.generate(prompt, max_new_tokens=80).tokens == whole.generate(prompt, max_new_tokens=80).tokens
    several = own.generate(PROMPTS, max_new_tokens=60)
    assert [one.tokens for one in several] == [own.generate(one, max_new_tokens=60).tokens for one in PROMPTS]


def test_drafts_are_those_of_the_whole_head_among_the_draft_tokens(draft_head_engine: Path, tiny_engine: Path) -> None:
    found = []
    for path in (draft_head_engine, tiny_engine):
        generator = Generator(path, threads=1, adapt=False)
        engine, order = generator.engine, generator.engine.dims.join_order
        drafter = generator.new_drafter(FixedSizes(generator.about.tree))
        rows = prompt_rows(generator.encode("Hello"), order, 0, 3, shortlist=264)
        outputs = engine.run(Batch.of([rows], [engine.new_slot()])).outputs(0)
        found.append(drafts_of(len(rows.input_ids) - 1, outputs, order, drafter.draft_tokens))
    for own, whole in zip(*found, strict=True):
        kept = np.isin(whole.tokens, DRAFT_TOKENS)
        assert own.tokens.tolist() == whole.tokens[kept].tolist()
        expected = whole.probabilities[kept] / whole.probabilities[kept].sum()
        np.testing.assert_allclose(own.probabilities, expected, rtol=1e-4)


VOCAB, DRAFTED = 11, np.array([0, 2, 3, 7, 10])
DIMS = GraphDims(1, 1, 1, 1, 1, VOCAB, (0, 0), draft_size=len(DRAFTED))


def test_right_drafts_are_accepted_and_tokens_that_cannot_be_drafted_are_not() -> None:
    # A text of all tokens in turn, whose drafts are right wherever the head has the token.
    def draft_logits(text: Text, step: int) -> np.ndarray:
        return 20 * np.isin(DRAFTED, (text[-1] + 1 + step) % VOCAB).astype(np.float32)

    def logits(text: Text) -> np.ndarray:
        return np.eye(VOCAB, dtype=np.float32)[(text[-1] + 1) % VOCAB]

    engine = KnownEngine(DIMS, logits, draft_logits)
    # A correction knows tokens, not places in the head: this one is for 3 after 2.
    candidates, contexts = np.zeros((2, VOCAB, 1))
    candidates[3], contexts[2] = 5.0, 1.0
    sources = [TransferDrafts(TokenCorrection(candidates, contexts, np.ones((2, 1))))]
    drafter = Drafter(FixedSizes(TreeSizes(3, (3, 3))), sources, DRAFTED)
    certain = []
    for step in steps(engine, [9], drafter, max_new_tokens=2 * VOCAB):
        certain.append(step)
    assert [token for step in certain for token in step] == [(10 + n) % VOCAB for n in range(2 * VOCAB)]
    guessed = [token for step in certain for token in step[:-1]]
    # The first token of an answer is none that was drafted.
    assert set(guessed) <= set(DRAFTED.tolist())
    assert len(guessed) >= 4
    # Behind a 1 there are 2 and 3.
    assert [2, 3, 4] in [step[-3:] for step in certain]


def test_files_that_do_not_fit_together(draft_head_engine: Path, tmp_path: Path) -> None:
    import shutil

    def copied(name: str) -> Path:
        shutil.copytree(draft_head_engine.parent, tmp_path / name)
        return tmp_path / name / draft_head_engine.name

    path = copied("without")
    assert "engine.draft_tokens.npy" in own_names(path)
    check_replaceable(path)
    path.with_name("engine.draft_tokens.npy").unlink()
    with pytest.raises(EngineFileError, match=r"engine\.draft_tokens\.npy is missing; copy all files"):
        Generator(path)
    path = copied("exchanged")
    tokens = path.with_name("engine.draft_tokens.npy")
    content = bytearray(tokens.read_bytes())
    content[-4] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(EngineFileError, match=r"is not the file that engine\.json describes"):
        Generator(path)
    for name, fields in (("unnamed", {"draft_tokens": None}), ("unsized", {"dims": {"draft_size": None}})):
        path = copied(name)
        about = json.loads(path.with_suffix(".json").read_text())
        if "dims" in fields:
            fields = {"dims": {**about["dims"], **fields["dims"]}}  # type: ignore[dict-item]
        change(path, **fields)
        with pytest.raises(EngineFileError, match=r"draft_size and draft_tokens: an engine has both, or neither"):
            Generator(path)
    path = copied("larger")
    dims = json.loads(path.with_suffix(".json").read_text())["dims"]
    change(path, dims={**dims, "draft_size": 265})
    with pytest.raises(EngineFileError, match="draft_size 265, and the vocabulary has 264 tokens"):
        Generator(path)
    change(path, dims={**dims, "draft_size": 175})
    with pytest.raises(EngineFileError, match=r"draft_tokens|does not have the graph its engine.json describes"):
        Generator(path)
