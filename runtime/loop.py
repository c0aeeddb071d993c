"""The draft-and-verify loop (arXiv 2404.12022): one engine pass verifies a tree of candidates and drafts the next."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.drafter import Drafter
from runtime.drafts import DraftStep, most_probable
from runtime.engines import Cache, Engine, Outputs
from runtime.tree import Rows, Tree, chain, lay_out

# Called once for each token, in order, with the base model's logits [V] after all tokens before it; it may keep state.
Choose = Callable[[NDArray[np.float32]], int]
# Called once for each token chosen, in order: whether the answer ends with it.
Ends = Callable[[int], bool]


def greedy(logits: NDArray[np.float32]) -> int:
    """Return the most probable token; among equals the smallest, as `argmax` of other libraries."""
    return int(logits.argmax())


def never(token: int) -> bool:
    """Return False: no token ends the answer."""
    return False


def draft_and_verify(
    engine: Engine,
    prompt: Sequence[int],
    drafter: Drafter,
    chunk: int,
    choose: Choose = greedy,
    max_new_tokens: int = sys.maxsize,
    ends: Ends = never,
) -> Iterator[list[int]]:
    """Yield the tokens that follow `prompt`, one list for each engine pass that makes a token certain.

    The tokens are those of plain decoding: each is `choose` of the base model's logits after all tokens before it. They
    end with the first that `ends` is true of, or after `max_new_tokens`.
    """
    join_order = engine.dims.join_order
    cache = engine.new_cache()
    token, drafted = process_prompt(engine, cache, prompt, drafter.draft_steps, chunk, choose, drafter.shortlist)
    drafter.begin(prompt)
    ended = ends(token) or max_new_tokens == 1
    yield [token]
    left = max_new_tokens - 1
    while not ended:
        tree, pseudo_parents = drafter.propose(token, drafted, cache.length)
        rows = lay_out(tree, pseudo_parents, join_order, start=cache.length)
        outputs = engine.run(rows, cache)
        accepted, token, ended = verify(tree, outputs.logits, choose, left, ends)
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
    ends: Ends = never,
) -> tuple[list[int], int, bool]:
    """Walk the tree by the base model's own choice at each node, one choice for each accepted node.

    Returns the accepted nodes, the root first; the token chosen at the last of them, which is the next certain one; and
    whether the answer ends with it: because `ends` says so, or as it is the last of the `most` that may be chosen.
    Otherwise no child holds it. logits [T, V] are the base model's.
    """
    accepted = [0]
    while True:
        token = choose(logits[accepted[-1]])
        if ends(token) or len(accepted) == most:
            return accepted, token, True
        child = tree.child(accepted[-1], token)
        if child is None:
            return accepted, token, False
        accepted.append(child)


def drafts_of(node: int, rows: Rows, outputs: Outputs, join_order: Sequence[int], count: int) -> list[DraftStep]:
    """Return the drafts of the pseudo rows of `node`, step 1 first.

    They end before the first step that it has no row of, or whose logits overflowed: a draft may be bad, not fatal.
    """
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
        logits = outputs.draft_logits[first_row[step] + int(found[0])]
        if not np.isfinite(logits.max()):
            break
        drafts.append(most_probable(logits, count))
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
