"""Measure structured answers: tokens per step and tokens/s by schema, and how long schemas take to compile.

    python docs/measuring/structured.py engine.onnx --out structured.json [--count 8] [--repeats 2] [--tokens 96]

Each prompt is asked in all ways in turn: plain and speculative within the grammar, without and with what it forces as
drafts, and freely. Texts within the grammar must be the same in all ways.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime import GenerationResult, Generator, Grammar, RequestOptions, Sampling
from tests.runtime.grammar.schemas import SCHEMAS

ASKED = {
    "a person": "Describe a person as JSON.",
    "a nested record": "Write a nested record as JSON.",
    "an address": "Give the address of a museum as JSON.",
    "a weather report": "Give the weather of Oslo as JSON.",
    "an event": "Plan a meeting as JSON.",
    "a review": "Review a film as JSON.",
    "a classification": "Is 'You won a prize!' spam? Answer as JSON.",
    "a configuration": "Write the configuration of a server as JSON.",
    "an order": "Order two books as JSON.",
    "told apart by a kind": "Describe a cat as JSON.",
    "a query": "Ask for all people of age 30 as JSON.",
    "a list of records": "List two records as JSON.",
}
WAYS: dict[str, tuple[str, RequestOptions]] = {
    "plain": ("grammar", {"speculate": False}),
    "speculative, nothing forced": ("grammar", {"forced_drafts": False}),
    "speculative": ("grammar", {}),
    "compact, plain": ("compact", {"speculate": False}),
    "compact, nothing forced": ("compact", {"forced_drafts": False}),
    "compact, speculative": ("compact", {}),
    "free, plain": ("free", {"speculate": False}),
    "free, speculative": ("free", {}),
}


def ask(generator: Generator, name: str, kind: str, options: RequestOptions, tokens: int) -> GenerationResult:
    """Return the answer to the prompt of a schema, within it unless `kind` is free."""
    grammar = None if kind == "free" else Grammar.json_schema(SCHEMAS[name], compact=kind == "compact")
    asked: RequestOptions = {"max_new_tokens": tokens, "sampling": Sampling(grammar=grammar), **options}
    return generator.submit(ASKED[name], **asked).result()


def compile_times(generator: Generator) -> dict[str, float]:
    """Return the milliseconds that the corpus takes to compile, and one that is there already."""
    generator.check("a", sampling=Sampling(grammar=Grammar.regex("the tokenizer comes first")))
    grammars = [Grammar.json_schema(schema) for schema in SCHEMAS.values()]
    found: dict[str, list[float]] = {"compiled": [], "kept": []}
    for grammar in grammars:
        for way in found:
            begun = time.perf_counter()
            generator.check("a", raw=True, sampling=Sampling(grammar=grammar))
            found[way].append(1000 * (time.perf_counter() - begun))
    begun = time.perf_counter()
    generator.check("a", raw=True)
    return {
        "median_ms": statistics.median(found["compiled"]),
        "largest_ms": max(found["compiled"]),
        "kept_median_ms": statistics.median(found["kept"]),
        "request_without_ms": 1000 * (time.perf_counter() - begun),
    }


def main() -> None:
    """Measure, print a table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=len(ASKED), help="how many of the prompts")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96)
    chosen = parser.parse_args()
    seen: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with Generator(chosen.engine, verify_weights=False) as generator:
        compiled = compile_times(generator)
        for name in list(ASKED)[: chosen.count]:
            texts: dict[str, set[str]] = {}
            for repeat in range(chosen.repeats + 1):
                for way, (kind, options) in WAYS.items():
                    found = ask(generator, name, kind, options, chosen.tokens)
                    texts.setdefault(kind, set()).add(found.text)
                    # The first time warms up.
                    if repeat and len(found.tokens) > 1:
                        rate = found.decode_tokens_per_second
                        seen[way].append({"steps": found.steps, "tokens": len(found.tokens), "rate": rate})
            different = [kind for kind, several in texts.items() if len(several) > 1]
            if different:
                raise SystemExit(f"{name}: texts differ between ways of decoding: {different}")
    results: dict[str, Any] = {"compile": compiled, "prompts": chosen.count, "ways": {}}
    for way, answers in seen.items():
        tokens, steps = (sum(one[field] for one in answers) for field in ("tokens", "steps"))
        rate = statistics.mean(one["rate"] for one in answers)
        results["ways"][way] = {"tokens_per_step": tokens / steps, "tokens_per_second": rate}
        print(f"{way:30} {tokens / steps:6.2f} tokens per step {rate:8.1f} tokens/s")
    print(json.dumps(compiled))
    chosen.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
