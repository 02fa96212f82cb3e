"""Optimizers as the trainer sees them: the wrapped optimizer, and what ``configure_optimizers`` may return."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Union

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig

if TYPE_CHECKING:
    from lightning.pytorch.core.module import LightningModule


def do_nothing_closure() -> None:
    """The closure of a manual step: everything has been done before it."""
    return


class LightningOptimizer:
    """An optimizer whose ``step`` goes through precision and strategy, and is counted.

    It shares the wrapped optimizer's attributes and is an instance of its class, so it can stand wherever that one can.

    Args:
        optimizer: the optimizer to wrap.
        step_through: ``f(optimizer, closure, **kwargs)``, which steps it; the trainer binds it.
        module: the module that it trains, for :meth:`toggle_model`.
    """

    def __init__(
        self, optimizer: Optimizer, step_through: Callable[..., Any] | None = None, module: LightningModule | None = None
    ) -> None:
        # Nothing is copied: param_groups and state are looked up in the wrapped optimizer, which may replace them.
        self.__class__ = type("Lightning" + type(optimizer).__name__, (type(self), type(optimizer)), {})
        self._optimizer = optimizer
        self._step_through = step_through
        self._module = module

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Take one optimizer step.

        Args:
            closure: evaluates the model anew and returns the loss; in automatic optimization the trainer passes it.
            **kwargs: passed to the wrapped optimizer's ``step``.

        Raises:
            MisconfigurationException: if ``closure`` cannot be called.
        """
        if closure is None:
            closure = do_nothing_closure
        elif not callable(closure):
            raise MisconfigurationException(f"`optimizer.step(closure)` got {closure!r}; a function without arguments is needed.")
        if self._step_through is None:
            return self._optimizer.step(closure, **kwargs)
        return self._step_through(self._optimizer, closure, **kwargs)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Generator[None, None, None]:
        """A context in which only this optimizer's parameters require gradients.

        Args:
            sync_grad: whether gradients are reduced over processes here; False while accumulating by hand.
        """
        assert self._module is not None
        strategy = self._module.trainer.strategy
        with nullcontext() if sync_grad else strategy.no_backward_sync():
            with self._module.toggled_optimizer(self):
                yield


Configured = tuple[list[Optimizer], list[LRSchedulerConfig]]

ACCEPTED = (
    "an optimizer; a list or tuple of optimizers; two lists, of optimizers and of schedulers; a dict with the key 'optimizer' "
    "and optionally 'lr_scheduler'; a list of such dicts; or None"
)


def configure_optimizers(module: LightningModule) -> Configured:
    """Call the module's ``configure_optimizers`` and bring what it returns into one form.

    Returns:
        the optimizers, and the schedulers with their settings.

    Raises:
        MisconfigurationException: for a return value or a scheduler setting that is not accepted.
    """
    returned: Any = module.configure_optimizers()
    if returned is None:
        rank_zero_warn(
            "`configure_optimizers` returned None: this fit will train nothing, since there is no optimizer.",
        )
        return [NoOptimizer()], []
    optimizers, schedulers, monitor = _take_apart(returned)
    configs = [_scheduler_config(scheduler, monitor) for scheduler in schedulers]
    _check_schedulers(configs, optimizers, module)
    return optimizers, configs


def _take_apart(returned: Any) -> tuple[list[Optimizer], list[Any], str | None]:
    if isinstance(returned, Optimizer):
        return [returned], [], None
    if isinstance(returned, Mapping):
        optimizer, scheduler, monitor = _from_dict(returned)
        return [optimizer], scheduler, monitor
    if isinstance(returned, (list, tuple)):
        if len(returned) == 2 and isinstance(returned[0], (list, tuple)) and all(isinstance(o, Optimizer) for o in returned[0]):
            schedulers = returned[1] if isinstance(returned[1], (list, tuple)) else [returned[1]]
            return list(returned[0]), list(schedulers), None
        if returned and all(isinstance(item, Mapping) for item in returned):
            parts = [_from_dict(item) for item in returned]
            # Each dict's monitor belongs to its own scheduler, so it is written into it.
            schedulers = [_with_monitor(s, monitor) for _, items, monitor in parts for s in items]
            return [optimizer for optimizer, _, _ in parts], schedulers, None
        if all(isinstance(item, Optimizer) for item in returned):
            return list(returned), [], None
    raise MisconfigurationException(f"`configure_optimizers` returned {_describe(returned)}; accepted are {ACCEPTED}.")


