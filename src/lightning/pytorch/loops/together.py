"""What one process can't do alone: ending an epoch before its last batch."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from lightning.fabric.collectives import SHOWN_RANKS

if TYPE_CHECKING:
    from lightning.fabric.side_channel import SideChannel
    from lightning.pytorch.trainer.trainer import Trainer

PATIENCE = 60.0  # seconds in which the other processes have to come to the same decision
LOOK = 0.1  # seconds between two looks whether they have


def end_epoch_together(trainer: Trainer) -> None:
    """Wait until the hooks of all processes have ended the epoch at this batch, which they tell each other without a collective.

    A process that went on would wait in its next step for the gradients of those that don't, or mix them with what these do next.

    Raises:
        RuntimeError: if others don't end it here.
    """
    channel: SideChannel | None = getattr(trainer.strategy, "side_channel", None)
    if channel is None:
        return
    progress = trainer.fit_loop.progress
    key = f"epoch-ended/{progress.epoch}/{progress.batch_idx}"
    missing = set(range(channel.world_size))
    all_here = threading.Event()

    def look() -> float | None:
        missing.difference_update([rank for rank in missing if channel.get(f"{key}/{rank}") is not None])
        if not missing:
            all_here.set()
        return LOOK if missing and channel.is_open else None

    channel.send(f"{key}/{channel.rank}", True)
    channel.every(look, 0)
    deadline = time.monotonic() + PATIENCE
    while not all_here.wait(LOOK):  # in short turns, so that an error from the channel's thread can be raised here
        if time.monotonic() > deadline or not channel.is_open:
            others = ", ".join(map(str, sorted(missing)[:SHOWN_RANKS]))
            raise RuntimeError(
                f"`on_train_batch_start` returned -1 for batch {progress.batch_idx} of epoch {progress.epoch} on rank {channel.rank}, and "
                f"within {PATIENCE:g} s not on rank {others}. An epoch ends at one batch in all processes: decide by what all of them "
                "know, such as by `self.trainer.strategy.reduce_boolean_decision(...)` every so many batches."
            )
