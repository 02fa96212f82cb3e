"""Objects of a hand-written loop: what a checkpoint holds of them, and optimizers whose parameters were replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning.fabric.checkpoint.format import Opaque, find_placeholders
from lightning.fabric.utilities.types import _Stateful

if TYPE_CHECKING:
    from lightning.fabric.strategies.strategy import Strategy

REPLACED = "_replaced_in_setup"  # set on a parameter that no module has any more


def collect(strategy: Strategy, state: Mapping[str, Any], filter: Mapping[str, Callable[[str, Any], bool]]) -> dict[str, Any]:
    """The checkpoint of a collection of objects.

    Args:
        strategy: knows what of a module and an optimizer a checkpoint holds.
        state: objects and values by name.
        filter: for names in ``state``, which entries of that object's ``state_dict`` are kept.
    """
    checkpoint = {name: _state_of(strategy, value) for name, value in state.items()}
    for name, keeps in filter.items():
        entries = checkpoint[name]
        if isinstance(entries, Mapping):
            checkpoint[name] = {key: value for key, value in entries.items() if keeps(key, value)}
    return checkpoint


def _state_of(strategy: Strategy, value: Any) -> Any:
    if isinstance(value, Module):
        return strategy.get_module_state_dict(value)
    if isinstance(value, Optimizer):
        return strategy.get_optimizer_state(value)
    return value.state_dict() if isinstance(value, _Stateful) else value


def restore(strategy: Strategy, checkpoint: dict[str, Any], state: MutableMapping[str, Any], strict: bool) -> dict[str, Any]:
    """Give objects what a checkpoint holds of them, and return what is left of it.

    Args:
        strategy: knows how modules and optimizers take their state.
        checkpoint: as :func:`collect` made it; stays as it is.
        state: the objects by name; values that are no such objects are replaced.
        strict: whether the checkpoint must hold every name, and the keys of modules must match.

    Raises:
        KeyError: if ``strict`` and the checkpoint lacks a name; nothing was restored then.
        UnpicklingError: if something that is asked for was not unpickled.
    """
    missing = [name for name in state if name not in checkpoint]
    if strict and missing:
        raise KeyError(
            f"The checkpoint holds no {', '.join(map(repr, missing))}, only {', '.join(map(repr, checkpoint))}. Leave out of `state` what "
            "was not saved, or pass strict=False."
        )
    for name in state:
        opaque = [(place, value) for place, value in find_placeholders(checkpoint.get(name), name) if isinstance(value, Opaque)]
        if opaque:
            raise UnpicklingError(
                f"{opaque[0][0]!r} in the checkpoint is {opaque[0][1]!r}. What stands in `state` itself, rather than in a collection, "
                "is saved by its state_dict, which needs no trust."
            )
    for name, value in state.items():
        if name in missing:
            continue
        saved = checkpoint[name]
        if isinstance(value, Module):
            strategy.load_module_state_dict(value, saved, strict)
        elif isinstance(value, Optimizer):
            strategy.load_optimizer_state(value, saved)
        elif isinstance(value, _Stateful):
            value.load_state_dict(saved)
        else:
            state[name] = saved
    return {name: value for name, value in checkpoint.items() if name not in state}


def follow_parameters(optimizers: list[Optimizer], before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """Let optimizers go on with the parameters that have taken the places of others.

    Args:
        optimizers: they hold the old ones, and have not stepped yet.
        before: the parameters of a module.
        after: those in the same places now; both lists are equal where nothing was replaced.

    Raises:
        RuntimeError: if an optimizer holds a parameter that is gone, or a state that belongs to it.
    """
    replaced = {old: new for old, new in zip(before, after) if old is not new} if len(before) == len(after) else {}
    gone = set(before).difference(after)
    for parameter in gone:
        setattr(parameter, REPLACED, True)
    for optimizer in optimizers:
        held = gone.intersection(parameter for group in optimizer.param_groups for parameter in group["params"])
        if not held:
            continue
        if not held <= replaced.keys() or any(parameter in optimizer.state for parameter in held):
            raise RuntimeError(why_replaced(optimizer))
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]


def holds_replaced(optimizer: Optimizer) -> bool:
    """Whether an optimizer would step parameters that no module has any more."""
    return any(hasattr(parameter, REPLACED) for group in optimizer.param_groups for parameter in group["params"])


def why_replaced(optimizer: Optimizer) -> str:
    """What to tell the user of such an optimizer."""
    return (
        f"{type(optimizer).__name__} was made of parameters that setting up the module has replaced, so its steps would change nothing. "
        "Make it after `model = fabric.setup_module(model)`, from `model.parameters()`, and pass it to `fabric.setup_optimizers`."
    )
