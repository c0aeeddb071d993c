"""How many rows of prompts may run between two steps of decoding, by what passes have taken lately."""

from __future__ import annotations

# Weight of what was measured before against one more pass.
MEMORY = 0.8
# Rows of a chunk of a prompt, however slow: with fewer a prompt would hardly get on.
FEWEST = 16
# Rows to begin with, before any pass was measured.
FIRST = 32
# Of the time that others may wait, the share that a pass is planned for: no two passes take the same.
SHARE = 0.8


class Pace:
    """The time of passes, and what follows of it for prompts: no request waits longer than `max_stall_s` seconds."""

    def __init__(self, max_stall_s: float) -> None:
        self.max_stall_s = max_stall_s
        self._decode: float | None = None
        self._prompt_row: float | None = None

    def decoded(self, seconds: float) -> None:
        """Take note that a step of decoding took so long."""
        self._decode = seconds if self._decode is None else MEMORY * self._decode + (1 - MEMORY) * seconds

    def prompted(self, rows: int, seconds: float) -> None:
        """Take note that a pass of so many rows of prompts took so long."""
        if not rows:
            return
        # Small passes take about as long as larger ones: their rows are no measure.
        taken = seconds / max(rows, FEWEST)
        known = self._prompt_row
        self._prompt_row = taken if known is None else MEMORY * known + (1 - MEMORY) * taken

    def prompt_rows(self, most: int) -> int:
        """Return how many rows of prompts may run beside requests that decode."""
        if self._prompt_row is None:
            return min(FIRST, most)
        left = SHARE * self.max_stall_s - (self._decode or 0.0)
        return max(min(FEWEST, most), min(most, int(left / self._prompt_row)))
