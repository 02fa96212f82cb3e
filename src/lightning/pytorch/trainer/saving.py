"""How the checkpoints of a run are saved: in the background, again after a failure, and what is looked at before."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.trainer.states import TrainerStatus

if TYPE_CHECKING:
    from lightning.fabric.strategies.strategy import Strategy
    from lightning.pytorch.trainer.trainer import Trainer

log = logging.getLogger(__name__)


def equip(strategy: Strategy, in_background: bool, on_error: str) -> None:
    """Let the strategy save in the background, or try again what has failed.

    Args:
        strategy: its CheckpointIO goes on writing and reading.
        in_background: whether training goes on while a checkpoint is written.
        on_error: ``"raise"`` or ``"retry"``.

    Raises:
        MisconfigurationException: if the strategy writes checkpoints by other means.
    """
    if not in_background and on_error == "raise":
        return
    from lightning.fabric.checkpoint.async_io import AsyncCheckpointIO
    from lightning.fabric.checkpoint.background import BackgroundCheckpointIO, PatientCheckpointIO

    found: Any = strategy._checkpoint_io
    if in_background and not isinstance(found, AsyncCheckpointIO):
        found = AsyncCheckpointIO(found)
    if not isinstance(found, BackgroundCheckpointIO):
        found = PatientCheckpointIO(found)
    if on_error == "retry":
        found.retries = True
    if strategy._checkpoint_io is not found:
        strategy.checkpoint_io = found


def before_save(trainer: Trainer, weights_only: bool) -> None:
    """Warn of what is no number, unless somebody else has looked; a failing run hears of earlier failures to save here."""
    if trainer.state.status is TrainerStatus.INTERRUPTED:
        try:
            trainer.strategy.checkpoint_io.wait()
        except Exception:
            log.exception("A checkpoint could not be saved.")  # and must not keep this one from being saved
    from lightning.pytorch.utilities.finite import has_been_looked_at, nonfinite_part

    if has_been_looked_at():
        return
    name = nonfinite_part(trainer, weights_only)
    if name is not None:
        step = trainer.global_step
        rank_zero_warn(f"The checkpoint that is saved at global step {step} holds NaN or infinity in the {name}.")


def after_save(trainer: Trainer) -> None:
    """Where no training goes on, a checkpoint is on the disk when the call returns."""
    if trainer.state.status is not TrainerStatus.RUNNING:
        trainer.strategy.checkpoint_io.wait()
