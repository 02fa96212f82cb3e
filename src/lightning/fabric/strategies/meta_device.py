"""Modules that were built on the ``meta`` device, without memory: giving them their weights, of which each process keeps its part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning.fabric import collectives
from lightning.fabric.strategies.sharding import is_dtensor, local_part, local_tensor


def children_first(module: Module, seen: set[Module] | None = None) -> Iterator[Module]:
    """All modules, each once and after those that it is made of: the order in which modules initialise themselves."""
    seen = set() if seen is None else seen
    seen.add(module)
    for child in module.children():
        if child not in seen:
            yield from children_first(child, seen)
    yield module


def materialize(module: Module, device: torch.device, offload: bool = False, init: Callable[[Module], None] | None = None) -> list[str]:
    """Give memory to what is on the ``meta`` device, and values: those that the module would have had without it.

    Modules initialise themselves in the order in which they were made, each with all of its weights in memory, of which the
    process then keeps its part. All processes use the random numbers of rank 0, so all must call it.

    Args:
        module: divided or not.
        device: the device of this process, whose generator is used.
        offload: whether divided weights are kept on the CPU.
        init: initialises the weights that a module owns itself; None for its ``reset_parameters``.

    Returns:
        the names of those tensors that got no value, because their module has no way to give them one.
    """
    missing = {part: own for part in children_first(module) if (own := [n for n, t in _own(part).items() if t.is_meta])}
    if not collectives.reduce_boolean_decision(bool(missing), all=False):
        return []
    shared: dict[Tensor, list[tuple[Any, str]]] = {}
    for part in module.modules():
        for name in missing.get(part, ()):
            shared.setdefault(_own(part)[name], []).append((_store_of(part, name), name))

    def allocate(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        return torch.empty_like(tensor, device="cpu" if offload and is_dtensor(tensor) else device)

    module._apply(allocate)
    for (first, first_name), *others in shared.values():
        for store, name in others:  # which `_apply` has made separate tensors of
            store[name] = first[first_name]
    names = {part: f"{name}." if name else "" for name, part in module.named_modules()}
    left: list[str] = []
    done: set[Tensor] = set()
    with RandomStateOfRankZero(device):
        for part, own in missing.items():
            left += [f"{names[part]}{name}" for name in _initialize(part, own, device, init, done)]
    return left


def _store_of(module: Module, name: str) -> dict[str, Any]:
    return module._parameters if name in module._parameters else module._buffers


def _own(module: Module) -> dict[str, Tensor]:
    """The parameters and buffers that a module holds itself."""
    return {name: tensor for store in (module._parameters, module._buffers) for name, tensor in store.items() if tensor is not None}


@torch.no_grad()
def _initialize(
    module: Module, names: list[str], device: torch.device, init: Callable[[Module], None] | None, done: set[Tensor]
) -> list[str]:
    """Let a module initialise its own tensors, whole ones in the places of divided ones; the names of those that it left out."""
    own = _own(module)
    whole: dict[str, Tensor] = {}
    for name in names:
        tensor = own[name]
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if values.is_floating_point() or values.is_complex():
            values.fill_(float("nan"))
        whole[name] = _store_of(module, name)[name] = Parameter(values, tensor.requires_grad) if isinstance(tensor, Parameter) else values
    # torch's own attention and Transformer have it under the second name only.
    reset = init or (lambda part: (getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters"))())  # noqa: B009
    known = init is not None or hasattr(module, "reset_parameters") or hasattr(module, "_reset_parameters")
    try:
        if known:
            reset(module)
    finally:
        for name, tensor in own.items():
            store = _store_of(module, name)
            values = store[name]
            store[name] = tensor
            # A weight that two modules share keeps what the first has given it.
            if name in whole and tensor not in done:
                local_tensor(tensor).copy_(local_part(values.detach(), tensor))
                done.add(tensor)
    return [name for name, values in whole.items() if not known or bool(values.numel() and values.isnan().all())]


class RandomStateOfRankZero:
    """A context in which the generators of the CPU and of a device are those of rank 0, in all processes.

    A process whose own were the same goes on from where they got to, as if it had done the same by itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.mine = self._states()
        theirs = collectives.broadcast(self.mine)
        self.same = all(torch.equal(mine, other) for mine, other in zip(self.mine, theirs))
        self._set(theirs)

    def __exit__(self, *exception: Any) -> None:
        if not self.same:
            self._set(self.mine)

    def _states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type != "cpu":
            states.append(torch.get_device_module(self.device.type).get_rng_state(self.device))
        return states

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type != "cpu":
            torch.get_device_module(self.device.type).set_rng_state(states[1], self.device)
