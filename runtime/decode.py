"""The draft-and-verify loop (arXiv 2404.12022): one pass verifies a tree of candidates and drafts the next.

The loop decides and never runs. `decode` yields the largest tree that a request may verify, and is sent the sizes to
cut it to; it yields the rows that it wants in the next pass and is sent what came of them; then it yields the rows that
were accepted, to be committed. Whatever runs passes, for one request or for many,
drives it: see `runtime.scheduling`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from runtime.arrays import IntArray
from runtime.drafting.drafter import Drafter, Offer
from runtime.drafting.drafts import DraftStep
from runtime.rows import Outputs, Rows, lay_out, prompt_rows
from runtime.sampling.choice import ArgMax, Choice, Chosen, Wanted, WholeLogits
from runtime.sampling.scores import PromptScores
from runtime.trace import Trace
from runtime.tree import Tree, TreeSizes

# Rows of a prompt whose whole logits come back at once, where the prompt is scored: all engines have room for so many.
SCORED_ROWS = 64

# Called once for each token chosen, in order; returns whether the answer ends with it.
Ends = Callable[[int], bool]


class Chooser(Protocol):
    """Chooses tokens: called once for each, in order, with what was `wanted` of the base model's logits after all
    tokens before it. It may keep state.
    """

    wanted: Wanted

    def __call__(self, found: Choice) -> int:
        """Return the token."""
        ...


class Greedy:
    """Chooses the most probable token."""

    def __init__(self) -> None:
        self.wanted: Wanted = ArgMax()

    def __call__(self, found: Choice) -> int:
        """See `Chooser`."""
        assert isinstance(found, Chosen)
        return found.token


def never(token: int) -> bool:
    """Return False: no token ends the answer."""
    return False


@dataclass
class DecodingState:
    """One text on its way: what was asked for, and how far it is.

    The prompt is run in chunks of `chunk` tokens, which may change between them, from the first token that is not
    `committed` on: the rows that an engine keeps for it, at the beginning those of a prompt that began alike.
    `join_order` is that of the graph's draft steps. The answer ends with the first token that `ends` is true of, or
    after `max_new_tokens`, of which there may be none where the prompt has `scores`: then all of its rows have logits,
    and its tokens are scored by them. `tokens` are those chosen so far; passes have verified `candidates` drafted
    tokens, of which so many were `accepted`. A `trace` is told of each pass.
    """

    prompt: Sequence[int]
    drafter: Drafter
    chunk: int
    join_order: Sequence[int]
    choose: Chooser = field(default_factory=Greedy)
    max_new_tokens: int = sys.maxsize
    ends: Ends = never
    tokens: list[int] = field(default_factory=list)
    committed: int = 0
    ended: bool = False
    scores: PromptScores | None = None
    candidates: int = 0
    accepted: int = 0
    trace: Trace | None = None

    def take(self, found: Choice) -> int:
        """Choose the next token, where `found` is what came back of the row before it; return it."""
        token = self.choose(found)
        self.tokens.append(token)
        self.ended = self.ends(token) or len(self.tokens) == self.max_new_tokens
        return token


@dataclass(frozen=True)
class Accepted:
    """The tree rows of the last pass that became certain, in order: to be committed."""

    rows: Sequence[int]


# Yields an `Offer` and is sent `TreeSizes`, but for chunks of the prompt; yields `Rows` and is sent their `Outputs`;
# then yields `Accepted` and is sent nothing. It need not be resumed once the request has ended.
Yielded = Offer | Rows | Accepted
Sent = TreeSizes | Outputs | None
Decoding = Generator[Yielded, Sent, None]


def decode(request: DecodingState) -> Decoding:
    """Decode `request` to its end. Its tokens are those of plain decoding: each is chosen from the base model's logits
    after all tokens before it.
    """
    drafter = request.drafter
    drafts = yield from process_prompt(request)
    drafter.begin([*request.prompt, *request.tokens])
    while not request.ended:
        offer = drafter.offer(request.tokens[-1], drafts, request.committed)
        sizes = yield offer
        assert isinstance(sizes, TreeSizes), "an offer is answered with sizes"
        tree, pseudo_parents = drafter.cut(offer, sizes)
        rows = lay_out(
            tree,
            pseudo_parents,
            request.join_order,
            request.committed,
            wanted=request.choose.wanted,
            shortlist=drafter.shortlist,
        )
        outputs = yield from run(rows, request.trace)
        accepted = verify(tree, outputs, request)
        drafts = drafts_of(accepted[-1], outputs, request.join_order, drafter.draft_tokens)
        request.committed += len(accepted)
        # The root was certain before.
        request.candidates += len(tree) - 1
        request.accepted += len(accepted) - 1
        drafter.accept(request.tokens[-len(accepted) :])
        if request.trace is not None:
            certain = request.tokens[-len(accepted) :]
            request.trace.verified(tree, offer.proposals, rows.counts, accepted, certain, offer.forced)
        yield Accepted(accepted)


def verify(tree: Tree, outputs: Outputs, request: DecodingState) -> list[int]:
    """Walk the tree by the base model's own choice at each node, one choice for each accepted node.

    Returns the accepted nodes, the root first. The token chosen at the last of them is the next certain one: the answer
    ends with it, or no child holds it.
    """
    accepted = [0]
    while True:
        token = request.take(outputs.chosen(accepted[-1]))
        child = None if request.ended else tree.child(accepted[-1], token)
        if child is None:
            return accepted
        accepted.append(child)


def drafts_of(node: int, outputs: Outputs, join_order: Sequence[int], draft_tokens: IntArray | None) -> list[DraftStep]:
    """Return the drafts of the pseudo rows of `node`, step 1 first. Draft logits are of `draft_tokens` [V_d], None for
    all tokens: this is where they get their names.

    They end before the first step that it has no row of, or whose logits overflowed.
    """
    pseudo_parents = outputs.rows.pseudo_parents
    if not any(map(len, pseudo_parents)):
        return []
    first_row = {}
    row = 0
    for step in join_order:
        first_row[step] = row
        row += len(pseudo_parents[step])
    drafts: list[DraftStep] = []
    for step, parents in enumerate(pseudo_parents):
        nodes = parents.tolist()
        draft = outputs.draft(first_row[step] + nodes.index(node)) if node in nodes else None
        if draft is None:
            break
        drafts.append(draft if draft_tokens is None else DraftStep(draft_tokens[draft.tokens], draft.probabilities))
    return drafts


def run(rows: Rows, trace: Trace | None = None) -> Generator[Yielded, Sent, Outputs]:
    """Have `rows` run, which a `trace` is told of; return what came of them."""
    if trace is not None:
        trace.begins()
    outputs = yield rows
    if trace is not None:
        trace.ends()
    assert outputs is not None and not isinstance(outputs, TreeSizes), "rows are answered with their outputs"
    return outputs


def process_prompt(request: DecodingState) -> Generator[Yielded, Sent, list[DraftStep]]:
    """Run the prompt in chunks, and choose the token after it, if there shall be one. Returns the drafts of what
    follows that.
    """
    drafter, prompt, scores = request.drafter, request.prompt, request.scores
    drafts: list[DraftStep] = []
    while (start := request.committed) < len(prompt):
        chunk = request.chunk if scores is None else min(request.chunk, SCORED_ROWS)
        tokens = prompt[start : start + chunk]
        ends_prompt = start + len(tokens) == len(prompt)
        rows = prompt_rows(
            tokens,
            request.join_order,
            start,
            drafter.draft_steps if ends_prompt and request.max_new_tokens else 0,
            wanted=request.choose.wanted if scores is None else WholeLogits(),
            shortlist=drafter.shortlist,
            every_logit=scores is not None,
        )
        outputs = yield from run(rows, request.trace)
        if scores is not None:
            for row, token in enumerate(prompt[start + 1 : start + len(tokens) + 1]):
                scores.add(outputs.chosen(row), token)
        if ends_prompt and request.max_new_tokens:
            request.take(outputs.chosen(len(rows.logit_rows) - 1))
            drafts = drafts_of(len(tokens) - 1, outputs, request.join_order, drafter.draft_tokens)
        request.committed += len(tokens)
        if request.trace is not None:
            request.trace.prompted(len(tokens), rows.counts, request.tokens)
        # Of an answer without tokens the prompt is all.
        request.ended = request.ended or (ends_prompt and not request.max_new_tokens)
        yield Accepted(range(len(tokens)))
    return drafts
