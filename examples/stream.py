"""Stream an answer to a conversation as it comes, and stop at a string.

python examples/stream.py engine.onnx
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from runtime import Generator

MESSAGES = [
    {"role": "system", "content": "You answer in one short paragraph."},
    {"role": "user", "content": "Why do leaves change colour in autumn?"},
]


def main(arguments: Sequence[str]) -> None:
    """Stream the answer of the engine named."""
    (engine,) = arguments
    generator = Generator(engine)
    for chunk in generator.stream(MESSAGES, max_new_tokens=96, stop=["\n\n"]):
        # One chunk for each step: the tokens that it made certain, and text that later tokens cannot change.
        print(chunk.text, end="", flush=True)
        if chunk.result is not None:
            print(f"\n[{chunk.result.finish_reason}; steps by drafted tokens accepted: {chunk.result.accepted}]")


if __name__ == "__main__":
    main(sys.argv[1:])
