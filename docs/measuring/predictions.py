"""What predicted text brings: edits of real files, answered plainly, speculatively, and with a prediction.

python docs/measuring/predictions.py ENGINE --json FILE [--prompts 0,1] [--threads N]

Each line of `predictions.jsonl` beside this file asks for an edit of a text. Its answer is measured with the text as
its prediction; and, as a small model edits badly, with its own greedy answer as the prediction, 0, 5 and 20 % of
whose words were changed: that is what a model gains which follows its prediction as closely. Ways take turns in one
process. What FILE has of other prompts stays there, and is not measured again, so that a run can be ended at any time.
Exits with 1 where a text is not that of plain decoding.
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

from ht_export.bench.conditions import commit
from runtime import GenerationResult, Generator
from runtime.checks import check_threads
from runtime.files import write_json
from runtime.tuning import cpu_name

CASES = Path(__file__).with_suffix(".jsonl")
SHARES = (0.0, 0.05, 0.2)
# Words that are put in: of other texts.
WORDS = ("and", "the", "value", "result", "count", "other", "name", "of", "not", "for", "this", "new", "return", "was")


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


def ways_of(generator: Generator, prompt: str, most: int, predictions: dict[str, str]) -> dict[str, Way]:
    """Return the ways to answer `prompt`, by name."""
    preparation = generator._preparation
    longest_path = preparation.longest_path

    def answer(**options: Any) -> Way:
        return lambda: generator.generate(prompt, max_new_tokens=most, **options)

    def short() -> GenerationResult:
        preparation.longest_path = 0
        try:
            return generator.generate(prompt, max_new_tokens=most)
        finally:
            preparation.longest_path = longest_path

    # Of the text so far alone, in trees of the sizes that were measured, and in longer paths too.
    ways = {"plain": answer(speculate=False), "short paths": short, "speculative": answer()}
    return ways | {f"predicted: {name}": answer(prediction=text) for name, text in predictions.items()}


def measured(generator: Generator, case: dict[str, Any], most: int, repeats: int) -> dict[str, Any]:
    """Return what was measured of one prompt: of each way its passes and the medians of its times."""
    text = generator.generate(case["prompt"], max_new_tokens=most, speculate=False).text
    predictions = {"the text": case["text"], **{f"{share:.0%} changed": changed(text, share) for share in SHARES}}
    ways = ways_of(generator, case["prompt"], most, predictions)
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
    parser.add_argument("--prompts", help="numbers of lines, from 0 (default: all that FILE does not have)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    options = parser.parse_args()
    check_threads(options.threads)
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    kept = json.loads(options.json.read_text()) if options.json.is_file() else {"cases": []}
    found = {case["name"]: case for case in kept["cases"]}
    wanted = [cases[int(one)] for one in options.prompts.split(",")] if options.prompts else cases
    if not options.prompts:
        wanted = [case for case in wanted if case["name"] not in found]
    with Generator(options.engine, threads=options.threads, prefix_cache_bytes=0, verify_weights=False) as generator:
        generator.warm_up()
        about = {
            "command": "python docs/measuring/predictions.py engine.onnx --json predictions.json",
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
            "model": generator.about.base_model["name"],
            "precision": generator.about.precision,
            "device": cpu_name(options.threads),
            "max_new_tokens": options.max_new_tokens,
            "repeats": options.repeats,
        }
        for case in wanted:
            found[case["name"]] = measured(generator, case, options.max_new_tokens, options.repeats)
            write_json(options.json, {**about, "cases": list(found.values())})
            print(case["name"], flush=True)
    print(table(list(found.values())))
    return int(not all(way["text_equal"] for case in found.values() for way in case["ways"].values()))


if __name__ == "__main__":
    sys.exit(main())
