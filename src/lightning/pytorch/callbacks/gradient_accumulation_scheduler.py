"""Change the number of accumulated batches from epoch to epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden

if TYPE_CHECKING:
    import lightning.pytorch as pl


class GradientAccumulationScheduler(Callback):
    """Accumulate gradients over a number of batches that depends on the epoch.

    Args:
        scheduling: from an epoch, counted from 0, to the number of batches that are accumulated from that epoch on. Before
            the first epoch given, every batch is an optimizer step.

    Raises:
        TypeError: if ``scheduling`` is empty or not a dict.
        MisconfigurationException: if an epoch is not an integer >= 0, or a number of batches not an integer >= 1.
        ValueError: at the start of training, if ``Trainer(accumulate_grad_batches=...)`` is set too.
        RuntimeError: at the start of training, with manual optimization.

    Example::

        >>> from lightning.pytorch.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
        >>> scheduler = GradientAccumulationScheduler({2: 4, 5: 8})
        >>> [scheduler.get_accumulate_grad_batches(epoch) for epoch in range(7)]
        [1, 1, 4, 4, 4, 8, 8]
    """

    def __init__(self, scheduling: dict[int, int]) -> None:
        super().__init__()
        if not isinstance(scheduling, dict) or not scheduling:
            raise TypeError(f"`scheduling={scheduling!r}`: a dict of at least one entry, from an epoch to a number of batches, is needed.")
        for epoch, factor in scheduling.items():
            if not isinstance(epoch, int) or epoch < 0:
                raise MisconfigurationException(f"`scheduling={scheduling!r}`: an epoch must be an integer >= 0, got {epoch!r}.")
            if not isinstance(factor, int) or factor < 1:
                raise MisconfigurationException(
                    f"`scheduling={scheduling!r}`: a number of batches must be an integer >= 1, got {factor!r}."
                )
        self.scheduling = {0: 1} | scheduling
        self.epochs = sorted(self.scheduling)
        # What this callback last set on a trainer, which a second fit must not take for the trainer's own argument.
        self._applied = 1

    def going_to_accumulate_grad_batches(self) -> bool:
        """Whether any epoch accumulates more than one batch."""
        return any(factor > 1 for factor in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """The number of batches per optimizer step in ``epoch``."""
        return self.scheduling[max(start for start in self.epochs if start <= epoch)]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work, then set the number for the epoch in which training starts."""
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                "`GradientAccumulationScheduler` needs automatic optimization, and the module has `automatic_optimization = False`. "
                "Remove the callback and accumulate in `training_step`, or switch to automatic optimization."
            )
        if trainer.accumulate_grad_batches not in (1, self._applied):
            raise ValueError(
                f"Both `Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches})` and `GradientAccumulationScheduler` say how "
                "many batches to accumulate. Remove one of them."
            )
        if self.going_to_accumulate_grad_batches():
            _warn_about_overrides(pl_module)
        # A run that resumes in the middle of an epoch does not come by `on_train_epoch_start`.
        self.on_train_epoch_start(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Set the number for the epoch that starts."""
        self._applied = self.get_accumulate_grad_batches(trainer.current_epoch)
        trainer.accumulate_grad_batches = self._applied


def _warn_about_overrides(pl_module: pl.LightningModule) -> None:
    overridden = [name for name in ("optimizer_step", "optimizer_zero_grad") if is_overridden(name, pl_module)]
    if overridden:
        rank_zero_warn(
            f"`{type(pl_module).__name__}` overrides {' and '.join(f'`{name}`' for name in overridden)}: with gradient accumulation these "
            "are called once per optimizer step, not once per batch."
        )
