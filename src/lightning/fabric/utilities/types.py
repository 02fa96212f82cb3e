"""Structural types that the runtime accepts, and aliases for what its functions take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar, Union, overload, runtime_checkable

import torch

__all__ = ["CollectibleGroup", "Optimizable", "Steppable"]

_PATH = Union[str, Path]
_DEVICE = Union[torch.device, str, int]
_MAP_LOCATION_TYPE = Union[_DEVICE, Callable[[torch.UntypedStorage, str], Union[torch.UntypedStorage, None]], dict[_DEVICE, _DEVICE], None]
_PARAMETERS = Iterator[torch.nn.Parameter]

ProcessGroup: TypeAlias = Any
ReduceOp: TypeAlias = Any
RedOpType: TypeAlias = Any

_DictKey = TypeVar("_DictKey")


@runtime_checkable
class _Stateful(Protocol[_DictKey]):
    """Anything whose state can be saved and loaded: optimizers, schedulers, loaders, modules."""

    def state_dict(self) -> dict[_DictKey, Any]: ...

    def load_state_dict(self, state_dict: dict[_DictKey, Any]) -> None: ...


@runtime_checkable
class CollectibleGroup(Protocol):
    """A process group: how many processes there are, and which one this is."""

    def size(self) -> int:
        """How many processes the group has."""
        ...

    def rank(self) -> int:
        """The place of this process in the group."""
        ...


@runtime_checkable
class Steppable(Protocol):
    """Anything with an optimizer's ``step``.

    Example::

        >>> isinstance(torch.optim.SGD([torch.zeros(1)]), Steppable), isinstance("text", Steppable)
        (True, False)
    """

    @overload
    def step(self, closure: None = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = ...) -> float | None:
        """Update the parameters, calling ``closure`` first where one is given."""
        ...


@runtime_checkable
class Optimizable(Steppable, Protocol):
    """Anything that can take the place of an optimizer: it steps, has parameter groups, and its state can be saved.

    Example::

        >>> isinstance(torch.optim.SGD([torch.zeros(1)]), Optimizable), isinstance(torch.nn.Linear(1, 1), Optimizable)
        (True, False)
    """

    param_groups: list[dict[Any, Any]]
    defaults: dict[Any, Any]
    state: dict[Any, Any]

    def state_dict(self) -> dict[str, dict[Any, Any]]:
        """The state, as plain containers and tensors."""
        ...

    def load_state_dict(self, state_dict: dict[str, dict[Any, Any]]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        ...
