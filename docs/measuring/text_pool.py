"""What a pool of other answers brings to drafts from text, simulated on answers that are there: no model runs.

python docs/measuring/text_pool.py DATA_FOLDER [--count 100] [--rows 8] [--json FILE]

Some answers of a folder that `ht-train data` made are drafted from their own text, and from a pool of all others, or of
others and themselves, as if the same had been asked before. Transfer layers draft nothing here. The steps are exact: a
tree of so many rows, from the answer's own tokens.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from ht_export.bench.conditions import commit
from ht_export.training.data import MANIFEST, MANIFESTS, SHARDS, AnsweredPrompt
from runtime.drafting.best_first import merge
from runtime.drafting.pool_drafts import PoolDrafts
from runtime.drafting.source import Context, DraftSource
from runtime.drafting.text_drafts import TextDrafts
from runtime.drafting.text_pool import TextPool
from runtime.files import write_json


def tokens_per_step(
    answers: Sequence[AnsweredPrompt], new_sources: Callable[[], Sequence[DraftSource]], rows: int
) -> float:
    """Return the mean over all steps after each answer's first token."""
    steps = tokens = 0
    for one in answers:
        sources, answer, done = new_sources(), one.answer, 1
        for source in sources:
            source.accept([*one.prompt, answer[0]])
        while done < len(answer):
            context = Context(answer[done - 1], 0, rows)
            tree = merge(context.token, (source.propose(context) for source in sources), rows)
            start, node = done, 0
            while done < len(answer):
                child = tree.child(node, answer[done])
                done += 1
                if child is None:
                    break
                node = child
            for source in sources:
                source.accept(answer[start:done])
            steps += 1
        tokens += len(answer) - 1
    return round(tokens / steps, 3)


def main() -> None:
    """Simulate, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--pool", type=int, default=1 << 20, help="tokens that it may hold")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    manifest = MANIFESTS.read(options.data / MANIFEST)
    # While it is being made the manifest names none of its shards yet.
    names = manifest.shards or sorted(path.name for path in options.data.glob("shard-*.jsonl"))
    answers = [one for name in names for _, one in SHARDS.lines(options.data / name)]
    random.Random(0).shuffle(answers)
    measured, others = answers[: options.count], answers[options.count :]
    others_alone, with_same = TextPool(options.pool), TextPool(options.pool)
    for one in others:
        others_alone.add(one.answer)
    for one in [*others, *measured]:
        with_same.add(one.answer)
    found = {
        "command": f"python docs/measuring/text_pool.py DATA --count {options.count} --rows {options.rows}",
        "commit": commit(),
        "model": manifest.base_model["name"],
        "answers": len(measured),
        "others": len(others),
        "tokens_of_others": len(others_alone) - len(others),
        "tokens_per_step": {
            "text": tokens_per_step(measured, lambda: [TextDrafts()], options.rows),
            "text and others": tokens_per_step(
                measured, lambda: [TextDrafts(), PoolDrafts(others_alone)], options.rows
            ),
            "text, asked before": tokens_per_step(
                measured, lambda: [TextDrafts(), PoolDrafts(with_same)], options.rows
            ),
        },
    }
    print(found)
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
