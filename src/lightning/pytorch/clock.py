"""Time limits that all processes of a run reach at the same step, though each has a clock of its own."""

from __future__ import annotations

import time
from typing import Any

LOOK_EVERY = 1.0  # seconds between two looks of several processes at the clock
MOST_SKIPPED = 1000  # steps between two looks


class SharedClock:
    """Rank 0's clock, which several processes look at together.

    They don't at each step, for that would be a collective each time: after a look they plan how many steps pass until the next, by the
    time that each has taken, so that it comes within a second and no later than after a quarter of what is left.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Look at the next step."""
        self._looked_at: float | None = None
        self._planned = self._skip = 0

    def is_over(self, strategy: Any, left: float, again: float = 0.0) -> bool:
        """Whether a time is over on rank 0; to be called once for each step, in all processes.

        Args:
            strategy: of the run.
            left: seconds until then by this process's clock.
            again: seconds until the next one, if it is over.
        """
        if strategy.world_size == 1:
            return left <= 0
        if self._skip:
            self._skip -= 1
            return False
        now, plan = time.monotonic(), 0
        if self._looked_at is not None and now > self._looked_at:
            per_step = (now - self._looked_at) / (self._planned + 1)
            plan = max(0, min(MOST_SKIPPED, int(min(LOOK_EVERY, (left if left > 0 else again) / 4) / per_step)))
        over, self._planned = strategy.broadcast((left <= 0, plan))
        self._looked_at, self._skip = now, self._planned
        return bool(over)
