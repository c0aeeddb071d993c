"""One size for all requests of a pass: simulated texts say which drafts are right, and a table how long passes take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from runtime.decode import DecodingState
from runtime.drafting.drafter import Drafter, Offer
from runtime.drafting.sizing import AdaptiveSizes, BatchMenu, FixedSizes, Menu
from runtime.drafting.source import Context
from runtime.drafting.text_drafts import TextDrafts
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.scheduling.job import Job
from runtime.scheduling.scheduler import Limits, Scheduler
from runtime.scheduling.shared_sizes import SharedSizes
from runtime.scheduling.slots import MANY
from runtime.tree import Tree, TreeSizes, chain
from tests.runtime.drafting.test_sizing import PLAIN, SIZES, Text, always, menu_of, never
from tests.runtime.scheduling.simulated_texts import Decoded, decode_together
from tests.runtime.test_decode import DIMS, known_engine, plain

REQUESTS = 4


def batch_menu(requests: int, row: float) -> BatchMenu:
    """Return the menu of passes whose every row adds `row` plain passes, all requests' rows counted."""
    times = [1 + row * requests * (one.tree_rows - 1 + 0.47 * sum(one.pseudo_rows)) for one in SIZES]
    return BatchMenu(requests, Menu(SIZES, (128,), np.array([times])))


def decode(texts: Sequence[Text], found: BatchMenu) -> Decoded:
    """Decode `texts` together, all by one shared choice."""
    seconds = dict(zip(found.menu.sizes, found.menu.seconds[0].tolist(), strict=True))

    def time_of(sizes: Sequence[TreeSizes], rows: int, pseudo_rows: int) -> float:
        (size,) = set(sizes)
        return seconds[size]

    return decode_together(SharedSizes([found]), texts, time_of)


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
        assert not any(any(one.pseudo_rows) for chosen in found.chosen[20:] for one in chosen)
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
    found = [shared._menu(count) for count in (1, 2, 3, 4, 7, 8, 16)]
    assert [one and one.requests for one in found] == [None, 2, 4, 4, 8, 8, 8]
    assert SharedSizes([])._menu(4) is None


class Watched:
    """A source that proposes nothing, and counts how often it is asked."""

    name = "watched"

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
    ngrams = [TextDrafts() for _ in range(4)]
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
