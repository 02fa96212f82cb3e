"""When learning rate schedulers step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.dispatch import no_op
from lightning.pytorch.loops import bind
from lightning.pytorch.utilities.types import LRSchedulerConfig

if TYPE_CHECKING:
    from lightning.pytorch.loops.fit import FitLoop
    from lightning.pytorch.trainer.trainer import Trainer


class Schedulers:
    """The schedulers of automatic optimization; manual optimization steps its own.

    Attributes:
        step_batch: call it after each optimizer step.
        watch_steps: whether some wait for a plateau of a step's metrics.
        step_epoch: call it after the last batch of an epoch.

    Schedulers that wait for a plateau go through :meth:`step_plateau` instead, when their metric is there.
    """

    def __init__(self, trainer: Trainer, loop: FitLoop) -> None:
        module = trainer.lightning_module
        self.trainer, self.loop = trainer, loop
        configs = trainer.lr_scheduler_configs if module.automatic_optimization else []
        self.override = bind.of_user(trainer, "lr_scheduler_step")
        self.plateau = [config for config in configs if config.reduce_on_plateau]
        self.watch_steps = any(config.interval == "step" for config in self.plateau)
        self.step_batch = self._stepper([c for c in configs if c.interval == "step" and not c.reduce_on_plateau])
        self.step_epoch = self._stepper([c for c in configs if c.interval == "epoch" and not c.reduce_on_plateau])

    def _stepper(self, configs: list[LRSchedulerConfig]) -> Callable[[], None]:
        if not configs:
            return no_op

        def step() -> None:
            for config in configs:
                if self._is_due(config):
                    self._step(config, None)

        return step

    def _is_due(self, config: LRSchedulerConfig) -> bool:
        done = self.loop.progress.stepped if config.interval == "step" else self.loop.progress.epoch + 1
        return done % config.frequency == 0

    def _step(self, config: LRSchedulerConfig, metric: Any) -> None:
        if self.override is not None:
            self.override(config.scheduler, metric)
        elif metric is None:
            config.scheduler.step()  # type: ignore[call-arg]
        else:
            config.scheduler.step(metric)

    def step_plateau(self, interval: str) -> None:
        """Step the schedulers that watch a metric.

        Raises:
            MisconfigurationException: if the metric of a strict scheduler was never logged.
        """
        for config in self.plateau:
            if config.interval != interval or not self._is_due(config):
                continue
            metrics = self.trainer.callback_metrics
            assert config.monitor is not None
            if config.monitor not in metrics:
                message = (
                    f"The scheduler {type(config.scheduler).__name__} watches {config.monitor!r}, which was not logged. "
                    f"Logged are {sorted(metrics)}. Log it with `self.log({config.monitor!r}, ...)`, or change the scheduler's 'monitor'."
                )
                if config.strict:
                    raise MisconfigurationException(message)
                rank_zero_warn(message, category=RuntimeWarning)
                continue
            self._step(config, metrics[config.monitor])
