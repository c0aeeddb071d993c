"""The slots of running requests, and the prefixes kept for later ones, within the rows that the cache may have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from runtime.engines.protocol import Engine, Kept, Slot
from runtime.errors import InputError
from runtime.scheduling.job import Job
from runtime.scheduling.pool import CachePool, Footprint, in_blocks
from runtime.scheduling.prefixes import SHORTEST, Prefix, Prefixes, common

# Rows without limit.
MANY = 1 << 40


class Slots:
    """Slots of `engine` in a pool of `cache_rows` rows, up to `prefix_rows` of them for prompts that may come again;
    `footprint` as for `CachePool`.

    Where there is too little room, what is kept makes way.
    """

    def __init__(self, engine: Engine, cache_rows: int, prefix_rows: int, footprint: Footprint | None = None) -> None:
        self.pool = CachePool(cache_rows, footprint)
        self.prefixes = Prefixes()
        self._engine = engine
        self._prefix_rows = prefix_rows
        self._kept_rows = 0

    def check(self, running: Iterable[Job]) -> None:
        """Raise `AssertionError` unless the pool accounts for the slots of the `running` and for what is kept, and for
        nothing else.
        """
        slots = [job.slot for job in running if job.slot is not None]
        self.pool.check([*slots, *(kept.rows for kept in self.prefixes)])
        assert self._kept_rows == sum(kept.rows.length for kept in self.prefixes), "the rows of kept prefixes"

    def begin(self, tokens: Sequence[int], running: Iterable[Job]) -> Slot:
        """Return a new slot that has the rows of the longest known beginning of `tokens`."""
        slot = self._engine.new_slot()
        self.pool.admit(slot)
        source, length = self.longest_prefix(tokens, running)
        if source is not None and self.pool.reserve(slot, length):
            self._engine.copy(source, slot, length)
        return slot

    def longest_prefix(self, tokens: Sequence[int], running: Iterable[Job]) -> tuple[Slot | Kept | None, int]:
        """Return the rows that share the longest beginning with `tokens`, kept or in use, and its length. Those kept
        are the last to make way then.
        """
        if not self._prefix_rows:
            return None, 0
        kept, length = self.prefixes.longest(tokens)
        found: Slot | Kept | None = kept.rows if kept else None
        if kept:
            self.prefixes.use(kept)
        for job in running:
            assert job.slot is not None
            if job.slot.length > length:
                shared = min(common(job.tokens, tokens), job.slot.length)
                if shared >= SHORTEST and shared > length:
                    found, length = job.slot, shared
        return found, length

    def comes_soon(self, prompt: Sequence[int], there: int, running: Iterable[Job]) -> bool:
        """Return whether a running request is about to compute a longer beginning of `prompt` than the tokens that are
        `there`.
        """
        if not self._prefix_rows:
            return False
        for one in running:
            assert one.slot is not None
            if not one.decodes:
                shared = min(common(one.state.prompt, prompt), len(prompt) - 1)
                if shared - max(there, one.slot.length) >= SHORTEST:
                    return True
        return False

    def reserve(self, slot: Slot, rows: int) -> bool:
        """Have room for `rows` more rows of `slot`; return False where that takes somebody else's."""
        while not self.pool.reserve(slot, slot.length + rows):
            if not self.forget(1):
                return False
        return True

    def has_room(self, rows: int) -> bool:
        """Return whether there is room for one more slot of `rows` rows, once kept prefixes have made way."""
        while not self.pool.has_room(rows):
            if not self.forget(1):
                return False
        return True

    def forget(self, rows: int = MANY) -> bool:
        """Free kept prefixes of `rows` rows or more, or all; return whether there were any."""
        freed = False
        target = self.pool.free + rows
        while self.pool.free < target and (kept := self.prefixes.oldest()) is not None:
            self._drop(kept)
            freed = True
        return freed

    def retire(self, slot: Slot, tokens: Sequence[int]) -> None:
        """Free `slot`, which has the rows of `tokens`; keep them for others where that is asked for."""
        if SHORTEST <= len(tokens) <= self._prefix_rows:
            self._keep(tuple(tokens), slot)
        self.release(slot)

    def release(self, slot: Slot) -> None:
        """Free `slot` and its rows."""
        self.pool.close(slot)
        self._engine.release(slot)

    def _keep(self, tokens: tuple[int, ...], slot: Slot) -> None:
        """Keep the rows of `tokens`, which `slot` has, where there is memory for both."""
        for kept in self.prefixes.covered_by(tokens):
            self._drop(kept)
        rows = len(tokens)
        while self._kept_rows + rows > self._prefix_rows or self.pool.free < in_blocks(rows):
            if not self.forget(1):
                return
        try:
            copies = self._engine.keep(slot, rows)
        except (InputError, MemoryError):
            # There is less memory than was thought: what would have been of use is computed again.
            return
        self.pool.admit(copies, kept=True)
        self.pool.reserve(copies, rows)
        self.prefixes.add(Prefix(tokens, copies))
        self._kept_rows += rows

    def _drop(self, kept: Prefix) -> None:
        self._kept_rows -= kept.rows.length
        self.pool.close(kept.rows)
