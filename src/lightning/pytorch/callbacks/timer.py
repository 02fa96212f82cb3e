"""Measure how long the stages take, and end training when its time is up."""

from __future__ import annotations

import logging
import re
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.enums import LightningEnum
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.clock import SharedClock
from lightning.pytorch.trainer.states import RunningStage

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)


class Interval(LightningEnum):
    """After what :class:`Timer` looks at the clock."""

    step = "step"
    epoch = "epoch"


class Timer(Callback):
    """Measure the time spent in training, validation, testing and prediction, and stop training when ``duration`` is over.

    The time spent training is part of the checkpoint, so that a run that is interrupted and resumed has its duration as a
    whole. What is running when the time is up, a step or an epoch, is completed.

    In a run of several processes the clock of rank 0 counts for all. They ask for it about once a second, not after each step.

    Args:
        duration: how long training may take: a string ``"DD:HH:MM:SS"``, a :class:`datetime.timedelta`, or a dict of the
            keywords of one. None only measures.
        interval: look at the clock after every ``"step"`` or every ``"epoch"`` of training.
        verbose: log a message when the time is up.

    Raises:
        MisconfigurationException: if ``duration`` or ``interval`` is not of that form.

    Example::

        >>> from datetime import timedelta
        >>> from lightning.pytorch.callbacks.timer import Timer
        >>> Timer("00:12:00:00").time_remaining()
        43200.0
        >>> Timer(timedelta(weeks=1), interval="epoch").time_elapsed()
        0.0
    """

    def __init__(
        self,
        duration: str | timedelta | dict[str, int] | None = None,
        interval: str = Interval.step,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(interval, str) or interval.lower() not in (Interval.step.value, Interval.epoch.value):
            raise MisconfigurationException(f"`Timer(interval={interval!r})`: choose 'step' or 'epoch'.")
        self._duration = _seconds(duration)
        self._interval = Interval(interval.lower())
        self._verbose = verbose
        self._start_time: dict[RunningStage, float] = {}
        self._end_time: dict[RunningStage, float] = {}
        # Seconds spent training before the checkpoint from which this run resumed.
        self._offset = 0.0
        self._told = False
        self._clock = SharedClock()

    def start_time(self, stage: str = RunningStage.TRAINING) -> float | None:
        """When ``stage`` last began, in seconds of :func:`time.monotonic`; None before that."""
        return self._start_time.get(RunningStage(stage))

    def end_time(self, stage: str = RunningStage.TRAINING) -> float | None:
        """When ``stage`` last ended, in seconds of :func:`time.monotonic`; None before that and while it runs."""
        return self._end_time.get(RunningStage(stage))

    def time_elapsed(self, stage: str = RunningStage.TRAINING) -> float:
        """Seconds spent in the last run of ``stage``; of training, those before a resume included."""
        stage = RunningStage(stage)
        offset = self._offset if stage is RunningStage.TRAINING else 0.0
        start = self._start_time.get(stage)
        if start is None:
            return offset
        return self._end_time.get(stage, time.monotonic()) - start + offset

    def time_remaining(self, stage: str = RunningStage.TRAINING) -> float | None:
        """The duration less :meth:`time_elapsed`, in seconds, negative when the time is over; None without a duration."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    def on_fit_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """A run that resumes with its time used up ends before its first step."""
        self._told = False
        self._clock.restart()
        if self._duration is not None:
            self._check_time_remaining(trainer)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(RunningStage.SANITY_CHECKING)

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(RunningStage.SANITY_CHECKING)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(RunningStage.TRAINING)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(RunningStage.TRAINING)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._start(RunningStage.VALIDATING)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._end(RunningStage.VALIDATING)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(RunningStage.TESTING)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(RunningStage.TESTING)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(RunningStage.PREDICTING)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(RunningStage.PREDICTING)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """An interrupted stage has ended: what the user does until the next run is not training time."""
        for stage in self._start_time.keys() - self._end_time.keys():
            self._end(stage)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop here if the time is up and the interval is a step."""
        if self._duration is not None and self._interval is Interval.step:
            self._check_time_remaining(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop here if the time is up and the interval is an epoch."""
        if self._duration is not None and self._interval is Interval.epoch:
            self._check_time_remaining(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The seconds spent in each stage."""
        return {"time_elapsed": {stage.value: self.time_elapsed(stage) for stage in RunningStage}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count the training time of the saved run as this run's."""
        elapsed = state_dict.get("time_elapsed", {})
        self._offset = elapsed.get(RunningStage.TRAINING.value, 0.0)

    def _start(self, stage: RunningStage) -> None:
        self._start_time[stage] = time.monotonic()
        self._end_time.pop(stage, None)

    def _end(self, stage: RunningStage) -> None:
        self._end_time[stage] = time.monotonic()

    def _check_time_remaining(self, trainer: pl.Trainer) -> None:
        left = self.time_remaining()
        assert left is not None
        if not self._clock.is_over(trainer.strategy, left):
            return
        trainer.should_stop = True
        if self._verbose and not self._told and trainer.is_global_zero:
            self._told = True  # until `min_epochs` is reached, every further check would say it again
            log.info(f"Time limit reached. Elapsed time is {timedelta(seconds=int(self.time_elapsed()))}. Signaling Trainer to stop.")


def _seconds(duration: object) -> float | None:
    if isinstance(duration, str):
        match = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", duration.strip())
        if match is None:
            raise MisconfigurationException(
                f"`Timer(duration={duration!r})` is not of the form 'DD:HH:MM:SS': days, hours, minutes and seconds, of two digits each."
            )
        days, hours, minutes, seconds = map(int, match.groups())
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()
    if isinstance(duration, dict):
        try:
            return timedelta(**duration).total_seconds()
        except TypeError as error:
            raise TypeError(
                f"`Timer(duration={duration!r})`: a dict holds keywords of `datetime.timedelta` (weeks, days, hours, minutes, seconds, "
                f"milliseconds, microseconds) and numbers."
            ) from error
    if isinstance(duration, timedelta):
        return duration.total_seconds()
    if duration is None:
        return None
    raise MisconfigurationException(
        f"`Timer(duration={duration!r})`: a string 'DD:HH:MM:SS', a `datetime.timedelta`, a dict of its keywords or None is accepted, "
        f"not {type(duration).__name__}."
    )
