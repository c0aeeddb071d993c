"""Run an engine with ONNX Runtime, numpy and a tokenizer alone, without this project's runtime: greedy, with drafts.

python examples/plain_onnxruntime.py engine.onnx "The sky is"

The graph verifies a tree of tokens and drafts what may follow it, in one pass. The tree here is the simplest one: a
chain, the certain token and the likeliest draft of each step. `docs/architecture.md` describes inputs and outputs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Engine:
    """One text: a session of the portable graph, and the keys and values of the tokens that are certain."""

    def __init__(self, path: Path) -> None:
        self.about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        dims = self.about["dims"]
        shape = (1, dims["key_value_heads"], 0, dims["head_dim"])
        self.names = [f"{kind}_cache_{n}" for kind in ("key", "value") for n in range(dims["num_layers"])]
        self.cache = [np.zeros(shape, dims["dtype"]) for _ in self.names]
        # Pseudo rows are sorted by the layer at which they join.
        self.steps = sorted(range(len(dims["transfer_layers"])), key=lambda k: (dims["transfer_layers"][k], k))

    def run(self, chain: list[int], drafts: bool) -> tuple[list[int], list[list[int]], list[np.ndarray]]:
        """Return the model's choice after each token of the chain, the drafts of what follows it, and new rows."""
        size, steps = len(chain), self.steps if drafts else []
        rows = np.array([(node, 0) for node in range(size)] + [(n, k + 1) for k in steps for n in range(size)])
        node, ahead = rows[:, 0], rows[:, 1]
        own = node[:, None] == node[None]
        # A row sees the tokens up to its own, and a pseudo row the earlier ones of its token.
        mask = (ahead[None] == 0) & (node[None] <= node[:, None]) | own & (ahead[None] <= ahead[:, None])
        start, everyone = self.cache[0].shape[2], np.arange(size)[None]
        feed = dict(zip(self.names, self.cache, strict=True))
        feed |= {"input_ids": np.array([chain]), "position_ids": (start + node + ahead)[None], "tree_mask": mask[None]}
        feed |= {"logit_rows": everyone, "cache_length": np.array([start])}
        feed |= {f"pseudo_parent_{k + 1}": everyone[:, : size * (k in steps)] for k in self.steps}
        logits, draft_logits, *new = self.session.run(None, feed)
        found = draft_logits[0].argmax(-1).reshape(len(steps), size)
        in_order = [found[steps.index(k)] for k in range(len(steps))]
        return logits[0].argmax(-1).tolist(), np.array(in_order).T.tolist(), new

    def keep(self, new: list[np.ndarray], count: int) -> None:
        """Append the first tokens' keys and values to the cache."""
        self.cache = [np.concatenate([old, one[:, :, :count]], 2) for old, one in zip(self.cache, new, strict=True)]


def generate(engine: Engine, prompt: list[int], count: int, drafts: bool = True) -> tuple[list[int], int]:
    """Return up to `count` greedy tokens, the same with drafts and without, and the passes that they took."""
    stops = engine.about["stop_tokens"]
    # Drafts of a draft head are numbers of a map that this example leaves out.
    drafts = drafts and not engine.about.get("draft_tokens")
    if len(prompt) > 1:
        engine.keep(engine.run(prompt[:-1], False)[2], len(prompt) - 1)
    tokens: list[int] = []
    chain, passes = [prompt[-1]], 0
    while True:
        chosen, guesses, new = engine.run(chain, drafts)
        passes += 1
        right = next((n for n in range(1, len(chain)) if chain[n] != chosen[n - 1]), len(chain))
        engine.keep(new, right)
        for token in chosen[:right]:
            tokens.append(token)
            if token in stops or len(tokens) == count:
                return tokens, passes
        chain = [tokens[-1], *(guesses[right - 1] if drafts else [])]


def main(arguments: Sequence[str]) -> None:
    """Continue a text by the engine named."""
    path, text = Path(arguments[0]), arguments[1]
    engine = Engine(path)
    tokenizer = Tokenizer.from_file(str(path.with_name(engine.about["tokenizer"]["name"])))
    prompt = tokenizer.encode(text).ids
    tokens, passes = generate(engine, prompt, 48)
    print(text + tokenizer.decode(tokens))
    print(f"[{len(tokens)} tokens in {passes} passes]")


if __name__ == "__main__":
    main(sys.argv[1:])
