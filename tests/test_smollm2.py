"""SmolLM2-135M, with its real weights and the shipped transfer layers."""

import importlib.util
from contextlib import nullcontext

import pytest
import torch

from ht_export.checkpoint import KNOWN_MODELS, BaseModel, load_base_model
from ht_export.export import PRETRAINED, ExportSettings, export
from ht_export.transfer import load_transfer_layers
from runtime import Generator

KNOWN = KNOWN_MODELS["smollm2-135m"]
pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(importlib.util.find_spec(KNOWN.package) is None, reason=f"not installed: {KNOWN.pip_line}"),
]

PROMPTS = [
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "A baker sells 14 loaves in the morning and three times as many in the afternoon. How many loaves is that in all?",
    "Write a Python function that returns the longest common prefix of a list of strings.",
    "Schreibe einen Satz über den Herbst, mit Umlauten und einem 🙂.",
]
TIE = 1e-4


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base_model("smollm2-135m")


@pytest.fixture(scope="module")
def generator(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Generator:
    out = tmp_path_factory.mktemp("smollm2") / "engine.onnx"
    export("smollm2-135m", None, out, ExportSettings(), lambda _: nullcontext(lambda _: None))
    return Generator(out, threads=2)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_transformers(generator: Generator, base: BaseModel, prompt: str) -> None:
    ids = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    output = base.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64)
    expected = output[0, ids.shape[1] :].tolist()
    speculative = generator.generate(prompt, max_new_tokens=64)
    plain = generator.generate(prompt, max_new_tokens=64, speculate=False)
    for found in (speculative.tokens, plain.tokens):
        if found != expected:
            position = next(i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
            logits = base.model(torch.cat([ids, torch.tensor([expected[:position]])], dim=1)).logits[0, -1]
            best = logits.topk(2).values
            assert best[0] - best[1] < TIE, f"differs at {position} by more than a tie"
    assert speculative.text == base.tokenizer.decode(speculative.tokens, skip_special_tokens=True)


def test_the_shipped_transfer_layers_bring_tokens(generator: Generator) -> None:
    results = [generator.generate(prompt, max_new_tokens=64) for prompt in PROMPTS]
    assert sum(len(r.tokens) for r in results) / sum(r.steps for r in results) > 1.7


def test_a_conversation_and_streaming(generator: Generator, base: BaseModel) -> None:
    messages = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Which animal barks?"},
        {"role": "assistant", "content": "Dog."},
        {"role": "user", "content": "And which one purrs?"},
    ]
    expected = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert generator.encode(messages) == expected
    chunks = list(generator.stream(messages, max_new_tokens=16))
    assert chunks[-1].result is not None
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].result.text


def test_the_shipped_file_says_what_was_measured(base: BaseModel) -> None:
    transfer, about = load_transfer_layers(PRETRAINED / KNOWN.transfer, base.identity())
    assert about.recipe["layers"] == list(transfer.layers)
    assert about.acceptance["top"]["1"][0] >= 0.60
