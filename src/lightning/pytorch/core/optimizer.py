"""Optimizers as the trainer sees them: the wrapped optimizer, and what ``configure_optimizers`` may return."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Union

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig

if TYPE_CHECKING:
    from lightning.pytorch.core.module import LightningModule


def do_nothing_closure() -> None:
    """The closure of a manual step: everything has been done before it."""
    return


OWN_NAMES = frozenset({"_optimizer", "_step_through", "_module", "optimizer", "step", "toggle_model"})


class LightningOptimizer:
    """An optimizer whose ``step`` goes through precision and strategy, and is counted.

    Everything else is the wrapped optimizer's: what is read, set or called here is read, set or called there. It is an
    instance of that optimizer's class, so it can stand wherever that one can.

    Args:
        optimizer: the optimizer to wrap.
        step_through: ``f(optimizer, closure, **kwargs)``, which steps it; the trainer binds it.
        module: the module that it trains, for :meth:`toggle_model`.

    Example::

        >>> import torch
        >>> wrapped = LightningOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
        >>> type(wrapped).__name__, isinstance(wrapped, torch.optim.SGD)
        ('LightningSGD', True)
    """

    def __init__(self, optimizer: Optimizer, step_through: Callable[..., Any] | None = None, module: LightningModule | None = None) -> None:
        self.__class__ = type("Lightning" + type(optimizer).__name__, (type(self), type(optimizer)), {})
        self._optimizer = optimizer
        self._step_through = step_through
        self._module = module

    # The class is the wrapped optimizer's too. Its methods must not find this object: `load_state_dict` would put the
    # state here, and a GradScaler its scale, where no step ever reads them.

    def __getattribute__(self, name: str) -> Any:
        if name in OWN_NAMES or name.startswith("__"):
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "_optimizer"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN_NAMES or name.startswith("__"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._optimizer, name, value)

    def __delattr__(self, name: str) -> None:
        if name in OWN_NAMES:
            object.__delattr__(self, name)
        else:
            delattr(self._optimizer, name)

    def __reduce__(self) -> Any:
        return LightningOptimizer, (self._optimizer,)

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._optimizer

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
            step: Callable[..., Any] = self._optimizer.step
            return step(closure, **kwargs)
        return self._step_through(self._optimizer, closure, **kwargs)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Generator[None, None, None]:
        """A context in which only this optimizer's parameters require gradients.

        Args:
            sync_grad: whether gradients are reduced over processes here; False while accumulating by hand.

        Raises:
            RuntimeError: if no trainer has made this wrapper.
        """
        if self._module is None:
            raise RuntimeError("`toggle_model` belongs to optimizers that a trainer has wrapped: get them from `self.optimizers()`.")
        strategy = self._module.trainer.strategy
        with nullcontext() if sync_grad else strategy.no_backward_sync():
            with self._module.toggled_optimizer(self):
                yield


Configured = tuple[list[Optimizer], list[LRSchedulerConfig]]
Monitored = tuple[Any, str | None]  # a scheduler or its dict, and the monitor of the dict around it

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
        rank_zero_warn("`configure_optimizers` returned None: this fit will train nothing, since there is no optimizer.")
        return [NoOptimizer()], []
    optimizers, schedulers = _take_apart(returned)
    if not optimizers and module.automatic_optimization:
        raise MisconfigurationException(
            "`configure_optimizers` returned no optimizer, and automatic optimization steps one. Return one, or None to train nothing."
        )
    to_config = _automatic_config if module.automatic_optimization else _manual_config
    configs = [to_config(scheduler, monitor) for scheduler, monitor in schedulers if scheduler is not None]
    _check_schedulers(configs, optimizers, module)
    return optimizers, configs


def _take_apart(returned: Any) -> tuple[list[Optimizer], list[Monitored]]:
    if isinstance(returned, Optimizer):
        return [returned], []
    if isinstance(returned, Mapping):
        optimizer, scheduler = _from_dict(returned)
        return [optimizer], [scheduler]
    if isinstance(returned, (list, tuple)):
        if len(returned) == 2 and isinstance(returned[0], (list, tuple)) and all(isinstance(o, Optimizer) for o in returned[0]):
            schedulers = returned[1] if isinstance(returned[1], (list, tuple)) else [returned[1]]
            return list(returned[0]), [(scheduler, None) for scheduler in schedulers]
        if returned and all(isinstance(item, Mapping) for item in returned):
            parts = [_from_dict(item) for item in returned]
            return [optimizer for optimizer, _ in parts], [scheduler for _, scheduler in parts]
        if all(isinstance(item, Optimizer) for item in returned):
            return list(returned), []
    raise MisconfigurationException(f"`configure_optimizers` returned {_describe(returned)}; accepted are {ACCEPTED}.")


def _from_dict(item: Mapping[str, Any]) -> tuple[Optimizer, Monitored]:
    unknown = set(item) - {"optimizer", "lr_scheduler", "monitor"}
    if unknown:
        rank_zero_warn(
            f"`configure_optimizers` returned a dict with the keys {sorted(map(str, unknown))}, which are ignored; "
            "known are 'optimizer', 'lr_scheduler' and 'monitor'.",
            category=RuntimeWarning,
        )
    if not isinstance(item.get("optimizer"), Optimizer):
        held = f"{_describe(item['optimizer'])} under 'optimizer'" if "optimizer" in item else "no key 'optimizer'"
        raise MisconfigurationException(f"`configure_optimizers` returned a dict with {held}; an optimizer is needed there.")
    scheduler = item.get("lr_scheduler")
    if isinstance(scheduler, (list, tuple)):
        if len(scheduler) > 1:
            raise MisconfigurationException(
                "`configure_optimizers` returned several schedulers in one dict: return two lists, of optimizers and of schedulers."
            )
        scheduler = scheduler[0] if scheduler else None
    return item["optimizer"], (scheduler, item.get("monitor"))


def _settings_of(scheduler: Any) -> dict[str, Any]:
    """The settings of a scheduler that was given as such or as a dict."""
    if not isinstance(scheduler, Mapping):
        return {"scheduler": scheduler}
    known = [field.name for field in fields(LRSchedulerConfig)]
    extra = sorted(str(key) for key in scheduler if key not in known)
    if extra:
        rank_zero_warn(
            f"The scheduler dict of `configure_optimizers` has the keys {extra}, which are ignored; known are {known}.",
            category=RuntimeWarning,
        )
    if "scheduler" not in scheduler:
        raise MisconfigurationException("A scheduler dict of `configure_optimizers` needs the key 'scheduler' with the scheduler itself.")
    return {key: value for key, value in scheduler.items() if key in known}


def _check_rhythm(config: LRSchedulerConfig) -> LRSchedulerConfig:
    if config.interval not in ("epoch", "step"):
        raise MisconfigurationException(f"A scheduler has interval={config.interval!r}; accepted are 'epoch' and 'step'.")
    if not isinstance(config.frequency, (int, float)) or config.frequency < 1 or config.frequency % 1 != 0:
        raise MisconfigurationException(f"A scheduler has frequency={config.frequency!r}; a positive whole number is needed.")
    config.frequency = int(config.frequency)
    return config


def _automatic_config(scheduler: Any, monitor: str | None) -> LRSchedulerConfig:
    """One scheduler that the trainer steps, with its settings checked."""
    if isinstance(scheduler, LRSchedulerConfig):
        return _check_rhythm(scheduler)
    config = _check_rhythm(LRSchedulerConfig(**_settings_of(scheduler)))
    if isinstance(config.scheduler, ReduceLROnPlateau):
        config.reduce_on_plateau = True
    if config.reduce_on_plateau and config.monitor is None:
        config.monitor = monitor
    if config.reduce_on_plateau and config.monitor is None:
        raise MisconfigurationException(
            f"`configure_optimizers` must say which metric the scheduler {type(config.scheduler).__name__} watches: "
            '{"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}'
        )
    if isinstance(scheduler, Mapping) and isinstance(config.scheduler, OneCycleLR) and config.interval == "epoch":
        rank_zero_warn(
            "A OneCycleLR scheduler has interval='epoch', so it steps once in an epoch. It is usually meant for interval='step'.",
            category=RuntimeWarning,
        )
    return config


def _manual_config(scheduler: Any, monitor: str | None) -> LRSchedulerConfig:
    """One scheduler that the user's ``training_step`` steps: what it would watch is the user's affair."""
    if isinstance(scheduler, LRSchedulerConfig):
        return scheduler
    settings = _settings_of(scheduler)
    unused = sorted(settings.keys() & {"reduce_on_plateau", "monitor", "strict"})
    if unused:
        rank_zero_warn(
            f"The scheduler dict of `configure_optimizers` has the keys {unused}, which mean nothing in manual optimization: "
            "call `self.lr_schedulers().step(metric)` yourself.",
            category=RuntimeWarning,
        )
    return _check_rhythm(LRSchedulerConfig(**{key: value for key, value in settings.items() if key not in unused}))


def _check_schedulers(configs: list[LRSchedulerConfig], optimizers: list[Optimizer], module: LightningModule) -> None:
    from lightning.pytorch.utilities.model_helpers import is_overridden

    for config in configs:
        scheduler: Any = config.scheduler
        if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
            if not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
                raise TypeError(
                    f"`configure_optimizers` returned the scheduler {_describe(scheduler)}, which has no `state_dict` and "
                    "`load_state_dict`: return one of `torch.optim.lr_scheduler`, or one that can be saved like them."
                )
            if module.automatic_optimization and not is_overridden("lr_scheduler_step", module):
                raise MisconfigurationException(
                    f"The scheduler {_describe(scheduler)} is none of torch's: override `lr_scheduler_step` to say how it steps."
                )
        optimizer = getattr(scheduler, "optimizer", None)
        if optimizer is not None and all(optimizer is not known for known in optimizers):
            raise MisconfigurationException(
                "`configure_optimizers` returned a scheduler of an optimizer that it did not return: return that optimizer too."
            )


def _describe(value: Any) -> str:
    """A value as errors show it: in one line, with its type."""
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {', '.join(type(item).__name__ for item in value)}" if value else repr(value)
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 100 else text[:97] + '...'} (of type {type(value).__name__})"


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
