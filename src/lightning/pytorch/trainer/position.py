"""Where a run is, as the watchdog asks for it from a thread of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lightning.pytorch.trainer.trainer import Trainer


class Position(NamedTuple):
    """A place in a run; a later one is greater.

    Args:
        batches: of any kind that were begun.
        stage: what they are for.
        epoch: of training.
        batch: the index of the current batch in its loader.
    """

    batches: int
    stage: str
    epoch: int
    batch: int


def position_of(trainer: Trainer) -> Position | None:
    """Read what the loops count anyway; None outside of loops, where hooks may take as long as they like while they work."""
    stage = trainer.state.stage
    if trainer._metrics.entries is None or stage is None:
        return None
    fit = trainer.fit_loop.progress
    loop = trainer.test_loop if stage == "test" else trainer.validate_loop if stage.evaluating else None
    return Position(trainer._metrics.serial, stage.value, fit.epoch, fit.batch_idx if loop is None else loop.batch_idx)
