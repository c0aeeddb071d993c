"""Choices of a pass, made on the GPU that its logits are on: what comes to the host does not grow with the vocabulary.

Each request says what it wants of its rows; that becomes a job for each row, the kernels answer all jobs of a pass,
whichever requests they are of, and one small block is fetched. A choice is then made of its answer, exactly as the host
makes it of the whole row. Where an answer does not suffice, that row alone is fetched.

The jobs follow the pass on its stream and are no part of a captured graph: how many there are, and how much is fetched,
differs between passes of the same shape, and a graph would have to answer for rows of no meaning too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plugins.choose_launch import ChooseBuffers, ChooseLauncher, scratch_bytes
from plugins.choosing import JOB
from runtime.drafting.drafts import DraftStep
from runtime.engines.buffers import FetchedRows
from runtime.engines.choice_jobs import Answers, Jobs
from runtime.engines.cuda import Cuda, DeviceMemory
from runtime.engines.layout import BatchInputs
from runtime.rows import HostOutputs, LogitRows, PickedRows, Rows
from runtime.sampling.choice import Choice, WholeLogits

# There is memory for so many jobs, and words of answers, from the beginning.
LEAST_JOBS, LEAST_WORDS = 64, 1 << 14


class DeviceChoices:
    """Makes the choices of an engine's passes, over rows of V = `vocab_size` logits. Draft logits have as many, or are
    rows of their own length, which `drafts` has a launcher for.
    """

    def __init__(
        self, cuda: Cuda, launcher: ChooseLauncher, vocab_size: int, drafts: tuple[ChooseLauncher, int] | None = None
    ) -> None:
        self._logits = _Chooser(cuda, launcher, vocab_size)
        # Rows of one length are answered together.
        self._drafts = self._logits if drafts is None else _Chooser(cuda, *drafts)

    def enqueue(
        self,
        batch: Sequence[Rows],
        laid_out: BatchInputs,
        logits: int,
        drafts: int,
        places: Sequence[int] | None = None,
    ) -> list[DeviceOutputs]:
        """Enqueue the choices of a batch's requests behind the pass, `laid_out`, that has its logits [B, M, V] and
        draft logits [B, sum R_k, V_d] at these device addresses; return their outputs.

        `places` are where they are among the B that were run, None where they are all of these in order. The outputs
        may be read once the stream is synchronised, until the next call.
        """
        row, draft_row = self._logits.row_bytes, self._drafts.row_bytes
        pseudo_count = sum(laid_out.sizes.pseudo_rows)
        jobs = Jobs()
        draft_jobs = jobs if self._drafts is self._logits else Jobs()
        asked = []
        for rows, place in zip(batch, range(len(laid_out.pseudo)) if places is None else places, strict=True):
            count, pseudo = len(rows.logit_rows), laid_out.pseudo[place]
            first = logits + place * laid_out.logit_count * row
            first_draft = drafts + place * pseudo_count * draft_row
            whole = HostOutputs(
                rows,
                self._logits.whole_rows(first, count),
                PickedRows(self._drafts.whole_rows(first_draft, pseudo_count), pseudo),
            )
            chosen = jobs.choose(rows, first + row * np.arange(count, dtype=np.int64))
            asked.append((whole, chosen, draft_jobs.shortlist(rows, first_draft + draft_row * pseudo)))
        answers = self._logits.answer(jobs)
        shortlists = answers if draft_jobs is jobs else self._drafts.answer(draft_jobs)
        return [DeviceOutputs(*one, answers, shortlists) for one in asked]


class _Chooser:
    """Answers jobs on rows of V = `vocab_size` logits."""

    def __init__(self, cuda: Cuda, launcher: ChooseLauncher, vocab_size: int) -> None:
        self._cuda = cuda
        self._launch = launcher
        self._vocab_size = vocab_size
        self._whole_row = cuda.pinned(4 * vocab_size)
        self._memory = _Memory.of(cuda, vocab_size, LEAST_JOBS, LEAST_WORDS)

    @property
    def row_bytes(self) -> int:
        """The bytes of a row."""
        return 4 * self._vocab_size

    def whole_rows(self, start: int, count: int) -> FetchedRows:
        """Return so many rows from a device address on."""
        return FetchedRows(self._cuda, self._whole_row, start, count)

    def answer(self, jobs: Jobs) -> NDArray[np.int32]:
        """Enqueue the jobs and the copy of their answers to the host; return where these come to."""
        if jobs.count > self._memory.most_jobs or jobs.words > self._memory.most_words:
            self._memory = self._memory.larger(self._cuda, self._vocab_size, jobs)
        memory = self._memory
        if jobs.count:
            written = memory.jobs_host[: jobs.count * JOB.itemsize]
            written.view(JOB)[:] = np.concatenate(jobs.tables)
            self._cuda.upload(memory.jobs.address, written)
            buffers = ChooseBuffers(memory.jobs.address, memory.results.address, memory.scratch.address)
            self._launch(buffers, jobs.count, self._vocab_size, self._cuda.stream)
            self._cuda.download(memory.results_host, memory.results.address, 4 * jobs.words)
        return memory.results_host.view(np.int32)


@dataclass(frozen=True)
class DeviceOutputs:
    """Outputs whose choices were made on the GPU, where `chosen_at` says where in the `answers` they are, and
    `shortlists_at` where in the `shortlists`; and `whole` ones, for all else. See `Outputs`.
    """

    whole: HostOutputs
    chosen_at: Answers | None
    shortlists_at: Answers | None
    answers: NDArray[np.int32]
    shortlists: NDArray[np.int32]

    @property
    def rows(self) -> Rows:
        """See `Outputs.rows`."""
        return self.whole.rows

    @property
    def logits(self) -> LogitRows:
        """See `Outputs.logits`: a row is fetched when it is asked for."""
        return self.whole.logits

    @property
    def draft_logits(self) -> LogitRows:
        """See `Outputs.draft_logits`: a row is fetched when it is asked for."""
        return self.whole.draft_logits

    def chosen(self, index: int) -> Choice:
        """See `Outputs.chosen`."""
        rows = self.rows
        if self.chosen_at is not None and not isinstance(rows.wanted, WholeLogits):
            position = int(rows.position_ids[rows.logit_rows[index]]) + 1
            found = self.chosen_at.of(index, self.answers).chosen(rows.wanted, position)
            if found is not None:
                return found
        return self.whole.chosen(index)

    def draft(self, row: int) -> DraftStep | None:
        """See `Outputs.draft`."""
        if self.shortlists_at is not None:
            answer = self.shortlists_at.of(row, self.shortlists)
            if not math.isfinite(answer.top):
                return None
            found = answer.draft(self.rows.shortlist)
            if found is not None:
                return found
        return self.whole.draft(row)


@dataclass(frozen=True)
class _Memory:
    """Memory for jobs and their answers, on the host and on the device, and for what is between launches."""

    most_jobs: int
    most_words: int
    jobs_host: NDArray[np.uint8]
    results_host: NDArray[np.uint8]
    jobs: DeviceMemory
    results: DeviceMemory
    scratch: DeviceMemory

    @classmethod
    def of(cls, cuda: Cuda, vocab_size: int, jobs: int, words: int) -> _Memory:
        """Return memory for so many jobs on rows of V logits, and words of answers."""
        return cls(
            jobs,
            words,
            cuda.pinned(jobs * JOB.itemsize),
            cuda.pinned(4 * words),
            cuda.allocate(jobs * JOB.itemsize),
            cuda.allocate(4 * words),
            cuda.allocate(scratch_bytes(jobs, vocab_size)),
        )

    def larger(self, cuda: Cuda, vocab_size: int, jobs: Jobs) -> _Memory:
        """Return memory for `jobs` too: at least twice as much of what there is too little of."""
        count, words = (
            least if wanted <= least else max(2 * least, wanted)
            for least, wanted in ((self.most_jobs, jobs.count), (self.most_words, jobs.words))
        )
        return _Memory.of(cuda, vocab_size, count, words)
