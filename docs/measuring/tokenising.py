"""Long texts encoded whole and in parts, in turns within one process: milliseconds, and how many times as fast.

python docs/measuring/tokenising.py TOKENIZER_JSON TEXT_FILE... [--repeats 5] [--json FILE]

The text is that of the files, repeated as often as a length needs. Every result is compared with that of the whole.
Threads are the library's own: RAYON_NUM_THREADS says how many.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from runtime.files import write_json
from runtime.long_texts import TextEncoder
from runtime.tokenizer import encode

LENGTHS = (10_000, 32_000, 100_000, 1_000_000)


def milliseconds(run: Callable[[], list[int]]) -> tuple[float, list[int]]:
    """Return how long `run` takes, and what it returns."""
    start = time.perf_counter()
    ids = run()
    return 1000 * (time.perf_counter() - start), ids


def main() -> None:
    """Measure, and print a line for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="characters")
    parser.add_argument("--parts", type=int, nargs="+", default=[2048, 8192, 32768], help="characters of one part")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    size = tokenizer.get_vocab_size()
    start = time.perf_counter()
    if TextEncoder(tokenizer, size).cuts is None:
        parser.error(f"{arguments.tokenizer} has a part that allows no cuts; name a tokenizer that is encoded in parts")
    print(f"reading the tokenizer for cuts: {1000 * (time.perf_counter() - start):.0f} ms, once")
    content = "".join(path.read_text(encoding="utf-8") for path in arguments.texts)
    rows = []
    for length in arguments.lengths:
        text = (content * (length // len(content) + 1))[:length]
        encoders = {part: TextEncoder(tokenizer, size, long=1, part=part) for part in arguments.parts}
        for encoder in encoders.values():
            encoder.encode(text[:100])
        whole: list[float] = []
        times: dict[int, list[float]] = {part: [] for part in encoders}
        for _ in range(arguments.repeats):
            spent, expected = milliseconds(partial(encode, tokenizer, text, size))
            whole.append(spent)
            for part, encoder in encoders.items():
                spent, ids = milliseconds(partial(encoder.encode, text))
                times[part].append(spent)
                if ids != expected:
                    raise SystemExit(f"{length} characters in parts of {part} have other tokens than the whole")
        for part, spents in times.items():
            ratios = sorted(one / other for one, other in zip(whole, spents, strict=True))
            row = {
                "characters": length,
                "part": part,
                "whole_ms": round(statistics.median(whole), 1),
                "parts_ms": round(statistics.median(spents), 1),
                "times_as_fast": round(statistics.median(ratios), 2),
                "least": round(ratios[0], 2),
                "most": round(ratios[-1], 2),
            }
            rows.append(row)
            print(*(f"{name} {value:,}" for name, value in row.items()), sep="  ", flush=True)
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
