"""Stop training when a metric no longer improves, crosses a threshold, or is no longer finite."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from enum import Enum
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.trainer.states import TrainerFn

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)


class EarlyStoppingReason(Enum):
    """Why :class:`EarlyStopping` ended the run. The values stand in checkpoints."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """Monitor a logged metric and stop training when it stops improving.

    The metric is read once per check, at the end of the training epoch or of the validation run. A decision to stop that
    the trainer does not follow, because ``min_epochs`` or ``min_steps`` is not reached, is taken back at the next check
    unless the metric still calls for it: a metric that has improved in the meantime does not end the run.

    In a run of several processes each of them decides by its own value, and all stop together as soon as one says so; log
    the metric with ``sync_dist=True`` to have one value, that of all data.

    Args:
        monitor: the key of the metric in ``trainer.callback_metrics``.
        min_delta: a change must be larger than this to count as an improvement. A negative one is a tolerance: a metric that
            got worse by less counts as improved.
        patience: how many checks in a row without improvement end the run. These are checks, not epochs: with
            ``check_val_every_n_epoch=2`` and a patience of 3, at least 6 epochs pass without improvement.
        verbose: log every improvement, and the reason for stopping.
        mode: ``"min"`` if smaller values are better, ``"max"`` if larger ones are.
        strict: raise if the metric was not logged, in any of the processes; otherwise warn and go on without a check.
        check_finite: stop as soon as the metric is NaN or infinite.
        stopping_threshold: stop as soon as the metric is better than this.
        divergence_threshold: stop as soon as the metric is worse than this.
        check_on_train_epoch_end: True checks at the end of training epochs, False at the end of validation runs. None
            chooses the former if validation runs once at the end of every epoch, and the latter otherwise.
        log_rank_zero_only: log the messages in the process of rank 0 only.

    Attributes:
        wait_count: checks in a row without improvement.
        best_score: the best value seen so far, a scalar tensor on the CPU.
        stopped_epoch: the epoch in which the run was stopped; 0 while no decision to stop stands.
        stopping_reason: an :class:`EarlyStoppingReason`.
        stopping_reason_message: the reason in words; None while no decision to stop stands.

    Raises:
        MisconfigurationException: if an argument is not one of the accepted ones.
        RuntimeError: at a check, if ``strict`` and the metric was not logged.

    Example::

        >>> from lightning.pytorch.callbacks.early_stopping import EarlyStopping
        >>> stopping = EarlyStopping("val_loss", min_delta=0.01, patience=5)
        >>> stopping.state_key
        "EarlyStopping{'monitor': 'val_loss', 'mode': 'min'}"
    """

    mode_dict: dict[str, Callable[[Tensor, Any], Tensor]] = {"min": torch.lt, "max": torch.gt}
    order_dict: dict[str, str] = {"min": "<", "max": ">"}

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(monitor, str):
            raise MisconfigurationException(f"`EarlyStopping(monitor={monitor!r})`: the key of a logged metric, a string, is needed.")
        if mode not in self.mode_dict:
            raise MisconfigurationException(
                f"`EarlyStopping(mode={mode!r})`: `mode` must be one of {', '.join(map(repr, self.mode_dict))}."
            )
        _require_number("min_delta", min_delta)
        _require_number("patience", patience)
        if patience < 0:
            raise MisconfigurationException(f"`EarlyStopping(patience={patience!r})`: the number of checks to wait must be 0 or more.")
        for name, value in (("stopping_threshold", stopping_threshold), ("divergence_threshold", divergence_threshold)):
            if value is not None:
                _require_number(name, value)

        self.monitor = monitor
        self.mode = mode
        # Signed so that `monitor_op(current - min_delta, best_score)` asks for an improvement by more than that.
        self.min_delta = min_delta if mode == "max" else -min_delta
        self.patience = patience
        self.verbose = verbose
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self.log_rank_zero_only = log_rank_zero_only

        self.wait_count = 0
        self.stopped_epoch = 0
        self._restored = False  # from a checkpoint, in a run that has not begun
        self.best_score = torch.tensor(torch.inf if mode == "min" else -torch.inf)
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self._check_on_train_epoch_end = bool(check_on_train_epoch_end)

    @property
    def monitor_op(self) -> Callable[[Tensor, Any], Tensor]:
        """``monitor_op(a, b)`` says whether ``a`` is better than ``b``."""
        return self.mode_dict[self.mode]

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint: several instances may watch different metrics."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides when to stop."""
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, of which the patience is a part."""
        if state_dict["patience"] != self.patience:
            rank_zero_warn(
                f"`EarlyStopping(monitor={self.monitor!r})` was created with `patience={self.patience}` and restored from a checkpoint "
                f"with `patience={state_dict['patience']}`, which is used. Set `patience` on the callback in `on_train_start` to change it."
            )
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.best_score = torch.as_tensor(state_dict["best_score"]).cpu()
        self.patience = state_dict["patience"]
        # Lightning's releases before 2.6 did not save the reason.
        self.stopping_reason = EarlyStoppingReason(state_dict.get("stopping_reason", EarlyStoppingReason.NOT_STOPPED.value))
        self.stopping_reason_message = state_dict.get("stopping_reason_message")
        self._restored = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose where to check, unless the caller has."""
        if self.check_on_train_epoch_end is None:
            self._check_on_train_epoch_end = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
        else:
            self._check_on_train_epoch_end = self.check_on_train_epoch_end

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop a resumed run that was stopped already: it may have been interrupted between the decision and its end."""
        restored, self._restored = self._restored, False
        if restored and self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            trainer.should_stop = True
            self._log_info(
                trainer,
                f"Early stopping on {self.monitor!r} had ended the run that is resumed: it ends here. To train on, leave the callback out.",
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check here, if this is the place."""
        if self._check_on_train_epoch_end and not self._should_skip_check(trainer):
            self._run_early_stopping_check(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check here, if this is the place."""
        if not self._check_on_train_epoch_end and not self._should_skip_check(trainer):
            self._run_early_stopping_check(trainer)

    def _should_skip_check(self, trainer: pl.Trainer) -> bool:
        return trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or bool(trainer.fast_dev_run)

    def _run_early_stopping_check(self, trainer: pl.Trainer) -> None:
        """Read the metric, decide, and tell the trainer. Each process decides by its own value, and all stop if any says so."""
        metrics, vote = trainer.callback_metrics, trainer.strategy.reduce_boolean_decision
        known = self.monitor in metrics
        if not vote(known):  # some process has no value to decide on
            self._report_missing(metrics)
            if not vote(known, all=False):
                return
        should_stop, message = False, None
        if known:
            # One read of the device; all that follows is arithmetic on the host.
            should_stop, message = self._evaluate_stopping_criteria(metrics[self.monitor].detach().cpu().squeeze())
        if vote(should_stop, all=False):
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            mine = self.stopping_reason if should_stop else EarlyStoppingReason.NOT_STOPPED
            self.stopping_reason = EarlyStoppingReason(int(trainer.strategy.reduce(torch.tensor(mine.value), reduce_op="max")))
            self.stopping_reason_message = message if should_stop else f"The metric {self.monitor} of another process called for it."
        else:
            # A run that goes on was not stopped, whatever an earlier check had decided.
            self.stopped_epoch = 0
            self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
            self.stopping_reason_message = None
        if message is not None and self.verbose:
            self._log_info(trainer, message)

    def _report_missing(self, metrics: Mapping[str, Tensor]) -> None:
        available = ", ".join(f"`{key}`" for key in metrics) or "none; log one with `self.log`"
        lacking = "has not been logged" if self.monitor not in metrics else "has been logged here, but not in every process"
        message = (
            f"`EarlyStopping` monitors the metric `{self.monitor}`, which {lacking}. Set `EarlyStopping(monitor=...)` to one "
            f"of the metrics that have been: {available}."
        )
        if self.strict:
            raise RuntimeError(message)
        rank_zero_warn(message, category=RuntimeWarning)

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        """Whether ``current``, a scalar on the CPU, calls for a stop, and a message to log."""
        value, worse = current.item(), self.order_dict["max" if self.mode == "min" else "min"]
        if self.check_finite and not torch.isfinite(current):
            return self._stop(
                EarlyStoppingReason.NON_FINITE_METRIC,
                f"Monitored metric {self.monitor} = {value} is not finite. Best value until now: {self.best_score.item():.3f}.",
            )

        improvement = None
        if self.monitor_op(current - self.min_delta, self.best_score):
            improvement = self._improvement_message(current)
            self.best_score = current
            self.wait_count = 0
        else:
            self.wait_count += 1

        # Numbers, not tensors: torch rounds them to the metric's type, so that 0.1 is not "less than" 0.1.
        if self.stopping_threshold is not None and self.monitor_op(current, float(self.stopping_threshold)):
            return self._stop(
                EarlyStoppingReason.STOPPING_THRESHOLD,
                f"Stopping threshold reached: {self.monitor} = {value} {self.order_dict[self.mode]} {self.stopping_threshold}.",
            )
        if self.divergence_threshold is not None and self.monitor_op(-current, -float(self.divergence_threshold)):
            return self._stop(
                EarlyStoppingReason.DIVERGENCE_THRESHOLD,
                f"Divergence threshold reached: {self.monitor} = {value} {worse} {self.divergence_threshold}.",
            )
        if improvement is None and self.wait_count >= self.patience:
            return self._stop(
                EarlyStoppingReason.PATIENCE_EXHAUSTED,
                f"Monitored metric {self.monitor} did not improve in the last {self.wait_count} records. "
                f"Best score: {self.best_score.item():.3f}.",
            )
        return False, improvement

    def _stop(self, reason: EarlyStoppingReason, message: str) -> tuple[bool, str]:
        self.stopping_reason = reason
        return True, f"{message} Signaling Trainer to stop."

    def _improvement_message(self, current: Tensor) -> str:
        """A sentence about the improvement from the best score until now to ``current``."""
        if not torch.isfinite(self.best_score):
            return f"Metric {self.monitor} improved. New best score: {current.item():.3f}"
        sign = 1 if self.mode == "max" else -1
        gain = f"improved by {sign * (current - self.best_score).item():.3f} >= min_delta = {sign * self.min_delta}"
        return f"Metric {self.monitor} {gain}. New best score: {current.item():.3f}"

    def _log_info(self, trainer: pl.Trainer, message: str) -> None:
        if self.log_rank_zero_only and trainer.global_rank != 0:
            return
        log.info(message if trainer.world_size <= 1 else f"[rank: {trainer.global_rank}] {message}")


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not (isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)):
        raise MisconfigurationException(f"`EarlyStopping({name}={value!r})`: a number is needed, got {type(value).__name__}.")
