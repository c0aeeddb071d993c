"""One size for all requests of a pass: simulated texts say which drafts are right, and a table how long passes take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from runtime.decode import DecodingState
from runtime.drafting.best_first import likely_ends
from runtime.drafting.drafter import Drafter, Offer
from runtime.drafting.ngrams import Ngrams
from runtime.drafting.sizing import AdaptiveSizes, BatchMenu, FixedSizes, Menu
from runtime.drafting.source import Context
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.scheduling.job import Job
from runtime.scheduling.scheduler import Limits, Scheduler
from runtime.scheduling.shared_sizes import SharedSizes
from runtime.scheduling.slots import MANY
from runtime.tree import Tree, TreeSizes, chain
from tests.runtime.drafting.test_sizing import PLAIN, SIZES, Text, always, menu_of, never
from tests.runtime.test_decode import DIMS, known_engine, plain

REQUESTS = 4


def batch_menu(requests: int, row: float) -> BatchMenu:
    """Return the menu of passes whose every row adds `row` plain passes, all requests' rows counted."""
    times = [1 + row * requests * (one.tree_rows - 1 + 0.47 * sum(one.pseudo_rows)) for one in SIZES]
    return BatchMenu(requests, Menu(SIZES, (128,), np.array([times])))


@dataclass
class Decoded:
    tokens: int
    time: float
    chosen: list[TreeSizes]
    offers: int

    def rate(self, requests: int) -> float:
        """Tokens of one request in the time of a plain pass."""
        return self.tokens / self.time / requests


def decode(texts: Sequence[Text], found: BatchMenu, steps: int = 400) -> Decoded:
    """Decode so many steps of `texts` together, all by one shared choice."""
    shared = SharedSizes([found])
    jobs = [
        Job(DecodingState([1], Drafter(AdaptiveSizes(menu_of(0.03, 0.013)), [TransferDrafts()]), 8, (0, 1, 2)), MANY)
        for _ in texts
    ]
    position, drafted = [0] * len(texts), [3] * len(texts)
    result = Decoded(0, 0.0, [], 0)
    seconds = dict(zip(found.menu.sizes, found.menu.seconds[0].tolist(), strict=True))
    for _ in range(steps):
        shared.prepare(jobs)
        trees: list[Tree] = []
        for index, (job, text) in enumerate(zip(jobs, texts, strict=True)):
            drafter = job.state.drafter
            if drafter.rests:
                drafted[index] = 0
                tree = chain([0])
            else:
                result.offers += 1
                tree = text.tree(position[index] % text.tokens, drafted[index], drafter.sizing.most_rows)
            trees.append(tree)
            job.offer = Offer(tree, 128, drafted[index] > 0)
        sizes = shared.choose(jobs)
        assert len(set(sizes.values())) == 1, "they are brought to one size anyway"
        size = sizes[jobs[0]]
        gained = []
        for index, (job, text) in enumerate(zip(jobs, texts, strict=True)):
            tree = trees[index].first(size.tree_rows)
            node = accepted = 0
            at = position[index] % text.tokens
            while accepted < drafted[index] and (child := tree.child(node, text.right[at][accepted])) is not None:
                node, accepted = child, accepted + 1
            job.state.drafter.accept([0] * (accepted + 1))
            gained.append(accepted + 1)
            position[index] += accepted + 1
            ends = likely_ends(tree, size.pseudo_rows)
            drafted[index] = next((k for k, nodes in enumerate(ends) if node not in nodes), len(ends))
            job.offer = None
        shared.learn(gained)
        result.tokens += sum(gained)
        result.time += seconds[size]
        result.chosen.append(size)
    return result


def texts(honest: bool = True) -> list[Text]:
    return [Text(3000, always if honest else never, seed=seed) for seed in range(REQUESTS)]


def test_rows_that_cost_nothing_are_used() -> None:
    found = decode(texts(), batch_menu(REQUESTS, 0.002))
    assert found.rate(REQUESTS) > 1.6


def test_rows_that_pay_a_little_are_used_a_little() -> None:
    found = decode(texts(), batch_menu(REQUESTS, 0.06))
    assert found.rate(REQUESTS) > 1.0


@pytest.mark.parametrize("row", [0.3, 0.6, 2.0])
def test_where_no_row_can_pay_it_is_plain_decoding_and_no_more(row: float) -> None:
    found = decode(texts(), batch_menu(REQUESTS, row))
    assert found.rate(REQUESTS) > 0.97
    if row > 0.5:
        # Not even tried: it would cost a pass.
        assert not any(any(one.pseudo_rows) for one in found.chosen[20:])
        # Drafts rest: hardly ever is anybody asked for an offer.
        assert found.offers < 0.2 * REQUESTS * len(found.chosen)


