"""One budget of rows for all requests of a pass: simulated texts say which drafts are right, a rule the time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from runtime.decode import DecodingState
from runtime.drafting.drafter import Drafter, Offer
from runtime.drafting.sizing import AdaptiveSizes, BatchMenu, FixedSizes, Menu
from runtime.drafting.text_drafts import TextDrafts
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.scheduling.job import Job
from runtime.scheduling.pass_sizes import PassSizes
from runtime.scheduling.row_budget import RowBudget
from runtime.scheduling.scheduler import Limits, Scheduler
from runtime.scheduling.shared_sizes import SharedSizes
from runtime.scheduling.slots import MANY
from runtime.tree import Tree, TreeSizes, chain
from tests.runtime.drafting.test_sizing import PLAIN, SIZES, Text, always, menu_of, never
from tests.runtime.scheduling.simulated_texts import Decoded, decode_together
from tests.runtime.test_decode import DIMS, known_engine, plain

REQUESTS = 4


def relative(requests: int, row: float, rows: int, pseudo_rows: int) -> float:
    return 1.0 + 0.05 * (rows + pseudo_rows > 0) + row * (rows + 0.47 * pseudo_rows)


def batch_menu(requests: int, row: float) -> BatchMenu:
    """Return the menu of passes whose every row adds `row` plain passes, all requests' rows counted."""
    times = [relative(requests, row, requests * (one.tree_rows - 1), requests * sum(one.pseudo_rows)) for one in SIZES]
    return BatchMenu(requests, Menu(SIZES, (128,), np.array([times])))


def job_of(sizing: AdaptiveSizes | FixedSizes | None = None) -> Job:
    sizing = sizing or AdaptiveSizes(menu_of(0.03, 0.013))
    return Job(DecodingState([1], Drafter(sizing, [TransferDrafts()]), 8, (0, 1, 2)), MANY)


def decode(texts: Sequence[Text], found: BatchMenu, row: float) -> Decoded:
    """Decode `texts` together, all by one budget."""
    return decode_together(
        RowBudget([found]), texts, lambda sizes, rows, pseudo_rows: relative(len(texts), row, rows, pseudo_rows)
    )


def texts(honest: bool = True, requests: int = REQUESTS) -> list[Text]:
    return [Text(3000, always if honest else never, seed=seed) for seed in range(requests)]


@pytest.mark.parametrize(("row", "least"), [(0.002, 1.8), (0.02, 1.4), (0.06, 1.05)])
def test_rows_are_used_as_far_as_they_pay(row: float, least: float) -> None:
    found = decode(texts(), batch_menu(REQUESTS, row), row)
    assert found.rate(REQUESTS) > least


@pytest.mark.parametrize("row", [0.3, 0.6, 2.0])
def test_where_no_row_can_pay_it_is_plain_decoding_and_hardly_more(row: float) -> None:
    found = decode(texts(), batch_menu(REQUESTS, row), row)
    assert found.rate(REQUESTS) > 0.97
    if row > 0.5:
        # Drafts rest: hardly ever is anybody asked for an offer.
        assert found.offers < 0.2 * REQUESTS * len(found.chosen)


def test_drafts_that_are_never_right_cost_little() -> None:
    found = decode(texts(honest=False), batch_menu(REQUESTS, 0.06), 0.06)
    assert found.rate(REQUESTS) > 0.95


def test_rows_go_to_those_whose_drafts_are_right() -> None:
    mixed = [*texts(requests=2), *(Text(3000, never, seed=seed) for seed in range(2))]
    found = decode(mixed, batch_menu(REQUESTS, 0.04), 0.04)
    rows = np.array([[sizes.tree_rows - 1 for sizes in chosen] for chosen in found.chosen[100:]]).mean(axis=0)
    assert rows[:2].mean() > 1.2 * rows[2:].mean()
    assert found.rate(REQUESTS) > 1.0


