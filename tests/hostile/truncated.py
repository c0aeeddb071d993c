"""Run by `test_placing.py`: decodes with an engine whose files other programs shorten and overwrite meanwhile.

python -m tests.hostile.truncated ENGINE PROMPT: prints a JSON list of tokens, those before and those after.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from runtime import Generator


def main() -> None:
    """Decode, damage every file in its place, and decode again."""
    engine, prompt = Path(sys.argv[1]), sys.argv[2]
    generator = Generator(engine, threads=1, adapt=False)
    texts = [generator.generate(prompt, max_new_tokens=20).tokens]
    for path in engine.parent.iterdir():
        with path.open("r+b") as file:
            file.truncate(0)
    texts.append(generator.generate(prompt, max_new_tokens=20).tokens)
    for path in engine.parent.iterdir():
        path.write_bytes(b"\xff" * 100_000)
    texts.append(generator.generate(prompt, max_new_tokens=20).tokens)
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
