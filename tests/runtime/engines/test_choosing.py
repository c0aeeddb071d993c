"""Choices on a simulated GPU, for any number of requests: what comes to the host, and how much."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("cuda.bindings")

from plugins.binaries import CHOOSE, CHOOSE_DRAFTS, Kernel, KernelBinaries
from plugins.choose_launch import ChooseLauncher
from plugins.choosing import JOB, TOP_ROOM, answer_words, best_room
from runtime.bundle.engine_file import read_engine_file
from runtime.drafting.drafts import DraftStep
from runtime.engines.choosing import LEAST_JOBS, DeviceChoices, DeviceOutputs
from runtime.engines.cuda import Cuda, DeviceMemory
from runtime.engines.layout import stack
from runtime.rows import HostOutputs, Outputs, Rows, lay_out
from runtime.sampling.choice import ArgMax, Race, Wanted, WholeLogits
from runtime.sampling.noise import Noise
from runtime.tree import TreeSizes, chain
from tests.runtime.engines.simulated_gpu import SimulatedDriver

ORDER = (0, 1)
NAMES = ("peak_kernel", "weigh_kernel", "collect_kernel")
KERNELS, KERNELS_FOR_DRAFTS = (
    {variant: Kernel(name, 128, 0, b"\x7fELF") for variant, name in zip(variants, NAMES, strict=True)}
    for variants in (CHOOSE, CHOOSE_DRAFTS)
)
BINARIES = KernelBinaries("float16", 64, {80: KERNELS | KERNELS_FOR_DRAFTS})


@pytest.fixture
def driver(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> SimulatedDriver:
    driver = SimulatedDriver(read_engine_file(tiny_engine).dims)
    bindings = ModuleType("cuda.bindings")
    bindings.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    return driver


class Pass:
    """A pass that left random logits of requests on the GPU, and the choices that are made of them. Draft logits are as
    many, or those of a draft head.
    """

    def __init__(self, vocab_size: int, kernels: KernelBinaries = BINARIES, draft_size: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.widths = (vocab_size, draft_size or vocab_size)
        self.rng = np.random.default_rng(0)
        self.cuda = Cuda()
        launcher = ChooseLauncher.of(kernels)
        assert launcher is not None
        drafts = None
        if draft_size is not None:
            of_drafts = ChooseLauncher.of(kernels, CHOOSE_DRAFTS)
            assert of_drafts is not None
            drafts = (of_drafts, draft_size)
        self.choices = DeviceChoices(self.cuda, launcher, vocab_size, drafts)

    def rows(self, wanted: Wanted, tokens: int = 2, shortlist: int = 16, drafts: int = 2) -> Rows:
        """Return rows of a request: a chain of tokens, of which the first has pseudo rows."""
        parents = (np.zeros(drafts, dtype=np.int64), np.zeros(drafts // 2, dtype=np.int64))
        return lay_out(chain(list(range(1, tokens + 1))), parents, ORDER, 7, wanted=wanted, shortlist=shortlist)

    def run(
        self, batch: list[Rows], odd: float | None = None, places: list[int] | None = None
    ) -> tuple[list[DeviceOutputs], list[HostOutputs]]:
        """Return outputs whose choices are made on the GPU, and those of the host of the same logits: of all requests
        of the batch, or of those in these places.
        """
        laid_out = stack(batch, [7] * len(batch), ORDER, TreeSizes(5, (3, 2)))
        shapes = ((len(batch), laid_out.logit_count), (len(batch), 5))
        values = [
            (self.rng.standard_normal((*shape, width)) * 6).astype(np.float32)
            for shape, width in zip(shapes, self.widths, strict=True)
        ]
        if odd is not None:
            for value in values:
                value[..., 3] = odd
        # Before the choices are enqueued: the pass itself is behind nothing here.
        self.held = [self._sent(value) for value in values]
        asked = batch if places is None else [batch[place] for place in places]
        found = self.choices.enqueue(asked, laid_out, self.held[0].address, self.held[1].address, places)
        self.cuda.synchronise()
        logits, drafts = values
        own = list(zip(batch, logits, drafts, laid_out.pseudo, strict=True))
        if places is not None:
            own = [own[place] for place in places]
        return found, [HostOutputs(rows, of, drafted[pseudo]) for rows, of, drafted, pseudo in own]

    def _sent(self, value: NDArray[np.float32]) -> DeviceMemory:
        memory = self.cuda.allocate(value.nbytes)
        pinned = self.cuda.pinned(value.nbytes)
        pinned.view(np.float32)[:] = value.reshape(-1)
        self.cuda.upload(memory.address, pinned)
        self.cuda.synchronise()
        return memory


def sampled(vocab_size: int, seed: int, *options: float | None) -> Race:
    return Race(Noise(seed, 3), vocab_size, 0.8, *options)  # type: ignore[arg-type]


def assert_alike(found: DraftStep | None, expected: DraftStep | None) -> None:
    assert found is not None
    assert expected is not None
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=1e-4)


def assert_same_choices(found: Outputs, host: HostOutputs) -> None:
    """Assert that all that may be asked of outputs is what the host makes of the whole rows."""
    assert found.rows is host.rows
    assert len(found.logits) == len(found.rows.logit_rows)
    assert len(found.draft_logits) == sum(found.rows.counts)
    for index in range(len(found.logits)):
        np.testing.assert_array_equal(found.chosen(index), host.chosen(index))
        np.testing.assert_array_equal(found.logits[index], host.logits[index])
    for row in range(len(found.draft_logits)):
        assert_alike(found.draft(row), host.draft(row))
        np.testing.assert_array_equal(found.draft_logits[row], host.draft_logits[row])


@pytest.mark.parametrize("vocab_size", [97, 3000])
def test_requests_that_want_different_things_get_them_in_one_pass(driver: SimulatedDriver, vocab_size: int) -> None:
    one = Pass(vocab_size)
    batch = different_requests(one)
    # The second pass answers for fewer rows, the third for more, where the first one's answers were.
    for some in (batch, batch[2:5], batch[::-1] * 3):
        for found, host in zip(*one.run(some), strict=True):
            assert_same_choices(found, host)


@pytest.mark.parametrize("draft_size", [64, 700, 3000])
def test_draft_logits_of_a_head_of_their_own_are_rows_of_their_own_length(
    driver: SimulatedDriver, draft_size: int
) -> None:
    one = Pass(3000, draft_size=draft_size)
    batch = different_requests(one)
    for some, places in ((batch, None), (batch[2:5], None), (batch[::-1] * 30, None), (batch, [5, 0, 3])):
        found, hosts = one.run(some, places=places)
        for outputs, host in zip(found, hosts, strict=True):
            assert_same_choices(outputs, host)
            assert len(outputs.draft_logits) == 0 or len(outputs.draft_logits[0]) == draft_size


def test_nothing_is_chosen_for_places_without_a_request(driver: SimulatedDriver) -> None:
    one = Pass(1000)
    found, hosts = one.run(different_requests(one), places=[5, 0, 3])
    assert len(found) == len(hosts) == 3
    for outputs, host in zip(found, hosts, strict=True):
        assert_same_choices(outputs, host)


def different_requests(one: Pass) -> list[Rows]:
    """Return rows of requests that want all there is."""
    vocab_size = one.vocab_size
    wanted: list[Wanted] = [
        ArgMax(),
        sampled(vocab_size, 1),
        WholeLogits(),
        sampled(vocab_size, 2, None, None, 0.1),
        sampled(vocab_size, 3, 20, 0.9),
        sampled(vocab_size, 4, None, 0.9),
        sampled(vocab_size, 5, 300),
    ]
    return [one.rows(what, tokens=1 + index % 5, drafts=index % 4) for index, what in enumerate(wanted)]


def test_what_is_fetched_does_not_grow_with_the_vocabulary(driver: SimulatedDriver) -> None:
    fetched = []
    for vocab_size in (2000, 150_000):
        one = Pass(vocab_size)
        batch = [one.rows(ArgMax()), one.rows(sampled(vocab_size, 1)), one.rows(sampled(vocab_size, 2, 50, 0.9))]
        before = driver.downloaded
        outputs, _ = one.run(batch)
        for found in outputs:
            for index in range(2):
                found.chosen(index)
            for row in range(3):
                found.draft(row)
        fetched.append(driver.downloaded - before)
    # Two rows of each kind, and three shortlists of each request.
    words = 2 * (answer_words(TOP_ROOM) + answer_words(16) + answer_words(best_room(50))) + 9 * answer_words(
        best_room(16)
    )
    assert fetched == [4 * words, 4 * words]


def test_whole_rows_are_fetched_one_by_one_when_they_are_asked_for(driver: SimulatedDriver) -> None:
    one = Pass(3000)
    (found,), (host,) = one.run([one.rows(WholeLogits(), shortlist=300)])
    assert driver.downloaded == 0
    np.testing.assert_array_equal(found.chosen(1), host.chosen(1))
    assert_alike(found.draft(2), host.draft(2))
    assert driver.downloaded == 2 * 4 * 3000
    for rows in (found.logits, found.draft_logits):
        with pytest.raises(IndexError):
            rows[len(rows)]


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_seen_without_the_row(driver: SimulatedDriver, odd: float) -> None:
    one = Pass(3000)
    wanted: list[Wanted] = [ArgMax(), sampled(3000, 1), sampled(3000, 2, 50), sampled(3000, 3, None, 0.9)]
    outputs, hosts = one.run([one.rows(what) for what in wanted], odd)
    before = driver.downloaded
    for found, host in zip(outputs, hosts, strict=True):
        np.testing.assert_array_equal(found.chosen(1).top, host.chosen(1).top)  # type: ignore[union-attr]
        assert found.draft(0) is host.draft(0) is None
    assert driver.downloaded == before


def test_memory_grows_with_the_rows_of_a_pass_and_what_is_too_small_is_freed(driver: SimulatedDriver) -> None:
    one = Pass(500)
    many = [one.rows(sampled(500, 1, 200), tokens=5, drafts=3) for _ in range(40)]
    assert len(many) * 9 > LEAST_JOBS
    for batch in (many[:1], many, many[:1]):
        for found, host in zip(*one.run(batch), strict=True):
            assert_same_choices(found, host)
    one.held.clear()
    # Jobs, results and what is between launches, once.
    assert len(driver._allocations) == 3
    assert max(map(len, driver._allocations.values())) > len(many) * 9 * JOB.itemsize


def test_kernels_of_earlier_releases_make_no_choices(driver: SimulatedDriver) -> None:
    Cuda()
    some = dict(list(KERNELS.items())[:2])
    assert ChooseLauncher.of(KernelBinaries("float16", 64, {80: some})) is None
    assert ChooseLauncher.of(KernelBinaries("float16", 64, {80: KERNELS}), CHOOSE_DRAFTS) is None
    with pytest.raises(ValueError, match=r"compiled for compute capabilities 9\.0, and this GPU has 8\.0"):
        ChooseLauncher.of(KernelBinaries("float16", 64, {90: KERNELS}))