def test_drafts_that_are_never_right_cost_little() -> None:
    found = decode(texts(honest=False), batch_menu(REQUESTS, 0.06))
    assert found.rate(REQUESTS) > 0.95


def test_one_request_chooses_for_itself() -> None:
    shared = SharedSizes([batch_menu(2, 0.06)])
    job = Job(DecodingState([1], Drafter(AdaptiveSizes(menu_of(0.03, 0.013)), [TransferDrafts()]), 8, (0, 1, 2)), MANY)
    job.offer = Offer(chain([0]), 10, drafted=False)
    shared.prepare([job])
    assert shared.choose([job]) == {}


def test_sizes_of_its_own_stay_a_requests_own() -> None:
    shared = SharedSizes([batch_menu(2, 0.002)])
    fixed, free = (
        Job(DecodingState([1], Drafter(sizing, [TransferDrafts()]), 8, (0, 1, 2)), MANY)
        for sizing in (FixedSizes(PLAIN), AdaptiveSizes(menu_of(0.03, 0.013)))
    )
    for job in (fixed, free):
        job.offer = Offer(chain([0]), 10, drafted=False)
    shared.prepare([fixed, free])
    assert list(shared.choose([fixed, free])) == [free]


def test_the_menu_is_that_of_as_many_requests_or_more() -> None:
    shared = SharedSizes([batch_menu(8, 0.06), batch_menu(2, 0.06), batch_menu(4, 0.06)])
    found = [shared._menu(count) for count in (1, 2, 3, 4, 7, 8, 50)]
    assert [one and one.requests for one in found] == [None, 2, 4, 4, 8, 8, 50]
    assert found[-1] is not None
    # So many were never measured: nothing but plain decoding.
    assert found[-1].menu.sizes == (PLAIN,)
    assert SharedSizes([])._menu(4) is None


class Watched:
    """A source that proposes nothing, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.tokens: list[int] = []

    def shortlist(self, max_rows: int) -> int:
        return max_rows

    def propose(self, context: Context) -> Tree:
        self.asked += 1
        return chain([context.token])

    def accept(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens


def test_where_plain_decoding_is_best_no_speculative_work_is_done() -> None:
    engine = known_engine([True], max_batch=4)
    menus = [batch_menu(2, 5.0), batch_menu(4, 5.0)]
    scheduler = Scheduler(engine, Limits(prompt_chunk=8), batch_menus=menus, checked=True)
    watched = [Watched() for _ in range(4)]
    ngrams = [Ngrams() for _ in range(4)]
    states = [
        DecodingState(
            [1, 2, index],
            Drafter(AdaptiveSizes(menu_of(0.03, 0.013)), [TransferDrafts(), one, index_]),
            8,
            DIMS.join_order,
            max_new_tokens=200,
        )
        for index, (one, index_) in enumerate(zip(watched, ngrams, strict=True))
    ]
    for state in states:
        scheduler.add(Job(state, MANY))
    while not scheduler.idle:
        scheduler.step()
    for state, source in zip(states, watched, strict=True):
        assert state.tokens == plain(list(state.prompt), 200)
        assert source.asked < 40
    # What was certain meanwhile, a source is told before it is asked again.
    for state, source in zip(states, watched, strict=True):
        assert [*state.prompt, *state.tokens][: len(source.tokens)] == source.tokens
    assert scheduler.metrics.tree_passes < 20


def test_requests_that_never_speculate_say_nothing_of_what_drafts_are_worth() -> None:
    def requests_of(sizing: Callable[[], FixedSizes | AdaptiveSizes]) -> list[Job]:
        drafters = [Drafter(sizing(), [TransferDrafts()]) for _ in range(2)]
        return [Job(DecodingState([1], drafter, 8, (0, 1, 2)), MANY) for drafter in drafters]

    shared = SharedSizes([batch_menu(2, 0.02)])
    shared.prepare(requests_of(lambda: FixedSizes(PLAIN)))
    jobs = requests_of(lambda: AdaptiveSizes(menu_of(0.03, 0.013)))
    for job in jobs:
        job.offer = Offer(chain([0]), 10, drafted=False)
    shared.prepare(jobs)
    assert all(any(sizes.pseudo_rows) for sizes in shared.choose(jobs).values())
