"""Greedy answers are those of `generate` in transformers with llguidance's masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance", reason="llguidance is not installed")

import torch
from llguidance import LLMatcher, LLTokenizer
from transformers import AutoModelForCausalLM, LogitsProcessorList

from runtime import Generator, Grammar, Sampling
from tests.runtime.grammar.schemas import SCHEMAS

MOST = 40


class Masks:
    """A logits processor that follows the text after the prompt."""

    def __init__(self, tokenizer: LLTokenizer, source: str, prompt: int) -> None:
        self._matcher = LLMatcher(tokenizer, '%llguidance {"no_forcing": true}\n' + source)
        self._taken = prompt

    def __call__(self, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        for token in tokens[0, self._taken :].tolist():
            assert self._matcher.consume_token(token)
            self._taken += 1
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: logits.shape[1]].astype(bool))
        return logits.masked_fill(~allowed, -torch.inf)


@pytest.mark.parametrize("name", ["an order", "a configuration", "told apart by a kind"])
def test_greedy_answers_are_those_of_generate_with_masks(tiny_engine: Path, tiny_checkpoint: Path, name: str) -> None:
    schema = {**SCHEMAS[name], "x-guidance": {"whitespace_flexible": False}}
    tokenizer = LLTokenizer((tiny_checkpoint / "tokenizer.json").read_text(), eos_token=2)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with Generator(tiny_engine, threads=1, adapt=False) as generator:
        prompt = generator.encode("Go", raw=True)
        masks = Masks(tokenizer, f"start: %json {json.dumps(schema)}", len(prompt))
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=MOST,
                do_sample=False,
                logits_processor=LogitsProcessorList([masks]),
            )[0, len(prompt) :].tolist()
        sampling = Sampling(grammar=Grammar.json_schema(SCHEMAS[name], compact=True))
        for way in (True, False):
            found = generator.generate("Go", raw=True, max_new_tokens=MOST, speculate=way, sampling=sampling)
            # Without another pass for the end of text, where nothing else may follow.
            assert found.tokens in (expected, expected[:-1])