def _from_dict(item: Mapping[str, Any]) -> tuple[Optimizer, list[Any], str | None]:
    unknown = set(item) - {"optimizer", "lr_scheduler", "monitor"}
    if unknown:
        rank_zero_warn(
            f"`configure_optimizers` returned a dict with the keys {sorted(unknown)}, which are ignored.", category=RuntimeWarning
        )
    if not isinstance(item.get("optimizer"), Optimizer):
        raise MisconfigurationException(
            f"`configure_optimizers` returned a dict without an optimizer under 'optimizer'; accepted are {ACCEPTED}."
        )
    scheduler = item.get("lr_scheduler")
    if isinstance(scheduler, (list, tuple)):
        if len(scheduler) > 1:
            raise MisconfigurationException(
                "`configure_optimizers` returned several schedulers in one dict: return two lists, of optimizers and of schedulers."
            )
        scheduler = scheduler[0] if scheduler else None
    return item["optimizer"], [] if scheduler is None else [scheduler], item.get("monitor")


def _with_monitor(scheduler: Any, monitor: str | None) -> Any:
    if isinstance(scheduler, Mapping):
        return {"monitor": monitor, **scheduler} if monitor is not None else scheduler
    return scheduler if monitor is None else {"scheduler": scheduler, "monitor": monitor}


def _scheduler_config(scheduler: Any, monitor: str | None) -> LRSchedulerConfig:
    """One scheduler, given as such or as a dict, with its settings checked."""
    if isinstance(scheduler, LRSchedulerConfig):
        return scheduler
    settings: dict[str, Any] = dict(scheduler) if isinstance(scheduler, Mapping) else {"scheduler": scheduler}
    known = {field.name for field in fields(LRSchedulerConfig)}
    extra = set(settings) - known
    if extra:
        rank_zero_warn(
            f"The scheduler dict of `configure_optimizers` has the keys {sorted(extra)}, which are ignored; known are {sorted(known)}.",
            category=RuntimeWarning,
        )
    if "scheduler" not in settings:
        raise MisconfigurationException("A scheduler dict of `configure_optimizers` needs the key 'scheduler' with the scheduler itself.")
    config = LRSchedulerConfig(**{key: value for key, value in settings.items() if key in known})
    if isinstance(config.scheduler, ReduceLROnPlateau):
        config.reduce_on_plateau = True
    if config.reduce_on_plateau and config.monitor is None:
        config.monitor = monitor
    if config.interval not in ("epoch", "step"):
        raise MisconfigurationException(f"A scheduler has interval={config.interval!r}; accepted are 'epoch' and 'step'.")
    if not isinstance(config.frequency, int) or config.frequency < 1:
        raise MisconfigurationException(f"A scheduler has frequency={config.frequency!r}; a positive whole number is needed.")
    if config.reduce_on_plateau and config.monitor is None:
        raise MisconfigurationException(
            "`configure_optimizers` must say which metric a ReduceLROnPlateau scheduler watches: "
            '{"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}'
        )
    return config


def _check_schedulers(configs: list[LRSchedulerConfig], optimizers: list[Optimizer], module: LightningModule) -> None:
    from lightning.pytorch.utilities.model_helpers import is_overridden

    for config in configs:
        scheduler: Any = config.scheduler
        if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
            if not is_overridden("lr_scheduler_step", module):
                raise MisconfigurationException(
                    f"The scheduler {_describe(scheduler)} is none of torch's: override `lr_scheduler_step` to say how it steps."
                )
            if not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
                raise TypeError(f"The scheduler {_describe(scheduler)} needs the methods `state_dict` and `load_state_dict`, to be saved.")
        optimizer = getattr(scheduler, "optimizer", None)
        if optimizer is not None and all(optimizer is not known for known in optimizers):
            raise MisconfigurationException(
                "`configure_optimizers` returned a scheduler of an optimizer that it did not return: return that optimizer too."
            )


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 100 else text[:97] + '...'} (a {type(value).__name__})"


class NoOptimizer(Optimizer):
    """Stands for the optimizer where ``configure_optimizers`` returns None: its step runs the closure and changes nothing."""

    def __init__(self) -> None:
        import torch

        super().__init__([torch.zeros(1)], {})

    def add_param_group(self, param_group: dict[Any, Any]) -> None:
        """There are no parameters."""

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        """There is no state."""

    def state_dict(self) -> dict[str, Any]:
        """There is no state."""
        return {}

    def step(self, closure: Callable[[], Any] | None = None) -> Union[Any, None]:  # type: ignore[override]
        """Run the closure."""
        return closure() if closure is not None else None

    def zero_grad(self, set_to_none: bool | None = True) -> None:
        """There are no gradients."""

    def __repr__(self) -> str:
        return "No Optimizer"
