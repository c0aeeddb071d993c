"""Answer one question speculatively and plainly: the time, the tokens per step, and whether the text is the same.

python examples/compare.py engine.onnx "Why is the sky blue?"
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from runtime import GenerationResult, Generator

NEW_TOKENS = 128


def timed(generator: Generator, prompt: str, *, speculate: bool) -> tuple[GenerationResult, float]:
    """Answer `prompt`, showing the text as it comes; return the result and its seconds, the prompt's included."""
    result, start = None, time.perf_counter()
    for chunk in generator.stream(prompt, max_new_tokens=NEW_TOKENS, speculate=speculate):
        print(chunk.text, end="", flush=True)
        result = chunk.result
    assert result is not None
    return result, time.perf_counter() - start


def main(arguments: Sequence[str]) -> None:
    """Answer the prompt after the engine's name in both ways."""
    engine, prompt = arguments
    # Without prefix reuse, or the second way would find the prompt computed.
    with Generator(engine, prefix_cache_bytes=0) as generator:
        generator.warm_up()
        print("speculative decoding:")
        fast, fast_s = timed(generator, prompt, speculate=True)
        print("\n\nplain decoding, one token a pass:")
        plain, plain_s = timed(generator, prompt, speculate=False)
    print(f"\n\n{'':12}  seconds  tokens  passes  tokens per step")
    for name, result, seconds in (("plain", plain, plain_s), ("speculative", fast, fast_s)):
        print(f"{name:12} {seconds:8.2f}  {len(result.tokens):6}  {result.steps:6}  {result.tokens_per_step:15.2f}")
    same = "the same text" if fast.tokens == plain.tokens else "ANOTHER TEXT (docs/exactness.md)"
    print(f"speed-up {plain_s / fast_s:.2f}, {same}")


if __name__ == "__main__":
    main(sys.argv[1:])
