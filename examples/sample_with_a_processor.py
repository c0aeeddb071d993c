"""Sample with a logits processor of one's own, and see that speculation does not change the draw.

The processor forbids a token that was used in the last few. It is called once for each token, in order, whether or not
several tokens become certain in one step, so it may keep state.

python examples/sample_with_a_processor.py engine.onnx "Write a limerick."
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime import Generator, Sampling


class NoRecentToken:
    """Rules out the last `count` tokens, and counts how often it was asked."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.calls = 0

    def __call__(self, tokens: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits [V] after `tokens`, those of the prompt first."""
        self.calls += 1
        logits[[token for token in tokens[-self.count :] if token < len(logits)]] = -np.inf
        return logits


def main(arguments: Sequence[str]) -> None:
    """Answer a prompt twice with the same seed: by draft and verify, and one token a step."""
    engine, prompt = arguments
    generator = Generator(engine)
    answers = []
    for speculate in (True, False):
        processor = NoRecentToken(4)
        sampling = Sampling(temperature=0.9, top_p=0.95, seed=7, processors=[processor])
        result = generator.generate(prompt, max_new_tokens=48, sampling=sampling, speculate=speculate)
        answers.append(result.tokens)
        print(f"{len(result.tokens)} tokens in {result.steps} steps, processor called {processor.calls} times")
    print(result.text)
    print("the same tokens both ways" if answers[0] == answers[1] else "DIFFERENT TOKENS")


if __name__ == "__main__":
    main(sys.argv[1:])