def test_a_surer_candidate_is_taken_before_another_requests_and_for_the_same_price() -> None:
    budget = RowBudget([batch_menu(2, 0.2)])
    jobs = [job_of(), job_of()]
    for job, probability in zip(jobs, (0.9, 0.1), strict=True):
        tree = Tree(np.array([5, 6]), np.array([-1, 0]), np.array([0, 1]), np.array([1.0, probability]))
        job.offer = Offer(tree, 128, drafted=True)
    budget.prepare(jobs)
    sizes = budget.choose(jobs)
    assert [sizes[job].tree_rows for job in jobs] == [2, 1]


def test_one_request_chooses_for_itself() -> None:
    budget = RowBudget([batch_menu(2, 0.06)])
    job = job_of()
    job.offer = Offer(chain([0]), 10, drafted=False)
    budget.prepare([job])
    assert budget.choose([job]) == {}


def test_sizes_of_its_own_stay_a_requests_own() -> None:
    budget = RowBudget([batch_menu(2, 0.002)])
    fixed, free = job_of(FixedSizes(PLAIN)), job_of()
    for job in (fixed, free):
        job.offer = Offer(chain([0]), 10, drafted=False)
    budget.prepare([fixed, free])
    assert list(budget.choose([fixed, free])) == [free]


@pytest.mark.parametrize("kind", [RowBudget, SharedSizes])
def test_far_more_requests_than_were_measured_decode_plainly_and_nothing_is_chosen_without_times(
    kind: type[PassSizes],
) -> None:
    jobs = [job_of() for _ in range(5)]
    for job in jobs:
        job.offer = Offer(chain([0]), 10, drafted=False)
    sizes = kind([batch_menu(2, 0.002)])
    for _ in range(20):
        sizes.prepare(jobs)
        assert set(sizes.choose(jobs).values()) == {PLAIN}
        sizes.learn([1] * 5)
    assert kind([]).choose(jobs) == {}


@pytest.mark.parametrize("row", [0.005, 0.05, 5.0])
def test_texts_are_those_of_plain_decoding_whatever_the_budget(row: float) -> None:
    engine = known_engine([True, True, False], max_batch=4)
    engine.packs = True
    menus = [batch_menu(2, row), batch_menu(4, row)]
    scheduler = Scheduler(engine, Limits(prompt_chunk=8), batch_menus=menus, checked=True)
    states = [
        DecodingState(
            [1, 2, index],
            Drafter(AdaptiveSizes(menu_of(0.03, 0.013)), [TransferDrafts(), TextDrafts()]),
            8,
            DIMS.join_order,
            max_new_tokens=100 + 20 * index,
        )
        for index in range(6)
    ]
    for state in states:
        scheduler.add(Job(state, MANY))
    while not scheduler.idle:
        scheduler.step()
    for state in states:
        assert state.tokens == plain(list(state.prompt), state.max_new_tokens)
    # Passes of this engine take next to no time, whatever was measured: in the end rows are cheap or they are not.
    assert scheduler.metrics.tree_passes > 0 or row > 1.0


def test_requests_that_never_speculate_say_nothing_of_what_drafts_are_worth() -> None:
    chosen = RowBudget([batch_menu(2, 0.02)])
    chosen.prepare([job_of(FixedSizes(PLAIN)) for _ in range(2)])
    jobs = [job_of() for _ in range(2)]
    for job in jobs:
        job.offer = Offer(chain([0]), 10, drafted=False)
    chosen.prepare(jobs)
    assert all(any(sizes.pseudo_rows) for sizes in chosen.choose(jobs).values())


def test_trees_of_fixed_sizes_beside_them_never_leave_requests_without_a_choice() -> None:
    budget = RowBudget([batch_menu(2, 0.2)])
    fixed, free = job_of(FixedSizes(TreeSizes(8, (4, 2, 2)))), job_of()
    for _ in range(50):
        for job in (fixed, free):
            job.offer = Offer(chain([0]), 10, drafted=False)
        budget.prepare([fixed, free])
        assert list(budget.choose([fixed, free])) == [free]
        budget.learn([1, 1])
