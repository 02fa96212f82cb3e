"""What Fabric's methods accept: each mistake is refused by name, before it does any harm."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning.fabric.precision import parse_precision
from lightning.fabric.strategies.objects import holds_replaced, why_replaced
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.types import Optimizable
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.fabric.wrappers import is_wrapped

# The arguments that the command line can set: their variables in the environment, and their defaults.
FROM_ENVIRONMENT = {
    "accelerator": ("LT_ACCELERATOR", "auto"),
    "strategy": ("LT_STRATEGY", "auto"),
    "devices": ("LT_DEVICES", "auto"),
    "num_nodes": ("LT_NUM_NODES", 1),
    "precision": ("LT_PRECISION", None),
}


def from_environment(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of Fabric, with what the command line has set where the code leaves it open.

    Args:
        given: those of the code.

    Raises:
        ValueError: if both say something, and not the same.

    Example::

        >>> from_environment({"devices": 2, "precision": None})
        {'devices': 2, 'precision': None}
    """
    found = dict(given)
    for name, value in given.items():
        variable, default = FROM_ENVIRONMENT[name]
        setting = os.environ.get(variable)
        if setting is None:
            continue
        if value != default and not _same(name, value, setting):
            raise ValueError(
                f"The code has Fabric({name}={value!r}), and the command line has set {variable}={setting} in the environment. Leave one "
                "of them out."
            )
        found[name] = int(setting) if name == "num_nodes" else setting
    return found


def _same(name: str, value: Any, setting: str) -> bool:
    return parse_precision(value) == parse_precision(setting) if name == "precision" else str(value) == setting


def as_list(given: Any) -> list[Any]:
    """A list of what was given: nothing, one thing, or several."""
    return [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]


def checked_loggers(given: Any) -> list[Any]:
    """The loggers as a list.

    Raises:
        TypeError: for something that can't log.
    """
    loggers = as_list(given)
    for logger in loggers:
        if not callable(getattr(logger, "log_metrics", None)):
            raise TypeError(f"loggers got {logger!r}, which has no method `log_metrics`: give a Logger, a list of them, or None.")
    return loggers


def check_launched(function: Any) -> None:
    """Refuse what can't be called with the Fabric as its first argument."""
    if not callable(function):
        raise TypeError(f"`fabric.launch({function!r})`: a function is needed. Pass it without calling it: `fabric.launch(train)`.")
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C
        return
    if not parameters:
        name = getattr(function, "__name__", repr(function))
        raise TypeError(f"`fabric.launch({name})`: the function gets the Fabric as its first argument, and takes none.")


def check_module(module: Any, method: str) -> None:
    """Refuse what is no module, or was set up before."""
    if is_wrapped(module):
        raise ValueError(f"`{method}` got a module that was set up already. Set up each module once, and go on with what is returned.")
    if not isinstance(module, Module):
        raise TypeError(f"`{method}` got {module!r}, a {type(module).__name__}; a torch.nn.Module is needed.")


def check_optimizers(optimizers: Sequence[Any], method: str) -> None:
    """Refuse what is no optimizer, or was set up before."""
    for optimizer in optimizers:
        if is_wrapped(optimizer):
            raise ValueError(f"`{method}` got an optimizer that was set up already. Set up each one once, and go on with what is returned.")
        if not isinstance(optimizer, (Optimizer, Optimizable)):
            raise TypeError(f"`{method}` got {optimizer!r}, a {type(optimizer).__name__}; a torch.optim.Optimizer is needed.")


def check_parameters(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers whose parameters will never change."""
    for optimizer in optimizers:
        if holds_replaced(optimizer):
            raise RuntimeError(why_replaced(optimizer))
        if any(parameter.is_meta for group in optimizer.param_groups for parameter in group["params"]):
            raise RuntimeError(
                f"{type(optimizer).__name__} was made of parameters on the meta device, which get their memory when the module is set up. "
                "Make it after `model = fabric.setup_module(model)`, from `model.parameters()`."
            )


def warn_of_foreign_optimizers(module: Module, optimizers: Sequence[Optimizer]) -> None:
    """Warn of optimizers that were made of the parameters of something else."""
    own = set(module.parameters()) if optimizers else set()
    for optimizer in optimizers:
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if held and not held & own:
            rank_zero_warn(
                f"`setup` got a {type(optimizer).__name__} that holds none of the parameters of the {type(module).__name__} beside it, "
                "and so will not train it. Was it made from another module?",
                category=PossibleUserWarning,
            )


def warn_of_several_devices(module: Module) -> None:
    """Warn if a module that will be moved to one device lies on several."""
    places: dict[Any, str] = {}
    for name, parameter in module.named_parameters():
        places.setdefault(parameter.device, name)
    if len(places) > 1:
        described = " and ".join(f"{name!r} on {device}" for device, name in list(places.items())[:2])
        rank_zero_warn(
            f"The parameters of the module lie on {len(places)} devices ({described}), and all are moved to one. To leave them where they "
            "are, pass move_to_device=False.",
            category=PossibleUserWarning,
        )


def check_dataloaders(dataloaders: Sequence[Any]) -> None:
    """Refuse no loaders, other things, and those that were set up before."""
    if not dataloaders:
        raise ValueError("`setup_dataloaders()` was called without a loader. Pass at least one.")
    for loader in dataloaders:
        if is_wrapped(loader):
            raise ValueError(
                "`setup_dataloaders` got a loader that was set up already. Set up each one once, and go on with what is returned."
            )
        if not isinstance(loader, DataLoader):
            raise TypeError(f"`setup_dataloaders` got {loader!r}, a {type(loader).__name__}; a torch.utils.data.DataLoader is needed.")


def check_state(state: Any, filter: Any) -> None:
    """Refuse a state that is no dict, and filters that fit nothing in it."""
    if not isinstance(state, MutableMapping):
        raise TypeError(f"state is a {type(state).__name__}; a dict of what is saved is needed, such as {{'model': model}}.")
    if filter is None:
        return
    if not isinstance(filter, Mapping):
        raise TypeError(f"filter={filter!r} is a {type(filter).__name__}; a dict of functions for names in `state` is needed.")
    unknown = [name for name in filter if name not in state]
    if unknown:
        raise ValueError(f"filter has {', '.join(map(repr, unknown))}, and `state` has only {', '.join(map(repr, state))}.")
    wrong: dict[str, Callable[..., Any]] = {name: value for name, value in filter.items() if not callable(value)}
    for name, value in wrong.items():
        raise TypeError(f"filter[{name!r}] is {value!r}; a function of key and value that returns a bool is needed.")
