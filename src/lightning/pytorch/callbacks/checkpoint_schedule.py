"""When a checkpoint falls due: by optimizer steps, by time, or by epochs."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.clock import SharedClock

if TYPE_CHECKING:
    import lightning.pytorch as pl


def refuse(argument: str, given: object, accepted: str) -> MisconfigurationException:
    """The error for an argument of ModelCheckpoint that cannot be used."""
    return MisconfigurationException(f"`ModelCheckpoint({argument}={given!r})` is not possible; accepted: {accepted}.")


class Schedule:
    """The moments at which a ModelCheckpoint saves.

    Args:
        every_n_train_steps: save when that many optimizer steps, or a multiple, were taken; None and 0: not by steps.
        train_time_interval: save after the first batch after this time; None: not by time.
        every_n_epochs: save at every n-th epoch; 0: not by epochs; None: 1 if neither steps nor time are given, else 0.
        by_train_epochs: whether an epoch is over at the end of training (True) or of validation (False); None: decided by the trainer's
            settings.

    Raises:
        MisconfigurationException: if an argument cannot be used, or more than one of the first three is.
    """

    def __init__(
        self,
        every_n_train_steps: int | None,
        train_time_interval: timedelta | None,
        every_n_epochs: int | None,
        by_train_epochs: bool | None = None,
    ) -> None:
        for argument, given in (("every_n_train_steps", every_n_train_steps), ("every_n_epochs", every_n_epochs)):
            if given is not None and (not isinstance(given, int) or given < 0):
                raise refuse(argument, given, "a whole number from 0, or None")
        interval = train_time_interval
        if interval is not None and (not isinstance(interval, timedelta) or interval < timedelta(0)):
            raise refuse("train_time_interval", interval, "a `datetime.timedelta` from 0, or None")
        if bool(every_n_train_steps) + bool(every_n_epochs) + (interval is not None) > 1:
            raise MisconfigurationException(
                f"`ModelCheckpoint(every_n_train_steps={every_n_train_steps}, every_n_epochs={every_n_epochs}, "
                f"train_time_interval={interval})` gives more than one of three arguments that exclude each other; use a callback for each."
            )
        self.steps = every_n_train_steps or 0
        self.interval = interval
        by_default = 1 if every_n_train_steps is None and interval is None else 0
        self.epochs = by_default if every_n_epochs is None else every_n_epochs
        self.by_train_epochs = by_train_epochs
        self.within_epochs = self.steps > 0 or interval is not None
        self.restart(global_step=0)

    def restart(self, global_step: int) -> None:
        """Begin a run that starts at ``global_step``, where nothing is due yet."""
        self._step = global_step
        self._time = time.monotonic()
        self._clock = SharedClock()

    def batch_due(self, trainer: pl.Trainer) -> bool:
        """Whether steps or time say so after this batch; once for each global step, whatever the number of batches it takes."""
        step = trainer.global_step
        if step == self._step:
            return False
        due = self.steps > 0 and step % self.steps == 0
        if self.interval is not None:
            self._step = step
            every = self.interval.total_seconds()
            due = self._clock.is_over(trainer.strategy, every - (time.monotonic() - self._time), every)
            if due:
                self._time = time.monotonic()
        if due:
            self._step = step
        return due

    def epoch_due(self, trainer: pl.Trainer) -> bool:
        """Whether the current epoch is an n-th one."""
        return self.epochs > 0 and (trainer.current_epoch + 1) % self.epochs == 0

    def at_train_epoch_end(self, trainer: pl.Trainer) -> bool:
        """Whether the end of an epoch is that of training: if asked for, or if validation does not run exactly once at each."""
        if self.by_train_epochs is not None:
            return self.by_train_epochs
        if not trainer.enable_validation:
            return True
        if trainer.check_val_every_n_epoch != 1:
            return False
        batches = trainer.num_val_batches
        return trainer.val_check_interval == 1.0 or not (sum(batches) if isinstance(batches, (list, tuple)) else batches)
