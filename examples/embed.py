"""Embed a generator in a program: load it once, answer many prompts, read what each answer cost.

python examples/embed.py engine.onnx "Why is the sky blue?" "Name three primes."
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from runtime import Generator, InputError, PromptTooLongError


def main(arguments: Sequence[str]) -> None:
    """Answer the prompts that follow the engine's name."""
    engine, *prompts = arguments
    generator = Generator(engine)
    for prompt in prompts:
        try:
            result = generator.generate(prompt, max_new_tokens=64)
        except PromptTooLongError as error:
            print(f"skipped: {error}")
            continue
        print(f"> {prompt}\n{result.text}")
        print(
            f"[{len(result.tokens)} tokens, {result.tokens_per_step:.2f} per step, "
            f"first after {1e3 * result.time_to_first_token_s:.0f} ms, {result.finish_reason}]\n"
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
