"""Log learning rates, and momentum and weight decay on request, of all optimizers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.callbacks.callback import Callback

if TYPE_CHECKING:
    from torch.optim import Optimizer

    import lightning.pytorch as pl


class LearningRateMonitor(Callback):
    """Log the learning rate of every optimizer to the trainer's loggers, and into ``trainer.callback_metrics``.

    An optimizer's rate is logged under the ``name`` of its scheduler's configuration, or else as ``lr-`` and its class:
    ``lr-SGD``, then ``lr-SGD-1`` for a second one. With several parameter groups, or named ones, the group's ``name`` or
    its number follows: ``lr-Adam/pg1``, ``lr-Adam/backbone``.

    Args:
        logging_interval: ``"step"`` logs at the steps at which loggers get rows (see ``Trainer(log_every_n_steps=...)``),
            ``"epoch"`` at the start of each epoch, None where the scheduler's own interval says; an optimizer without a
            scheduler is then logged at both.
        log_momentum: log the momentum too, or the first beta, as ``lr-SGD-momentum``.
        log_weight_decay: log the weight decay too, as ``lr-SGD-weight_decay``.

    Attributes:
        lrs: all rates logged in this fit, by name.
        last_momentum_values: the momentum last logged, by name.
        last_weight_decay_values: the weight decay last logged, by name.

    Raises:
        MisconfigurationException: if ``logging_interval`` is none of these; at the start of training, if the trainer has
            no logger, or if two parameter groups of an optimizer have the same name.

    Example::

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
            return [optimizer], [{"scheduler": scheduler, "name": "learning_rate"}]

        trainer = Trainer(callbacks=LearningRateMonitor(logging_interval="step"))
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        super().__init__()
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfigurationException(f"`LearningRateMonitor(logging_interval={logging_interval!r})`: use 'step', 'epoch' or None.")
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float | None] = {}
        self.last_weight_decay_values: dict[str, float | None] = {}

    def on_train_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Name the optimizers, and refuse to go on where nothing could be logged."""
        if not trainer.loggers:
            raise MisconfigurationException(
                "`LearningRateMonitor` has nowhere to log to: the trainer has no logger. Remove the callback, or `Trainer(logger=False)`."
            )
        if self.log_momentum and not all({"momentum", "betas"} & optimizer.defaults.keys() for optimizer in trainer.optimizers):
            rank_zero_warn(
                "`LearningRateMonitor(log_momentum=True)`: an optimizer has neither `momentum` nor `betas`; its momentum is logged as 0.",
                category=RuntimeWarning,
            )
        names = [name for prefix, optimizer, _ in _monitored(trainer) for name in _group_names(prefix, optimizer)]
        self.lrs = {name: [] for name in names}
        self.last_momentum_values = {f"{name}-momentum": None for name in names}
        self.last_weight_decay_values = {f"{name}-weight_decay": None for name in names}

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Log the rates of this step, if loggers get a row now."""
        if self.logging_interval != "epoch" and trainer.log_due:
            self._log(trainer, "step")

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Log the rates with which the epoch starts."""
        if self.logging_interval != "step":
            self._log(trainer, "epoch")

    def _log(self, trainer: pl.Trainer, moment: str) -> None:
        row: dict[str, float] = {}
        for prefix, optimizer, interval in _monitored(trainer):
            if self.logging_interval is None and interval not in (None, moment):
                continue
            names = _group_names(prefix, optimizer)
            if prefix in self.lrs and prefix not in names:
                # A group was added since: what was the optimizer's only one goes on under its group's name.
                self.lrs[names[0]] = self.lrs.pop(prefix)
            for name, group in zip(names, optimizer.param_groups, strict=True):
                row.update(self._read(name, group))
        if not row:
            return
        trainer.add_callback_metrics(row)
        trainer.send_to_loggers(row, trainer.log_step)

    def _read(self, name: str, group: dict[str, Any]) -> dict[str, float]:
        row = {name: _number(group["lr"])}
        self.lrs.setdefault(name, []).append(row[name])
        if self.log_momentum:
            momentum = _number(group["betas"][0] if "betas" in group else group.get("momentum", 0))
            row[f"{name}-momentum"] = self.last_momentum_values[f"{name}-momentum"] = momentum
        if self.log_weight_decay:
            decay = _number(group.get("weight_decay", 0))
            row[f"{name}-weight_decay"] = self.last_weight_decay_values[f"{name}-weight_decay"] = decay
        return row


def _number(value: float | Tensor) -> float:
    """The value on the host: the rate of a capturable optimizer lives on the device."""
    return value.item() if isinstance(value, Tensor) else value


def _monitored(trainer: pl.Trainer) -> list[tuple[str, Optimizer, str | None]]:
    """A name, the optimizer and the interval for each scheduler, then the same for each optimizer without a scheduler."""
    configs = trainer.lr_scheduler_configs
    entries: list[tuple[str | None, Optimizer, str | None]] = [(c.name, c.scheduler.optimizer, c.interval) for c in configs]
    scheduled = [id(optimizer) for _, optimizer, _ in entries]
    entries += [(None, optimizer, None) for optimizer in trainer.optimizers if id(optimizer) not in scheduled]

    result: dict[str, tuple[str, Optimizer, str | None]] = {}
    for given, optimizer, interval in entries:
        name = base = given if given is not None else f"lr-{type(optimizer).__name__}"
        number = 0
        while name in result:
            number += 1
            name = f"{base}-{number}"
        result[name] = (name, optimizer, interval)
    return list(result.values())


def _group_names(prefix: str, optimizer: Optimizer) -> list[str]:
    """One name for each parameter group of the optimizer.

    Raises:
        MisconfigurationException: if two of them are the same.
    """
    groups = optimizer.param_groups
    if len(groups) == 1 and "name" not in groups[0]:
        return [prefix]
    names = [str(group.get("name", f"pg{number}")) for number, group in enumerate(groups, start=1)]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise MisconfigurationException(
            f"`LearningRateMonitor` cannot tell the parameter groups of {prefix} apart: the names {twice} stand for more than one. Give "
            "each group another `name`, or none."
        )
    return [f"{prefix}/{name}" for name in names]
