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
    """

    epoch: int = 0
    batch_idx: int = 0
    total_batches: int = 0
    global_step: int = 0
    stepped: int = 0
    next: Next = Next.BATCH

    def start_anew(self) -> None:
        """Move to the start of an epoch: of the current one if a failed run left it half-way, of the next if it was through."""
        if self.next is Next.EPOCH:
            self.epoch += 1
        self.batch_idx = 0
        self.next = Next.BATCH

    def state_dict(self) -> dict[str, Any]:
        """The cursor as plain data."""
        return {**asdict(self), "next": self.next.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Move to where :meth:`state_dict` was taken."""
        for name, value in state.items():
            setattr(self, name, Next(value) if name == "next" else value)
