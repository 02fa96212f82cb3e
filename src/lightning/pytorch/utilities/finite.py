"""Whether weights, statistics and moments are numbers: what is looked at before a checkpoint is saved."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from lightning.pytorch.trainer.states import TrainerStatus

if TYPE_CHECKING:
    import lightning.pytorch as pl

WORTH_A_THREAD = 2**24  # bytes

_looked_at: ContextVar[bool] = ContextVar("looked_at", default=False)


@dataclass
class Part:
    """Something of a checkpoint that is looked at as a whole."""

    name: str  # for messages
    tensors: list[Tensor]
    placeholders: bool = False  # whether infinities may be meant, as in masks and in values that are the smallest so far
    learned: bool = True  # whether only training changes it


def nonfinite_part(trainer: pl.Trainer, weights_only: bool = False, known: Collection[str] = ()) -> str | None:
    """What of the trainer's state is the first to hold a NaN or an infinity, such as "parameter 'weight'"; None if nothing does.

    Looked at are parameters, the buffers that are saved, and the states of optimizers. In buffers only NaN counts, but for the
    running statistics of normalizing layers.

    All processes must call it, unless the run is failing, and get the same answer: where each holds a part of
    the weights, that of all of them, else that of rank 0. It reads one flag from each device.

    Args:
        trainer: whose state.
        weights_only: leave the optimizers out.
        known: names that do not count, see :func:`nonfinite_at_start`.
    """
    strategy = trainer.strategy
    parts = _parts(trainer, weights_only)
    places = _nonfinite(parts, known)
    first = min(places, default=len(parts))
    if trainer.state.status is not TrainerStatus.INTERRUPTED and strategy.world_size > 1:
        # The order of the parts is the same everywhere, and so the first of all is the one with the smallest number.
        first = int(strategy.reduce(torch.tensor(first), reduce_op="min")) if strategy.forward_is_collective else strategy.broadcast(first)
    return parts[first].name if first < len(parts) else None


def nonfinite_at_start(trainer: pl.Trainer) -> frozenset[str]:
    """What holds a NaN or an infinity before training has done anything, and so may be meant: all but parameters that are trained.

    Each process finds its own; nobody is waited for.
    """
    parts = _parts(trainer, weights_only=False)
    trained = {part.name for part in parts if part.learned}
    return frozenset(parts[place].name for place in _nonfinite(parts, trained))


def _parts(trainer: pl.Trainer, weights_only: bool) -> list[Part]:
    """As many, in the same order, in all processes."""
    module = trainer.lightning_module
    parameters = list(module.named_parameters())
    parts = [Part(f"parameter {name!r}", [parameter], learned=parameter.requires_grad) for name, parameter in parameters]
    for prefix, each in module.named_modules():
        statistics = isinstance(each, _NormBase)
        for name, buffer in each._buffers.items():
            if buffer is not None and name not in each._non_persistent_buffers_set:
                name = f"{prefix}.{name}" if prefix else name
                parts.append(Part(f"buffer {name!r}", [buffer], placeholders=not statistics, learned=False))
    if weights_only:
        return parts
    names = {parameter: repr(name) for name, parameter in parameters}
    for optimizer in trainer.optimizers:
        states: Any = getattr(optimizer, "state", None)
        if not isinstance(states, Mapping):  # of an engine that keeps them elsewhere
            continue
        for group in optimizer.param_groups:
            for number, parameter in enumerate(group["params"]):
                name = names.get(parameter, f"number {number} of a group")
                held = states.get(parameter) or {}
                # Counts of steps and other single numbers are no moments.
                tensors = [value for value in held.values() if isinstance(value, Tensor) and value.dim() > 0]
                parts.append(Part(f"optimizer's state for the parameter {name}", tensors, learned=False))
    return parts


def _nonfinite(parts: list[Part], known: Collection[str]) -> list[int]:
    """The places of the parts that hold what they should not."""
    groups: dict[tuple[torch.device, torch.dtype, bool], tuple[list[int], list[Tensor]]] = {}
    for place, part in enumerate(parts):
        for tensor in part.tensors if part.name not in known else ():
            held = _held(tensor)
            if held is not None:
                places, group = groups.setdefault((held.device, held.dtype, part.placeholders), ([], []))
                places.append(place)
                group.append(held)
    found: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for (device, _, placeholders), (places, group) in groups.items():
        # Extremes, which are NaN if there is one, and, unlike sums, never overflow: two of them are quick on the CPU, one on GPUs.
        if device.type == "cpu":
            extremes = torch.stack(_extremes(group))
        else:
            extremes = torch.stack(torch._foreach_norm(group, torch.inf)).unsqueeze(1)
        bad = extremes.isnan() if placeholders else extremes.isfinite().logical_not()
        all_places, flags = found.setdefault(device, ([], []))
        all_places += places
        flags.append(bad.any(1))
    bad_places: list[int] = []
    for all_places, flags in found.values():
        bad = torch.cat(flags)
        if bool(bad.any()):
            bad_places += [all_places[index] for index in bad.nonzero()[:, 0].tolist()]
    return bad_places


def _extremes(tensors: list[Tensor]) -> list[Tensor]:
    """Least and greatest element of each: by two threads where torch takes one, since a core alone can't use all of the bus."""
    found: dict[int, Tensor] = {}
    todo = iter(range(len(tensors)))

    def work() -> None:
        while (index := next(todo, None)) is not None:
            found[index] = torch.stack(torch.aminmax(tensors[index]))

    large = sum(tensor.nbytes for tensor in tensors) > WORTH_A_THREAD
    helpers = [threading.Thread(target=work, name="looks-for-nan")] if large and torch.get_num_threads() == 1 else []
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    return [found[index] for index in range(len(tensors))]


def _held(tensor: Tensor) -> Tensor | None:
    """What this process holds of a tensor, as plain real numbers; None if that is nothing of the kind."""
    if is_lazy(tensor):
        return None
    held: Any = getattr(tensor, "ds_tensor", tensor)  # under ZeRO 3
    held = getattr(held, "_local_tensor", held)  # of a DTensor
    if hasattr(held, "__tensor_flatten__") or held.is_meta or held.layout is not torch.strided or held.numel() == 0:
        return None
    held = held.detach()
    if held.is_complex():
        held = torch.view_as_real(held.resolve_conj())
    return held if held.is_floating_point() and held.dtype.itemsize > 1 else None


@contextmanager
def looked_at() -> Iterator[None]:
    """Inside, nothing need be looked at: that has happened."""
    token = _looked_at.set(True)
    try:
        yield
    finally:
        _looked_at.reset(token)


def has_been_looked_at() -> bool:
    """Whether this is called inside of :func:`looked_at`."""
    return _looked_at.get()
