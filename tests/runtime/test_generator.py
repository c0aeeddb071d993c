from pathlib import Path

import pytest
import torch

from ht_export.checkpoint import load_base_model
from runtime import Generator


@pytest.fixture(scope="module")
def generator(tiny_engine: Path) -> Generator:
    return Generator(tiny_engine, threads=1)


@pytest.mark.parametrize("prompt", ["a", "Hello there", "x" * 40, "Ünïcödé 漢字 🙂"])
def test_greedy_tokens_are_those_of_transformers(generator: Generator, tiny_checkpoint: Path, prompt: str) -> None:
    base = load_base_model(str(tiny_checkpoint))
    ids = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    expected = base.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60)[
        0, ids.shape[1] :
    ].tolist()
    speculative = generator.generate(prompt, max_new_tokens=60)
    plain = generator.generate(prompt, max_new_tokens=60, speculate=False)
    assert speculative.tokens == plain.tokens == expected
    assert plain.tokens_per_step == 1.0
    assert plain.prompt_tokens == ids.shape[1]
