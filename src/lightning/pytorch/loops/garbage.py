"""Python's garbage collection on a schedule, instead of in the middle of a step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.loops.fit import FitLoop


class GarbageSchedule:
    """Switches automatic collection off while training runs, and collects between two batches.

    Python collects whenever so many objects were made, which takes milliseconds where there are many, in the middle of some step; of
    several processes each does so at another step, and all wait for it. What exists when training begins, such as modules and imports,
    is left out of the collections, which makes them cheap (:func:`gc.freeze`).

    Args:
        interval: batches from one collection to the next.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.left = 0  # batches until the next collection
        self.running = self.was_enabled = False

    def wrap(self, loop: FitLoop) -> None:
        """Collect where a batch is about to be moved to the device: the step before it is over."""
        loop.prepare = self.before(loop.prepare)

    def before(self, prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``prepare``, with a collection before it where one is due."""

        def collecting(batch: Any) -> Any:
            if self.left == 0:
                self.collect()
            self.left -= 1
            return prepare(batch)

        return collecting

    def collect(self) -> None:
        """Collect; the first time, take over from Python."""
        gc.collect()
        if not self.running:
            self.running, self.was_enabled = True, gc.isenabled()
            gc.disable()
            gc.freeze()
        self.left = self.interval

    def finish(self) -> None:
        """Leave it to Python again."""
        if not self.running:
            return
        self.running, self.left = False, 0
        gc.unfreeze()
        if self.was_enabled:
            gc.enable()
