"""Where texts part: which tokens, how far apart, and what a report tells of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ht_export.model.checkpoint import load_base_model
from ht_export.parity.report import Report, to_html, to_markdown
from ht_export.parity.text import Divergence, TextParity, TextSummary, compare_text
from runtime import Generator


def test_where_texts_part_both_tokens_are_told(tiny_checkpoint: Path, tiny_engine: Path) -> None:
    model = load_base_model(str(tiny_checkpoint)).model
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()
    with Generator(tiny_engine, adapt=False) as generator:
        found = compare_text(generator, model, "hello", "Hello", 8, 1e-4)
        first = generator.generate("Hello", max_new_tokens=1, speculate=False).tokens[0]
        spelled = generator.token_bytes(first).decode(errors="replace")
    assert found.from_plain is None
    assert found.from_transformers is not None
    assert (found.from_transformers.position, found.from_transformers.explained) == (0, False)
    assert found.from_transformers.tokens[0] == spelled != found.from_transformers.tokens[1]
    assert found.from_transformers.gap > found.from_transformers.allowed > 0


def report(precision: str) -> Report:
    parted = Divergence(3, 2e-2, True, 5e-2, (" a|b", "\n"))
    prompt = TextParity("tea | milk", 8, parted, None, 0.1, 0.1, 0)
    return Report({"model": "tiny", "precision": precision}, [], TextSummary([prompt]))


def test_a_table_of_tokens_stays_a_table() -> None:
    written = to_markdown(report("float32"), per_layer=False)
    assert "| tea \\| milk | plain / transformers | 3 | ' a\\|b' / '\\n' | 2.0e-02 | 5.0e-02 | yes |" in written
    assert "&#39; a|b&#39; / &#39;\\n&#39;" in to_html(report("float32"), per_layer=False)


@pytest.mark.parametrize(
    ("precision", "told"), [("float32", False), ("bfloat16", False), ("int8", True), ("int4", True)]
)
def test_of_rounded_weights_a_report_says_that_other_texts_are_expected(precision: str, told: bool) -> None:
    assert (
        "the engine is another model than the one it is compared with" in to_markdown(report(precision), False)
    ) == told
