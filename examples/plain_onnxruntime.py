"""Run an engine with ONNX Runtime, numpy and a tokenizer alone, without this project's runtime: greedy, with drafts.

python examples/plain_onnxruntime.py engine.onnx "The sky is"

The graph verifies a tree of tokens and drafts what may follow it, in one pass. The tree here is the simplest one: a
chain, the certain token and the likeliest draft of each step. `docs/architecture.md` describes inputs and outputs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def generate(path: Path, prompt: list[int], count: int, drafts: bool = True) -> tuple[list[int], int]:
    """Return up to `count` greedy tokens, the same with drafts and without, and the passes that they took."""
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    session, dims = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), about["dims"]
    names = [f"{kind}_cache_{n}" for kind in ("key", "value") for n in range(dims["num_layers"])]
    cache = [np.zeros((1, dims["key_value_heads"], 0, dims["head_dim"]), dims["dtype"]) for _ in names]
    # Pseudo rows are sorted by the layer at which they join. Drafts of a draft head would need its map of tokens.
    order = sorted(range(len(dims["transfer_layers"])), key=lambda k: (dims["transfer_layers"][k], k))
    steps = order if drafts and not about.get("draft_tokens") else []
    tokens: list[int] = []
    chain, known, passes = prompt, len(prompt), 0
    while True:
        size, start, parents = len(chain), cache[0].shape[2], np.arange(known - 1, len(chain))
        node, ahead = np.array([(n, 0) for n in range(size)] + [(n, k + 1) for k in steps for n in parents]).T
        # A row sees the tokens up to its own, and a pseudo row the earlier ones of its token.
        own = (node[:, None] == node) & (ahead <= ahead[:, None])
        mask = (ahead == 0) & (node <= node[:, None]) | own
        feed = dict(zip(names, cache, strict=True)) | {"input_ids": np.array([chain]), "tree_mask": mask[None]}
        feed |= {"position_ids": (start + node + ahead)[None], "cache_length": np.array([start])}
        feed |= {f"pseudo_parent_{k + 1}": parents[None, : len(parents) * (k in steps)] for k in order}
        logits, draft_logits, *new = session.run(None, feed | {"logit_rows": parents[None]})
        chosen = logits[0].argmax(-1).tolist()
        right = next((n for n in range(known, size) if chain[n] != chosen[n - known]), size)
        cache = [np.concatenate([old, one[:, :, :right]], 2) for old, one in zip(cache, new, strict=True)]
        passes += 1
        for token in chosen[: right - known + 1]:
            tokens.append(token)
            if token in about["stop_tokens"] or len(tokens) == count:
                return tokens, passes
        found = draft_logits[0].argmax(-1).reshape(len(steps), len(parents))
        chain, known = [tokens[-1], *(int(found[steps.index(k), right - known]) for k in sorted(steps))], 1


if __name__ == "__main__":
    engine, text = Path(sys.argv[1]), sys.argv[2]
    name = json.loads(engine.with_suffix(".json").read_text(encoding="utf-8"))["tokenizer"]["name"]
    tokenizer = Tokenizer.from_file(str(engine.with_name(name)))
    answer, passes = generate(engine, tokenizer.encode(text).ids, 48)
    print(text + tokenizer.decode(answer))
    print(f"[{len(answer)} tokens in {passes} passes]")
