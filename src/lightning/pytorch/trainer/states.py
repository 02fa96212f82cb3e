"""What the trainer is doing: the function called, the stage it is in, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.fabric.utilities.enums import LightningEnum


class TrainerStatus(LightningEnum):
    """How far the current call of the trainer got."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"

    @property
    def stopped(self) -> bool:
        """Whether the call is over, by its end or by an exception."""
        return self in (TrainerStatus.FINISHED, TrainerStatus.INTERRUPTED)


class TrainerFn(LightningEnum):
    """The entry point that runs; also what ``setup(stage)`` and ``teardown(stage)`` get."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


class RunningStage(LightningEnum):
    """The loop that runs inside an entry point: ``fit`` goes through sanity checking, training and validating."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    @property
    def evaluating(self) -> bool:
        """Whether the stage runs an evaluation loop on validation or test data."""
        return self in (RunningStage.VALIDATING, RunningStage.TESTING, RunningStage.SANITY_CHECKING)

    @property
    def dataloader_prefix(self) -> str:
        """The first part of the stage's loader hook: ``val`` for ``val_dataloader``."""
        return "val" if self in (RunningStage.VALIDATING, RunningStage.SANITY_CHECKING) else str(self.value)


@dataclass
class TrainerState:
    """The trainer's current status, function and stage.

    Args:
        status: how far the call got.
        fn: the entry point that was called, None before the first.
        stage: the loop that runs, None outside of one.
    """

    status: TrainerStatus = TrainerStatus.INITIALIZING
    fn: TrainerFn | None = None
    stage: RunningStage | None = None

    @property
    def finished(self) -> bool:
        """Whether the last call ran to its end."""
        return self.status is TrainerStatus.FINISHED

    @property
    def stopped(self) -> bool:
        """Whether the last call is over, by its end or by an exception."""
        return self.status.stopped
