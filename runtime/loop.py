"""The draft-and-verify loop (arXiv 2404.12022): one engine pass verifies a tree of candidates and drafts the next."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.drafter import Drafter
from runtime.drafts import DraftStep, most_probable
from runtime.engines import Cache, Engine, Outputs
from runtime.tree import Rows, Tree, chain, lay_out

# Called once for each token, in order, with the base model's logits [V] after all tokens before it; it may keep state.
Choose = Callable[[NDArray[np.float32]], int]


def greedy(logits: NDArray[np.float32]) -> int:
    """Return the most probable token; among equals the smallest, as `argmax` of other libraries."""
    return int(logits.argmax())


def draft_and_verify(
    engine: Engine,
    prompt: Sequence[int],
    drafter: Drafter,
    chunk: int,
    choose: Choose = greedy,
    max_new_tokens: int = sys.maxsize,
    stop_tokens: Collection[int] = (),
) -> Iterator[list[int]]:
    """Yield the tokens that follow `prompt`, one list for each engine pass that makes a token certain.

    The tokens are those of plain decoding: each is `choose` of the base model's logits after all tokens before it. They
    end with the first of `stop_tokens`, or after `max_new_tokens`.
    """
    join_order = engine.dims.join_order
    cache = engine.new_cache()
    token, drafted = process_prompt(engine, cache, prompt, drafter.draft_steps, chunk, choose, drafter.shortlist)
    drafter.begin(prompt)
    yield [token]
    left = max_new_tokens - 1
    while left > 0 and token not in stop_tokens:
        tree, ends = drafter.propose(token, drafted, cache.length)
        rows = lay_out(tree, ends, join_order, start=cache.length)
        outputs = engine.run(rows, cache)
        accepted, token = verify(tree, outputs.logits, choose, left, stop_tokens)
        left -= len(accepted)
        cache.commit(outputs, accepted)
        drafted = drafts_of(accepted[-1], rows, outputs, join_order, drafter.shortlist)
        candidates = tree.tokens[accepted[1:]].tolist()
        drafter.learn(candidates, token)
        yield [*candidates, token]


def verify(
    tree: Tree,
    logits: NDArray[np.float32],
    choose: Choose,
    most: int = sys.maxsize,
    stop_tokens: Collection[int] = (),
) -> tuple[list[int], int]:
    """Walk the tree by the base model's own choice at each node, one choice for each accepted node.

    Returns the accepted nodes, the root first, and the token chosen at the last of them: the next certain token. No
    child holds it, or it is one of `stop_tokens`, or the last of the `most` that may be chosen. logits [T, V] are the
    base model's.
    """
    accepted = [0]
    while True:
        token = choose(logits[accepted[-1]])
        child = tree.child(accepted[-1], token)
        if child is None or len(accepted) == most or token in stop_tokens:
            return accepted, token
        accepted.append(child)


def drafts_of(node: int, rows: Rows, outputs: Outputs, join_order: Sequence[int], count: int) -> list[DraftStep]:
    """Return the drafts of the pseudo rows of `node`, step 1 first, up to the first step that it has no row of."""
    first_row = {}
    row = 0
    for step in join_order:
        first_row[step] = row
        row += len(rows.pseudo_parents[step])
    drafts = []
    for step, parents in enumerate(rows.pseudo_parents):
        found = np.flatnonzero(parents == node)
        if not len(found):
            break
        drafts.append(most_probable(outputs.draft_logits[first_row[step] + int(found[0])], count))
    return drafts


def process_prompt(
    engine: Engine,
    cache: Cache,
    prompt: Sequence[int],
    draft_steps: int,
    chunk: int,
    choose: Choose,
    shortlist: int,
) -> tuple[int, list[DraftStep]]:
    """Run the prompt in chunks into `cache`.

    Returns the first token after it, and the `shortlist` most probable tokens of each of the first `draft_steps` draft
    steps that follow that.
    """
    join_order = engine.dims.join_order
    nothing = (np.empty(0, dtype=np.int64),) * engine.dims.num_steps
    for start in range(0, len(prompt), chunk):
        tree = chain(prompt[start : start + chunk])
        last = np.array([len(tree) - 1], dtype=np.int64)
        ends_prompt = start + chunk >= len(prompt)
        drafting = (last,) * draft_steps + nothing[draft_steps:] if ends_prompt else nothing
        rows = lay_out(tree, drafting, join_order, start, logit_rows=last)
        outputs = engine.run(rows, cache)
        cache.commit(outputs, range(len(tree)))
    return choose(outputs.logits[0]), drafts_of(len(tree) - 1, rows, outputs, join_order, shortlist)
