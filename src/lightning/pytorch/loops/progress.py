"""The cursor of a run: what runs next. It is what a checkpoint holds of the loop."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class Next(str, Enum):
    """What runs next: a batch, the validation that is due after it, the end of the epoch, or another epoch."""

    BATCH = "batch"
    VALIDATE = "validate"
    EPOCH_END = "epoch_end"
    EPOCH = "epoch"


@dataclass(slots=True)
class FitProgress:
    """Where a fit is.

    Args:
        epoch: the current epoch, from 0.
        batch_idx: the next batch of this epoch.
        total_batches: batches taken in all epochs.
        global_step: optimizer steps taken; with several optimizers, by all of them.
        stepped: batches after which an optimizer stepped; the x value of loggers counts these.
        next: what runs next.
        is_last: whether the batch taken last is the last of its epoch.
        updates: whether that batch ends an accumulation window, so that an optimizer steps.
        ending: whether there is still to do what follows the hooks of a batch's end, or an epoch's: rows for the loggers, and steps of
            schedulers that watch a metric.
        stopping: whether a bound or a stop has ended the epoch in the middle, and the hooks of its end are called.
        cut_off: the position in the epoch before, where that was ended in the middle; :meth:`position` is then there.
    """

    epoch: int = 0
    batch_idx: int = 0
    total_batches: int = 0
    global_step: int = 0
    stepped: int = 0
    next: Next = Next.BATCH
    is_last: bool = False
    updates: bool = False
    ending: bool = False
    cut_off: dict[str, Any] | None = None
    stopping: bool = False

    def next_epoch(self) -> None:
        """Move to the next epoch. Of one that a bound or a stop ended in the middle, the position is kept."""
        self.stopping = False
        self.cut_off = self.position() if self.next is Next.BATCH else None
        self.epoch += 1
        self.batch_idx = 0
        self.next = Next.BATCH
        self.ending = False

    def position(self) -> dict[str, Any]:
        """What a checkpoint holds: where a resumed run goes on."""
        state = self.state_dict()
        cut_off = state.pop("cut_off")
        return state if cut_off is None else cut_off

    def start_anew(self) -> None:
        """Move to the start of an epoch: of the current one if a failed run left it half-way, of the next if it was through."""
        if self.next is Next.EPOCH:
            self.epoch += 1
        self.batch_idx = 0
        self.next = Next.BATCH
        self.ending = self.stopping = False
        self.cut_off = None

    def state_dict(self) -> dict[str, Any]:
        """The cursor as plain data."""
        return {**asdict(self), "next": self.next.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Move to where :meth:`state_dict`, or :meth:`position`, was taken."""
        self.cut_off = None
        for name, value in state.items():
            setattr(self, name, Next(value) if name == "next" else value)
