"""What predicted text brings: edits of real files, answered plainly, speculatively, and with a prediction.

python scripts/predictions.py ENGINE --json FILE [--prompts 0,1] [--threads N] [--alternatives]

Each line of `predictions.jsonl` beside this file asks for an edit of a text. Its answer is measured with the text as
its prediction; and, as a small model edits badly, with its own greedy answer as the prediction, 0, 5, 20 and 50 % of
whose words were changed: that is what a model gains which follows its prediction as closely. Ways take turns in one
process; what was measured of other prompts stays in FILE. Exits with 1 where a text is not that of plain decoding.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import runtime.preparation
from ht_export.bench.conditions import commit
from runtime import GenerationResult, Generator
from runtime.checks import check_threads
from runtime.drafting.ngrams import Ngrams
from runtime.drafting.sizing import LONG_PATHS
from runtime.files import write_json
from runtime.tuning import cpu_name

CASES = Path(__file__).with_suffix(".jsonl")
SHARES = (0.0, 0.05, 0.2, 0.5)
# Words that are put in: of other texts.
WORDS = ("and", "the", "value", "result", "count", "other", "name", "of", "not", "for", "this", "new", "return", "was")


class Indexed(Ngrams):
    """The alternative: the prediction is put in front of what n-grams are looked up in, and no more is done."""

    def __init__(self, tokens: Sequence[int], prompt_tokens: int, ends: Sequence[int]) -> None:
        super().__init__(tokens)
        self.found = 0


def changed(text: str, share: float) -> str:
    """Return `text` with this share of its words changed: replaced, put in, left out, or moved a few words on."""
    generator = random.Random(7)
    words = re.findall(r"\S+\s*|\s+", text)
    for _ in range(round(share * len(words))):
        place = generator.randrange(len(words))
        kind = generator.choice(("replace", "put in", "leave out", "move"))
        word = generator.choice(WORDS) + " "
        if kind == "put in":
            words.insert(place, word)
        elif kind == "replace":
            words[place] = word
        elif kind == "move":
            words.insert(generator.randrange(len(words)), words.pop(place))
        elif len(words) > 1:
            del words[place]
    return "".join(words)


Way = Callable[[], GenerationResult]


def ways_of(
    generator: Generator, prompt: str, most: int, predictions: dict[str, str], alternatives: bool
) -> dict[str, Way]:
    """Return the ways to answer `prompt`, by name."""

    def answer(**options: Any) -> Way:
        return lambda: generator.generate(prompt, max_new_tokens=most, **options)

    def indexed(prediction: str) -> Way:
        def ask() -> GenerationResult:
            own, runtime.preparation.Predicted = runtime.preparation.Predicted, Indexed  # type: ignore[assignment, attr-defined]
            try:
                return generator.generate(prompt, max_new_tokens=most, prediction=prediction, ngrams=False)
            finally:
                runtime.preparation.Predicted = own  # type: ignore[attr-defined]

        return ask

    def at_most(rows: int, prediction: str) -> Way:
        def ask() -> GenerationResult:
            preparation = generator._preparation
            preparation.longest_path = rows
            try:
                return generator.generate(prompt, max_new_tokens=most, prediction=prediction)
            finally:
                preparation.longest_path = LONG_PATHS[-1]

        return ask

    ways = {"plain": answer(speculate=False), "speculative": answer()}
    if alternatives:
        # Of the text so far alone, in paths as long.
        ways["n-grams, long paths"] = answer(prediction="")
    for name, prediction in predictions.items():
        ways[f"predicted: {name}"] = answer(prediction=prediction)
        if alternatives:
            ways[f"n-grams alone: {name}"] = indexed(prediction)
            ways[f"without n-grams: {name}"] = answer(prediction=prediction, ngrams=False)
            ways[f"8 rows: {name}"] = at_most(8, prediction)
            ways[f"32 rows: {name}"] = at_most(32, prediction)
    return ways


def measured(generator: Generator, case: dict[str, Any], most: int, repeats: int, alternatives: bool) -> dict[str, Any]:
    """Return what was measured of one prompt: of each way its passes and the medians of its times."""
    text = generator.generate(case["prompt"], max_new_tokens=most, speculate=False).text
    predictions = {"the text": case["text"], **{f"{share:.0%} changed": changed(text, share) for share in SHARES}}
    ways = ways_of(generator, case["prompt"], most, predictions, alternatives)
    found: dict[str, list[tuple[GenerationResult, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            result = way()
            found[name].append((result, time.perf_counter() - start))
    rows = {}
    for name, results in found.items():
        last = results[-1][0]
        rows[name] = {
            "tokens": len(last.tokens),
            "steps": last.steps,
            "tokens_per_step": round(last.tokens_per_step, 3),
            "tokens_per_second": round(len(last.tokens) / statistics.median(seconds for _, seconds in results), 2),
            "decode_tokens_per_second": round(
                statistics.median(result.decode_tokens_per_second for result, _ in results), 2
            ),
            "candidates": last.candidates,
            "found_prediction_tokens": last.found_prediction_tokens,
            "prediction_tokens": last.prediction_tokens,
            "text_equal": all(result.text == text for result, _ in results),
        }
    return {"name": case["name"], "prompt_tokens": results[0][0].prompt_tokens, "answer": text, "ways": rows}


def table(cases: Sequence[dict[str, Any]]) -> str:
    """Return medians of the cases as a table: of speeds, each divided by that of plain decoding of its prompt."""
    names = list(dict.fromkeys(name for case in cases for name in case["ways"]))
    lines = [
        "| | tokens per step | over plain: decoding | with the prompt | over no prediction: decoding | with the prompt "
        "| texts equal |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    decode, whole = "decode_tokens_per_second", "tokens_per_second"
    speeds = ((decode, "plain"), (whole, "plain"), (decode, "speculative"), (whole, "speculative"))
    for name in names:
        rows = [case["ways"] for case in cases if name in case["ways"]]
        columns = [statistics.median(ways[name]["tokens_per_step"] for ways in rows)]
        for speed, other in speeds:
            columns.append(statistics.median(ways[name][speed] / ways[other][speed] for ways in rows))
        equal = sum(ways[name]["text_equal"] for ways in rows)
        lines.append(f"| {name} | {' | '.join(f'{one:.2f}' for one in columns)} | {equal} of {len(rows)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print a table, write the results; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--prompts", help="numbers of lines, from 0 (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--alternatives", action="store_true", help="also other designs, and trees of 8 and 32 rows")
    options = parser.parse_args()
    check_threads(options.threads)
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    numbers = [int(one) for one in options.prompts.split(",")] if options.prompts else range(len(cases))
    kept = json.loads(options.json.read_text()) if options.json.is_file() else {"cases": []}
    names = [cases[number]["name"] for number in numbers]
    found = [case for case in kept["cases"] if case["name"] not in names]
    with Generator(options.engine, threads=options.threads, prefix_cache_bytes=0, verify_weights=False) as generator:
        generator.warm_up()
        for number in numbers:
            found.append(
                measured(generator, cases[number], options.max_new_tokens, options.repeats, options.alternatives)
            )
            print(found[-1]["name"], flush=True)
        about = {
            "command": "python scripts/predictions.py engine.onnx --json predictions.json"
            + (" --alternatives" if options.alternatives else ""),
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
            "model": generator.about.base_model["name"],
            "precision": generator.about.precision,
            "device": cpu_name(options.threads),
            "max_new_tokens": options.max_new_tokens,
            "repeats": options.repeats,
        }
    write_json(options.json, {**about, "cases": found})
    print(table(found))
    return int(not all(way["text_equal"] for case in found for way in case["ways"].values()))


if __name__ == "__main__":
    sys.exit(main())
